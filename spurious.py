"""Figure 4 of "Lazy vs hasty": a spurious attribute that agrees with the label for most training images.

    python spurious.py --quick                        a demonstration on synthetic images, no download
    python spurious.py --dataset celeba               the paper's figure: blond hair is the label, gender the attribute
    python spurious.py --dataset waterbirds           the paper's figure: land or water bird, in front of land or water
    python spurious.py --dataset FILE.npz             your own images, with attribute_train and attribute_test

The claim: at an equal training loss, the rich network (alpha = 1) leans on the attribute more than the lazy one
(alpha = 100). What agrees with the attribute is easy and it hastens there; the cells against it stay behind.

--quick takes 33 seconds on two CPU cores; CelebA and Waterbirds were not run (2026-11-24). It prints, among others,

    alpha = 1 - 100, paired by seed (95 % interval from three seeds on)
      loss                        gap              against_acc           worst_test_acc                 test_acc
      0.25       0.258 [0.000, 0.516]   -0.092 [-0.190, 0.006]   -0.073 [-0.181, 0.036]  -0.031 [-0.060, -0.001]
      0.23       0.341 [0.156, 0.526]   -0.099 [-0.216, 0.019]   -0.074 [-0.185, 0.037]  -0.035 [-0.061, -0.008]

A cell is a (label, attribute) pair: "10" is label 1 with attribute 0. For either label the cell with the larger share
of the training set goes *with* the correlation, the other *against* it. (In CelebA women are the majority of the blond
and, at 52 %, of the others, so with is women and against is men, which is how the paper draws it.)
"""
import csv
import itertools
import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import common

QUICK = dict(dataset="synthetic", alpha=[1.0, 100.0], seeds=[0, 1, 2], epochs=20, width=16, lr=.0005, batch_size=25,
             probe_examples=25, stop_loss=.2, levels=[.3, .26, .25, .24, .23, .22])
CELLS = ("00", "01", "10", "11")
PER_CELL = 150  # examples of a cell that are evaluated: equally many, so that averages over cells are balanced
CELEBA_TRAIN = 15000  # of the 162,770 training images
IMAGENET = {"mean": [.485, .456, .406], "std": [.229, .224, .225]}
WATERBIRDS = "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"


def make_parser():
    p = common.parser(__doc__, "spurious", dataset="celeba", alpha=[.5, 1.0, 100.0], lr=None, batch_size=100,
                      epochs=750, stop_loss=0.0)
    p.add_argument("--lr", type=common.number(float, above=0),
                   help="learning rate, before the division by alpha^2 (default: the paper's, .01, pretrained .001)")
    p.add_argument("--from-scratch", action="store_true",
                   help="waterbirds: CelebA's network instead of the ImageNet-pretrained one")
    return p


# The data: x_train (N, H, W, C) uint8, y_train and attribute_train (N,) in {0, 1}; the same for test; mean and std; and
# for pool, where the training cells are drawn from another set than the training set.


def load(o):
    if o.dataset in ("celeba", "waterbirds"):
        return (celeba if o.dataset == "celeba" else waterbirds)(pathlib.Path(os.path.abspath(o.data_dir)))
    if o.dataset == "synthetic":
        return common.with_statistics(synthetic())
    if not o.dataset.endswith(".npz"):
        raise ValueError(f"--dataset {o.dataset}: not celeba, waterbirds or synthetic, nor the path of an .npz file")
    images = common.load_images(o.dataset)
    for name in ("attribute_train", "attribute_test"):
        if name not in images:
            raise ValueError(f"{o.dataset}: no array {name}, the attribute (0 or 1) of each image")
    if images["y_train"].max() > 1:
        raise ValueError(f"{o.dataset}: labels must be 0 or 1 here, and go up to {images['y_train'].max()}")
    return images


