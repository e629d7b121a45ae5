"""Figure 2 of "Lazy vs hasty": CIFAR-10 by difficulty, measured by C-score.

    python cscore.py --quick                    a demonstration on synthetic images, no download
    python cscore.py --alpha 1 100              the paper's figure (downloads CIFAR-10 and the C-scores)
    python cscore.py --dataset FILE.npz         your own images, with score_train and score_test

The claim: at an equal mean training loss, the rich network (alpha = 1) is further ahead on easy examples and further
behind on hard ones than the lazy network (alpha = 100).

The C-score of an example (Jiang, Zhang, Talwar, Mozer, ICML 2021) is how well networks trained without it predict its
label: near 1 for a typical image, near 0 for an odd one. Decile 1 holds the lowest tenth (hardest), decile 10 the
highest.

--quick takes 59 seconds on two CPU cores (AMD EPYC, 2026-11-25), an epoch of 40,000 images one to two minutes; not
timed on a GPU. --quick ends with

    At equal mean training loss 1.5 the hardest decile's loss is above the easiest's by 1.209 at alpha = 1 and 1.030 at
    alpha = 100, paired difference 0.179 [0.015, 0.344] (3): the rich network hastens to the easy examples, as in the
    paper.
"""
import os
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

OPTIONS = {"deciles": ("reading", [1, 3, 8, 10], "at least 1, at most 10", "which deciles to draw; 1 = hardest")}
QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=16, width=16, lr=.0008, batch_size=25, probe_examples=25,
             stop_loss=1.35, levels=[1.7, 1.6, 1.5, 1.4])
SCORES = "cifar10-cscores-orig-order.npz"
SCORE_URLS = ["https://pluskid.github.io/structural-regularity/cscores/" + SCORES,
              "https://raw.githubusercontent.com/pluskid/structural-regularity/HEAD/docs/cscores/" + SCORES]
loss_of = F.cross_entropy  # of outputs (n, C) and labels (n,); whatever stands here is trained on, probed and compared


# The data: images, and a score of each.


def load(o):
    images = common.load_images(o.dataset, o.data_dir)
    if o.dataset == "cifar10":
        scores = fetch_scores(o.data_dir, np.concatenate([images["y_train"], images["y_test"]]))
        images["score_train"], images["score_test"] = np.split(scores, [len(images["y_train"])])
    for name in ("score_train", "score_test"):
        if name not in images:
            raise ValueError(f"{o.dataset}: has no {name}; cscore.py needs a difficulty score for each image (higher = "
                             "easier)")
    return images


def fetch_scores(data_dir, labels, urls=SCORE_URLS):
    """The C-scores of the 50,000 CIFAR-10 training images, from data_dir or else from the authors' page."""
    from torchvision.datasets.utils import download_url
    path = pathlib.Path(data_dir) / SCORES
    if path.exists():
        return check_scores(path, labels)  # refused if wrong, but never deleted: it is the user's
    part = path.with_name(path.stem + ".part.npz")
    reasons = []
    for url in urls:
        try:
            download_url(url, data_dir, part.name)
            scores = check_scores(part, labels)  # no checksum was published: the labels are the check
            os.replace(part, path)
            return scores
        except (OSError, RuntimeError, ValueError) as e:
            reasons.append(f"{url} ({common.first_line(e)[:200]})")
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"C-scores could not be fetched from {' nor '.join(reasons)}. Put {SCORES} into "
                  f"{os.path.abspath(data_dir)} by hand, or try --dataset synthetic")


