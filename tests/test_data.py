"""Data: .npz files good, impossible and damaged; CIFAR-10's split and download; label noise, synthetic images."""
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision

import common
from conftest import refused, tiny_arrays

# 60 training and 30 test images of 3 classes, 8 x 8 x 3, and all else that a file may hold
A = {**tiny_arrays(), "attribute_train": np.arange(60) % 2, "attribute_test": np.arange(30) % 2,
     "mean": np.array([.1, .2, .3]), "std": np.array([.4, .5, .1])}


def save(folder, **changes):
    """A file of the arrays A and of `changes`; None leaves an array out."""
    np.savez(folder / "mine.npz", **{name: value for name, value in {**A, **changes}.items() if value is not None})
    return str(folder / "mine.npz")


def last(name, value):
    """The array A[name] with another last element."""
    changed = A[name].copy()
    changed[-1] = value
    return changed


def test_npz_round_trip(tiny):
    images = common.load_images(str(tiny))
    assert np.array_equal(images["x_train"], A["x_train"]) and np.array_equal(images["y_train"], A["y_train"])
    pixels = A["x_train"].reshape(-1, 3) / 255
    assert np.allclose(images["std"], pixels.std(0))  # the mean to the last digit: every machine has one checksum
    assert images["mean"] == [float(Fraction(int(total), 255 * 60 * 64)) for total in A["x_train"].sum((0, 1, 2))]
    x = common.on_device(images["x_train"], types.SimpleNamespace(device="cpu"))
    assert x.shape == (60, 3, 8, 8) and x.dtype == torch.uint8  # images stay as they are stored
    x = common.Standardise(images["mean"], images["std"])(x).permute(0, 2, 3, 1)
    assert np.allclose(x, (A["x_train"] / 255 - pixels.mean(0)) / pixels.std(0), atol=1e-5)


def test_what_is_possible_is_taken(tmp_path):
    """The extremes, other integer and float types, and grey images."""
    images = common.load_images(save(tmp_path, x_train=A["x_train"][..., 0], x_test=A["x_test"][..., 0], mean=[1.0],
                                     std=[.5], y_train=A["y_train"].astype(np.uint8), score_train=np.arange(60) - 30,
                                     attribute_train=A["attribute_train"] > 0, attribute_test=np.ones(30)))
    assert images["x_train"].shape == (60, 8, 8, 1) and np.array_equal(images["y_train"], A["y_train"])
    assert images["mean"] == [1.0] and images["std"] == [.5] and images["score_train"].min() == -30
    assert images["score_train"].dtype == np.float64  # one type, so one checksum of the same data
    assert images["attribute_train"].tolist() == [0, 1] * 30 and images["attribute_test"].dtype == np.int64


BAD = [("y_test", "needs arrays x_test|not a readable", [None, np.array([{}] * 30, dtype=object)]),
       ("x_train", "must be uint8", [A["x_train"] / 255, A["x_train"][:0], A["x_train"][..., None]]),
       ("x_test", "differ", [A["x_test"][:, :4]]),
       ("y_train", "must be integers", [A["y_train"][1:], A["y_train"] + .5, A["y_train"] > 0, A["y_train"] * 1j]),
       ("y_train", "must run from 0", [A["y_train"] + 1, A["y_train"] * 0, last("y_train", -1),
                                       last("y_train", 10**12), A["y_train"].astype(np.uint64) + 2**63]),
       ("y_test", "has a label outside 0 to 2", [last("y_test", 3), last("y_test", -1)]),
       ("score_train", "must be finite", [last("score_train", value) for value in (np.nan, -np.inf)]),
       ("score_train", "60 of them", [A["score_train"][1:], A["score_train"] * 1j, A["score_train"][:, None], .5]),
       ("attribute_test", "must be", [A["attribute_test"] * value for value in (2, -1, .5, np.nan, 1j)]),
       ("mean", "mean", [last("mean", value) for value in (-.01, 1.01, np.nan)] + [.5, ["a", "b", "c"], None]),
       ("std", "must be", [last("std", value) for value in (0, -.1, .51, np.inf)] + [[.1, .1]])]


@pytest.mark.parametrize("name, words, values", BAD)
def test_impossible_arrays(tmp_path, name, words, values):
    for value in values:
        refused(f"mine.npz: .*({words})", common.load_images, save(tmp_path, **{name: value}))
    other = {name: A[name][..., :2] for name in ("x_train", "x_test")}
    refused("mine.npz: .*channels come last", common.load_images, save(tmp_path, **other))


def test_damaged_files(tiny):
    data = tiny.read_bytes()
    for content in (data[:len(data) // 2], b"", b"hello\n" * 100, b"\x80\x04N."):
        tiny.write_bytes(content)
        refused("tiny.npz: not a readable .npz file", common.load_images, str(tiny))
    refused("No such file.*none.npz", common.load_images, "none.npz")
    refused("must be cifar10, synthetic or a file FILE.npz", common.load_images, "mnist")


def test_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    refused(fr"from http://127.0.0.1:9/.* \(.+\). Put cifar-10-python.tar.gz into {tmp_path}/here by hand.*--dataset "
            "synthetic", common.load_images, "cifar10", str(tmp_path / "here"))

    def numbered(self, root, train, download):
        assert train
        self.data, self.targets = np.arange(50000)[:, None, None, None], list(range(50000))

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", numbered)
    images = common.load_images("cifar10")
    for name, first, end in (("train", 0, 40000), ("test", 40000, 50000)):
        assert images[f"x_{name}"].ravel().tolist() == images[f"y_{name}"].tolist() == list(range(first, end))


def test_synthetic_images_are_what_they_say():
    images = common.load_images("synthetic")
    # The score is a difficulty: the nearest class mean, an independent classifier, errs where the score is low.
    x, test = (images[name].reshape(len(images[name]), -1) / 255 for name in ("x_train", "x_test"))
    means = np.stack([x[images["y_train"] == c].mean(0) for c in range(10)])
    right = (test @ means.T - (means**2).sum(1) / 2).argmax(1) == images["y_test"]
    order = np.argsort(images["score_test"])
    assert right[order[-200:]].mean() > right[order[:200]].mean() + .1


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_flip_labels(kind):
    y = kind(np.random.default_rng(0).integers(0, 7, 1000))
    flipped = common.flip_labels(y, .15, 7, 3)
    assert type(flipped) is type(y) and set(np.asarray(flipped).tolist()) == set(range(7))
    shift = np.bincount(np.asarray((flipped - y) % 7), minlength=7)
    assert shift[0] == 850 and shift[1:].min() > 8  # the exact share, uniform over the other six: 25 each expected
    assert bool((flipped == common.flip_labels(y, .15, 7, 3)).all())
    assert bool((flipped != common.flip_labels(y, .15, 7, 4)).any())
    for fraction in (0, 1, float("nan"), 1e-9):
        refused("label noise must change some of", common.flip_labels, y, fraction, 7, 0)


def test_outputs_in_blocks_equal_all_at_once():
    f, x = common.center(common.mlp([4, 8, 3]), 3.0), torch.randn(23, 4)
    torch.nn.init.ones_(f.model[0].weight)
    f0 = common.outputs(f.model0, x, block=7)
    assert torch.allclose(common.outputs(f, x, f0, block=5), f(x), atol=1e-5) and not common.outputs(f, x).requires_grad