def synthetic(n_train=1500, n_test=800, size=32):
    """A disc (label 0) or a cross (label 1) near the middle, under pixel noise; around it stripes that run across
    (attribute 0) or down (attribute 1). They always lie in the same place and fill the image: the easy feature. They
    agree with the label for 95 % of the training images, half of the test's."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:size, :size]
    images = {}
    for split, n, agree in (("train", n_train, .95), ("test", n_test, .5)):
        y = rng.permutation(np.arange(n) % 2)
        attribute = np.where(rng.permutation(n) < agree * n, y, 1 - y)
        each = lambda values: values[:, None, None]
        dy, dx = (np.abs(at - size / 2 - each(rng.uniform(-3, 3, n))) for at in (row, column))  # (n, size, size)
        r = each(rng.uniform(6, 8, n))
        cross = (np.minimum(dx, dy) < r / 3) & (np.maximum(dx, dy) < r)
        shape = np.where(each(y) == 1, cross, dx**2 + dy**2 < r**2)
        stripes = np.cos(2 * np.pi / 8 * np.where(each(attribute) == 1, column, row))
        x = np.where(shape, 1, .4 * stripes)[..., None] + .5 * rng.normal(size=(n, size, size, 3))
        images.update({f"x_{split}": (128 + 50 * x).clip(0, 255).astype(np.uint8), f"y_{split}": y,
                       f"attribute_{split}": attribute})
    return images


class Files:
    """JPEGs that stand where an array (N, 224, 224, 3) is expected: indexing reads them, and `crop` makes them fit."""

    def __init__(self, paths, crop):
        self.paths, self.crop, self.shape = np.array(paths), crop, (len(paths), 224, 224, 3)

    def __getitem__(self, index):
        x = np.empty((len(index), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor() as threads:
            for i, image in enumerate(threads.map(self.read, self.paths[index])):
                x[i] = image
        return x

    def read(self, path):
        from PIL import Image
        try:
            with Image.open(path) as image:
                return np.asarray(self.crop(image.convert("RGB")))
        except FileNotFoundError:
            raise OSError(f"{path}: missing") from None
        except Exception as e:  # damaged bytes make the decoders raise nearly anything
            raise ValueError(f"{path}: damaged, or not an image ({common.first_line(e)})") from None


def celeba(data_dir):
    """Blond hair is the label, male the attribute; the first 15,000 training images train. As published, the training
    cells are drawn from the whole training split: most of these images are not trained on."""
    from torchvision.datasets import CelebA
    from torchvision.transforms import CenterCrop, Compose, Resize
    folder, jpegs = data_dir / "celeba", data_dir / "celeba" / "img_align_celeba"
    texts = [name for _, _, name in CelebA.file_list if name.endswith(".txt")]
    missing = [path.name for path in (jpegs, *(folder / name for name in texts)) if not path.exists()]
    if missing:
        try:
            CelebA(data_dir, download=True)
        except Exception as e:  # the helper package it needs, gdown, has errors of its own, such as a quota
            raise OSError(f"CelebA could not be fetched from Google Drive ({common.first_line(e)}). Put "
                          f"{', '.join(missing)} into {folder} by hand (img_align_celeba is the folder of JPEGs in "
                          "img_align_celeba.zip), or try --dataset synthetic") from None

    class ByContent(CelebA):  # torchvision would refuse files that were put there by hand without saying which
        def _check_integrity(self):
            if self.split == "train" and not super()._check_integrity():
                print(f"note: the text files in {folder} are not the published ones by checksum; going on with them")
            return True

    images, there = dict(IMAGENET), set(os.listdir(jpegs))
    for split, name in (("train", "pool"), ("test", "test")):
        try:
            part = ByContent(data_dir, split)
        except (ValueError, IndexError, TypeError, csv.Error) as e:
            raise ValueError(f"{folder}: {', '.join(texts)}: one is not in CelebA's format "
                             f"({common.first_line(e)})") from None
        if not {"Blond_Hair", "Male"} <= set(part.attr_names):
            raise ValueError(f"{folder}/list_attr_celeba.txt: its header does not name Blond_Hair and Male")
        absent = [file for file in part.filename if file not in there]
        if absent:
            raise OSError(f"{jpegs / absent[0]}: missing, as {len(absent)} of the {len(part)} {split} images")
        crop = Compose([CenterCrop(178), Resize(224)])
        images[f"x_{name}"] = Files([str(jpegs / file) for file in part.filename], crop)
        images[f"y_{name}"] = part.attr[:, part.attr_names.index("Blond_Hair")].numpy()
        images[f"attribute_{name}"] = part.attr[:, part.attr_names.index("Male")].numpy()
    return {**images, "x_train": Files(images["x_pool"].paths[:CELEBA_TRAIN], images["x_pool"].crop),
            "y_train": images["y_pool"][:CELEBA_TRAIN], "attribute_train": images["attribute_pool"][:CELEBA_TRAIN]}


def waterbirds(data_dir):
    """Land bird 0 or water bird 1 (label) pasted on a picture of land 0 or water 1 (attribute)."""
    from torchvision.transforms import CenterCrop, Compose, Resize
    folder = data_dir / WATERBIRDS.split("/")[-1].split(".")[0]
    table = folder / "metadata.csv"
    if not table.exists():
        fetch_waterbirds(folder)
    with open(table, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"img_filename", "y", "split", "place"} <= set(rows[0]):
        raise ValueError(f"{table}: needs a header with img_filename, y, split, place, and rows below it")
    for i, row in enumerate(rows, start=2):
        if row["y"] not in ("0", "1") or row["place"] not in ("0", "1") or row["split"] not in ("0", "1", "2"):
            raise ValueError(f"{table}: line {i}: y and place must be 0 or 1, split 0, 1 or 2")
        if not (folder / row["img_filename"]).is_file():
            raise OSError(f"{folder / row['img_filename']}: missing, though metadata.csv lists it")
    images = dict(IMAGENET)
    for split, number in (("train", "0"), ("test", "2")):
        part = [row for row in rows if row["split"] == number]
        images[f"x_{split}"] = Files([str(folder / row["img_filename"]) for row in part],
                                     Compose([Resize(256), CenterCrop(224)]))
        for name, column in (("y", "y"), ("attribute", "place")):
            images[f"{name}_{split}"] = np.array([int(row[column]) for row in part], np.int64)
    return images


def fetch_waterbirds(folder):
    """Download and unpack. No checksum is published: gzip's own and the table of images tell whether all is there. What
    is not finished has a name ending in .part, and is never taken for whole."""
    from torchvision.datasets.utils import download_url, extract_archive
    archive, part = (folder.with_name(folder.name + end) for end in (".tar.gz", ".part"))
    try:
        if not archive.exists():
            download = archive.with_name(archive.name + ".part")
            download.unlink(missing_ok=True)  # torchvision would take it for the file
            download_url(WATERBIRDS, folder.parent, download.name)
            os.replace(download, archive)
        extract_archive(archive, part)
        os.replace(part / folder.name, folder)
        part.rmdir()
    except Exception as e:  # damaged bytes make tarfile raise nearly anything
        what = "is damaged or cut short, delete it" if archive.exists() else f"could not be fetched from {WATERBIRDS}"
        raise OSError(f"{archive.name} {what} ({common.first_line(e)}). Put it into {folder.parent} by hand, or try "
                      "--dataset synthetic") from None


def check_memory(images, o):
    """State what the training images take; ValueError if the device cannot hold them."""
    shape = (min(o.subset or math.inf, len(images["y_train"])), *images["x_train"].shape[1:])
    need, have = math.prod(shape) / 1e9, memory(o.device)
    print(f"training images: {' x '.join(map(str, shape))} bytes = {need:.3g} GB, kept on {o.device}")
    if o.device.type == "cpu":
        need *= 2  # as they are read, and as Examples holds them
    if need > have:
        raise ValueError(f"the training images need {need:.3g} GB, {o.device} has {have:.3g}: try a smaller --subset")


def memory(device):
    """GB: what is free on a CUDA device; all there is for the CPU, where "free" leaves out what caches give back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    known = device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if known else math.inf


