"""spurious.py: its data, cells and networks; and what the three scripts that train on images write and refuse."""
import os
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, models

import cscore
import experiment
import noisy
import spurious
from conftest import TINY, records_of, refused, small_arrays

ELSEWHERE = r"by hand, over what is there, or try --dataset dominoes \(downloads MNIST and CIFAR-10\) or synthetic"


def load(dataset, data_dir="data"):
    return spurious.load(types.SimpleNamespace(dataset=dataset, data_dir=data_dir, digits=[2, 5], agree=.6, seeds=[0],
                                               subset=None, batch_size=1))


def no_network(*arguments, **more):
    raise OSError("Name or service not known")


def test_dominoes(monkeypatch):
    """Digits and images are numbers, the last digit is their kind; from 150 on they are of the test sets."""
    def numbered(self, root, train, download):
        number = torch.arange(150) if train else torch.arange(150, 200)
        self.data, self.targets = number[:, None, None, None].repeat(1, 32, 32, 3).numpy(), (number % 10).tolist()
        if isinstance(self, datasets.MNIST):
            number = number[:len(number) // 2]  # so few that they are used again
            self.data, self.targets = number[:, None, None].repeat(1, 28, 28), number % 10
            self.data[:, 27] = torch.arange(28)

    for kind in (datasets.MNIST, datasets.CIFAR10):
        monkeypatch.setattr(kind, "__init__", numbered)
    images = load("dominoes")
    for split, share, numbers in (("train", .6, range(150)), ("test", .5, range(150, 200))):
        x, y, attribute = (images[f"{name}_{split}"] for name in ("x", "y", "attribute"))
        digit, below = x[:, 2, 2, 0], x[:, 40, 5, 1]
        assert (y == attribute).mean() == share and (x[:, 29, 2:30, 2] == np.arange(28)).all()
        assert sorted(below) == [k for k in numbers if k % 10 in (1, 9)] and set(digit) <= set(numbers)
        assert (below % 10 == np.where(y == 1, 9, 1)).all() and (digit % 10 == np.where(attribute == 1, 5, 2)).all()
        assert not x[:, [0, 1, 30, 31]].any() and not x[:, :32, [0, 1, 30, 31]].any()
        assert max(np.ptp(np.unique(digit[attribute == kind], return_counts=True)[1]) for kind in (0, 1)) <= 1  # uses


def test_celeba_cells_pixels_and_refusals(tmp_path, monkeypatch):
    folder, attributes = tmp_path / "celeba", "-1 1 -1,-1 -1 1,-1 1 1,-1 -1 -1,-1 -1 -1,-1 1 -1,-1 -1 1".split(",")
    os.makedirs(folder / "img_align_celeba")
    for k in range(7):
        image = Image.new("RGB", (178, 218), (30 * k, 99, 200))
        image.paste((255, 255, 255), (0, 0, 178, 15))  # not seen: the middle 178 of 218 rows stay
        image.save(folder / "img_align_celeba" / f"{k + 1:06d}.jpg")
    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", no_network)
    refused(f"CelebA could not be had .* into {folder} {ELSEWHERE}.*not known", load, "celeba", tmp_path)
    for name in ("attr_celeba", "bbox_celeba", "landmarks_align_celeba", "eval_partition", "identity_CelebA"):
        head = "7\n5_o_Clock_Shadow Blond_Hair Male\n" * name.endswith("celeba")
        rows = [f"{k + 1:06d}.jpg {row}\n" for k, row in enumerate("0001022" if "eval" in name else attributes)]
        (folder / f"list_{name}.txt".replace("list_id", "id")).write_text(head + "".join(rows))
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", lambda path, md5=None: os.path.isfile(path))
    monkeypatch.setattr(spurious, "CELEBA_TRAIN", 3)
    images = load("celeba", tmp_path)
    cells = [(2 * images[f"y_{split}"] + images[f"attribute_{split}"]).tolist() for split in ("train", "pool", "test")]
    x = images["x_pool"][np.arange(4)]
    assert cells == [[2, 1, 3], [2, 1, 3, 0], [2, 1]]
    assert x.shape == images["x_pool"].shape == (4, 224, 224, 3) and x.dtype == np.uint8 and images["std"][0] == .229
    np.testing.assert_allclose(x.mean((1, 2)), [(0, 99, 200), (30, 99, 200), (60, 99, 200), (120, 99, 200)], atol=3)
    (folder / "img_align_celeba" / "000002.jpg").write_bytes(b"\xff\xd8 this is no JPEG")
    refused("000002.jpg: missing, damaged", images["x_pool"].__getitem__, np.arange(2))


def test_waterbirds_archive_cells_pixels_and_refusals(tmp_path, monkeypatch):
    name, lines = "waterbird_complete95_forest2water2", ["img_id,img_filename,y,split,place,place_filename\n"]
    rows = [(y, place, split) for y in (0, 1) for place in (0, 1) for split in (0, 0, 0, 2)]
    for k, (y, place, split) in enumerate([*rows, (0, 0, 0), (1, 1, 0), (0, 1, 1)]):
        image = tmp_path / name / f"{k % 3 + 1:03d}.Bird" / f"Bird_{k}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (320, 290), (40 + 150 * y, 40 + 150 * place, 100 * split)).save(image)
        lines.append(f'{k},{image.parent.name}/{image.name},{y},{split},{place},"/b/bamboo forest/0.jpg"\n')
    (tmp_path / name / "metadata.csv").write_text("".join(lines))
    archives = {}
    for folder in (name, "../elsewhere"):
        with tarfile.open(tmp_path / "archive", "w:gz") as members:
            members.add(tmp_path / name, folder)
        archives[folder] = (tmp_path / "archive").read_bytes()
    for content, reason in ((None, "not known"), (archives[name][:-99], "end"), (archives[name][:999], "marker"),
                            (archives["../elsewhere"], "is outside"), (archives[name], ""), (None, "")):
        data = tmp_path / "data" / reason
        data.mkdir(parents=True, exist_ok=True)
        download = no_network if content is None else lambda url, root: (root / f"{name}.tar.gz").write_bytes(content)
        monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
        words = f"put {spurious.WATERBIRDS} into {data} {ELSEWHERE}.*{reason}"
        images = refused(words, load, "waterbirds", data) if reason else load("waterbirds", data)
    assert images["y_test"].tolist() == [0, 0, 1, 1] and images["attribute_test"].tolist() == [0, 1, 0, 1]
    x, cells = images["x_train"][np.arange(14)], np.stack([images["y_train"], images["attribute_train"]], 1)
    assert x.shape == (14, 224, 224, 3) and images["mean"][0] == .485 and not (tmp_path / "data" / "elsewhere").exists()
    np.testing.assert_allclose(x.mean((1, 2))[:, :2], 40 + 150 * cells, atol=3)
    (data / name / "metadata.csv").write_text("".join(lines).replace("split", "part"))
    refused(ELSEWHERE, load, "waterbirds", data)


def test_unequal_cells_are_drawn_by_the_seed_and_what_is_with_the_correlation():
    y, attribute = np.repeat([0, 0, 1, 1], [200, 3, 56, 300]), np.repeat([0, 1, 0, 1], [200, 3, 56, 300])
    number, drawn = np.arange(559), []
    images = {"x_test": number[:, None, None, None], "y_test": y, "attribute_test": attribute}
    for seed, inside in ((0, number), (1, number), (0, number[50:])):
        cells = spurious.watch(images, "test", inside, seed, types.SimpleNamespace(group_size=150, device="cpu"))
        index = cells["x"].flatten().numpy()
        drawn.append(set(index))
        assert len(drawn[-1]) == 359 and drawn[-1] <= set(inside) and np.array_equal(cells["y"], y[index])
        assert cells["sizes"] == [150, 3, 56, 150] and (np.diff(2 * y[index] + attribute[index]) >= 0).all()
    assert drawn[0] != drawn[1] and spurious.with_correlation(y, attribute) == ["00", "11"]
    assert spurious.with_correlation(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])) == ["00", "10"]
    refused("both attributes equally often", spurious.with_correlation, np.array([0, 0, 1]), np.array([0, 1, 1]))


