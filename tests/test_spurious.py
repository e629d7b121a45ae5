"""spurious.py: the cells' bookkeeping, the real loaders on small look-alike folders, pretrained weights, whole runs."""
import json
import math
import os
import subprocess
import sys
import tarfile
import types
import urllib.error

import numpy as np
import pytest
import torch

import common
import spurious
from conftest import ROOT

CPU = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, subset=None, batch_size=2, dataset="x.npz")
TINY = dict(alpha=[1, 100], epochs=3, width=2, batch_size=20, probe_examples=6, device="cpu")


def jpeg(path, colour, size):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, quality=95)


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


# The cells


def test_averages_by_hand():
    accuracy = {"00": .9, "01": .5, "10": .2, "11": 1.0}
    entry = {f"{start}cell_{c}_{what}": value + add for c, value in accuracy.items()
             for start, add in (("", 0), ("test_", -.1)) for what in ("acc", "loss")}
    share = {"00": .5, "01": .1, "10": .1, "11": .3}
    r = spurious.averages(entry, share, ["00", "11"])
    expected = {"mean_train_acc": .45 + .05 + .02 + .3, "mean_train_loss": .82, "with_acc": .95, "against_acc": .35,
                "balanced_train_acc": .65, "worst_train_acc": .2, "test_acc": .55, "test_loss": .55,
                "test_with_acc": .85, "test_against_acc": .25, "test_acc_reweighted": .72, "worst_test_acc": .1,
                "with_loss": .95, "against_loss": .35, "test_with_loss": .85, "test_against_loss": .25}
    assert r == pytest.approx(expected)
    women = spurious.averages(entry, share, ["00", "10"])
    assert women["with_acc"] == pytest.approx(.55) and women["against_acc"] == pytest.approx(.75)


def test_cells_unequal_and_empty(capsys):
    y = np.array([0] * 200 + [0] * 3 + [1] * 56 + [1] * 300)
    a = np.array([0] * 200 + [1] * 3 + [0] * 56 + [1] * 300)
    cells = spurious.choose_cells(y, a, 0, "training")
    assert {c: len(i) for c, i in cells.items()} == {"00": 150, "01": 3, "10": 56, "11": 150}
    for c, i in cells.items():
        assert (y[i] == int(c[0])).all() and (a[i] == int(c[1])).all() and len(set(i)) == len(i)
    assert "00 150 of 200, 01 3 of 3, 10 56 of 56, 11 150 of 300" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no test image has label 0 and attribute 1"):
        spurious.choose_cells(np.delete(y, [200, 201, 202]), np.delete(a, [200, 201, 202]), 0, "test")
    assert spurious.with_correlation(y, a) == ["00", "11"]
    assert spurious.with_correlation(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])) == ["00", "10"]
    with pytest.raises(ValueError, match="label 0 has both attributes equally often"):
        spurious.with_correlation(np.array([0, 0, 1]), np.array([0, 1, 1]))


def test_prepare_weights_and_order():
    """Shares are those of the images trained on; the watched images lie cell by cell, and are those of their cell."""
    images = {**common.with_statistics(tiny_arrays())}
    train, watched, share, agree = spurious.prepare(images, 0, CPU)
    assert share == pytest.approx({"00": 30 / 67, "01": 4 / 67, "10": 3 / 67, "11": 30 / 67}) and agree == ["00", "11"]
    examples, sizes = watched[""]
    assert sizes == [30, 4, 3, 30] and len(train) == 67 and watched["test_"][1] == [5, 5, 5, 5]
    bright = examples.x.float().mean((1, 2, 3)) > 80
    for c, y, b in zip(spurious.CELLS, examples.y.split(sizes), bright.split(sizes)):
        assert (y == int(c[0])).all() and (b == bool(int(c[1]))).all()
    some = types.SimpleNamespace(**{**vars(CPU), "subset": 60})
    train, watched, share, _ = spurious.prepare(images, 0, some)
    assert len(train) == 60 == sum(watched[""][1]) and sum(share.values()) == pytest.approx(1)
    images |= {"x_pool": images["x_test"], "y_pool": images["y_test"], "attribute_pool": images["attribute_test"]}
    assert spurious.prepare(images, 0, CPU)[1][""][1] == [5, 5, 5, 5]  # as for CelebA: cells from the whole split
    with pytest.raises(ValueError, match="--batch-size 2 is larger than the training set of 1"):
        spurious.prepare(images, 0, types.SimpleNamespace(**{**vars(CPU), "subset": 1}))


