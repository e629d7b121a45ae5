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

--quick takes 78 s of CPU (AMD EPYC, 2026-11-29). It prints, before the tables, that the claim holds: gap at alpha = 1
minus that at alpha = 100 is +0.381 [0.161, 0.601] at mean_train_loss 0.243 and +0.638 [0.145, 1.13] at mean_train_loss
0.208 (n = 3; resnet18, binary_cross_entropy).
"""
import csv
import pathlib
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

import common
import experiment

QUICK = dict(dataset="synthetic", alpha=[1.0, 100.0], seeds=[0, 1, 2], epochs=20, width=16, lr=.001, batch_size=50,
             probe_examples=10, group_size=75, stop_loss=.2)
CELLS = ("00", "01", "10", "11")  # label and attribute
CELEBA_TRAIN = 15000  # of the 162,770 training images, as in the paper
WATERBIRDS = "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"
OFFLINE = "by hand, over what is there, or try --dataset dominoes (downloads MNIST and CIFAR-10) or synthetic (offline)"
PAPER = {"celeba": {.5: {.8: .56}, 1: {.8: .58}, 100: {.8: .63}},  # {alpha: {accuracy with: accuracy against}}
         "waterbirds": {.5: {.8: .37}, 1: {.8: .48}, 100: {.8: .54}}}


def binary_cross_entropy(f, y):  # of outputs f (n, 1) and labels y (n,) of 0 and 1
    return F.binary_cross_entropy_with_logits(f[:, 0], y.to(f.dtype))


loss_of = binary_cross_entropy  # whatever stands here is trained on, probed and compared


def load(o):
    """The data set that --dataset names, as experiment.load_images gives it. celeba and waterbirds: x_ are Files;
    celeba has x_pool etc., too. Raises BadInput."""
    data_dir = pathlib.Path(o.data_dir).absolute()
    if o.dataset == "celeba":
        return celeba(data_dir)  # its cells do not depend on the seed
    if o.dataset == "waterbirds":
        images = waterbirds(data_dir)
    elif o.dataset == "dominoes":
        images = experiment.with_statistics(mnist_on_cifar(data_dir, o.digits, o.agree))
    elif o.dataset == "synthetic":
        images = experiment.with_statistics(synthetic())
    elif o.dataset.endswith(".npz"):
        images = experiment.load_images(o.dataset)
    else:
        raise experiment.BadInput(f"--dataset {o.dataset}: must be celeba, waterbirds, dominoes, synthetic or an .npz")
    for name in ("y_train", "attribute_train", "y_test", "attribute_test"):
        if set(images.get(name, [])) != {0, 1}:
            raise experiment.BadInput(f"{o.dataset}: {name} must hold both 0 and 1")
    for seed in o.seeds:  # before the first run trains
        keep = experiment.training_indices(images, seed, o)
        need_cells(images["y_train"][keep], images["attribute_train"][keep], f"training image (--subset, seed {seed})")
    need_cells(images["y_test"], images["attribute_test"], "test image")
    return images


def correlated(y, agree, rng):
    """An attribute (N,) equal to the label y (N,) for the exact share `agree` of examples, drawn by rng."""
    agrees = rng.permutation(len(y)) < round(agree * len(y))
    return np.where(agrees, y, 1 - y)


def synthetic(n_train=1500, n_test=800, size=32):
    """A disc (label 0) or cross (1) over the easy feature, stripes across (attribute 0) or down (1), under noise."""
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
    """One split of the MNIST-CIFAR dominoes (Shah et al., NeurIPS 2020), x (N, 64, 32, 3), y and attribute (N,): digits
    above images. digits: two arrays (n, 28, 28), of attribute 0 and 1; images: two (n, 32, 32,
    3), of label 0 and 1, each used once. agree: the exact share of images whose attribute is their label."""
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
    """Dominoes of automobiles (label 0) and trucks (1); in the test ones the digit says nothing about the label."""
    from torchvision.datasets import CIFAR10, MNIST
    images = {}
    for seed, (split, share) in enumerate((("train", agree), ("test", .5))):
        with experiment.explained(f"Put {CIFAR10.url} into {data_dir}, MNIST's four files from {MNIST.mirrors[0]} into "
                                  f"{data_dir}/MNIST/raw by hand, or try --dataset synthetic (offline)"):
            mnist = MNIST(data_dir, train=split == "train", download=True)
            cifar = CIFAR10(data_dir, train=split == "train", download=True)
        above = [mnist.data[mnist.targets == digit].numpy() for digit in digits]
        below = [cifar.data[np.equal(cifar.targets, label)] for label in (1, 9)]  # automobile, truck
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
        with experiment.explained(f"{path}: missing, damaged or no image; get it anew"), Image.open(path) as image:
            return np.asarray(self.crop(image.convert("RGB")))


def from_files(parts, crop):
    """What load returns, of parts {"train": [(path, label, attribute), ...], "test": likewise}."""
    images = {"mean": [.485, .456, .406], "std": [.229, .224, .225]}  # ImageNet's
    for split, rows in parts.items():
        paths, labels, attributes = zip(*rows)
        images[f"x_{split}"] = Files(paths, crop)
        images[f"y_{split}"], images[f"attribute_{split}"] = np.array(labels), np.array(attributes)
    return images


def celeba(data_dir):
    """Blond or not, male or not. As published, 15,000 images train, and the cells are drawn from all of the split."""
    from torchvision import datasets, transforms
    parts = {}
    for split in ("train", "test"):
        with experiment.explained("CelebA could not be had from Google Drive: put its tables and img_align_celeba/ "
                                  f"into {data_dir}/celeba {OFFLINE}"):
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
    folder = data_dir / WATERBIRDS.split("/")[-1].removesuffix(".tar.gz")
    parts = {"0": [], "1": [], "2": []}  # train, validation, test
    with experiment.explained(f"Waterbirds could not be had: put {WATERBIRDS} into {data_dir} {OFFLINE}"):
        if not folder.exists():
            download_url(WATERBIRDS, data_dir)
            with tarfile.open(f"{folder}.tar.gz") as members:
                members.extractall(data_dir / "part", filter="data")  # refuses whatever would lie outside
            (data_dir / "part" / folder.name).rename(folder)  # only what is whole
        with open(folder / "metadata.csv", newline="") as file:
            for row in csv.DictReader(file):
                parts[row["split"]].append((str(folder / row["img_filename"]), int(row["y"]), int(row["place"])))
    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    return from_files({"train": parts["0"], "test": parts["2"]}, crop)


def in_cell(cell, y, attribute):
    """Which examples have the label and the attribute of a cell, (N,)."""
    return (y == int(cell[0])) & (attribute == int(cell[1]))


def need_cells(y, attribute, where):
    """Raise BadInput if a (label, attribute) has no example."""
    for cell in CELLS:
        if not in_cell(cell, y, attribute).any():
            raise experiment.BadInput(f"no {where} has label {cell[0]} and attribute {cell[1]}: an empty cell")


def with_correlation(y, attribute):
    """The cells with the majority of either label: ["00", "11"] where attribute and label mostly agree."""
    cells = []
    for label in (0, 1):
        share = np.mean(attribute[y == label])  # of attribute 1
        if share == .5:
            raise experiment.BadInput(f"label {label} has both attributes equally often: there is no correlation")
        cells.append(f"{label}{int(share > .5)}")
    return cells


def averages(entry, share, agree):
    """Means over the cells in `entry`: mean_train_ by their share of the training set, all others plain."""
    result = {}
    for what in ("loss", "acc"):
        result[f"mean_train_{what}"] = sum(share[cell] * entry[f"cell_{cell}_{what}"] for cell in CELLS)
        result[f"test_{what}"] = sum(entry[f"test_cell_{cell}_{what}"] for cell in CELLS) / 4
        for start in ("", "test_"):
            result[f"{start}with_{what}"] = sum(entry[f"{start}cell_{cell}_{what}"] for cell in agree) / 2
            against = set(CELLS) - set(agree)
            result[f"{start}against_{what}"] = sum(entry[f"{start}cell_{cell}_{what}"] for cell in against) / 2
    return result


def network(images, o):
    """One logit, on standardised images: your own goes here. celeba and waterbirds: torchvision's ResNet18."""
    if o.dataset not in ("celeba", "waterbirds"):
        return common.resnet18(1, images["x_train"].shape[3], o.width)
    from torchvision.models import ResNet18_Weights, resnet18
    if o.dataset == "celeba":
        return resnet18(norm_layer=torch.nn.Identity, num_classes=1)
    model, weights = resnet18(), ResNet18_Weights.IMAGENET1K_V1
    with experiment.explained(f"The ImageNet weights could not be had: put {weights.url} into {o.data_dir} {OFFLINE}"):
        model.load_state_dict(weights.get_state_dict(model_dir=o.data_dir, check_hash=True, weights_only=True))
    model.fc = torch.nn.Linear(model.fc.in_features, 1)
    return model.eval()  # batch norm's statistics stay ImageNet's; its scales train


