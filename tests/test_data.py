"""Data: npz files good and bad, label noise, standardisation, synthetic images, CIFAR-10 that is not there."""
import io
import types
import zipfile

import numpy as np
import pytest
import torch

import common
from conftest import tiny_arrays


def options(**more):
    return types.SimpleNamespace(device=torch.device("cpu"), batch_size=10, subset=None, **more)


def test_npz_round_trip(tiny):
    images = common.load_images(str(tiny))
    arrays = tiny_arrays()
    assert np.array_equal(images["x_train"], arrays["x_train"]) and images["y_train"].dtype == np.int64
    pixels = arrays["x_train"].reshape(-1, 3) / 255
    assert np.allclose(images["mean"], pixels.mean(0)) and np.allclose(images["std"], pixels.std(0))
    x = common.on_device(images["x_train"], options())
    assert x.shape == (60, 3, 8, 8) and x.dtype == torch.uint8  # images stay as they are stored
    first_layer = common.Standardise(images["mean"], images["std"]).double()
    x = first_layer(x)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3, dtype=x.dtype), atol=1e-6)
    assert torch.allclose(x.std((0, 2, 3), unbiased=False), torch.ones(3, dtype=x.dtype), atol=1e-6)
    by_hand = (arrays["x_train"][7, 1, 2, 0] / 255 - images["mean"][0]) / images["std"][0]
    assert x[7, 0, 1, 2].item() == pytest.approx(by_hand, rel=1e-5)


def test_an_npz_may_bring_its_own_constants(tmp_path):
    np.savez(tmp_path / "own.npz", **tiny_arrays(), mean=[.1, .2, .3], std=[.4, .5, .6])
    images = common.load_images(str(tmp_path / "own.npz"))
    assert images["mean"] == [.1, .2, .3] and images["std"] == [.4, .5, .6]


@pytest.mark.parametrize("std", [[.1, .1], [.1, 0, .1], [.1, np.nan, .1], 3.0, ["a", "b", "c"]])
def test_bad_constants(tmp_path, std):
    np.savez(tmp_path / "own.npz", **tiny_arrays(), mean=[.1, .2, .3], std=std)
    with pytest.raises(ValueError, match="std must be"):
        common.load_images(str(tmp_path / "own.npz"))
    np.savez(tmp_path / "own.npz", **tiny_arrays(), std=[.4, .5, .6])
    with pytest.raises(ValueError, match="mean and std; they come together"):
        common.load_images(str(tmp_path / "own.npz"))


def test_channels_first_are_warned_about(tmp_path, capsys):
    arrays = tiny_arrays()
    for name in ("x_train", "x_test"):
        arrays[name] = arrays[name].transpose(0, 3, 1, 2)
    np.savez(tmp_path / "first.npz", **arrays)
    common.load_images(str(tmp_path / "first.npz"))
    assert "channels come last" in capsys.readouterr().out


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
    member = io.BytesIO()
    with zipfile.ZipFile(member, "w") as archive:
        archive.writestr("x_train", b"no array")
    yield "a member that is no array", member.getvalue()


def test_damaged_files(tiny):
    for name, data in damaged(tiny):
        tiny.write_bytes(data)
        with pytest.raises(ValueError, match="not a readable .npz") as e:
            common.load_images(str(tiny))
        assert "\n" not in str(e.value) and "pickle" not in str(e.value), name  # numpy's advice to load it unsafely


def test_missing_and_unknown():
    with pytest.raises(OSError, match="no such file"):
        common.load_images("nowhere/file.npz")
    with pytest.raises(ValueError, match="choose one of cifar10, synthetic or a file FILE.npz"):
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
    rows = common.training_indices(images, 0, o)
    assert len(set(rows)) == 25 and sorted(rows) == rows.tolist() and rows.max() < 60
    assert not np.array_equal(rows, common.training_indices(images, 1, o))
    o.subset = None
    assert common.training_indices(images, 0, o).tolist() == list(range(60))
    o.subset = 61
    with pytest.raises(ValueError, match="--subset 61 is larger than the training set of 60"):
        common.training_indices(images, 0, o)
    o.subset, o.batch_size = 25, 26
    with pytest.raises(ValueError, match="larger than the training set"):
        common.training_indices(images, 0, o)


def test_outputs_in_blocks_equal_all_at_once():
    torch.manual_seed(0)
    f = common.center(common.mlp([4, 8, 3]).double(), 3.0)
    with torch.no_grad():
        f.model[0].weight.add_(.1)
    x = torch.randn(23, 4, dtype=torch.float64)
    f0 = common.outputs(f.model0, x, block=7)
    assert torch.allclose(common.outputs(f, x, f0, block=5), f(x)) and not common.outputs(f, x).requires_grad


def test_initialisation_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with common.seeded("init", 0):
        a = common.mlp([4, 3])
    torch.manual_seed(99)
    with common.seeded("init", 0):
        b = common.mlp([4, 3])
    assert torch.equal(a[0].weight, b[0].weight)
    torch.set_rng_state(before)
    with common.seeded("init", 1):
        assert not torch.equal(common.mlp([4, 3])[0].weight, a[0].weight)
    assert torch.equal(torch.get_rng_state(), before)