def test_crossing():
    records = [{"x": x, "y": y} for x, y in ((.5, .5), (.85, .4), (.75, .3), (.85, .5), (.9, .9))]
    assert spurious.at_crossing(records, "x", .8, "y") == pytest.approx(.4)  # the last time upwards: halfway .3 to .5
    assert spurious.at_crossing(records, "x", .95, "y") is None
    assert spurious.at_crossing(records[1:2], "x", .8, "y") is None  # above from the start


def test_synthetic():
    images = spurious.synthetic()
    agree = {s: (images[f"y_{s}"] == images[f"attribute_{s}"]).mean() for s in ("train", "test")}
    assert agree["train"] == pytest.approx(.95) and agree["test"] == pytest.approx(.5)
    assert images["x_train"].shape == (1500, 32, 32, 3) and images["x_train"].dtype == np.uint8
    assert common.crc32(images["x_test"]) == common.crc32(spurious.synthetic()["x_test"])


def test_memory(monkeypatch, capsys):
    images = common.with_statistics(tiny_arrays())
    spurious.check_memory(images, CPU)
    assert "67 x 8 x 8 x 3 bytes" in capsys.readouterr().out
    monkeypatch.setattr(spurious, "memory", lambda device: 1e-6)
    with pytest.raises(ValueError, match="try a smaller --subset"):
        spurious.check_memory(images, CPU)


# CelebA: six images, the first three train, one is for validation, two test


@pytest.fixture
def celeba(tmp_path):
    folder = tmp_path / "celeba"
    names = [f"{i + 1:06d}.jpg" for i in range(7)]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (255, 255, 0), (0, 255, 255), (255, 255, 255)]
    for name, colour in zip(names, colours):
        jpeg(folder / "img_align_celeba" / name, colour, (178, 218))
    attributes = ["5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]
    rows = [(1, -1), (-1, 1), (1, 1), (-1, -1), (-1, -1), (1, -1), (-1, 1)]  # (blond, male)
    texts = {
        "list_attr_celeba.txt": ["7", " ".join(attributes) + " "] + [f"{n} -1 {b:2d} {m:2d}  1"
                                                                     for n, (b, m) in zip(names, rows)],
        "list_eval_partition.txt": [f"{n} {s}" for n, s in zip(names, (0, 0, 0, 1, 0, 2, 2))],
        "identity_CelebA.txt": [f"{n} {i}" for i, n in enumerate(names)],
        "list_bbox_celeba.txt": ["7", "image_id x_1 y_1 width height"] + [f"{n}    95  71 226 313" for n in names],
        "list_landmarks_align_celeba.txt": ["7", "lefteye_x lefteye_y"] + [f"{n} 69  109" for n in names]}
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_celeba_folder(celeba, capsys):
    images = spurious.celeba(celeba)
    assert "not the published ones by checksum" in capsys.readouterr().out
    assert images["y_pool"].tolist() == [1, 0, 1, 0] and images["attribute_pool"].tolist() == [0, 1, 1, 0]
    assert images["y_test"].tolist() == [1, 0] and images["attribute_test"].tolist() == [0, 1]
    assert images["mean"] == [.485, .456, .406] and images["std"] == [.229, .224, .225]
    x = images["x_train"][np.arange(4)]
    assert x.shape == (4, 224, 224, 3) and x.dtype == np.uint8
    np.testing.assert_allclose(x.mean((1, 2)), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], atol=3)
    examples = common.Examples(x, images["y_train"], images["mean"], images["std"], CPU)
    red = examples.pixels(torch.tensor([0]))[0, :, 100, 100]
    torch.testing.assert_close(red, torch.tensor([(1 - .485) / .229, -.456 / .224, -.406 / .225]), atol=.05, rtol=0)


def test_celeba_crop(celeba):
    """The middle 178 of 218 rows stay: a band painted over the uppermost 15 rows is gone."""
    from PIL import Image
    path = celeba / "celeba" / "img_align_celeba" / "000001.jpg"
    image = np.zeros((218, 178, 3), np.uint8)
    image[:15] = 255
    Image.fromarray(image).save(path)
    assert spurious.celeba(celeba)["x_train"][np.array([0])].max() < 10


