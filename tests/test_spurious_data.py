"""spurious.py's data: dominoes, CelebA and Waterbirds from look-alike files, hostile archives, the cells."""
import gzip
import io
import os
import pickle
import struct
import tarfile
import types
import urllib.error

import numpy as np
import pytest

import spurious


def jpeg(path, colour, size):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, quality=95)


def refused(error, match, function, *arguments):
    """function(*arguments) raises `error`, in one line that matches."""
    with pytest.raises(error, match=match) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3000


def load(dataset, data_dir="data", digits=(7, 9), agree=.95):
    return spurious.load(types.SimpleNamespace(dataset=dataset, data_dir=data_dir, digits=list(digits), agree=agree))


# Synthetic images and .npz files


def test_synthetic():
    images = load("synthetic")
    agree = {s: (images[f"y_{s}"] == images[f"attribute_{s}"]).mean() for s in ("train", "test")}
    assert agree == {"train": .95, "test": .5}
    assert images["x_train"].shape == (1500, 32, 32, 3) and images["x_train"].dtype == np.uint8
    assert len(images["mean"]) == len(images["std"]) == 3
    np.testing.assert_array_equal(images["x_test"], spurious.synthetic()["x_test"])


def test_npz(tmp_path):
    x, y, attribute = spurious.dominoes(*small_parts(), seed=0)
    arrays = {f"{name}_{split}": value for split in ("train", "test")
              for name, value in (("x", x), ("y", y), ("attribute", attribute))}
    path = str(tmp_path / "file.npz")

    def changed(**others):
        np.savez(path, **{name: value for name, value in {**arrays, **others}.items() if value is not None})
        return path

    images = load(changed())
    np.testing.assert_array_equal(images["attribute_test"], attribute)
    assert images["mean"] == pytest.approx(list(x.mean((0, 1, 2)) / 255))
    refused(ValueError, "and attribute_train and attribute_test", load, changed(attribute_test=None))
    refused(ValueError, "needs labels 0 and 1", load, changed(y_train=np.arange(len(y)) % 3))
    refused(ValueError, "choose one of celeba, waterbirds, dominoes, synthetic or a file FILE.npz", load, "cifar10")
    refused(OSError, "no such file", load, str(tmp_path / "none.npz"))


# Dominoes


def small_parts(count=20, seed=0):
    """Stand-ins: two kinds of digits, with a number of their own in one pixel, and two kinds of images, likewise."""
    rng = np.random.default_rng(seed)
    digits = [rng.integers(100, 200, (n, 28, 28), dtype=np.uint8) for n in (9, 7)]
    images = [rng.integers(100, 200, (n, 32, 32, 3), dtype=np.uint8) for n in (count, count)]
    for start, part in zip((0, 50, 0, 50), (*digits, *images)):
        part[:, 0, 0] = start + np.arange(len(part)).reshape(-1, *[1] * (part.ndim - 3))
    return digits, images


@pytest.mark.parametrize("agree", [0, .5, .75, .95, 1])
def test_dominoes(agree):
    digits, images = small_parts()
    x, y, attribute = spurious.dominoes(digits, images, 3, agree)
    assert x.shape == (40, 64, 32, 3) and x.dtype == np.uint8 and y.dtype == attribute.dtype == np.int64
    assert (y == attribute).mean() == agree
    assert sorted(x[:, 32, 0, 0]) == [*range(20), *range(50, 70)]  # each image once
    for domino, label, kind in zip(x, y, attribute):
        number = domino[32, 0, 0]
        assert label == number // 50
        np.testing.assert_array_equal(domino[32:], images[label][number % 50])
        number = domino[2, 2, 0]
        assert kind == number // 50
        padded = np.pad(digits[kind][number % 50], 2)
        np.testing.assert_array_equal(domino[:32], np.stack([padded] * 3, -1))
    for kind in (0, 1):  # no digit is used twice more often than another
        times = np.bincount(x[attribute == kind][:, 2, 2, 0] % 50, minlength=len(digits[kind]))
        assert times.max() - times.min() <= 1


