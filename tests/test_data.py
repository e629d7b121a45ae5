"""Data: npz files good and bad, label noise, standardisation, synthetic images, CIFAR-10 that is not there."""
import io
import zipfile

import numpy as np
import pytest
import torch

import common
from conftest import tiny_arrays


def options(**more):
    import argparse
    return argparse.Namespace(device=torch.device("cpu"), dtype=torch.float64, batch_size=10, subset=None, **more)


def test_npz_round_trip(tiny):
    images = common.load_images(str(tiny))
    arrays = tiny_arrays()
    assert np.array_equal(images["x_train"], arrays["x_train"]) and images["y_train"].dtype == np.int64
    pixels = arrays["x_train"].reshape(-1, 3) / 255
    assert np.allclose(images["mean"], pixels.mean(0)) and np.allclose(images["std"], pixels.std(0))
    examples = common.Examples(images["x_train"], images["y_train"], images["mean"], images["std"], options())
    x = examples.pixels(examples.index())
    assert x.shape == (60, 3, 8, 8)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3, dtype=x.dtype), atol=1e-9)
    assert torch.allclose(x.std((0, 2, 3), unbiased=False), torch.ones(3, dtype=x.dtype))
    by_hand = (arrays["x_train"][7, 1, 2, 0] / 255 - images["mean"][0]) / images["std"][0]
    assert x[7, 0, 1, 2].item() == pytest.approx(by_hand)


def test_grey_images(tmp_path):
    arrays = {k: v[..., 0] if k[0] == "x" else v for k, v in tiny_arrays().items()}
    np.savez(tmp_path / "grey.npz", **arrays)
    assert common.load_images(str(tmp_path / "grey.npz"))["x_train"].shape == (60, 8, 8, 1)


BAD = {
    "no y_test": (lambda a: a.pop("y_test"), "y_test"),
    "float images": (lambda a: a.update(x_train=a["x_train"] / 255), "uint8"),
    "empty": (lambda a: a.update(x_train=a["x_train"][:0], y_train=a["y_train"][:0]), "empty"),
    "unequal length": (lambda a: a.update(y_train=a["y_train"][:-1]), "y_train"),
    "float labels": (lambda a: a.update(y_train=a["y_train"] + .5), "integers"),
    "labels from 1": (lambda a: a.update(y_train=a["y_train"] + 1), "0 to the number of classes"),
    "negative label": (lambda a: a["y_train"].__setitem__(0, -1), "0 to the number of classes"),
    "huge label": (lambda a: a["y_train"].__setitem__(0, 10**12), "0 to the number of classes"),
    "one class": (lambda a: a["y_train"].__imul__(0), "0 to the number of classes"),
    "test label": (lambda a: a["y_test"].__setitem__(0, 3), "y_test"),
    "other size": (lambda a: a.update(x_test=a["x_test"][:, :4]), "x_test"),
    "nan score": (lambda a: a["score_train"].__setitem__(0, np.nan), "score_train"),
    "scores of another length": (lambda a: a.update(score_test=a["score_test"][1:]), "score_test"),
    "attribute 2": (lambda a: a.update(attribute_train=np.full(60, 2)), "attribute_train"),
    "objects": (lambda a: a.update(y_train=np.array([{}] * 60, dtype=object)), "npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(tmp_path, case):
    arrays = tiny_arrays()
    change, words = BAD[case]
    change(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=words) as e:
        common.load_images(str(tmp_path / "bad.npz"))
    assert "bad.npz" in str(e.value) and "\n" not in str(e.value)


def damaged(tiny):
    data = tiny.read_bytes()
    yield "truncated", data[:len(data) // 2]
    yield "empty", b""
    yield "text", b"hello\n" * 100
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 255
    yield "flipped", bytes(flipped)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    yield "npy", single.getvalue()
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 1)})
        archive.writestr("x_train.npy", header.getvalue() + b"123")
    yield "claims 10^12 elements", huge.getvalue()
    yield "pickle", b"\x80\x04N."


def test_damaged_files(tiny):
    for name, data in damaged(tiny):
        tiny.write_bytes(data)
        with pytest.raises(ValueError, match="not a readable .npz") as e:
            common.load_images(str(tiny))
        assert "\n" not in str(e.value) and "pickle" not in str(e.value), name  # numpy's advice to load it unsafely