@pytest.mark.parametrize("dataset, lr, major", [("celeba", .01, ["00", "10"]), ("waterbirds", .001, ["01", "11"])])
def test_torchvision_networks(dataset, lr, major, tmp_path, monkeypatch):
    """Whole runs at 32 pixels; CelebA's training cells come from the pool, and men are against the correlation."""
    images, folder = {**small_arrays((2, 7, 2, 5), (1, 1, 1, 1), 32), "mean": [.5] * 3, "std": [.2] * 3}, tmp_path
    if dataset == "celeba":
        images.update({f"{name}_pool": images[f"{name}_train"] for name in ("x", "y", "attribute")})
        images.update({f"{name}_train": images[f"{name}_pool"][:11] for name in ("x", "y", "attribute")})  # no cell 11
    monkeypatch.setattr(spurious, dataset, lambda data_dir: images)
    options = dict(TINY, dataset=dataset, data_dir=folder, out=folder, alpha=1, epochs=1, lr=None, probe_examples=2)
    if dataset == "waterbirds":
        monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
        refused(f"put .*resnet18-.* into {folder} {ELSEWHERE}.*not known", spurious.main, **options)
        source = models.resnet18()
        torch.save(source.state_dict(), folder / "resnet18-f37072fd.pth")
        model = spurious.network(images, types.SimpleNamespace(dataset=dataset, data_dir=folder))
        assert torch.equal(model.conv1.weight, source.conv1.weight) and not model.training
    assert spurious.main(**options)["options"]["lr"] == lr
    first, *_, last = records_of(folder / "alpha=1_seed=0")
    assert first["mean_train_loss"] == pytest.approx(np.log(2)) and np.isfinite(last["test_loss"])
    assert first["ntk_alignment"] == pytest.approx(1, abs=1e-5) and first["ntk_alignment"] != last["ntk_alignment"] > 0
    assert last["with_loss"] == pytest.approx(np.mean([last[f"cell_{cell}_loss"] for cell in major]))
    assert last["test_against_acc"] == np.mean([last[f"test_cell_{cell}_acc"] for cell in {*spurious.CELLS} - {*major}])