def test_celeba_only_the_first_15000(celeba, monkeypatch):
    monkeypatch.setattr(spurious, "CELEBA_TRAIN", 3)
    images = spurious.celeba(celeba)
    assert len(images["y_train"]) == images["x_train"].shape[0] == 3 and len(images["y_pool"]) == 4


def test_celeba_refusals(celeba, monkeypatch):
    folder = celeba / "celeba"
    (folder / "img_align_celeba" / "000005.jpg").write_bytes(b"\xff\xd8 this is no JPEG")
    with pytest.raises(ValueError, match="000005.jpg: damaged"):
        spurious.celeba(celeba)["x_train"][np.arange(4)]
    (folder / "img_align_celeba" / "000005.jpg").unlink()
    with pytest.raises(OSError, match="000005.jpg: missing"):
        spurious.celeba(celeba)
    text = (folder / "list_attr_celeba.txt").read_text()
    (folder / "list_attr_celeba.txt").write_text(text.replace("Blond_Hair", "Blonde"))
    with pytest.raises(ValueError, match="list_attr_celeba.txt: its header does not name Blond_Hair"):
        spurious.celeba(celeba)
    (folder / "list_attr_celeba.txt").write_text("7\nBlond_Hair Male\n000001.jpg yes no\n")
    with pytest.raises(ValueError, match="list_attr_celeba.txt.*not in CelebA's format"):
        spurious.celeba(celeba)
    import torchvision

    def quota(*arguments, **more):
        raise RuntimeError("Too many users have viewed or downloaded this file recently.")

    monkeypatch.setattr(torchvision.datasets.celeba, "download_file_from_google_drive", quota)
    (folder / "list_attr_celeba.txt").unlink()
    with pytest.raises(OSError, match=r"Too many users.*Put list_attr_celeba.txt into .*celeba by hand.*synthetic"):
        spurious.celeba(celeba)


# Waterbirds: fourteen training images (four in the cells with the correlation), one a cell for testing