# The groups


def choose_cells(y, attribute, seed, where):
    """{"00": indices, ...}: up to PER_CELL examples of each (label, attribute). ValueError if there is none of one."""
    members = {c: np.flatnonzero((y == int(c[0])) & (attribute == int(c[1]))) for c in CELLS}
    cells = {c: common.some(members[c], PER_CELL, seed) for c in CELLS}
    print(f"{where} cells: " + ", ".join(f"{c} {len(cells[c])} of {len(members[c])}" for c in CELLS))
    for c in CELLS:
        if not len(cells[c]):
            raise ValueError(f"no {where} image has label {c[0]} and attribute {c[1]}: each cell needs at least one")
    return cells


def with_correlation(y, attribute):
    """The two cells that hold the majority of either label: ["00", "11"] where attribute and label mostly agree."""
    ones = [(attribute[y == label] == 1).mean() for label in (0, 1)]
    if .5 in ones:
        raise ValueError(f"label {ones.index(.5)} has both attributes equally often: no cell goes with a correlation")
    return [f"{label}{int(share > .5)}" for label, share in enumerate(ones)]


def averages(entry, share, agree):
    """What follows from the losses and accuracies of the cells in `entry`. share: each cell's part of the training set.
    mean_train_ and _reweighted weight the cells by it, all others equally. agree: the cells with the correlation."""
    disagree = [c for c in CELLS if c not in agree]
    mean = lambda start, what, cells=CELLS: sum(entry[f"{start}cell_{c}_{what}"] for c in cells) / len(cells)
    result = {f"{start}{name}_{what}": mean(start, what, cells) for start in ("", "test_") for what in ("loss", "acc")
              for name, cells in (("with", agree), ("against", disagree))}
    for what in ("loss", "acc"):
        result[f"mean_train_{what}"] = sum(share[c] * entry[f"cell_{c}_{what}"] for c in CELLS)
        result[f"test_{what}"] = mean("test_", what)
    return {**result, "balanced_train_acc": mean("", "acc"),
            "test_acc_reweighted": sum(share[c] * entry[f"test_cell_{c}_acc"] for c in CELLS),
            "worst_train_acc": min(entry[f"cell_{c}_acc"] for c in CELLS),
            "worst_test_acc": min(entry[f"test_cell_{c}_acc"] for c in CELLS)}


