"""Data: .npz files good, impossible and damaged; CIFAR-10's split and download; label noise, synthetic images."""
import re

import numpy as np
import pytest
import torch
import torchvision

import common
import experiment
from conftest import refused, tiny_arrays

A = {**tiny_arrays(), "attribute_test": np.arange(30) % 2, "mean": np.array([.1, .2, .3]), "std": np.array([.4, .5, 1])}
last = lambda name, value: np.array([*A[name][:-1], value])


def load(folder, **changes):  # None leaves an array out
    np.savez(folder / "mine.npz", **{name: value for name, value in {**A, **changes}.items() if value is not None})
    return experiment.load_images(str(folder / "mine.npz"))


def test_npz_round_trip_and_other_types(tmp_path):
    images, pixels = load(tmp_path, mean=None, std=None), A["x_train"] / 255
    x = torch.tensor(images["x_train"]).permute(0, 3, 1, 2)
    assert x.dtype == torch.uint8 and np.array_equal(images["x_train"], A["x_train"])  # as they are stored
    x = common.Standardise(images["mean"], images["std"])(x).permute(0, 2, 3, 1)
    assert np.allclose(x, (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2)), atol=1e-5)
    images = load(tmp_path, x_train=A["x_train"][..., 0], x_test=A["x_test"][..., 0], mean=[1.0], std=[.5],
                  y_train=A["y_train"].astype(np.uint8), y_test=A["y_test"] * 1.0, score_train=np.arange(60) - 30)
    assert images["x_train"].shape == (60, 8, 8, 1) and np.array_equal(images["y_train"], A["y_train"])
    assert images["y_train"].dtype == images["y_test"].dtype == np.int64 and images["mean"] == [1.0]


@pytest.mark.parametrize("name, values", [
    ("x_train", [None, A["x_train"] / 255, A["x_train"][:0], A["x_train"][..., None], A["x_train"][..., :2]]),
    ("x_test", [None, A["x_test"][:, :4], A["x_test"][..., :1], A["x_test"].astype(int)]),
    ("y_train", [None, A["y_train"][1:], A["y_train"] + .5, A["y_train"] + 1, A["y_train"] * 0, last("y_train", -1)]),
    ("y_test", [None, last("y_test", 3), last("y_test", -10**12), A["y_test"][:, None], A["y_test"].astype(str)]),
    ("score_train", [last("score_train", np.nan), last("score_train", -np.inf), A["score_train"][1:], .5]),
    ("attribute_test", [A["attribute_test"] * np.nan, A["attribute_test"][1:], ["a"] * 30]),
    ("mean", [last("mean", np.nan), .5, ["a", "b", "c"]]), ("std", [last("std", np.inf), [.1, .1]])])
def test_impossible_arrays(name, values, tmp_path):
    """Refused in a line that names the array, its type and shape."""
    for array in values:
        found = "missing" if array is None else f"{np.asarray(array).dtype} {np.shape(array)}"
        refused(re.escape(f"mine.npz: {name} ({found}) does not fit. It must"), load, tmp_path, **{name: array})


def test_damaged_files(tiny, tmp_path):
    for content in (tiny.read_bytes()[:9000], b"", b"hello\n" * 100, b"\x80\x04N."):
        tiny.write_bytes(content)
        refused("tiny.npz is missing, or not a readable .npz file", experiment.load_images, str(tiny))
    refused("mine.npz is .*not a readable", load, tmp_path, y_test=np.array([{}] * 30, object))  # never unpickled
    refused("none.npz is missing, .*No such file", experiment.load_images, "none.npz")
    refused("mnist: must be cifar10, synthetic or a file FILE.npz", experiment.load_images, "mnist")


def test_cifar10_split_and_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    refused(fr"put cifar-10-python.tar.gz from http://127.0.0.1:9/.* into {tmp_path}, .*synthetic \(.*refused.*\)",
            experiment.load_images, "cifar10", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", lambda self, root, train, download: vars(self).update(
        data=np.arange(50000 * train)[:, None, None, None], targets=list(range(50000))))
    images = experiment.load_images("cifar10")
    for name, first, end in (("train", 0, 40000), ("test", 40000, 50000)):
        assert images[f"x_{name}"].ravel().tolist() == images[f"y_{name}"].tolist() == list(range(first, end))


def test_synthetic_images_score_is_a_difficulty_and_flip_labels():
    images = experiment.load_images("synthetic")
    x, test = (images[name].reshape(len(images[name]), -1) / 255 for name in ("x_train", "x_test"))
    means = np.stack([x[images["y_train"] == c].mean(0) for c in range(10)])  # a classifier
    right = ((test @ means.T - (means**2).sum(1) / 2).argmax(1) == images["y_test"])[np.argsort(images["score_test"])]
    assert right[200:].mean() > right[:200].mean() + .1
    y = images["y_train"]
    flipped, again, other = (experiment.flip_labels(y, .15, 10, seed) for seed in (3, 3, 4))
    shift = np.bincount((flipped - y) % 10, minlength=10)
    assert shift[0] == 1020 and shift[1:].min() > 5 and set(flipped) == set(range(10))  # of each shift 20 are expected
    assert np.array_equal(flipped, again) and (flipped != other).any()
    for fraction in (0, 1, 1e-9):
        refused(f"label noise of {fraction:g} would change", experiment.flip_labels, y, fraction, 10, 0)


def test_outputs_in_blocks_equal_all_at_once():
    f, x = common.center(common.mlp([4, 8, 3]), 3.0), torch.randn(23, 4)
    torch.nn.init.ones_(next(f.model.parameters()))
    in_blocks = experiment.outputs(f, x, experiment.outputs(f.model0, x, block=7), block=5)
    assert torch.allclose(in_blocks, f(x), atol=1e-5) and f(x).requires_grad and not in_blocks.requires_grad