@pytest.fixture
def waterbirds(tmp_path):
    folder = tmp_path / "waterbird_complete95_forest2water2"
    rows = [(y, place, split) for y in (0, 1) for place in (0, 1) for split in (0, 0, 0, 2)]
    rows += [(0, 0, 0), (1, 1, 0), (0, 1, 1)]
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for i, (y, place, split) in enumerate(rows):
        name = f"{i % 3 + 1:03d}.Bird/Bird_{i}.jpg"
        jpeg(folder / name, (40 + 150 * y, 40 + 150 * place, 100 * split), (320, 290))
        lines.append(f'{i},{name},{y},{split},{place},"/b/bamboo forest/0.jpg"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_waterbirds_folder(waterbirds):
    images = spurious.waterbirds(waterbirds)
    assert len(images["y_train"]) == 14 and images["y_test"].tolist() == [0, 0, 1, 1]
    assert images["attribute_test"].tolist() == [0, 1, 0, 1] and images["mean"] == [.485, .456, .406]
    x = images["x_train"][np.arange(14)]
    assert x.shape == (14, 224, 224, 3)
    np.testing.assert_allclose(x[..., 0].mean((1, 2)), 40 + 150 * images["y_train"], atol=3)
    np.testing.assert_allclose(x[..., 1].mean((1, 2)), 40 + 150 * images["attribute_train"], atol=3)


def test_waterbirds_refusals(waterbirds):
    table = waterbirds / "waterbird_complete95_forest2water2" / "metadata.csv"
    text = table.read_text()
    for wrong in (text.replace("img_filename", "file", 1), "", "\x00\xff,\n1,2\n"):
        table.write_text(wrong, encoding="latin1")
        with pytest.raises(ValueError, match="metadata.csv: needs a header with img_filename, y, split, place"):
            spurious.waterbirds(waterbirds)
    table.write_text(text.replace(".jpg,0,0,0,", ".jpg,2,0,0,", 1))
    with pytest.raises(ValueError, match="metadata.csv: line 2: y and place must be 0 or 1"):
        spurious.waterbirds(waterbirds)
    table.write_text(text)
    image = table.parent / "002.Bird" / "Bird_1.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="Bird_1.jpg: damaged"):
        spurious.waterbirds(waterbirds)["x_train"][np.arange(14)]
    image.unlink()
    with pytest.raises(OSError, match="Bird_1.jpg: missing, though metadata.csv lists it"):
        spurious.waterbirds(waterbirds)


def test_waterbirds_download(waterbirds, tmp_path, monkeypatch):
    """A failed download says what to do; what is cut short is not taken for whole; a good archive is unpacked."""
    name, new = "waterbird_complete95_forest2water2", tmp_path / "new"
    new.mkdir()
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as tar:
        tar.add(waterbirds / name, name)
    good = (tmp_path / "good.tar.gz").read_bytes()

    def download(data, error=None):
        def download_url(url, root, filename):
            assert url == spurious.WATERBIRDS and not os.path.exists(os.path.join(root, filename))
            with open(os.path.join(root, filename), "wb") as file:
                file.write(data)
            if error:
                raise error
        monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)

    for _ in range(2):  # the second time the first one's leavings are there
        download(good[:1000], urllib.error.URLError("Name or service not known"))
        with pytest.raises(OSError, match=r"tar.gz could not be fetched.*\(Name or service not known\). Put it into"):
            spurious.waterbirds(new)
    download(good[:len(good) // 2])
    with pytest.raises(OSError, match="is damaged or cut short, delete it"):
        spurious.waterbirds(new)
    assert not (new / name).exists()
    (new / f"{name}.tar.gz").unlink()
    download(good)
    assert len(spurious.waterbirds(new)["y_train"]) == 14


# Networks


def test_pretrained_weights(tmp_path, monkeypatch):
    from torchvision.models import ResNet18_Weights, resnet18
    o = types.SimpleNamespace(dataset="waterbirds", from_scratch=False, data_dir=str(tmp_path), width=64)

    def no_network(*arguments, **more):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(OSError, match="resnet18-.*Name or service not known.*by hand, or .*--from-scratch"):
        spurious.network(o, 3)
    path = tmp_path / ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1]
    path.write_bytes(b"not a weights file")
    with pytest.raises(OSError, match="ImageNet weights could not be had"):
        spurious.network(o, 3)
    source = resnet18()
    source.bn1.running_mean += 1
    torch.save(source.state_dict(), path)
    model = spurious.network(o, 3)
    assert not any(m.training for m in model.modules()) and model.fc.out_features == 1
    assert torch.equal(model.bn1.running_mean, source.bn1.running_mean)
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert model.bn1.weight.requires_grad and not any("running" in name for name, _ in model.named_parameters())
    o.from_scratch = True
    scratch = spurious.network(o, 3)
    assert {n.split(".")[-1] for n, _ in scratch.named_parameters() if "fc" not in n} == {"weight"}  # no conv bias
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in scratch.modules())


@pytest.mark.parametrize("pretrained", [False, True])
def test_torchvision_networks_through_the_core(pretrained, tmp_path, monkeypatch):
    """Both networks are exactly 0 at the start, linear at alpha = inf, and all linearity measures work on them."""
    from torchvision.models import resnet18
    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", lambda *a, **k: resnet18().state_dict())
    o = types.SimpleNamespace(dataset="waterbirds", from_scratch=not pretrained, data_dir=str(tmp_path), width=64)
    x, y = torch.randn(3, 3, 64, 64), torch.tensor([0., 1., 1.])
    with common.seeded("init", 0):
        model = spurious.network(o, 3)
    centered = common.center(model, 2.0)
    assert centered(x).shape == (3, 1) and not centered(x).any()
    measures = common.LinearityProbe(centered, x)
    assert measures()["ntk_alignment"] == pytest.approx(1, abs=1e-5) and measures()["sign_similarity"] == 1
    before = model(x).detach()
    optimizer = common.scaled_sgd(centered, 1e-3)
    torch.nn.functional.binary_cross_entropy_with_logits(centered(x)[:, 0], y).backward()
    optimizer.step()
    assert not torch.equal(model(x), before) and measures()["ntk_alignment"] < 1
    linear = common.center(spurious.network(o, 3), math.inf)
    assert not linear(x).any()


