"""Figure 4 of "Lazy vs hasty": a spurious attribute that agrees with the label for most training images.

    python spurious.py --quick                        a demonstration on synthetic images, no download
    python spurious.py --dataset dominoes             on a laptop: a digit above an automobile or a truck
    python spurious.py --dataset celeba               the paper's figure: blond hair is the label, gender the attribute
    python spurious.py --dataset waterbirds           the paper's figure: land or water bird, in front of land or water
    python spurious.py --dataset FILE.npz             your own images, with attribute_train and attribute_test

The claim: at an equal training loss, the rich network (alpha = 1) leans on the attribute more than the lazy one
(alpha = 100). What agrees with the attribute is easy and it hastens there; the cells against it stay behind.

A cell is a (label, attribute) pair: "10" is label 1 with attribute 0. For either label the cell with the larger share
of the training set goes *with* the correlation, the other *against* it. (In CelebA with is women, against is men.)

--quick took 36 seconds on two idle CPU cores (AMD EPYC, 2026-11-29), 332 on very busy ones; the README's dominoes 3.5
minutes (alpha = 1) and 11 to 12 (100) a run on one. It prints, before the tables,

    The claim that rich networks lean more on the spurious attribute holds in these runs: gap at alpha = 1 minus
    that at alpha = 100 is +0.440 [0.048, 0.832] at mean_train_loss 0.243 and +0.676 [0.096, 1.256] at
    mean_train_loss 0.208 (n = 3; ResNet18, binary_cross_entropy).
"""
import csv
import os
import pathlib
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

QUICK = dict(dataset="synthetic", alpha=[1.0, 100.0], seeds=[0, 1, 2], epochs=20, width=16, lr=.0005, batch_size=25,
             probe_examples=25, stop_loss=.2)
CELLS = ("00", "01", "10", "11")  # label and attribute
AUTOMOBILE, TRUCK = 1, 9  # CIFAR-10's numbers for them
CELEBA = "Google Drive, see https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
CELEBA_TRAIN = 15000  # of the 162,770 training images, as in the paper
WATERBIRDS = "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"
IMAGENET = {"mean": [.485, .456, .406], "std": [.229, .224, .225]}
DOMINOES = "--dataset dominoes (downloads MNIST and CIFAR-10) or "
WORDS = {"celeba": ("women", "men"), "waterbirds": ("at home", "elsewhere"),
         "dominoes": ("digit agrees", "digit disagrees")}
PAPER = {"celeba": {.5: {.8: .56}, 1: {.8: .58}, 100: {.8: .63}},  # {alpha: {accuracy with: accuracy against}}
         "waterbirds": {.5: {.8: .37}, 1: {.8: .48}, 100: {.8: .54}}}


def binary_cross_entropy(f, y):
    """Of outputs f (n, 1) and labels y (n,) of 0 and 1."""
    return F.binary_cross_entropy_with_logits(f[:, 0], y.to(f.dtype))


loss_of = binary_cross_entropy  # whatever stands here is trained on, probed and compared


def load(o):
    """The data set that --dataset names as a dict: x_train uint8 (N, H, W, C), y_train and attribute_train (N,) of 0
    and 1, the same for test; mean and std per channel. celeba and waterbirds: x_ are Files; celeba: also x_pool etc.
    ValueError or OSError: one line that says what is wrong and what to do."""
    data_dir = pathlib.Path(os.path.abspath(o.data_dir))
    if o.dataset == "celeba":
        return celeba(data_dir)  # its cells do not depend on the seed
    if o.dataset == "waterbirds":
        images = waterbirds(data_dir)
    elif o.dataset == "dominoes":
        images = common.with_statistics(mnist_on_cifar(data_dir, o.digits, o.agree))
    elif o.dataset == "synthetic":
        images = common.with_statistics(synthetic())
    elif o.dataset.endswith(".npz"):
        images = common.load_images(o.dataset)
    else:
        raise ValueError(f"--dataset {o.dataset}: must be celeba, waterbirds, dominoes, synthetic or a file FILE.npz")
    if not {"attribute_train", "attribute_test"} <= set(images) or set(images["y_train"]) != {0, 1}:
        raise ValueError(f"{o.dataset}: needs labels 0 and 1, and attribute_train and attribute_test likewise")
    for seed in o.seeds:  # before the first run trains
        keep = common.training_indices(images, seed, o)
        need_cells(images["y_train"][keep], images["attribute_train"][keep], "training")
    return images


