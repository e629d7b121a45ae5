"""spurious.py: its data, cells and networks; and what the three scripts that train on images write and refuse."""
import json
import math
import os
import tarfile
import types
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, models

import cscore
import noisy
import spurious
from conftest import TINY, records_of, refused, small_arrays

WATERBIRDS = "waterbird_complete95_forest2water2"


def load(dataset, data_dir="data", **changes):
    options = dict(dataset=dataset, data_dir=data_dir, digits=[7, 9], agree=.95, seeds=[0], subset=None, batch_size=1)
    return spurious.load(types.SimpleNamespace(**{**options, **changes}))


def no_network(*arguments, **more):
    raise urllib.error.URLError("Name or service not known")


@pytest.mark.parametrize("agree", [.6, .9])
def test_dominoes(agree, monkeypatch):
    """Digits and images are numbers, the last digit is their kind; from 150 on they are of the test sets."""
    def numbered(self, root, train, download):
        number = torch.arange(150) if train else torch.arange(150, 200)
        if isinstance(self, datasets.MNIST):
            number = number[:len(number) // 2]  # so few that they are used again
            self.data = torch.arange(28).repeat(len(number), 28, 1)
            self.data[:, 0, 0] = number
        else:
            self.data = number[:, None, None, None].repeat(1, 32, 32, 3).numpy()
        self.targets = number % 10 if isinstance(self, datasets.MNIST) else (number % 10).tolist()

    monkeypatch.setattr(datasets.CIFAR10, "__init__", numbered)
    monkeypatch.setattr(datasets.MNIST, "__init__", numbered)
    images = load("dominoes", digits=[2, 5], agree=agree)
    for split, share, numbers in (("train", agree, range(150)), ("test", .5, range(150, 200))):
        x, y, attribute = (images[f"{name}_{split}"] for name in ("x", "y", "attribute"))
        digit, below = x[:, 2, 2, 0], x[:, 40, 5, 1]
        assert (y == attribute).mean() == share and (x[:, 5, 2:30, 2] == np.arange(28)).all()
        assert sorted(below) == [k for k in numbers if k % 10 in (1, 9)]  # each automobile and truck once
        assert np.array_equal(below % 10, np.where(y == 1, 9, 1)) and set(digit) <= set(numbers)
        assert np.array_equal(digit % 10, np.where(attribute == 1, 5, 2))
        assert not x[:, [0, 1, 30, 31]].any() and not x[:, :32, [0, 1, 30, 31]].any()
        for kind in (0, 1):  # no digit is used twice more often than another
            assert np.ptp(np.unique(digit[attribute == kind], return_counts=True)[1]) <= 1
    assert np.array_equal(images["x_train"], load("dominoes", digits=[2, 5], agree=agree)["x_train"])


def test_celeba(tmp_path, monkeypatch):
    """Seven images, four for training, two for testing; damaged; a table missing, cut short, of another checksum."""
    folder = tmp_path / "celeba"
    os.makedirs(folder / "img_align_celeba")
    attributes = ["-1  1 -1", "-1 -1  1", "-1  1  1", "-1 -1 -1", "-1 -1 -1", "-1  1 -1", "-1 -1  1"]
    for name, text, values in (("list_attr_celeba", "7\n5_o_Clock_Shadow Blond_Hair Male \n", attributes),
                               ("list_eval_partition", "", [0, 0, 0, 1, 0, 2, 2]), ("identity_CelebA", "", range(7)),
                               ("list_bbox_celeba", "7\nimage_id x y\n", ["1 2"] * 7),
                               ("list_landmarks_align_celeba", "7\nlefteye_x lefteye_y\n", ["1 2"] * 7)):
        for k, value in enumerate(values):
            text += f"{k + 1:06d}.jpg {value}\n"
        (folder / f"{name}.txt").write_text(text)
    for k in range(7):
        image = Image.new("RGB", (178, 218), (30 * k, 99, 200))
        image.paste((255, 255, 255), (0, 0, 178, 15))  # not seen: the middle 178 of 218 rows stay
        image.save(folder / "img_align_celeba" / f"{k + 1:06d}.jpg")
    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", no_network)
    there = lambda path, md5=None: os.path.isfile(path)
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", there)
    monkeypatch.setattr(spurious, "CELEBA_TRAIN", 3)
    images = load("celeba", tmp_path)
    assert images["y_pool"].tolist() == [1, 0, 1, 0] and images["attribute_pool"].tolist() == [0, 1, 1, 0]
    assert images["y_train"].tolist() == [1, 0, 1] and images["x_train"].shape == (3, 224, 224, 3)
    assert images["y_test"].tolist() == [1, 0] and images["attribute_test"].tolist() == [0, 1]
    x = images["x_pool"][np.arange(4)]
    assert x.shape == (4, 224, 224, 3) and x.dtype == np.uint8 and images["std"] == [.229, .224, .225]
    np.testing.assert_allclose(x.mean((1, 2)), [(0, 99, 200), (30, 99, 200), (60, 99, 200), (120, 99, 200)], atol=3)
    (folder / "img_align_celeba" / "000002.jpg").write_bytes(b"\xff\xd8 this is no JPEG")
    refused("000002.jpg.: missing, damaged", images["x_pool"].__getitem__, np.arange(2))
    table = folder / "list_attr_celeba.txt"
    text = table.read_text()
    for content, check in ((None, there), (text[:-5], there), (text, datasets.utils.check_integrity)):
        monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", check)
        table.unlink() if content is None else table.write_text(content)
        refused(f"CelebA could not be had from Google Drive.*Put list_attr_celeba.txt, .* into {folder} by hand.*"
                r"--dataset dominoes \(downloads MNIST and CIFAR-10\) or --dataset synthetic", load, "celeba", tmp_path)


@pytest.fixture
def waterbirds(tmp_path):
    """Fourteen training images, four in either cell with the correlation; one a cell for testing."""
    folder = tmp_path / WATERBIRDS
    rows = [(y, place, split) for y in (0, 1) for place in (0, 1) for split in (0, 0, 0, 2)]
    lines = ["img_id,img_filename,y,split,place,place_filename\n"]
    for k, (y, place, split) in enumerate([*rows, (0, 0, 0), (1, 1, 0), (0, 1, 1)]):
        image = folder / f"{k % 3 + 1:03d}.Bird" / f"Bird_{k}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (320, 290), (40 + 150 * y, 40 + 150 * place, 100 * split)).save(image)
        lines.append(f'{k},{image.relative_to(folder)},{y},{split},{place},"/b/bamboo forest/0.jpg"\n')
    (folder / "metadata.csv").write_text("".join(lines))
    return tmp_path


def test_waterbirds_folder(waterbirds):
    images = load("waterbirds", waterbirds)
    assert images["y_test"].tolist() == [0, 0, 1, 1] and images["attribute_test"].tolist() == [0, 1, 0, 1]
    x = images["x_train"][np.arange(14)]
    assert x.shape == (14, 224, 224, 3) and images["mean"] == [.485, .456, .406]
    expected = np.stack([40 + 150 * images["y_train"], 40 + 150 * images["attribute_train"], np.zeros(14)], 1)
    np.testing.assert_allclose(x.mean((1, 2)), expected, atol=3)
    table = waterbirds / WATERBIRDS / "metadata.csv"
    text = table.read_text()
    for old, new in (("img_filename", "file"), ("split", "part"), ("jpg,0,0,0,", "jpg,2,0,0,"),
                     ("jpg,0,0,0,", "jpg,0,3,0,"), ("jpg,0,0,0,", "jpg\n"), ("/b/bamboo", "b" * 200_000)):
        table.write_text(text.replace(old, new, 1))
        refused("metadata.csv: needs img_filename, y, place and split", load, "waterbirds", waterbirds)
    table.write_text(text.split("\n")[0])
    refused("waterbirds: needs labels 0 and 1", load, "waterbirds", waterbirds)


def test_waterbirds_archive(waterbirds, tmp_path, monkeypatch):
    """What is cut short is not taken for whole; what is left of an earlier call is not taken either."""
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as members:
        members.add(waterbirds / WATERBIRDS, WATERBIRDS)
    good, new, archive = (tmp_path / "good.tar.gz").read_bytes(), tmp_path / "new", f"{WATERBIRDS}.tar.gz"
    (new / f"{WATERBIRDS}.part" / WATERBIRDS / "leftover").mkdir(parents=True)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    for content, reason in ((None, "not known"), (good[:-99], "ended before"), (good[:999], "ended before")):
        if content:
            (new / archive).write_bytes(content)
        refused(fr"from {spurious.WATERBIRDS} \(.*{reason}.*\). Put {archive} into {new} by hand, .*--dataset dominoes",
                load, "waterbirds", new)
        assert not (new / WATERBIRDS).exists()
    (new / archive).rename(new / f"{archive}.part")

    def download_url(url, root, filename):
        assert url == spurious.WATERBIRDS and not (root / filename).exists()
        (root / filename).write_bytes(good)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    for _ in range(2):  # the second time without a download
        assert len(load("waterbirds", new)["y_train"]) == 14 and not (new / WATERBIRDS / "leftover").exists()
        assert sorted(os.listdir(new)) == [WATERBIRDS, archive]


def test_cells_unequal_and_empty():
    y, attribute = np.repeat([0, 0, 1, 1], [200, 3, 56, 300]), np.repeat([0, 1, 0, 1], [200, 3, 56, 300])
    number = np.arange(len(y))
    x = np.stack([number // 256, number % 256], 1).astype(np.uint8)[:, None, None]  # an image tells which it is

    def drawn(seed, inside=number):
        images = {"x_test": x, "y_test": y, "attribute_test": attribute}
        cells = spurious.watch(images, "test", inside, seed, types.SimpleNamespace(group_size=150, device="cpu"))
        index = (256 * cells["x"][:, 0, 0, 0].int() + cells["x"][:, 1, 0, 0]).numpy()
        assert np.array_equal(cells["y"], y[index]) and cells["sizes"] == [150, 3, 56, 150]
        return np.split(index, np.cumsum(cells["sizes"])[:-1])

    for name, index in zip(("00", "01", "10", "11"), drawn(0)):
        assert (y[index] == int(name[0])).all() and (attribute[index] == int(name[1])).all()
    assert min(drawn(0, number[50:])[0]) == 50 and not np.array_equal(drawn(0)[3], drawn(1)[3])
    refused("no test image has label 0 and attribute 1", drawn, 0, np.delete(number, [200, 201, 202]))
    assert spurious.with_correlation(y, attribute) == ["00", "11"]
    assert spurious.with_correlation(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])) == ["00", "10"]
    refused("both attributes equally often", spurious.with_correlation, np.array([0, 0, 1]), np.array([0, 1, 1]))


@pytest.mark.parametrize("dataset, lr, major", [("celeba", .01, ["00", "10"]), ("waterbirds", .001, ["00", "11"])])
def test_torchvision_networks(dataset, lr, major, tmp_path, monkeypatch):
    """Whole runs at 32 pixels; CelebA's training cells come from the pool, and men are against the correlation."""
    images = {**small_arrays((7, 2, 2, 5), (1, 1, 1, 1), 32), "mean": [.5] * 3, "std": [.2] * 3}
    if dataset == "celeba":
        for name in ("x", "y", "attribute"):
            images[f"{name}_pool"] = images[f"{name}_train"]
            images[f"{name}_train"] = images[f"{name}_train"][:11]  # nothing in the last cell
    monkeypatch.setattr(spurious, dataset, lambda data_dir: images)
    options = dict(TINY, dataset=dataset, data_dir=tmp_path, out=tmp_path, alpha=1, epochs=1, lr=None, probe_examples=2)
    if dataset == "waterbirds":
        monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
        refused("resnet18-.*Name or service not known.*by hand.*--dataset dominoes", spurious.main, **options)
        torch.manual_seed(0)
        source = models.resnet18()
        torch.save(source.state_dict(), tmp_path / "resnet18-f37072fd.pth")
    spurious.main(**options)
    folder = tmp_path / "alpha=1_seed=0"
    first, *_, last = records_of(folder)
    assert json.loads((folder / "args.json").read_text())["lr"] == lr
    assert first["mean_train_loss"] == pytest.approx(math.log(2)) and math.isfinite(last["test_loss"])
    assert first["ntk_alignment"] == pytest.approx(1, abs=1e-5) and first["ntk_alignment"] != last["ntk_alignment"] > 0
    assert last["with_loss"] == pytest.approx(np.mean([last[f"cell_{cell}_loss"] for cell in major]))
    if dataset == "waterbirds":  # hardly moved
        trained = torch.load(folder / "checkpoint.pt")["tensors"][0]
        assert torch.cosine_similarity(trained.flatten(), source.conv1.weight.flatten(), 0) > .99


@pytest.mark.parametrize("script, lazy, groups", [
    (noisy, "inf", {"clean": 57, "noisy": 10}), (cscore, 100, {f"decile_{d}": 1 for d in range(1, 11)}),
    (spurious, "inf", {"cell_00": 30, "cell_01": 4, "cell_10": 3, "cell_11": 30})])
def test_what_a_script_writes(script, lazy, groups, tmp_path):
    """The files of DESIGN.md; means are weighted by the groups' sizes, and differences are those of the rows."""
    name, out = script.__name__, tmp_path / "run"
    np.savez(tmp_path / "mine.npz", **small_arrays())
    script.main(dataset=tmp_path / "mine.npz", out=out, **{**TINY, "alpha": [1, lazy], "epochs": 4})
    folders = ["alpha=1_seed=0", f"alpha={lazy}_seed=0"]
    assert sorted(os.listdir(out)) == [*sorted(folders), f"{name}.pdf", f"{name}.png", "summary.json"]
    for folder in folders:
        assert sorted(os.listdir(out / folder)) == ["args.json", "checkpoint.pt", "log.jsonl"]
        args, records = json.loads((out / folder / "args.json").read_text()), records_of(out / folder)
        assert args["script"] == name and {"dataset", "loss", "network", "data_crc32", "width"} <= set(args)
        for k, record in enumerate(records):
            assert {"iteration", "epoch", "seconds", "mean_train_acc", "test_loss", "test_acc"} <= set(record)
            weighted = sum(size * record[f"{group}_loss"] for group, size in groups.items()) / sum(groups.values())
            assert record["mean_train_loss"] == pytest.approx(weighted)
            assert ("linearisation_error" in record) == (k % 5 == 0 or k == len(records) - 1)
        assert records[0]["mean_train_loss"] == pytest.approx(math.log(2)) and records[-1]["ended"] == "epochs"
        if script is spurious:
            assert record["test_against_acc"] == (record["test_cell_01_acc"] + record["test_cell_10_acc"]) / 2
            assert record["with_loss"] == pytest.approx((record["cell_00_loss"] + record["cell_11_loss"]) / 2)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"options", "readings", "differences", "diverged", "conclusion"}
    value = {(row["alpha"], row["on"], row["level"]): row for row in summary["readings"]}
    assert {alpha for alpha, on, level in value} == {1, lazy} and summary["differences"]
    for row in summary["differences"]:
        assert set(row) == {"alpha", "minus", "on", "level", "quantity", "mean", "low", "high", "n"}
        read = [value[alpha, row["on"], row["level"]][row["quantity"]] for alpha in (1, lazy)]
        assert row["mean"] == pytest.approx(read[0] - read[1], abs=1e-5)
    picture = np.asarray(Image.open(out / f"{name}.png").convert("RGBA"))
    assert (picture[..., 3] == 255).all() and (picture[[0, -1]] == 255).all() and picture[..., 0].mean() < 254
    options = {**TINY, "epochs": 1, "batch_size": 30, "lr": 1e-6}  # no level is passed
    short = script.main(dataset=tmp_path / "mine.npz", out=tmp_path / "short", **options)
    assert not short["readings"] and short["conclusion"].startswith("Nothing is concluded")