def test_waterbirds_run(waterbirds, tmp_path, monkeypatch):
    """One whole run at 224 pixels with a local weights file, at the paper's learning rate for it."""
    from torchvision.models import ResNet18_Weights, resnet18
    with common.seeded("weights", 0):
        torch.save(resnet18().state_dict(), waterbirds / ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1])
    out = tmp_path / "out"
    summary = spurious.main(dataset="waterbirds", data_dir=str(waterbirds), out=str(out), alpha=[1], epochs=1,
                            batch_size=7, probe_examples=2, device="cpu")
    assert summary["options"]["lr"] == .001
    assert json.loads((out / "alpha=1_seed=0" / "args.json").read_text())["run"]["lr"] == .001
    last = json.loads((out / "alpha=1_seed=0" / "log.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 2 and math.isfinite(last["test_loss"]) and 0 < last["ntk_alignment"] <= 1.001


# Whole runs


def test_files_and_keys(tiny, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "spurious.py"), "--dataset", tiny, "--out", str(out), "--seeds", "0", "1",
               "--alpha", "1", "100", "--epochs", "3", "--width", "2", "--batch-size", "20", "--probe-examples", "6",
               "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "training cells: 00 30 of 30, 01 4 of 4, 10 3 of 3, 11 30 of 30" in done.stdout
    assert "paired by seed" in done.stdout
    assert {"spurious.png", "spurious.pdf", "summary.json"} <= {p.name for p in out.iterdir()}
    strict = lambda text: json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
    names = ("cell_00", "cell_01", "cell_10", "cell_11", "with", "against")
    keys = {f"{start}{name}_{what}" for start in ("", "test_") for name in names for what in ("loss", "acc")}
    keys |= {"mean_train_loss", "mean_train_acc", "test_loss", "test_acc", "test_acc_reweighted", "balanced_train_acc",
             "worst_train_acc", "worst_test_acc", "iteration", "epoch", "seconds", "train_loss", "train_acc"}
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
    assert set(summary["at_equal_accuracy"]["alphas"]["1"]) == set(summary["at_equal_accuracy"]["paired"]["1 - 100"])
    from PIL import Image
    picture = np.asarray(Image.open(out / "spurious.png").convert("RGBA"))
    assert (picture[..., 3] == 255).all() and (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()


def test_again_draw_only_and_streak(tiny, tmp_path, capsys):
    out = str(tmp_path / "run")
    first = spurious.main(dataset=tiny, out=out, **TINY)
    again = spurious.main(dataset=tiny, out=out, **TINY)
    assert "already finished" in capsys.readouterr().out and again["alphas"] == first["alphas"]
    drawn = spurious.main(dataset=tiny, out=out, draw_only=True)
    assert drawn["alphas"] == first["alphas"] and drawn["at_equal_accuracy"] == first["at_equal_accuracy"]
    long = {**TINY, "out": str(tmp_path / "long"), "alpha": [1], "epochs": 400, "width": 8, "lr": .02}
    for _ in range(2):
        capsys.readouterr()
        spurious.main(dataset=tiny, **long)
    assert "already finished (streak)" in capsys.readouterr().out


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
    refused("not celeba, waterbirds or synthetic", dataset="cifar10")
    refused("no such file", dataset=str(tmp_path / "none.npz"))
    refused("no array attribute_train, the attribute", dataset=changed(attribute_train=None))
    refused("no array attribute_test, the attribute", dataset=changed(attribute_test=None))
    refused("attribute_train must be 0 or 1", dataset=changed(attribute_train=np.full(67, 2)))
    refused("labels must be 0 or 1 here, and go up to 2", dataset=changed(y_train=np.arange(67) % 3))
    refused("no training image has label 1 and attribute 0", dataset=changed(**tiny_arrays(train=((30, 4), (0, 30)))))
    refused("no test image has label 0 and attribute 0", dataset=changed(**tiny_arrays(test=((0, 4), (3, 3)))))
    refused("--batch-size 68 is larger", batch_size=68)
    refused("--epochs", epochs=0)


@pytest.mark.slow
def test_quick_shows_the_effect(tmp_path):
    for seed in (0, 1, 2):
        summary = spurious.main(quick=True, seeds=[seed], out=str(tmp_path / "quick"), device="cpu")
        gaps = {level: row["gap"]["mean"] for level, row in summary["paired"]["1 - 100"]["levels"].items()
                if "gap" in row and float(level) < .8 * math.log(2)}
        assert sum(gap > .02 * math.log(2) for gap in gaps.values()) >= 3, (seed, gaps)