def correlated(y, agree, rng):
    """An attribute (N,) equal to the label y (N,) for the exact share `agree` of examples, drawn by rng."""
    agrees = rng.permutation(len(y)) < round(agree * len(y))
    return np.where(agrees, y, 1 - y)


def synthetic(n_train=1500, n_test=800, size=32):
    """A disc (label 0) or a cross (label 1) near the middle, under pixel noise; around it stripes that run
    across (attribute 0) or down (attribute 1). They always lie in the same place and fill the image: the
    easy feature. They agree with the label for 95 % of the training images, half of the test's."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:size, :size]
    images = {}
    for split, count, agree in (("train", n_train, .95), ("test", n_test, .5)):
        y = rng.permutation(np.arange(count) % 2)
        attribute = correlated(y, agree, rng)
        down = np.abs(row - size / 2 - rng.uniform(-3, 3, (count, 1, 1)))  # (count, size, size)
        across = np.abs(column - size / 2 - rng.uniform(-3, 3, (count, 1, 1)))
        radius = rng.uniform(6, 8, (count, 1, 1))
        disc = across**2 + down**2 < radius**2
        cross = (np.minimum(across, down) < radius / 3) & (np.maximum(across, down) < radius)
        shape = np.where(y[:, None, None] == 1, cross, disc)
        stripes = np.cos(2 * np.pi / 8 * np.where(attribute[:, None, None] == 1, column, row))
        x = np.where(shape, 1, .4 * stripes)[..., None] + .5 * rng.normal(size=(count, size, size, 3))
        images[f"x_{split}"] = (128 + 50 * x).clip(0, 255).astype(np.uint8)
        images[f"y_{split}"], images[f"attribute_{split}"] = y, attribute
    return images


def dominoes(digits, images, seed, agree=.95):
    """One split of the MNIST-CIFAR dominoes: a digit, zero-padded to 32 x 32, above an image (Shah et al., "The
    pitfalls of simplicity bias in neural networks", NeurIPS 2020).

    digits: two arrays uint8 (n, 28, 28), of attribute 0 and of attribute 1. images: two arrays uint8 (n, 32, 32, 3), of
    label 0 and of label 1; each is used once, a digit again where there are too few. agree: the exact share of images
    whose attribute is their label. Returns x uint8 (N, 64, 32, 3), y (N,) and attribute (N,), in an order drawn from
    the seed."""
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], [len(images[0]), len(images[1])])
    attribute = correlated(y, agree, rng)
    x = np.zeros((len(y), 64, 32, 3), np.uint8)
    x[:, 32:] = np.concatenate(images)
    for kind in (0, 1):
        place = np.flatnonzero(attribute == kind)
        drawn = np.resize(rng.permutation(len(digits[kind])), len(place))  # begins again at the end
        x[place, 2:30, 2:30] = digits[kind][drawn][..., None]
    order = rng.permutation(len(y))
    return x[order], y[order], attribute[order]


def mnist_on_cifar(data_dir, digits, agree):
    """Dominoes of automobiles (label 0) and trucks (label 1). Training ones from MNIST's and CIFAR-10's
    training sets, test ones, in which the digit says nothing about the label, from their test sets."""
    from torchvision.datasets import CIFAR10, MNIST
    if digits[0] == digits[1]:
        raise ValueError(f"--digits {digits[0]} {digits[1]}: must be two different digits")
    archives = ", ".join(name for name, checksum in MNIST.resources)
    images = {}
    for seed, (split, share) in enumerate((("train", agree), ("test", .5))):
        with common.fetching("MNIST", MNIST.mirrors[0], archives, data_dir / "MNIST" / "raw"):
            mnist = MNIST(data_dir, train=split == "train", download=True)
        with common.fetching("CIFAR-10", CIFAR10.url, CIFAR10.filename, data_dir):
            cifar = CIFAR10(data_dir, train=split == "train", download=True)
        above = [mnist.data[mnist.targets == digit].numpy() for digit in digits]
        below = [cifar.data[np.equal(cifar.targets, label)] for label in (AUTOMOBILE, TRUCK)]
        x, y, attribute = dominoes(above, below, seed, share)
        images[f"x_{split}"], images[f"y_{split}"], images[f"attribute_{split}"] = x, y, attribute
    return images


class Files:
    """JPEGs in place of an array uint8 (N, 224, 224, 3): indexing reads them, and crop makes them fit."""

    def __init__(self, paths, crop):
        self.paths, self.crop, self.shape = np.array(paths, object), crop, (len(paths), 224, 224, 3)

    def __getitem__(self, index):
        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(self.read, self.paths[index])))

    def read(self, path):
        from PIL import Image
        try:
            with Image.open(path) as image:
                return np.asarray(self.crop(image.convert("RGB")))
        except Exception as error:  # damaged bytes make the decoders raise nearly anything
            raise ValueError(f"{path!r}: missing, damaged or no image; get it anew ({error})") from None


def from_files(parts, crop):
    """What load returns, of parts {"train": [(path, label, attribute), ...], "test": likewise}."""
    images = dict(IMAGENET)
    for split, rows in parts.items():
        images[f"x_{split}"] = Files([row[0] for row in rows], crop)
        images[f"y_{split}"] = np.array([row[1] for row in rows], np.int64)
        images[f"attribute_{split}"] = np.array([row[2] for row in rows], np.int64)
    return images


def celeba(data_dir):
    """Blond hair is the label, male the attribute. As published, the first 15,000 images of the training
    split train, but the training cells are drawn from all of it (the pool): most are not trained on."""
    from torchvision import datasets, transforms
    files = "list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, list_landmarks_align_celeba.txt, " \
            "list_eval_partition.txt, img_align_celeba/"
    parts = {}
    for split in ("train", "test"):
        with common.fetching("CelebA", CELEBA, files, data_dir / "celeba", DOMINOES):
            there = datasets.CelebA(data_dir, split, download=True)  # torchvision verifies the tables' checksums
        both = there.attr[:, [there.attr_names.index(name) for name in ("Blond_Hair", "Male")]]
        paths = [str(data_dir / "celeba" / "img_align_celeba" / name) for name in there.filename]
        parts[split] = list(zip(paths, *both.T.tolist()))
    crop = transforms.Compose([transforms.CenterCrop(178), transforms.Resize(224)])
    return from_files({"train": parts["train"][:CELEBA_TRAIN], "pool": parts["train"], "test": parts["test"]}, crop)


def waterbirds(data_dir):
    """Land bird 0 or water bird 1 (label) pasted on a picture of land 0 or water 1 (attribute)."""
    from torchvision import transforms
    from torchvision.datasets.utils import download_url
    bit, parts = {"0": 0, "1": 1}, {"0": [], "1": [], "2": []}  # 0 train, 1 validation, 2 test
    archive = data_dir / WATERBIRDS.split("/")[-1]
    folder = data_dir / archive.name.removesuffix(".tar.gz")
    if not folder.exists():  # what is not finished has a name ending in .part, and is never taken for whole
        download, unpacked = archive.with_name(f"{archive.name}.part"), folder.with_name(f"{folder.name}.part")
        with common.fetching("Waterbirds", WATERBIRDS, archive.name, data_dir, DOMINOES):
            if not archive.exists():
                download.unlink(missing_ok=True)  # torchvision would take it for the file
                download_url(WATERBIRDS, data_dir, download.name)
                os.replace(download, archive)
            shutil.rmtree(unpacked, ignore_errors=True)
            with tarfile.open(archive) as members:
                members.extractall(unpacked, filter="data")  # refuses whatever would lie outside
            os.replace(unpacked / folder.name, folder)
            shutil.rmtree(unpacked)
    table = folder / "metadata.csv"
    with open(table, newline="", errors="replace") as file:
        try:
            for row in csv.DictReader(file):
                path = str(folder / row["img_filename"])
                parts[row["split"]].append((path, bit[row["y"]], bit[row["place"]]))
        except (KeyError, TypeError, csv.Error) as error:  # a short line is TypeError
            raise ValueError(f"{table}: needs img_filename, y, place and split; got {str(error)[:100]}") from None
    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    return from_files({"train": parts["0"], "test": parts["2"]}, crop)


def in_cell(cell, y, attribute):
    """Which examples have the label and the attribute of a cell, (N,)."""
    return (y == int(cell[0])) & (attribute == int(cell[1]))


def need_cells(y, attribute, where):
    """Raise ValueError if a (label, attribute) has no example; where: "training" or "test"."""
    for cell in CELLS:
        if not in_cell(cell, y, attribute).any():
            raise ValueError(f"no {where} image has label {cell[0]} and attribute {cell[1]}: an empty cell")


def with_correlation(y, attribute):
    """The cells with the majority of either label: ["00", "11"] where attribute and label mostly agree."""
    cells = []
    for label in (0, 1):
        share = np.mean(attribute[y == label])  # of attribute 1
        if share == .5:
            raise ValueError(f"label {label} has both attributes equally often: there is no correlation")
        cells.append(f"{label}{int(share > .5)}")
    return cells


def averages(entry, share, agree):
    """What follows from the losses and accuracies of the cells in `entry`. share: each cell's part of the training set,
    by which mean_train_ weights; all other means are plain. agree: what with_correlation returned."""
    result = {}
    for what in ("loss", "acc"):
        result[f"mean_train_{what}"] = sum(share[cell] * entry[f"cell_{cell}_{what}"] for cell in CELLS)
        result[f"test_{what}"] = sum(entry[f"test_cell_{cell}_{what}"] for cell in CELLS) / 4
        for start in ("", "test_"):
            result[f"{start}with_{what}"] = sum(entry[f"{start}cell_{cell}_{what}"] for cell in agree) / 2
            against = set(CELLS) - set(agree)
            result[f"{start}against_{what}"] = sum(entry[f"{start}cell_{cell}_{what}"] for cell in against) / 2
    return result


def network(o, images):
    """One logit. celeba and waterbirds: torchvision's ResNet18, as in the paper; else common's, of --width."""
    standardise = common.Standardise(images["mean"], images["std"])
    if o.dataset not in ("celeba", "waterbirds"):
        return nn.Sequential(standardise, common.resnet18(1, images["x_train"].shape[3], o.width))
    from torchvision.models import ResNet18_Weights, resnet18
    if o.dataset == "celeba":
        return nn.Sequential(standardise, resnet18(norm_layer=nn.Identity, num_classes=1))
    model, weights = resnet18(), ResNet18_Weights.IMAGENET1K_V1
    name, folder = weights.url.split("/")[-1], os.path.abspath(o.data_dir)
    with common.fetching("The ImageNet weights", weights.url, name, folder, DOMINOES):
        model.load_state_dict(weights.get_state_dict(model_dir=o.data_dir, check_hash=True, weights_only=True))
    model.fc = nn.Linear(model.fc.in_features, 1)
    return nn.Sequential(standardise, model).eval()  # batch norm's statistics stay ImageNet's; its scales train


def run(alpha, seed, images, o):
    """Train f^alpha from one seed; its records go to OUT/alpha=ALPHA_seed=SEED/log.jsonl."""
    # The data, and the cells that are watched: the same for every alpha.
    keep = common.training_indices(images, seed, o)
    labels, attribute = images["y_train"][keep], images["attribute_train"][keep]
    x, y = common.on_device(images["x_train"][keep], o), torch.as_tensor(labels, device=o.device)
    # In CelebA women hold 94 % of the blond, but a bare 52 % of the others: small subsets could tip it over.
    agree = ["00", "10"] if o.dataset == "celeba" else with_correlation(images["y_train"], images["attribute_train"])
    share = {cell: np.mean(in_cell(cell, labels, attribute)).item() for cell in CELLS}
    pool = "pool" if "x_pool" in images else "train"
    inside = np.arange(len(images["y_pool"])) if pool == "pool" else keep
    watched = {"": watch(images, pool, inside, seed, o),
               "test_": watch(images, "test", np.arange(len(images["y_test"])), seed, o)}

    # f^alpha(x) = alpha (f_theta(x) - f_theta0(x)), trained at lr / alpha^2.
    with common.seeded("init", seed):
        model = network(o, images)
    f = common.center(model.to(o.device, o.dtype), alpha)
    optimizer = common.scaled_sgd(f, o.lr, o.momentum)
    f0 = common.outputs(f.model0, x)  # never changes: computed once
    for cells in watched.values():
        cells["f0"] = common.outputs(f.model0, cells["x"])

    def step(i):
        loss = loss_of(f(x[i], f0[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def probe():
        record = {}
        for start, cells in watched.items():
            outputs = common.outputs(f, cells["x"], cells["f0"]).split(cells["sizes"])
            for cell, f_cell, y_cell in zip(CELLS, outputs, cells["y"].split(cells["sizes"])):
                record[f"{start}cell_{cell}_loss"] = loss_of(f_cell, y_cell).item()
                record[f"{start}cell_{cell}_acc"] = ((f_cell[:, 0] > 0) == (y_cell > 0)).double().mean().item()
        return {**record, **averages(record, share, agree)}

    x_test = watched["test_"]["x"]
    some = x_test[::max(1, len(x_test) // o.probe_examples)][:o.probe_examples]  # of each cell
    training = common.Run(o, seed, f, optimizer, len(y), common.Linearity(f, some))
    step = common.graphed(step, training)  # on a GPU one CUDA graph; on a CPU step itself
    for i in training.minibatches(probe):
        step(i)


def watch(images, name, inside, seed, o):
    """Up to --group-size examples of each cell of one set (of those `inside`), drawn with the seed, which a probe
    evaluates: {"x", "y", one cell after the other, "sizes" of the four}."""
    y, attribute = images[f"y_{name}"][inside], images[f"attribute_{name}"][inside]
    need_cells(y, attribute, "test" if name == "test" else "training")
    cells = [common.draw_some(inside[in_cell(cell, y, attribute)], o.group_size, seed) for cell in CELLS]
    index = np.concatenate(cells)
    return {"x": common.on_device(images[f"x_{name}"][index], o), "sizes": [len(cell) for cell in cells],
            "y": torch.as_tensor(images[f"y_{name}"][index], device=o.device)}


def derive(curve):
    """What follows from the smoothed curves of a run."""
    curve["gap"] = curve["against_loss"] - curve["with_loss"]
    return curve


def conclude(o, runs):
    """Print the conclusion and a table a claim; return rows and sentence. The paper reads accuracies: those against the
    correlation where those with it first pass a level, and test accuracy where training accuracy does."""
    rows = common.readings(runs, derive, accuracies=("with_acc", "test_with_acc", "mean_train_acc"))
    pairs = common.differences(rows, ["gap", "against_loss", "against_acc", "test_against_acc", "test_acc"])
    conclusion = common.verdict(runs, rows, pairs, "mean_train_loss", "gap",
                                "rich networks lean more on the spurious attribute", o.about)
    print(f"\n{conclusion}\n\nwith, against: the cells with and against the correlation")
    common.print_table("Gap: loss of the cells against minus loss of those with", rows, pairs, "mean_train_loss", "gap")
    for on, quantity in (("with_acc", "against_acc"), ("test_with_acc", "test_against_acc"),
                         ("mean_train_acc", "test_acc")):
        common.print_table(f"{quantity} where {on} first passes a level", rows, pairs, on, quantity)
    return rows, pairs, conclusion


def draw(o, rows, pairs):
    """spurious.png: the paper's Figure 4, accuracies and losses of the cells, and the paired difference."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 7.8), layout="constrained")
    (train, difference), (losses, test) = figure.subplots(2, 2)
    name = pathlib.Path(o.dataset).stem
    major, minor = WORDS.get(name, ("attribute agrees", "attribute disagrees"))
    for ax, start, title in ((train, "", "(a) training accuracy"), (test, "test_", "(d) test accuracy")):
        common.draw(ax, rows, f"{start}with_acc", f"{start}against_acc")
        ax.set(title=title, xlabel=f"accuracy, {major}", ylabel=f"accuracy, {minor}")
    common.draw_crosses(train, PAPER.get(name, {}))
    common.draw_differences(difference, pairs, "mean_train_loss", "gap")
    common.draw(losses, rows, "mean_train_loss", "against_loss", "-", minor.split()[-1])
    common.draw(losses, rows, "mean_train_loss", "with_loss", "--", major.split()[-1])
    losses.set(title="(c) loss of the cells", ylabel=f"loss ({o.loss})")
    losses.legend(handles=losses.lines[:len({row["alpha"] for row in rows})])
    common.save_figure(figure, o.out, "spurious")
    common.draw_alphas(o, rows, "mean_train_loss", "gap")


def main(*words, **options):
    """Train, conclude and draw, with the command line's words, or its options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    parser = common.image_parser(__file__, __doc__)
    parser.set_defaults(dataset="celeba", alpha=[.5, 1.0, 100.0], epochs=750, lr=None, batch_size=100, group_size=150)
    parser.add_argument("--digits", nargs=2, type=common.number(int, at_least=0, below=10), default=[7, 9], metavar="D",
                        help="dominoes: two digits; published with 0 and 1, far easier")
    parser.add_argument("--agree", type=common.number(float, above=.5, below=1), default=.95, metavar="X",
                        help="dominoes: share of training images whose digit tells the label")
    o = common.parse(parser, QUICK, loss_of, words, options)
    if o.lr is None:
        o.lr = {"dominoes": .002, "waterbirds": .001}.get(o.dataset, .01)
    if o.dataset in ("celeba", "waterbirds"):
        o.jobs = o.jobs or 1  # each process holds all images
    return common.sweep(o, run, conclude, draw, load, o)


if __name__ == "__main__":
    common.command_line(main)