def prepare(images, seed, o):
    """The data of one seed, the same for every alpha: the training set, and the cells that are watched."""
    y, attribute, statistics = images["y_train"], images["attribute_train"], (images["mean"], images["std"])
    keep = common.training_indices(images, seed, o)
    # In CelebA women hold 94 % of the blond, but a bare 52 % of the others: small subsets could tip it over.
    agree = ["00", "10"] if o.dataset == "celeba" else with_correlation(y, attribute)
    share = {c: float(((y[keep] == int(c[0])) & (attribute[keep] == int(c[1]))).mean()) for c in CELLS}
    watched = {}
    for start, name in (("", "pool" if "x_pool" in images else "train"), ("test_", "test")):
        inside = keep if name == "train" else np.arange(len(images[f"y_{name}"]))
        cells = choose_cells(images[f"y_{name}"][inside], images[f"attribute_{name}"][inside], seed,
                             "test" if start else "training")
        index = inside[np.concatenate(list(cells.values()))]
        watched[start] = (common.Examples(images[f"x_{name}"][index], images[f"y_{name}"][index], *statistics, o),
                          [len(members) for members in cells.values()])
    return common.Examples(images["x_train"][keep], y[keep], *statistics, o), watched, share, agree


def network(o, channels):
    """One logit. celeba and waterbirds: torchvision's ResNet18, as in the paper; else common's, of --width."""
    if o.dataset not in ("celeba", "waterbirds"):
        return common.resnet18(1, channels, o.width)
    from torchvision.models import ResNet18_Weights, resnet18
    if o.dataset == "celeba" or o.from_scratch:
        return resnet18(norm_layer=torch.nn.Identity, num_classes=1)
    model, weights = resnet18(), ResNet18_Weights.IMAGENET1K_V1
    try:
        model.load_state_dict(weights.get_state_dict(model_dir=o.data_dir, check_hash=True, weights_only=True))
    except Exception as e:  # no network, a wrong checksum, or a damaged or different file
        raise OSError(f"the ImageNet weights could not be had from {weights.url} ({common.first_line(e)}). Put "
                      f"{weights.url.split('/')[-1]} into {os.path.abspath(o.data_dir)} by hand, or train the network "
                      "without batch norm instead: --from-scratch") from None
    model.fc = torch.nn.Linear(model.fc.in_features, 1)
    return model.eval()  # batch norm's statistics stay ImageNet's; its scales and shifts train


