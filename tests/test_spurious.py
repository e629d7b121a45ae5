"""spurious.py: pretrained weights and networks, whole runs, wrong inputs; its data have a file of their own."""
import json
import math
import os
import subprocess
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch

import common
import spurious
from conftest import ROOT

TINY = dict(alpha=[1, 100], epochs=3, width=2, batch_size=20, probe_examples=6, device="cpu")


IMAGES = {"x_train": np.zeros((1, 64, 64, 3), np.uint8), "mean": [.5] * 3, "std": [.2] * 3}


def tiny_arrays(train=((30, 4), (3, 30)), test=((5, 5), (5, 5)), size=8):
    """Counts of (label, attribute) -> arrays. The label is a bar's place, the attribute the image's brightness."""
    rng, arrays = np.random.default_rng(0), {}
    for split, counts in (("train", train), ("test", test)):
        y, a = np.array([(y, a) for y in (0, 1) for a in (0, 1) for _ in range(counts[y][a])], dtype=np.int64).T
        x = rng.integers(0, 60, (len(y), size, size, 3)) + 80 * a[:, None, None, None]
        for i, label in enumerate(y):
            x[i, :, 4 * label:4 * label + 2] += 60
        arrays.update({f"x_{split}": x.astype(np.uint8), f"y_{split}": y, f"attribute_{split}": a})
    return arrays


@pytest.fixture
def tiny(tmp_path):
    np.savez(tmp_path / "tiny.npz", **tiny_arrays())
    return str(tmp_path / "tiny.npz")


# Networks


def test_pretrained_weights(tmp_path, monkeypatch):
    from torchvision.models import ResNet18_Weights, resnet18
    o = types.SimpleNamespace(dataset="waterbirds", from_scratch=False, data_dir=str(tmp_path), width=64)

    def no_network(*arguments, **more):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(OSError, match="resnet18-.*Name or service not known.*by hand, over what is there, or try --from-scratch"):
        spurious.network(o, IMAGES)
    path = tmp_path / ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1]
    path.write_bytes(b"not a weights file")
    with pytest.raises(OSError, match="ImageNet weights could not be had"):
        spurious.network(o, IMAGES)
    source = resnet18()
    source.bn1.running_mean += 1
    torch.save(source.state_dict(), path)
    standardise, model = spurious.network(o, IMAGES).eval()
    assert not any(m.training for m in model.modules()) and model.fc.out_features == 1
    assert torch.equal(model.bn1.running_mean, source.bn1.running_mean)
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert model.bn1.weight.requires_grad and not any("running" in name for name, _ in model.named_parameters())
    o.from_scratch = True
    scratch = spurious.network(o, IMAGES)
    assert {n.split(".")[-1] for n, _ in scratch.named_parameters() if "fc" not in n} == {"weight"}  # no conv bias
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in scratch.modules())


@pytest.mark.parametrize("pretrained", [False, True])
def test_torchvision_networks_through_the_core(pretrained, tmp_path, monkeypatch):
    """Both networks are exactly 0 at the start, linear at alpha = inf, and all linearity measures work on them."""
    from torchvision.models import resnet18
    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", lambda *a, **k: resnet18().state_dict())
    o = types.SimpleNamespace(dataset="waterbirds", from_scratch=not pretrained, data_dir=str(tmp_path), width=64)
    x, y = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8), torch.tensor([0, 1, 1])
    with common.seeded("init", 0):
        model = spurious.network(o, IMAGES)
    centered = common.center(model, 2.0)
    assert centered(x).shape == (3, 1) and not centered(x).any()
    measures = common.Linearity(centered, x, y)
    assert measures()["ntk_alignment"] == pytest.approx(1, abs=1e-5) and measures()["sign_similarity"] == 1
    before = model(x).detach()
    optimizer = common.scaled_sgd(centered, 1e-3)
    spurious.loss_of(centered(x), y).backward()
    optimizer.step()
    assert not torch.equal(model(x), before) and measures()["ntk_alignment"] < 1
    linear = common.center(spurious.network(o, IMAGES), math.inf)
    assert not linear(x).any()


