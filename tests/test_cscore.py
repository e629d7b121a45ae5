"""C-scores: deciles by hand, the file and its download from a local server, a run's losses computed once more."""
import functools
import http.server
import threading
import types

import numpy as np
import pytest
import torch

import common
import cscore
from conftest import TINY, records_of, tiny_arrays


def test_deciles_by_hand():
    score = np.array([.5, .1, .9, .1, .3, .7, .2, .8, .4, .6, .05, .95])
    by_hand = [[10, 1], [3, 6], [4], [8], [0], [9], [5], [7], [2], [11]]  # twelve: the first two groups hold two
    assert [members.tolist() for members in cscore.deciles(score)] == by_hand
    ties = np.concatenate(cscore.deciles(np.arange(200) % 2))  # stable: in the order of the file
    assert ties.tolist() == [*range(0, 200, 2), *range(1, 200, 2)]


def test_load(monkeypatch):
    images = {"y_train": np.arange(40000), "y_test": np.arange(40000, 50000)}
    monkeypatch.setattr(common, "load_images", lambda dataset, data_dir: dict(images))
    monkeypatch.setattr(cscore, "fetch_scores", lambda data_dir, labels: labels / 2)
    loaded = cscore.load(types.SimpleNamespace(dataset="cifar10", data_dir="data"))
    assert np.array_equal(loaded["score_train"], images["y_train"] / 2)
    assert np.array_equal(loaded["score_test"], images["y_test"] / 2)
    with pytest.raises(ValueError, match="mine.npz: cscore.py needs score_train"):
        cscore.load(types.SimpleNamespace(dataset="mine.npz", data_dir="data"))


@pytest.mark.parametrize("case, words", [
    ("good", None), ("other order", "50 of 50 labels differ"), ("too few", "need arrays"), ("nan", "must be finite"),
    ("complex", "must be finite"), ("cut", "readable"), ("empty", "readable")])
def test_scores(tmp_path, monkeypatch, case, words):
    """Put there by hand, and downloaded: what is wrong is refused in one line, and never taken for the file."""
    labels, scores = np.arange(50) % 10, np.linspace(0, 1, 50)
    theirs = {"other order": np.roll(labels, 1), "too few": labels[1:]}.get(case, labels)
    wrong = {"nan": np.where(labels == 3, np.nan, scores), "complex": scores * 1j}.get(case, scores)
    (tmp_path / "mine").mkdir()
    mine, data = tmp_path / "mine" / cscore.SCORES, tmp_path / "data"
    np.savez(mine, labels=theirs, scores=wrong)
    mine.write_bytes({"cut": mine.read_bytes()[:300], "empty": b""}.get(case, mine.read_bytes()))
    before = mine.read_bytes()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mine.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()
        monkeypatch.setattr(cscore, "SCORES_URL", f"http://127.0.0.1:{server.server_port}/{mine.name}")
        data.mkdir()
        (data / "cifar10-cscores-orig-order.part.npz").write_bytes(b"left by an earlier call")
        if words is None:
            for folder in (mine.parent, data, data):  # at last from the disk
                assert np.array_equal(cscore.fetch_scores(folder, labels), scores)
            assert [path.name for path in data.iterdir()] == [cscore.SCORES]
        else:
            with pytest.raises(ValueError, match=words):
                cscore.fetch_scores(mine.parent, labels)
            with pytest.raises(OSError, match=f"{cscore.SCORES_URL} .*{words}.* into {data} by") as error:
                cscore.fetch_scores(data, labels)
            assert "\n" not in str(error.value) and not (data / cscore.SCORES).exists()
        server.shutdown()
    assert mine.read_bytes() == before  # refused, not deleted


def test_a_run_computed_once_more(tiny, tmp_path):
    """The last record, from the checkpoint: the network is built again, and the deciles are sorted by hand."""
    summary = cscore.main(dataset=str(tiny), out=str(tmp_path), **{**TINY, "alpha": 1, "epochs": 4})
    arrays, images, last = tiny_arrays(), common.load_images(str(tiny)), records_of(tmp_path / "alpha=1_seed=0")[-1]
    with common.seeded("init", 0):
        network = common.resnet18(3, width=TINY["width"])
    f = common.center(torch.nn.Sequential(common.Standardise(images["mean"], images["std"]), network), 1)
    state = torch.load(tmp_path / "alpha=1_seed=0" / "checkpoint.pt")
    torch.nn.utils.vector_to_parameters(torch.cat([t.flatten() for t in state["tensors"]]), f.model.parameters())
    for key, split, first, end in (("decile_1", "train", 0, 6), ("decile_9", "train", 48, 54), ("test", "test", 0, 30),
                                   ("test_decile_10", "test", 27, 30), ("mean_train", "train", 0, 60)):
        i = np.argsort(arrays[f"score_{split}"])[first:end]
        output, y = f(torch.tensor(arrays[f"x_{split}"][i]).permute(0, 3, 1, 2)), arrays[f"y_{split}"][i]
        assert last[f"{key}_loss"] == pytest.approx(-output.log_softmax(1)[range(len(i)), y].mean().item(), rel=1e-4)
        assert last[f"{key}_acc"] == pytest.approx((output.argmax(1).numpy() == y).mean())
    row = summary["readings"][-1]
    loss = [row[f"decile_{d}_loss"] for d in range(1, 11)]
    assert row["gap"] == pytest.approx(loss[0] - loss[9], abs=1e-5)
    assert row["half_gap"] == pytest.approx(np.mean(loss[:5]) - np.mean(loss[5:]), abs=1e-5)