@pytest.mark.parametrize("script, lazy, groups", [
    (noisy, "inf", {"clean": 57, "noisy": 10}), (cscore, 100, {f"decile_{d}": 1 for d in range(1, 11)}),
    (spurious, "inf", {"cell_00": 30, "cell_01": 4, "cell_10": 3, "cell_11": 30})])
def test_what_a_script_writes(script, lazy, groups, tmp_path):
    """Files; means weighted by the groups' sizes; the summary's differences are those of its rows; a picture."""
    name, out, folders = script.__name__, tmp_path / "run", [f"alpha={alpha}_seed=0" for alpha in (1, lazy)]
    np.savez(tmp_path / "mine.npz", **small_arrays())
    summary = script.main(dataset=tmp_path / "mine.npz", out=out, **{**TINY, "alpha": [1, lazy], "epochs": 4})
    assert set(os.listdir(out)) == {*folders, f"{name}.pdf", f"{name}.png", "summary.json"}
    for folder in folders:
        assert set(os.listdir(out / folder)) == {"args.json", "checkpoint.pt", "log.jsonl"}
        for k, record in enumerate(records := records_of(out / folder)):
            assert {"iteration", "epoch", "seconds", "mean_train_acc", "test_loss", "test_acc"} <= set(record)
            weighted = sum(size * record[f"{group}_loss"] for group, size in groups.items()) / sum(groups.values())
            assert record["mean_train_loss"] == pytest.approx(weighted)
            assert ("linearisation_error" in record) == (k % 5 == 0 or k == len(records) - 1)
        assert records[0]["mean_train_loss"] == pytest.approx(np.log(2)) and records[-1]["ended"] == "epochs"
    assert summary == experiment.read_json(out / "summary.json")[0] and summary["differences"]
    value = {(row["alpha"], row["on"], row["level"]): row for row in summary["readings"]}
    for row in summary["differences"]:
        rich, lazy = (value[row[which], row["on"], row["level"]][row["quantity"]] for which in ("alpha", "minus"))
        assert row["mean"] == pytest.approx(rich - lazy, abs=1e-5)
    picture = np.asarray(Image.open(out / f"{name}.png").convert("RGBA"))
    assert (picture[..., 3] == 255).all() and (picture[[0, -1]] == 255).all() and picture[..., 0].mean() < 254


@pytest.mark.parametrize("script, words, case", [
    (noisy, "of 67 images, --subset ", {"subset": 68}), (noisy, "label noise", {"noise": .001}),
    (cscore, "have no deciles", {"score_train": [.5] * 67}), (cscore, "needs score_train", {"score_test": None}),
    (spurious, "must be celeba", {"dataset": "cifar10"}), (spurious, "both 0 and 1", {"y_train": np.arange(67) % 3}),
    (spurious, "both 0 and 1", {"attribute_test": None}), (spurious, "--digits must be two", {"digits": [7, 7]}),
    (spurious, "--agree between", {"agree": 1}), (spurious, "no test image", {"attribute_test": [1] * 15 + [0] * 5}),
    (spurious, r"\(--subset, seed 1\) has label 1 and attribute 0", {"subset": 30, "seeds": [0, 2, 1]})])
def test_what_is_refused_before_anything_is_recorded(script, words, case, tmp_path):
    options = {**small_arrays(), **TINY, "dataset": tmp_path / "mine.npz", "out": tmp_path / "run", **case}
    arrays = {name: options.pop(name) for name in small_arrays()}
    np.savez(tmp_path / "mine.npz", **{name: array for name, array in arrays.items() if array is not None})
    refused(words, script.main, **options)
    assert not (tmp_path / "run").exists()