def run(alpha, seed, images, o):
    """Train f^alpha from one seed. The data, and the cells that are watched, are the same for every alpha."""
    keep = experiment.training_indices(images, seed, o)
    labels, attribute = images["y_train"][keep], images["attribute_train"][keep]
    x, y = experiment.on_device(images["x_train"][keep], o), torch.as_tensor(labels, device=o.device)
    # In CelebA women hold 94 % of the blond, but a bare 52 % of the others: small subsets could tip it over.
    agree = ["00", "10"] if o.dataset == "celeba" else with_correlation(images["y_train"], images["attribute_train"])
    share = {cell: np.mean(in_cell(cell, labels, attribute)).item() for cell in CELLS}
    name, inside = ("pool", np.arange(len(images["y_pool"]))) if "x_pool" in images else ("train", keep)
    watched = {"": watch(images, name, inside, seed, o),
               "test_": watch(images, "test", np.arange(len(images["y_test"])), seed, o)}

    # f^alpha(x) = alpha (f_theta(x) - f_theta0(x)), trained at lr / alpha^2.
    with experiment.seeded("init", seed):
        model = network(images, o)
    model = torch.nn.Sequential(common.Standardise(images["mean"], images["std"]), model).to(o.device, o.dtype)
    f = common.center(model, alpha)
    optimizer = common.scaled_sgd(f, o.lr, o.momentum)
    f0 = experiment.outputs(f.model0, x)  # never changes: computed once
    for cells in watched.values():
        cells["f0"] = experiment.outputs(f.model0, cells["x"])

    def probe():
        record = {}
        for start, cells in watched.items():
            outputs = experiment.outputs(f, cells["x"], cells["f0"]).split(cells["sizes"])
            for cell, f_cell, y_cell in zip(CELLS, outputs, cells["y"].split(cells["sizes"])):
                record[f"{start}cell_{cell}_loss"] = loss_of(f_cell, y_cell).item()
                record[f"{start}cell_{cell}_acc"] = ((f_cell[:, 0] > 0) == (y_cell > 0)).double().mean().item()
        return {**record, **averages(record, share, agree)}

    x_test = watched["test_"]["x"]
    some = x_test[::max(1, len(x_test) // o.probe_examples)][:o.probe_examples]  # of each cell
    for i in experiment.minibatches(o, seed, f, optimizer, len(y), probe, experiment.linearity(f, some)):
        loss = loss_of(f(x[i], f0[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def watch(images, name, inside, seed, o):
    """What a probe evaluates: up to --group-size of each cell `inside` a set, as {"x", "y", "sizes" of the cells}."""
    y, attribute = images[f"y_{name}"][inside], images[f"attribute_{name}"][inside]
    cells = [experiment.draw_some(inside[in_cell(cell, y, attribute)], o.group_size, seed) for cell in CELLS]
    index = np.concatenate(cells)
    return {"x": experiment.on_device(images[f"x_{name}"][index], o), "sizes": [len(cell) for cell in cells],
            "y": torch.as_tensor(images[f"y_{name}"][index], device=o.device)}


def derive(curve):
    """What follows from the smoothed curves of a run."""
    return {**curve, "gap": curve["against_loss"] - curve["with_loss"]}


def conclude(o, runs):
    """Print the conclusion and a table a claim. The paper reads accuracies where others first pass a level."""
    on = ("mean_train_loss", "with_acc", "test_with_acc", "mean_train_acc")
    loss, *accuracies = [experiment.at_levels(runs, derive, each) for each in on]
    conclusion = experiment.verdict(
        loss, "gap", "rich networks lean more on the spurious attribute",
        "at the same training loss, the rich networks are further behind where the attribute misleads", o.about)
    experiment.print_table("Gap: loss of the cells against minus loss of those with", loss, "gap")
    for read, quantity in zip(accuracies, ("against_acc", "test_against_acc", "test_acc")):
        experiment.print_table(f"{quantity} where {read.on} first passes a level", read, quantity)
    return [loss, *accuracies], ["gap", "against_loss", "against_acc", "test_against_acc", "test_acc"], conclusion


def draw(o, loss, with_acc, test_with_acc, mean_train_acc):
    """spurious.png: the paper's Figure 4, accuracies and losses of the cells, and the paired difference."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 7.8), layout="constrained")
    (train, difference), (losses, test) = figure.subplots(2, 2)
    experiment.draw(train, with_acc, "against_acc")
    for alpha, points in PAPER.get(o.dataset, {}).items():
        train.plot(points.keys(), points.values(), "x", color=experiment.look(alpha)["color"], markersize=8)
    experiment.draw(test, test_with_acc, "test_against_acc")
    for ax, title in ((train, "(a) training accuracy"), (test, "(d) test accuracy")):
        ax.set(title=title, xlabel="with the correlation", ylabel="against the correlation")
    experiment.draw_differences(difference, loss, "gap")
    experiment.draw(losses, loss, "against_loss", "-", "against the correlation")
    experiment.draw(losses, loss, "with_loss", "--", "with it")
    losses.set(title="(c) loss of the cells", ylabel=f"loss ({o.loss})")
    experiment.save_figure(figure, o, o.script)


def main(*words, **options):
    """Train, conclude, draw: main("--quick") or main(quick=True). Returns the summary; raises ValueError, OSError."""
    rows = [*experiment.IMAGE_OPTIONS,
            ("digits", experiment.natural, [7, 9], "dominoes: two digits; published with 0 and 1, far easier"),
            ("agree", experiment.positive, .95, "dominoes: share of training images whose digit tells the label")]
    o = experiment.parse(__file__, __doc__, rows, QUICK, loss_of, words, options, dataset="celeba", lr=None,
                         alpha=[.5, 1.0, 100.0], epochs=750, batch_size=100, group_size=150)
    if len(set(o.digits)) != 2 or not .5 < o.agree < 1:
        raise experiment.BadInput("--digits must be two different ones, and --agree between .5 and 1")
    o.lr = o.lr or {"dominoes": .002, "waterbirds": .001}.get(o.dataset, .01)
    if o.dataset in ("celeba", "waterbirds"):
        o.jobs = o.jobs or 1  # each process holds all images
    return experiment.sweep(o, lambda: load(o), network, run, conclude, draw)


if __name__ == "__main__":
    experiment.command_line(main)
