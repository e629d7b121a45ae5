"""C-scores: deciles by hand, the file and its download from a local server, a run's losses computed once more."""
import http.server
import threading
import types

import numpy as np
import pytest
import torch

import common
import cscore
import experiment
from conftest import TINY, records_of, refused, tiny_arrays


def test_deciles_by_hand():
    score = np.array([.5, .1, .9, .1, .3, .7, .2, .8, .4, .6, .05, .95])
    assert list(map(list, cscore.deciles(score))) == [[10, 1], [3, 6], [4], [8], [0], [9], [5], [7], [2], [11]]
    assert list(np.concatenate(cscore.deciles(np.arange(200) % 2))) == [*range(0, 200, 2), *range(1, 200, 2)]  # stable


@pytest.mark.parametrize("case, words", [("good", None), ("other order", "its labels differ"), ("too few", "50 finite"),
    ("not finite", "50 finite"), ("complex", "50 finite"), ("cut", "readable"), ("empty", "readable")])
def test_scores_by_hand_and_downloaded(case, words, tmp_path, monkeypatch):
    """What is wrong is refused in one line, every time, and not deleted; a left-over .part is not taken."""
    labels, scores, mine, data = np.arange(50) % 10, np.linspace(0, 1, 50), tmp_path / cscore.SCORES, tmp_path / "data"
    data.mkdir()
    wrong = {"too few": scores[1:], "not finite": np.where(labels == 3, np.nan, scores), "complex": scores * 1j}
    np.savez(mine, labels=np.roll(labels, case == "other order"), scores=wrong.get(case, scores))
    mine.write_bytes({"cut": mine.read_bytes()[:300], "empty": b""}.get(case, mine.read_bytes()))
    (data / cscore.SCORES).with_suffix(".part").write_bytes(b"left by an earlier call")
    serve = lambda *given: http.server.SimpleHTTPRequestHandler(*given, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()
        monkeypatch.setattr(cscore, "SCORES_URL", f"http://127.0.0.1:{server.server_port}/{mine.name}")
        monkeypatch.setattr(experiment, "load_images", lambda *o: {"y_train": labels[:40], "y_test": labels[40:]})
        for folder in (tmp_path, data, data):  # by hand; downloaded; from the disk
            o = types.SimpleNamespace(dataset="cifar10", data_dir=folder)
            if words:
                refused(f"put {mine.name} from http.* into {folder} by.*{words}", cscore.load, o)
            else:
                score_train, score_test = (cscore.load(o)[f"score_{name}"] for name in ("train", "test"))
                assert np.array_equal(score_train, scores[:40]) and np.array_equal(score_test, scores[40:])
        server.shutdown()
    assert (data / cscore.SCORES).read_bytes() == mine.read_bytes()


def test_a_run_computed_once_more(tiny, tmp_path):
    """The last record, from the checkpoint: the network is built again, and the deciles are sorted by hand."""
    row = cscore.main(dataset=tiny, out=tmp_path, **{**TINY, "alpha": 1, "epochs": 4})["readings"][-1]
    arrays, images, last = tiny_arrays(), experiment.load_images(tiny), records_of(tmp_path / "alpha=1_seed=0")[-1]
    with experiment.seeded("init", 0):
        network = common.resnet18(3, 3, TINY["width"])
    f = common.center(torch.nn.Sequential(common.Standardise(images["mean"], images["std"]), network), 1)
    state = torch.load(tmp_path / "alpha=1_seed=0" / "checkpoint.pt")[1]
    f.load_state_dict({name: value for name, value in state.items() if name.startswith("model.")}, strict=False)
    for key, split, first, end in (("decile_1", "train", 0, 6), ("decile_9", "train", 48, 54), ("test", "test", 0, 30),
                                   ("test_decile_10", "test", 27, 30), ("mean_train", "train", 0, 60)):
        i = np.argsort(arrays[f"score_{split}"])[first:end]
        output, y = f(torch.tensor(arrays[f"x_{split}"][i]).permute(0, 3, 1, 2)), arrays[f"y_{split}"][i]
        assert last[f"{key}_loss"] == pytest.approx(-output.log_softmax(1)[range(len(i)), y].mean().item(), rel=1e-4)
        assert last[f"{key}_acc"] == pytest.approx((output.argmax(1).numpy() == y).mean())
    loss = [row[f"decile_{d}_loss"] for d in range(1, 11)]
    assert row["gap"] == pytest.approx(loss[0] - loss[9], abs=1e-5)
    assert row["half_gap"] == pytest.approx(np.mean(loss[:5]) - np.mean(loss[5:]), abs=1e-5)
