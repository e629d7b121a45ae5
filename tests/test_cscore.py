"""C-scores: deciles against a sort by hand, the file and its download from a local server, the records of a run."""
import http.server
import json
import threading

import numpy as np
import pytest

import cscore
from conftest import TINY, tiny_arrays


def test_deciles_against_a_sort_by_hand():
    score = np.array([.5, .1, .9, .1, .3, .7, .2, .8, .4, .6, .05, .95])
    by_hand = [[10, 1], [3, 6], [4], [8], [0], [9], [5], [7], [2], [11]]  # twelve: the first two groups hold two
    assert [list(d) for d in cscore.deciles(score)] == by_hand
    ties = cscore.deciles(np.zeros(20))
    assert [list(d) for d in ties] == [[2 * i, 2 * i + 1] for i in range(10)]  # stable: in the order of the file
    sizes = [len(d) for d in cscore.deciles(np.random.default_rng(0).uniform(size=4068))]
    assert sum(sizes) == 4068 and max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="ten deciles"):
        cscore.deciles(np.arange(9.0))


def write_scores(path, labels, scores=None, **more):
    scores = np.linspace(0, 1, len(labels)) if scores is None else scores
    np.savez(path, **{"labels": labels, "scores": scores, **more})
    return path


LABELS = np.arange(50) % 10


def test_scores_that_fit(tmp_path):
    assert np.array_equal(cscore.check_scores(write_scores(tmp_path / "s.npz", LABELS), LABELS), np.linspace(0, 1, 50))


@pytest.mark.parametrize("case, words", [("order", "labels differ"), ("number", "each"), ("nan", "finite"), ("absent", "arrays scores"),
                                         ("truncated", "not a readable"), ("text", "not a readable")])
def test_wrong_score_files_are_refused_and_not_deleted(tmp_path, case, words):
    path = tmp_path / cscore.SCORES
    write_scores(path, LABELS)
    if case == "order":
        write_scores(path, np.roll(LABELS, 1))
    elif case == "number":
        write_scores(path, LABELS[:-1])
    elif case == "nan":
        write_scores(path, LABELS, np.where(LABELS == 3, np.nan, .5))
    elif case == "absent":
        np.savez(path, labels=LABELS)
    else:
        path.write_bytes(path.read_bytes()[:300] if case == "truncated" else b"<html>not here</html>")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words) as e:
        cscore.fetch_scores(tmp_path, LABELS, [])
    assert path.read_bytes() == before and "\n" not in str(e.value)


@pytest.fixture
def server(tmp_path):
    """A file server on loopback that serves what `served` holds: bytes, and how many of them it really sends."""
    served = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in served:
                return self.send_error(404)
            data, sent = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:sent])

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield served, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_download(tmp_path, server):
    served, address = server
    good = write_scores(tmp_path / "good.npz", LABELS).read_bytes()
    served["/scores.npz"] = good, len(good)
    scores = cscore.fetch_scores(tmp_path / "data", LABELS, [address + "/gone.npz", address + "/scores.npz"])  # falls back
    assert np.array_equal(scores, np.linspace(0, 1, 50))
    assert (tmp_path / "data" / cscore.SCORES).read_bytes() == good and len(list((tmp_path / "data").iterdir())) == 1
    served.clear()
    cscore.fetch_scores(tmp_path / "data", LABELS, [address + "/scores.npz"])  # the second time from the disk


@pytest.mark.parametrize("case", ["half-way", "flipped", "wrong labels", "not there"])
def test_failed_download_leaves_nothing_behind(tmp_path, server, case):
    served, address = server
    good = write_scores(tmp_path / "good.npz", LABELS if case != "wrong labels" else np.roll(LABELS, 1)).read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 4
    if case != "not there":
        served["/scores.npz"] = (bytes(bad) if case == "flipped" else good), (len(good) // 2 if case == "half-way" else len(good))
    with pytest.raises(OSError) as e:
        cscore.fetch_scores(tmp_path / "data", LABELS, [address + "/scores.npz"])
    message = str(e.value)
    assert address in message and cscore.SCORES in message and str(tmp_path / "data") in message and "--dataset synthetic" in message
    assert "\n" not in message and not list((tmp_path / "data").glob("*"))


def test_missing_scores_are_named(tmp_path):
    arrays = {k: v for k, v in tiny_arrays().items() if k != "score_test"}
    np.savez(tmp_path / "tiny.npz", **arrays)
    with pytest.raises(ValueError, match="score_test"):
        cscore.main(dataset=str(tmp_path / "tiny.npz"), out=str(tmp_path / "run"), **TINY)


def test_records_and_summary(tiny, tmp_path):
    summary = cscore.main(dataset=str(tiny), out=str(tmp_path / "run"), deciles=[1, 10], **TINY)
    for name in ("cscore.png", "cscore.pdf", "cscore_curves.png", "summary.json"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    log = [json.loads(line) for line in (tmp_path / "run" / "alpha=1_seed=0" / "log.jsonl").read_text().splitlines()]
    for r in log:
        deciles = [r[f"decile_{d}_loss"] for d in range(1, 11)]  # 60 examples, all of them, in groups of 6
        assert r["mean_train_loss"] == pytest.approx(np.mean(deciles))
        assert r["test_loss"] == pytest.approx(np.mean([r[f"test_decile_{d}_loss"] for d in range(1, 11)]))
    at = next(iter(summary["alphas"]["100"]["levels"].values()))
    assert at["gap"]["mean"] == pytest.approx(at["decile_1"]["mean"] - at["decile_10"]["mean"])
    assert set(summary["alphas"]["1"]["half_way"]) == {f"decile_{d}" for d in range(1, 11)}


def test_half_way():
    """Read by the rule of all tables: where the decile's loss first passes half of its start, on a line in ln(loss)."""
    m = 2.0 * .95**np.arange(40)
    records = [{"x": 1.5 * v, "mean_train_loss": v, "iteration": k, "epoch": 0.0} for k, v in enumerate(m)]
    assert cscore.half_way(records, "x") == pytest.approx(1.0, rel=.01)
    assert cscore.half_way(records[:8], "x") is None


@pytest.mark.parametrize("deciles", [[0], [11], ["x"]])
def test_bad_deciles(tiny, deciles):
    with pytest.raises(ValueError):
        cscore.main(dataset=str(tiny), deciles=deciles, **TINY)