def test_dominoes_are_pure():
    digits, images = small_parts()
    before = [part.copy() for part in (*digits, *images)]
    np.random.seed(0)
    first = spurious.dominoes(digits, images, 0)
    again = spurious.dominoes(digits, images, 0)
    other = spurious.dominoes(digits, images, 1)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])
    for part, same in zip((*digits, *images), before):
        np.testing.assert_array_equal(part, same)
    for wrong in (([digits[0], digits[1][:0]], images, 0), (digits, [images[0][:0], images[1]], 0),
                  (digits, images, 0, 1.5), (digits, images, 0, float("nan"))):
        refused(ValueError, "dominoes need both digits and kinds of images", spurious.dominoes, *wrong)


def idx(array):
    """MNIST's file format: a magic number, the shape, the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist_and_cifar(tmp_path, monkeypatch):
    """Stand-ins in the original formats: a training set of 60 digits and 60 images, a test set of half as many. All
    bytes of a training digit are below 100, all of a test digit above."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))
    rng = np.random.default_rng(0)
    raw, batches = tmp_path / "MNIST" / "raw", tmp_path / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    batches.mkdir()
    for name, count, low in (("train", 60, 0), ("t10k", 30, 100)):
        digits = rng.integers(low, low + 100, (count, 28, 28), dtype=np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(digits))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    for name, count in (*((f"data_batch_{k}", 12) for k in range(1, 6)), ("test_batch", 30)):
        labels = np.array([1, 9, 4] * (count // 3))
        pixels = np.tile(labels[:, None] * 20, (1, 3072)).astype(np.uint8)
        (batches / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    return tmp_path


def test_load_dominoes(mnist_and_cifar):
    images = load("dominoes", str(mnist_and_cifar), digits=[2, 5], agree=.9)
    for split, count, agree in (("train", 40, .9), ("test", 20, .5)):
        x, y, attribute = (images[f"{name}_{split}"] for name in ("x", "y", "attribute"))
        assert x.shape == (count, 64, 32, 3) and (y == attribute).mean() == agree and y.sum() == count / 2
        np.testing.assert_array_equal(x[:, 40, 5, 1], np.where(y == 1, 180, 20))  # trucks are label 1
    assert images["x_train"][:, 2:30, 2:30].max() < 100 <= images["x_test"][:, 2:30, 2:30].min()
    assert images["mean"] == pytest.approx(list(images["x_train"].mean((0, 1, 2)) / 255))
    again = load("dominoes", str(mnist_and_cifar), digits=[2, 5], agree=.9)
    np.testing.assert_array_equal(images["x_train"], again["x_train"])
    for digits in ([7, 7], [7, 10], [7], [1, 2, 3], [-1, 3]):
        refused(ValueError, "must be two different digits from 0 to 9", load, "dominoes", "data", digits)


def no_network(*arguments, **more):
    raise urllib.error.URLError("Name or service not known")


def test_dominoes_download(mnist_and_cifar, monkeypatch):
    """A blocked download, and a file that is cut short, name the address, the reason and where to put what."""
    load_them = lambda: load("dominoes", str(mnist_and_cifar))
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops=3: url)
    digits = mnist_and_cifar / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = digits.read_bytes()
    digits.write_bytes(whole[:1000])
    refused(OSError, "MNIST could not be had from http.*over what is there", load_them)
    digits.unlink()
    refused(OSError, r"MNIST could not be had from https://ossci.*Name or service not known.*Put train-images-idx3-"
            r"ubyte.gz, .*t10k-labels-idx1-ubyte.gz into /.*MNIST/raw by hand.*or try --dataset synthetic", load_them)
    digits.write_bytes(whole)
    (mnist_and_cifar / "cifar-10-batches-py" / "data_batch_2").unlink()
    refused(OSError, r"CIFAR-10 could not be had from https://www.cs.toronto.*\(.*Name or service not known.*\). Put "
            r"cifar-10-python.tar.gz into /.* by hand.*or try --dataset synthetic", load_them)


# CelebA: seven images, four for training, one for validation, two for testing


@pytest.fixture
def celeba(tmp_path):
    folder = tmp_path / "celeba"
    names = [f"{i + 1:06d}.jpg" for i in range(7)]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (255, 255, 0), (0, 255, 255), (255, 255, 255)]
    for name, colour in zip(names, colours):
        jpeg(folder / "img_align_celeba" / name, colour, (178, 218))
    rows = [(1, -1), (-1, 1), (1, 1), (-1, -1), (-1, -1), (1, -1), (-1, 1)]  # (blond, male)
    lines = ["7", "5_o_Clock_Shadow Blond_Hair Male Young "]
    lines += [f"{name} -1 {blond:2d} {male:2d}  1" for name, (blond, male) in zip(names, rows)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    splits = [f"{name} {split}" for name, split in zip(names, (0, 0, 0, 1, 0, 2, 2))]
    (folder / "list_eval_partition.txt").write_text("\n".join(splits) + "\n")
    return tmp_path


def test_celeba_folder(celeba, monkeypatch):
    images = load("celeba", str(celeba))
    assert images["y_pool"].tolist() == [1, 0, 1, 0] and images["attribute_pool"].tolist() == [0, 1, 1, 0]
    assert images["y_test"].tolist() == [1, 0] and images["attribute_test"].tolist() == [0, 1]
    assert images["mean"] == [.485, .456, .406] and images["std"] == [.229, .224, .225]
    x = images["x_train"][np.arange(4)]
    assert x.shape == images["x_train"].shape == (4, 224, 224, 3) and x.dtype == np.uint8
    np.testing.assert_allclose(x.mean((1, 2)), [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], atol=3)
    monkeypatch.setattr(spurious, "CELEBA_TRAIN", 3)
    images = load("celeba", str(celeba))
    assert len(images["y_train"]) == images["x_train"].shape[0] == 3 and len(images["y_pool"]) == 4


def test_celeba_crop(celeba):
    """The middle 178 of 218 rows stay: a band painted over the uppermost 15 rows is gone."""
    from PIL import Image
    image = np.zeros((218, 178, 3), np.uint8)
    image[:15] = 255
    Image.fromarray(image).save(celeba / "celeba" / "img_align_celeba" / "000001.jpg")
    assert spurious.celeba(celeba)["x_train"][np.array([0])].max() < 10


def test_celeba_damaged_images(celeba):
    path = celeba / "celeba" / "img_align_celeba" / "000005.jpg"
    path.write_bytes(b"\xff\xd8 this is no JPEG")
    images = spurious.celeba(celeba)
    refused(ValueError, "000005.jpg.: missing, damaged", images["x_train"].__getitem__, np.arange(4))
    path.unlink()
    refused(ValueError, "000005.jpg.: missing, damaged.*No such file", images["x_train"].__getitem__, np.arange(4))


@pytest.mark.parametrize("name, old, new", [
    ("list_attr_celeba.txt", "Blond_Hair", "Blonde"), ("list_attr_celeba.txt", "Male", ""),
    ("list_attr_celeba.txt", "2.jpg -1 -1", "2.jpg -1 yes"), ("list_attr_celeba.txt", "000002.jpg", "2.jpg"),
    ("list_attr_celeba.txt", "7\n", "8\n"), ("list_attr_celeba.txt", "7\n", "x" * 200_000 + "\n"),
    ("list_attr_celeba.txt", "000007.jpg -1 -1  1  1\n", ""), ("list_attr_celeba.txt", "000003.jpg", ""),
    ("list_eval_partition.txt", "000007.jpg 2\n", ""), ("list_eval_partition.txt", "0000", "8.jpg 2\n0000"),
    ("list_eval_partition.txt", "7.jpg 2", "7.jpg 3"),
    ("list_eval_partition.txt", "7.jpg 2", "7.jpg"), ("list_eval_partition.txt", "000007.jpg", "000008.jpg"),
    ("list_eval_partition.txt", "000007.jpg 2", "y" * 200_000 + " 2")])
def test_celeba_text_files(celeba, name, old, new):
    path = celeba / "celeba" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    refused(ValueError, "list_attr_celeba.txt or list_eval_partition.txt: cut short, or not CelebA's",
            spurious.celeba, celeba)


def test_celeba_empty_text_files(celeba):
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        (celeba / "celeba" / name).write_bytes(b"\x00\xff\xfe")
        refused(ValueError, "cut short, or not CelebA's", spurious.celeba, celeba)
        (celeba / "celeba" / name).write_text("")
        refused(ValueError, "cut short, or not CelebA's", spurious.celeba, celeba)


@pytest.mark.parametrize("name", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_celeba_download(celeba, name, monkeypatch):
    def quota(*arguments, **more):
        raise RuntimeError("Failed to retrieve file url:\n\n\tToo many users have viewed this file recently.")

    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", quota)
    (celeba / "celeba" / name).unlink()
    refused(OSError, r"CelebA could not be had from Google Drive.*Too many users.*Put list_attr_celeba.txt, .* into "
            r"/.*celeba by hand.*--dataset dominoes \(downloads MNIST and CIFAR-10\) or --dataset synthetic",
            spurious.celeba, celeba)


# Waterbirds: fourteen training images (four in the cells with the correlation), one a cell for testing

NAME = "waterbird_complete95_forest2water2"


@pytest.fixture
def waterbirds(tmp_path):
    folder = tmp_path / NAME
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
    images = load("waterbirds", str(waterbirds))
    assert len(images["y_train"]) == 14 and images["y_test"].tolist() == [0, 0, 1, 1]
    assert images["attribute_test"].tolist() == [0, 1, 0, 1] and images["mean"] == [.485, .456, .406]
    x = images["x_train"][np.arange(14)]
    assert x.shape == (14, 224, 224, 3)
    np.testing.assert_allclose(x[..., 0].mean((1, 2)), 40 + 150 * images["y_train"], atol=3)
    np.testing.assert_allclose(x[..., 1].mean((1, 2)), 40 + 150 * images["attribute_train"], atol=3)


@pytest.mark.parametrize("old, new", [
    ("img_filename", "file"), ("split", "part"), (",y,", ",label,"), (".jpg,0,0,0,", ".jpg,2,0,0,"),
    (".jpg,0,0,0,", ".jpg,0,3,0,"), (".jpg,0,0,0,", ".jpg,0,0,yes,"), (".jpg,0,0,0,", ".jpg\n"),
    ("/b/bamboo", "b" * 200_000), (".jpg,0,0,0,", f".jpg,{'9' * 150_000},0,0,"), ("0,001.Bird", '0,"001.Bird')])
def test_waterbirds_table(waterbirds, old, new):
    table = waterbirds / NAME / "metadata.csv"
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))
    refused(ValueError, "metadata.csv: line [0-9]+: needs img_filename, y and place", spurious.waterbirds, waterbirds)


def test_waterbirds_refusals(waterbirds):
    table = waterbirds / NAME / "metadata.csv"
    text = table.read_text()
    table.write_bytes(b"\x00\xff,\n1,2\n")
    refused(ValueError, "metadata.csv: line 2: needs img_filename", spurious.waterbirds, waterbirds)
    for name in ("x" * 1000, '"two\nlines"', "\0", "../../../etc"):
        table.write_text(text.replace("001.Bird/Bird_0.jpg", name, 1))
        read = spurious.waterbirds(waterbirds)["x_train"].__getitem__
        refused(ValueError, "missing, damaged or no image", read, np.arange(14))
    table.write_text(text)
    image = table.parent / "002.Bird" / "Bird_1.jpg"
    whole = image.read_bytes()
    read = spurious.waterbirds(waterbirds)["x_train"].__getitem__
    image.write_bytes(whole[:len(whole) // 2])
    refused(ValueError, "Bird_1.jpg.: missing, damaged", read, np.arange(14))
    image.unlink()
    refused(ValueError, "Bird_1.jpg.: missing, damaged.*No such file", read, np.arange(14))


# Waterbirds' archive


def serve(monkeypatch, data, error=None):
    """What torchvision's download leaves behind, and raises, from now on."""
    def download_url(url, root, filename):
        path = os.path.join(root, filename)
        assert url == spurious.WATERBIRDS and not os.path.exists(path)
        os.makedirs(root, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        if error:
            raise error
    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)


@pytest.fixture
def archive(waterbirds, tmp_path):
    """The bytes of a good archive."""
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as members:
        members.add(waterbirds / NAME, NAME)
    return (tmp_path / "good.tar.gz").read_bytes()


def test_waterbirds_download(archive, tmp_path, monkeypatch):
    """A failed download says what to do; what is cut short is not taken for whole; a good archive is unpacked."""
    new = tmp_path / "new" / "data"
    for _ in range(2):  # the second time the first one's leavings are there
        serve(monkeypatch, archive[:1000], urllib.error.URLError("Name or service not known"))
        refused(OSError, rf"from {spurious.WATERBIRDS} \(.*Name or service not known.*\). Put {NAME}.tar.gz into "
                rf"{new} by hand, .*--dataset dominoes", spurious.waterbirds, new)
    for cut in (50, len(archive) // 2, len(archive) - 4):
        serve(monkeypatch, archive[:cut])
        refused(OSError, f"Waterbirds could not be had.*Put {NAME}.tar.gz into", spurious.waterbirds, new)
        assert not (new / NAME).exists()
        (new / f"{NAME}.tar.gz").unlink()
    serve(monkeypatch, archive)
    assert len(spurious.waterbirds(new)["y_train"]) == 14
    assert sorted(path.name for path in new.iterdir()) == [NAME, f"{NAME}.tar.gz"]
    serve(monkeypatch, b"", AssertionError("not again"))
    assert len(spurious.waterbirds(new)["y_train"]) == 14


def test_waterbirds_bit_errors(archive, tmp_path):
    """One changed byte of a picture, stored uncompressed: only gzip's checksum at the very end can tell."""
    plain = bytearray(gzip.decompress(archive))
    stored = bytearray(gzip.compress(bytes(plain), compresslevel=0))
    stored[stored.index(b"JFIF") + 100] ^= 1
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"{NAME}.tar.gz").write_bytes(stored)
    refused(OSError, "CRC check failed", spurious.waterbirds, tmp_path / "new")
    assert not (tmp_path / "new" / NAME).exists()


def test_waterbirds_interrupted(archive, tmp_path, monkeypatch):
    """Ctrl-C while it unpacks: the next run starts that again, and keeps nothing of what is there."""
    new = tmp_path / "new"
    new.mkdir()
    (new / f"{NAME}.tar.gz").write_bytes(archive)
    with monkeypatch.context() as patch:
        extract, count = tarfile.TarFile.extract, iter(range(100))

        def stop(*arguments, **more):
            if next(count) == 9:
                raise KeyboardInterrupt
            return extract(*arguments, **more)

        patch.setattr(tarfile.TarFile, "extract", stop)
        with pytest.raises(KeyboardInterrupt):
            spurious.waterbirds(new)
    assert not (new / NAME).exists()
    (new / f"{NAME}.part" / NAME / "leftover").write_text("of another archive")
    assert len(spurious.waterbirds(new)["y_train"]) == 14 and not (new / f"{NAME}.part").exists()
    assert not (new / NAME / "leftover").exists()


def hostile(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return member


OUT = "SCRATCH/stolen"  # stands for the scratch folder, which lies beside the data folder


@pytest.mark.parametrize("members", [
    [hostile(OUT)], [hostile("../scratch/stolen")], [hostile(f"{NAME}/../../../scratch/stolen")],
    [hostile(f"{NAME}/link", tarfile.SYMTYPE, "SCRATCH"), hostile(f"{NAME}/link/stolen")],
    [hostile(f"{NAME}/link", tarfile.SYMTYPE, "../../../scratch"), hostile(f"{NAME}/link/stolen")],
    [hostile(f"{NAME}/link", tarfile.SYMTYPE, "metadata.csv")],
    [hostile(f"{NAME}/hard", tarfile.LNKTYPE, "SCRATCH/secret")],
    [hostile(f"{NAME}/hard", tarfile.LNKTYPE, "../scratch/secret")],
    [hostile(f"{NAME}/hard", tarfile.LNKTYPE, f"{NAME}/metadata.csv")],
    [hostile(f"{NAME}/pipe", tarfile.FIFOTYPE)], [hostile(f"{NAME}/character", tarfile.CHRTYPE)],
    [hostile(f"{NAME}/block", tarfile.BLKTYPE)], [hostile(f"{NAME}/two\nlines", tarfile.FIFOTYPE)]])
def test_hostile_archives(tmp_path, members):
    """Each comes behind a good table; nothing is written outside, and the archive is named."""
    new, scratch = tmp_path / "new", tmp_path / "scratch"
    new.mkdir()
    scratch.mkdir()
    (scratch / "secret").write_text("mine")
    table = hostile(f"{NAME}/metadata.csv")
    with tarfile.open(new / f"{NAME}.tar.gz", "w:gz") as tar:
        for member in (table, *members):
            changed = tarfile.TarInfo(member.name.replace("SCRATCH", str(scratch)))
            changed.type, changed.size = member.type, member.size
            changed.linkname = member.linkname.replace("SCRATCH", str(scratch))
            tar.addfile(changed, io.BytesIO(b"evil"))
    refused(OSError, f"could not be had.*{NAME}.tar.gz", spurious.waterbirds, new)
    assert [path.name for path in scratch.iterdir()] == ["secret"] and (scratch / "secret").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "scratch"]
    assert not (new / NAME).exists()


# The cells


def test_cells_unequal_and_empty():
    y = np.array([0] * 200 + [0] * 3 + [1] * 56 + [1] * 300)
    a = np.array([0] * 200 + [1] * 3 + [0] * 56 + [1] * 300)
    number = np.arange(len(y))
    x = np.stack([number // 256, number % 256], 1).astype(np.uint8)[:, None, None]  # an image tells which it is

    def drawn(seed, keep=number):
        images = {"x_test": x, "y_test": y, "attribute_test": a}
        cells = spurious.watch(images, "test", keep, seed, types.SimpleNamespace(group_size=150, device="cpu"))
        index = (256 * cells["x"][:, 0, 0, 0].int() + cells["x"][:, 1, 0, 0]).numpy()
        assert np.array_equal(cells["y"], y[index])
        return cells["sizes"], np.split(index, np.cumsum(cells["sizes"])[:-1])

    sizes, cells = drawn(0)
    assert sizes == [150, 3, 56, 150]
    for name, index in zip(("00", "01", "10", "11"), cells):
        assert (y[index] == int(name[0])).all() and (a[index] == int(name[1])).all() and (np.diff(index) > 0).all()
    assert not np.array_equal(cells[3], drawn(1)[1][3])
    inside = np.delete(number, np.arange(100))
    assert min(drawn(0, inside)[1][0]) >= 100
    with pytest.raises(ValueError, match="no test image has label 0 and attribute 1"):
        drawn(0, np.delete(number, [200, 201, 202]))


def test_with_correlation():
    assert spurious.with_correlation(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1])) == ["00", "11"]
    assert spurious.with_correlation(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])) == ["00", "10"]
    with pytest.raises(ValueError, match="label 0 has both attributes equally often"):
        spurious.with_correlation(np.array([0, 0, 1]), np.array([0, 1, 1]))


def test_averages_by_hand():
    accuracy = {"00": .9, "01": .5, "10": .2, "11": 1.0}
    entry = {}
    for start, add in (("", 0), ("test_", -.1)):
        for cell, value in accuracy.items():
            entry[f"{start}cell_{cell}_acc"] = entry[f"{start}cell_{cell}_loss"] = value + add
    share = {"00": .5, "01": .1, "10": .1, "11": .3}
    expected = {"mean_train_acc": .45 + .05 + .02 + .3, "mean_train_loss": .82, "with_acc": .95, "against_acc": .35,
                "balanced_train_acc": .65, "worst_train_acc": .2, "test_acc": .55, "test_loss": .55,
                "test_with_acc": .85, "test_against_acc": .25, "test_acc_reweighted": .72, "worst_test_acc": .1,
                "with_loss": .95, "against_loss": .35, "test_with_loss": .85, "test_against_loss": .25}
    assert spurious.averages(entry, share, ["00", "11"]) == pytest.approx(expected)
    women = spurious.averages(entry, share, ["00", "10"])
    assert women["with_acc"] == pytest.approx(.55) and women["against_acc"] == pytest.approx(.75)