def check_scores(path, labels):
    """The C-scores in an .npz with arrays `scores` and `labels`, one for each of `labels` (N,), in their order.

    Raises ValueError: damaged file, wrong number, scores that are not finite, or labels in another order: some loaders
    order CIFAR-10 differently, and every score would belong to another image."""
    arrays = common.read_npz(path)
    scores, theirs = arrays.get("scores"), arrays.get("labels")
    if scores is None or theirs is None or scores.shape != labels.shape or theirs.shape != labels.shape:
        raise ValueError(f"{path}: need arrays scores and labels, each ({len(labels)},)")
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise ValueError(f"{path}: scores must be finite numbers")
    if not np.array_equal(theirs, labels):
        raise ValueError(f"{path}: {(theirs != labels).sum()} of {len(labels)} labels differ from CIFAR-10's original "
                         "order: these scores are for another ordering of the images")
    return scores.astype(np.float64)


def deciles(score):
    """Indices of the ten groups by rank of score (N,), lowest first, ties in their order; sizes differ by 1."""
    if len(score) < 10:
        raise ValueError(f"{len(score)} examples cannot be split into ten deciles")
    return np.array_split(np.argsort(score, kind="stable"), 10)


# One run.


def run(alpha, seed, images, o):
    """Train f^alpha from one seed; its records go to OUT/alpha=ALPHA_seed=SEED/log.jsonl."""
    # The data, and the groups that are watched: the same for every alpha.
    keep = common.training_indices(images, seed, o)
    classes = int(images["y_train"].max()) + 1
    x, y = common.on_device(images["x_train"][keep], o), torch.as_tensor(images["y_train"][keep], device=o.device)
    watched, watched_test = [], []  # indices of each decile's examples that are watched, up to --group-size
    for members in deciles(images["score_train"][keep]):
        watched.append(torch.as_tensor(common.draw_some(members, o.group_size, seed), device=o.device))
    for members in deciles(images["score_test"]):
        watched_test.append(torch.as_tensor(common.draw_some(members, o.group_size, seed), device=o.device))
    x_test, y_test = common.on_device(images["x_test"], o), torch.as_tensor(images["y_test"], device=o.device)

    # f^alpha(x) = alpha (f_theta(x) - f_theta0(x)), trained at lr / alpha^2.
    with common.seeded("init", seed):
        network = common.resnet18(classes, in_channels=x.shape[1], width=o.width)
    network = nn.Sequential(common.Standardise(images["mean"], images["std"]), network).to(o.device, o.dtype)
    f = common.center(network, alpha)
    optimizer = common.scaled_sgd(f, o.lr, o.momentum)
    f0, f0_test = common.outputs(f.model0, x), common.outputs(f.model0, x_test)  # never change: computed once

    def step(i):
        loss = loss_of(f(x[i], f0[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def probe():
        record = {}
        for d in range(10):
            i, j = watched[d], watched_test[d]
            f_train, f_test = common.outputs(f, x[i], f0[i]), common.outputs(f, x_test[j], f0_test[j])
            record[f"decile_{d + 1}_loss"] = loss_of(f_train, y[i]).item()
            record[f"decile_{d + 1}_acc"] = accuracy(f_train, y[i])
            record[f"test_decile_{d + 1}_loss"] = loss_of(f_test, y_test[j]).item()
            record[f"test_decile_{d + 1}_acc"] = accuracy(f_test, y_test[j])
        for what in ("loss", "acc"):  # each decile is a tenth of its set
            record[f"mean_train_{what}"] = sum(record[f"decile_{d}_{what}"] for d in range(1, 11)) / 10
            record[f"test_{what}"] = sum(record[f"test_decile_{d}_{what}"] for d in range(1, 11)) / 10
        return record

    linearity = common.Linearity(f, x_test[:o.probe_examples], y_test[:o.probe_examples])
    training = common.Run(o, seed, f, optimizer, images, len(y), linearity)
    step = common.graphed(step, training)  # on a GPU one CUDA graph; on a CPU step itself
    for i in training.minibatches(probe):
        step(i)


def accuracy(f, y):
    return (f.argmax(1) == y).double().mean().item()


# What came out.


def quantities(curve):
    """What is compared at equal loss, from the smoothed curves of one run."""
    result = {"gap": curve["decile_1_loss"] - curve["decile_10_loss"],
              "test_gap": curve["test_decile_1_loss"] - curve["test_decile_10_loss"],
              "test_loss": curve["test_loss"], "test_acc": curve["test_acc"]}
    for d in range(1, 11):
        result[f"decile_{d}"] = curve[f"decile_{d}_loss"]
    return result


def conclude(o, runs):
    """Print a table a claim and return the summary."""
    summary = common.summarise(runs, quantities, common.loss_levels(runs, o.levels))
    common.print_claim("Gap, loss of decile 1 (hardest) minus loss of decile 10 (easiest), at equal mean training loss",
                       summary, "gap")
    for alpha, part in summary["alphas"].items():
        common.print_table(f"Loss of the deciles, alpha = {alpha}, at equal mean training loss", part["levels"],
                           [f"decile_{d}" for d in sorted(o.deciles)])
    rows = {f"decile_{d}": {} for d in range(1, 11)}
    for alpha, seeds in runs.items():
        part = summary["alphas"][f"{alpha:g}"]["half_way"] = {}
        for name, row in rows.items():
            part[name] = common.spread([half_way(records, f"{name}_loss") for records in seeds.values()])
            row[f"alpha = {alpha:g}"] = part[name]
    common.print_table("Mean training loss at which each decile has fallen to half its initial loss (1 = hardest)",
                       rows, [f"alpha = {alpha:g}" for alpha in runs])
    summary["conclusion"] = common.sentence(
        runs, summary, "gap", "At equal mean training loss {level} the hardest decile's loss is above the easiest's by",
        "the rich network hastens to the easy examples, as in the paper",
        "the lazy network is the one that hastens, against the paper")
    return summary


def half_way(records, key):
    """The mean training loss where a decile's loss passes half of its initial value; None if it has not."""
    curve = common.curve(records)
    return common.value_at(records[0][key] / 2, curve[key], curve["mean_train_loss"])


def draw(o, runs):
    """cscore.png, the paper's Figure 2; cscore_curves.png: the test split, and the same runs against iterations, which
    shows why equal time is no comparison."""
    from matplotlib.figure import Figure
    dashes = ["-", "--", "-.", ":", (0, (6, 1)), (0, (1, 3)), (0, (3, 4)), (0, (9, 2)), (0, (2, 6)), (0, (5, 5))]
    styles = dict(zip(sorted(o.deciles), dashes))

    def panel(ax, prefix, x, read=common.value_at):
        for alpha, seeds in runs.items():
            for d, style in styles.items():
                common.draw_band(ax, seeds, x, f"{prefix}_{d}_loss", read, color=common.colour(alpha), linestyle=style)
        common.legend_below(ax, runs, {f"decile {d}": style for d, style in styles.items()})
        ax.set(xlabel=x.replace("_", " "), ylabel="loss")

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panel(left, "decile", "mean_train_loss")
    left.set_title("Loss by C-score decile (1 = hardest)")
    common.draw_linearity(middle, right, runs, "mean_train_loss")
    for ax in (left, middle, right):
        ax.set_xlabel("mean training loss (training: to the right)")
        ax.invert_xaxis()
    common.save_figure(figure, o.out, "cscore")

    figure = Figure(figsize=(8.3, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, "test_decile", "mean_train_loss")
    left.set_title("Test loss by decile")
    left.invert_xaxis()
    panel(right, "decile", "iteration", np.interp)
    right.set(title="Training loss by decile", xscale="symlog")
    common.save_figure(figure, o.out, "cscore_curves")


def main(**options):
    """Train, conclude and draw, with the command line's options as keywords: main(alpha=[1, 100], quick=True). Returns
    the summary; raises ValueError or OSError for bad input."""
    o = common.options("cscore", OPTIONS, QUICK, options, __file__)
    return common.sweep(o, load, run, conclude, draw)


if __name__ == "__main__":
    common.command_line("cscore", main, OPTIONS, QUICK, __doc__)