@pytest.mark.parametrize("script, words, cases", [
    (noisy, "larger than the training set of 67|label noise", [{"batch_size": 68}, {"subset": 68}, {"noise": .001}]),
    (cscore, "have no deciles", [{"score_train": [.5] * 67}, {"score_test": [1] * 20}, {"subset": 9, "batch_size": 9}]),
    (spurious, "must be celeba|needs labels 0 and 1", [{"dataset": "cifar10"}, {"y_train": np.arange(67) % 3}]),
    (spurious, "--digits|--agree", [{"digits": 1}, {"digits": [7, 7], "dataset": "dominoes"}, {"agree": 1}]),
    (spurious, "an empty cell", [{"attribute_train": [0] * 67}, {"attribute_test": [1] * 20},
                                 {"subset": 30, "seeds": [0, 2, 1]}])])  # of one seed only
def test_what_is_refused(script, words, cases, tmp_path):
    """In one line, and before anything is recorded."""
    for case in cases:
        arrays, options = small_arrays(), {**TINY, "dataset": tmp_path / "mine.npz", "out": tmp_path / "run"}
        for name, value in case.items():
            place = arrays if name in arrays else options
            place[name] = value
        np.savez(tmp_path / "mine.npz", **arrays)
        refused(words, script.main, **options)
        assert not list(tmp_path.rglob("log.jsonl"))