def test_missing_and_unknown():
    with pytest.raises(OSError, match="no such file"):
        common.load_images("nowhere/file.npz")
    with pytest.raises(ValueError, match="not a known name"):
        common.load_images("mnist")


def test_fuzzed_npz(tiny):
    """A few hundred seeded mutations: every outcome is a data set or one clear line."""
    data, rng = tiny.read_bytes(), np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            kind, place = rng.integers(3), rng.integers(len(mutant))
            if kind == 0:
                mutant[place] = rng.integers(256)
            elif kind == 1:
                del mutant[place:place + rng.integers(1, 50)]
            else:
                mutant[place:place] = rng.bytes(rng.integers(1, 50))
        tiny.write_bytes(mutant)
        try:
            common.load_images(str(tiny))
            outcomes[True] += 1
        except (ValueError, OSError) as e:
            outcomes[False] += 1
            assert str(e) and "\n" not in str(e)
    assert outcomes[False] > 200


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_flip_labels(kind):
    y = kind(np.random.default_rng(0).integers(0, 7, 1000))
    noisy = common.flip_labels(y, .15, 7, 3)
    assert type(noisy) is type(y)
    changed = noisy != y
    assert int(changed.sum()) == 150 and int(noisy.min()) >= 0 and int(noisy.max()) < 7  # exact share, another class
    again = common.flip_labels(y, .15, 7, 3)
    assert bool((noisy == again).all()) and bool((noisy != common.flip_labels(y, .15, 7, 4)).any())
    shift = np.bincount(np.asarray((noisy - y) % 7), minlength=7)
    assert shift[0] == 850 and shift[1:].min() > 8  # uniform over the other six: 25 each expected


@pytest.mark.parametrize("fraction", [0, 1, -.1, 1.5, float("nan"), 1e-9])
def test_flip_labels_bad_fraction(fraction):
    with pytest.raises(ValueError, match="label noise"):
        common.flip_labels(np.zeros(10, int), fraction, 3, 0)
    with pytest.raises(ValueError, match="two classes"):
        common.flip_labels(np.zeros(10, int), .5, 1, 0)


def test_synthetic_images_are_what_they_say():
    images = common.load_images("synthetic")
    assert images["x_train"].shape[1:] == (32, 32, 3) and images["x_train"].dtype == np.uint8
    assert set(images["y_train"]) == set(range(10))
    again = common.load_images("synthetic")
    assert all(np.array_equal(images[k], again[k]) for k in images)
    # The score is a difficulty: the nearest class mean, an independent classifier, errs where the score is low.
    x = images["x_train"].reshape(len(images["x_train"]), -1) / 255.0
    means = np.stack([x[images["y_train"] == c].mean(0) for c in range(10)])
    t = images["x_test"].reshape(len(images["x_test"]), -1) / 255.0
    right = ((t[:, None] - means)**2).sum(2).argmin(1) == images["y_test"]
    order = np.argsort(images["score_test"])
    assert right[order[-200:]].mean() > right[order[:200]].mean() + .1


def test_cifar10_not_there_and_no_network(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(OSError) as e:
        common.load_images("cifar10", str(tmp_path / "here"))
    message = str(e.value)
    assert "127.0.0.1:9" in message and "cifar-10-python.tar.gz" in message and "--dataset synthetic" in message
    assert str(tmp_path / "here") in message and "\n" not in message


def test_subset_and_batch(tiny):
    images = common.load_images(str(tiny))
    o = options()
    o.subset = 25
    x, y, score = common.draw_training_set(images, 0, o)
    rows = [int(np.flatnonzero((images["x_train"] == image).all((1, 2, 3)))[0]) for image in x]
    assert len(set(rows)) == 25 and rows == sorted(rows) and np.array_equal(images["score_train"][rows], score)
    assert not np.array_equal(x, common.draw_training_set(images, 1, o)[0])
    o.subset = 61
    with pytest.raises(ValueError, match="--subset 61 is larger than the training set of 60"):
        common.draw_training_set(images, 0, o)
    o.subset, o.batch_size = 25, 26
    with pytest.raises(ValueError, match="larger than the training set"):
        common.draw_training_set(images, 0, o)