def test_waterbirds_run(tmp_path, monkeypatch):
    """One whole run at 224 pixels with a local weights file, at the paper's learning rate for it."""
    from torchvision.models import ResNet18_Weights, resnet18
    with common.seeded("weights", 0):
        torch.save(resnet18().state_dict(), tmp_path / ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1])
    images = {**tiny_arrays(train=((5, 2), (2, 5)), test=((2, 1), (1, 2)), size=224), "mean": [.5] * 3, "std": [.2] * 3}
    monkeypatch.setattr(spurious, "waterbirds", lambda data_dir: images)
    out = tmp_path / "out"
    spurious.main(dataset="waterbirds", data_dir=str(tmp_path), out=str(out), alpha=[1], epochs=1, batch_size=7,
                  probe_examples=2, device="cpu")
    args = json.loads((out / "alpha=1_seed=0" / "args.json").read_text())
    assert args["run"]["lr"] == .001 and args["dataset"] == "waterbirds"
    last = json.loads((out / "alpha=1_seed=0" / "log.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 2 and math.isfinite(last["test_loss"]) and 0 < last["ntk_alignment"] <= 1.001


# Whole runs


def test_files_and_keys(tiny, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "spurious.py"), "--dataset", tiny, "--out", str(out), "--seeds", "0", "1",
               "--alpha", "1", "100", "--epochs", "12", "--width", "2", "--batch-size", "20", "--probe-examples", "6",
               "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "1 - 100, paired" in done.stdout and "Traceback" not in done.stderr
    assert {"spurious.png", "spurious.pdf", "spurious_curves.png", "summary.json"} <= {p.name for p in out.iterdir()}
    strict = lambda text: json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
    names = ("cell_00", "cell_01", "cell_10", "cell_11", "with", "against")
    keys = {f"{start}{name}_{what}" for start in ("", "test_") for name in names for what in ("loss", "acc")}
    keys |= {"mean_train_loss", "mean_train_acc", "test_loss", "test_acc", "test_acc_reweighted", "balanced_train_acc",
             "worst_train_acc", "worst_test_acc", "iteration", "epoch", "seconds"}
    for alpha in (1, 100):
        for seed in (0, 1):
            folder = out / f"alpha={alpha}_seed={seed}"
            assert (folder / "args.json").exists() and (folder / "checkpoint.pt").exists()
            for record in map(strict, (folder / "log.jsonl").read_text().splitlines()):
                assert keys <= set(record)
            first = strict((folder / "log.jsonl").read_text().splitlines()[0])
            assert first["mean_train_loss"] == pytest.approx(math.log(2)) and "ntk_alignment" in first
    summary = strict((out / "summary.json").read_text())
    assert set(summary) >= {"options", "alphas", "paired", "at_equal_accuracy", "diverged"}
    assert "1 - 100" in summary["paired"]
    at_equal = summary["at_equal_accuracy"]
    for part in (at_equal["alphas"]["1"], at_equal["alphas"]["100"], at_equal["paired"]["1 - 100"]):
        assert set(part["levels"]["end"]) == {"against_acc", "test_against_acc", "test_acc"}
    from PIL import Image
    picture = np.asarray(Image.open(out / "spurious.png").convert("RGBA"))
    assert (picture[..., 3] == 255).all() and (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()


def test_bad_inputs(tmp_path, tiny):
    def refused(match, **options):
        with pytest.raises((ValueError, OSError), match=match) as error:
            spurious.main(**{**TINY, "dataset": tiny, "out": str(tmp_path / "bad"), **options})
        assert "\n" not in str(error.value)

    def changed(**arrays):
        whole = {k: v for k, v in {**tiny_arrays(), **arrays}.items() if v is not None}
        np.savez(tmp_path / "changed.npz", **whole)
        return str(tmp_path / "changed.npz")

    refused("alpha", alpha=[0])
    refused("celeba, waterbirds, dominoes", dataset="cifar10")
    refused("no such file", dataset=str(tmp_path / "none.npz"))
    refused("attribute_train and attribute_test", dataset=changed(attribute_train=None))
    refused("attribute_train and attribute_test", dataset=changed(attribute_test=None))
    refused("attribute_train must be 0 or 1", dataset=changed(attribute_train=np.full(67, 2)))
    refused("needs labels 0 and 1", dataset=changed(y_train=np.arange(67) % 3))
    refused("no training image has label 1 and attribute 0", dataset=changed(**tiny_arrays(train=((30, 4), (0, 30)))))
    refused("no test image has label 0 and attribute 0", dataset=changed(**tiny_arrays(test=((0, 4), (3, 3)))))
    refused("--batch-size 68 is larger", batch_size=68)
    refused("--epochs", epochs=0)


def test_an_empty_cell_of_any_seed_is_refused_before_the_first_run(tmp_path):
    with pytest.raises(ValueError, match="empty cell"):  # seed 0 has all four
        spurious.main(**{**TINY, "dataset": "synthetic", "subset": 60, "seeds": [0, 1], "out": str(tmp_path / "run")})
    assert not list(tmp_path.rglob("log.jsonl"))