def run(alpha, seed, images, data, o):
    """Train f^alpha from one seed; its records go to OUT/alpha=ALPHA_seed=SEED/log.jsonl."""
    train, watched, share, agree = data
    with common.seeded("init", seed):
        model = network(o, train.x.shape[1])
    model = model.to(o.device, o.dtype)
    test = watched["test_"][0]
    probe_x = test.pixels(test.index()[::max(1, len(test) // o.probe_examples)][:o.probe_examples])  # some of each cell

    identity = common.identity_of(o, alpha, seed, images, model)
    with common.run_folder(o, common.folder_of(o, alpha, seed), identity) as folder:
        centered = common.center(model, alpha)
        for examples, _ in watched.values():
            examples.cache_f0(centered)

        def evaluate():
            entry = {}
            for start, (examples, sizes) in watched.items():
                f = examples.predict(centered, examples.index())
                for c, f_cell, y_cell in zip(CELLS, f.split(sizes), examples.y.split(sizes)):
                    entry[f"{start}cell_{c}_loss"], entry[f"{start}cell_{c}_acc"] = common.measure(f_cell, y_cell)
            return {**entry, **averages(entry, share, agree)}

        return common.train(folder, centered, train, probe_x, evaluate, o, seed, num_classes=2, streak=12)


# What follows from the records


COLUMNS = {"gap": lambda r: common.minus(r["against_loss"], r["with_loss"]),
           **{key: lambda r, key=key: r[key] for key in (
               "with_acc", "against_acc", "worst_train_acc", "test_with_acc", "test_against_acc", "worst_test_acc",
               "test_acc", "test_acc_reweighted")}}


def at_crossing(records, x, level, y):
    """y where x passes `level` upwards for the last time, on a line between the probes around it. None if never."""
    value = None
    for a, b in zip(records, records[1:]):
        if a[x] < level <= b[x]:
            value = a[y] + (level - a[x]) / (b[x] - a[x]) * (b[y] - a[y])
    return value


def at_equal_accuracy(o, runs):
    """The paper's readings: accuracy of the cells against the correlation where those with it pass .8, on training and
    on test images; test accuracy at a training accuracy; the end. Per alpha over seeds, and paired by seed."""
    level = .85 if o.dataset == "celeba" else .9
    readings = {"against_acc at with_acc .8": lambda r: at_crossing(r, "with_acc", .8, "against_acc"),
                "the same on test": lambda r: at_crossing(r, "test_with_acc", .8, "test_against_acc"),
                f"test_acc at train {level}": lambda r: at_crossing(r, "mean_train_acc", level, "test_acc"),
                "against_acc at the end": lambda r: r[-1]["against_acc"],
                "test_acc at the end": lambda r: r[-1]["test_acc"]}
    value = {name: {a: {s: of(r) for s, r in runs[a].items()} for a in runs} for name, of in readings.items()}
    alphas = {f"{a:g}": {name: common.spread(v[a].values()) for name, v in value.items()} for a in runs}
    minus = lambda a, b: [common.minus(a[s], b[s]) for s in a if s in b]
    paired = {f"{a:g} - {b:g}": {name: common.spread(minus(v[a], v[b]), interval=True) for name, v in value.items()}
              for a, b in itertools.combinations(runs, 2)}
    print("\nat equal accuracy, where it is passed for the last time")
    print("  alpha   " + "".join(f"{name:>27}" for name in readings))
    for alpha, row in [*alphas.items(), *paired.items()]:
        print(f"{alpha:>9} " + "".join(f"{common.cell(row[name]):>27}" for name in readings))
    return {"alphas": alphas, "paired": paired}


def summarise(o, runs, classes):
    """Tables at equal mean training loss and at equal accuracy; prints and returns them."""
    levels = common.loss_levels(classes, *o.levels)
    summary = common.summarise(runs, COLUMNS, levels)
    shown = ["gap", "against_acc", "worst_test_acc", "test_acc"]
    shown += ["test_acc_reweighted"] if o.dataset == "waterbirds" else ["with_acc"]  # the literature's "average"
    print("\nwith, against: the cells with and against the correlation; gap: loss against minus loss with")
    for alpha, part in summary["alphas"].items():
        common.print_table(f"alpha = {alpha}, at equal mean training loss", part, shown, levels)
    for pair, part in summary["paired"].items():
        common.print_table(f"alpha = {pair}, paired by seed (95 % interval from three seeds on)", part, shown[:4],
                           levels)
    summary["at_equal_accuracy"] = at_equal_accuracy(o, runs)
    return summary


def trajectory(ax, seeds, x, y, **style):
    """y against x in the order of training: each run thin, and their mean at equal training loss."""
    runs = [np.array([(-r["mean_train_loss"], r[x], r[y]) for r in records if r["mean_train_loss"] is not None]).T
            for records in seeds]
    progress = [np.maximum.accumulate(run[0]) for run in runs]
    grid = np.linspace(max(p[0] for p in progress), min(p[-1] for p in progress), 100)
    if len(runs) > 1:
        for _, u, v in runs:
            ax.plot(u, v, color=style["color"], linewidth=.6, alpha=.4)
        runs = [(grid, *(np.mean([np.interp(grid, p, run[k]) for p, run in zip(progress, runs)], 0) for k in (1, 2)))]
    ax.plot(*runs[0][1:], **style)


def draw(o, runs):
    """spurious.png: the three panels of the paper's Figure 4, and what a user wants to know first, the worst group."""
    from matplotlib.figure import Figure
    major, minor = ("women", "men") if o.dataset == "celeba" else ("with the correlation", "against it")
    figure = Figure(figsize=(8.3, 7.4), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    panels = ((a, "with_acc", f"training accuracy, {major}", "against_acc", f"training accuracy, {minor}"),
              (b, "test_with_acc", f"test accuracy, {major}", "test_against_acc", f"test accuracy, {minor}"),
              (c, "mean_train_acc", "training accuracy", "test_acc", "test accuracy, cells weighted equally"))
    for colour, (alpha, seeds) in zip(itertools.cycle(common.COLOURS), runs.items()):
        style = dict(color=colour, label=common.alpha_label(alpha))
        for ax, x, _, y, _ in panels:
            trajectory(ax, seeds.values(), x, y, **style)
        common.band(d, seeds.values(), lambda r: r["mean_train_loss"], lambda r: r["worst_test_acc"], **style)
    for ax, _, x_label, _, y_label in panels:
        ax.set(xlabel=x_label, ylabel=y_label)
    for ax in (a, b):
        ax.axline((.5, .5), slope=1, color="#999999", linestyle=":", linewidth=1)  # both groups equally well
    d.set(xlabel="mean training loss (training goes to the right)", ylabel="accuracy of the worst test cell")
    d.invert_xaxis()
    a.legend()
    common.save_figure(figure, o.out, "spurious")


def main(argv=None, **options):
    """Run, draw and conclude, with the command line's options as keywords: main(alpha=[1, 100], quick=True). Returns
    the summary; raises ValueError or OSError for bad input."""
    o = common.parse(make_parser(), QUICK, argv, options)
    if not o.draw_only:
        o.lr = o.lr or (.001 if o.dataset == "waterbirds" and not o.from_scratch else .01)
        images = load(o)
        check_memory(images, o)
    data = {}  # of the seed at hand, for all its alphas: the images may have to be read from files

    def run_one(alpha, seed):
        if seed not in data:
            data.clear()
            data[seed] = prepare(images, seed, o)
        return run(alpha, seed, images, data[seed], o)

    return common.sweep(o, run_one, summarise, draw)


if __name__ == "__main__":
    common.command_line(main)
