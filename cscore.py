"""Figure 2 of "Lazy vs hasty": CIFAR-10 by difficulty, measured by C-score.

    python cscore.py --quick                    a demonstration on synthetic images, no download
    python cscore.py --alpha 1 100              the paper's figure (downloads CIFAR-10); 2 minutes an epoch on a CPU
    python cscore.py --dataset FILE.npz         your own images, with score_train and score_test

The claim: at an equal mean training loss, the rich network (alpha = 1) is further ahead on easy examples and further
behind on hard ones than the lazy network (alpha = 100).

The C-score of an example (Jiang, Zhang, Talwar, Mozer, ICML 2021) is how well networks trained without it predict its
label: near 1 for a typical image, near 0 for an odd one. Decile 1 holds the lowest tenth (hardest), decile 10 the
highest.

--quick took 46 seconds on two idle CPU cores (AMD EPYC, 2026-11-29), 237 on busy ones. It prints, before the tables,

    The claim that rich networks lag more on hard deciles holds in these runs: gap at alpha = 1 minus that at alpha =
    100 is +0.126 [0.003, 0.249] at mean_train_loss 1.61 and +0.187 [0.030, 0.343] at mean_train_loss 1.49 (n = 3;
    ResNet18, cross_entropy).
"""
import os
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=16, width=16, lr=.0008, batch_size=25, probe_examples=25,
             stop_loss=1.35)
SCORES = "cifar10-cscores-orig-order.npz"
SCORES_URL = "https://pluskid.github.io/structural-regularity/cscores/" + SCORES
loss_of = F.cross_entropy  # of outputs (n, C) and labels (n,); whatever stands here is trained on, probed and compared
DRAWN = {1: "-", 3: "--", 8: "-.", 10: ":"}  # the deciles of the picture, as in the paper
PAPER = {1: {1.0: [2.01, 1.46, .51, .32], .5: [1.37, .74, .17, .07]},  # {alpha: {mean training loss: their losses}}
         100: {1.0: [1.72, 1.33, .68, .38], .5: [.92, .68, .32, .15]}}


def load(o):
    images = common.load_images(o.dataset, o.data_dir)
    if o.dataset == "cifar10":
        scores = fetch_scores(o.data_dir, np.concatenate([images["y_train"], images["y_test"]]))
        images["score_train"], images["score_test"] = np.split(scores, [len(images["y_train"])])
    for name in ("score_train", "score_test"):
        if name not in images:
            raise ValueError(f"{o.dataset}: cscore.py needs {name}, a score for each image (higher = easier)")
    return images


def fetch_scores(data_dir, labels):
    """The C-scores of the 50,000 CIFAR-10 training images, from data_dir or else from the authors' page."""
    from torchvision.datasets.utils import download_url
    path = pathlib.Path(os.path.abspath(data_dir)) / SCORES
    if not path.exists():
        part = path.with_name(path.stem + ".part.npz")
        with common.fetching("C-scores", SCORES_URL, SCORES, path.parent):
            part.unlink(missing_ok=True)  # torchvision would take it for the file
            download_url(SCORES_URL, path.parent, part.name)
            check_scores(part, labels)  # no checksum was published: the labels are the check
            os.replace(part, path)
    return check_scores(path, labels)  # refused if wrong, but never deleted: it is the user's


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
    if len(score) < 10 or score.min() == score.max():
        raise ValueError(f"{len(score)} examples with scores from {score.min():g} to {score.max():g} have no deciles")
    return np.array_split(np.argsort(score, kind="stable"), 10)


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
            record[f"decile_{d + 1}_acc"] = common.accuracy(f_train, y[i])
            record[f"test_decile_{d + 1}_loss"] = loss_of(f_test, y_test[j]).item()
            record[f"test_decile_{d + 1}_acc"] = common.accuracy(f_test, y_test[j])
        for what in ("loss", "acc"):  # each decile is a tenth of its set
            record[f"mean_train_{what}"] = sum(record[f"decile_{d}_{what}"] for d in range(1, 11)) / 10
            record[f"test_{what}"] = sum(record[f"test_decile_{d}_{what}"] for d in range(1, 11)) / 10
        return record

    training = common.Run(o, seed, f, optimizer, len(y), common.Linearity(f, x_test[:o.probe_examples]))
    step = common.graphed(step, training)  # on a GPU one CUDA graph; on a CPU step itself
    for i in training.minibatches(probe):
        step(i)


def derive(curve):
    """What follows from the smoothed curves of a run."""
    curve["gap"] = curve["decile_1_loss"] - curve["decile_10_loss"]
    hard = sum(curve[f"decile_{d}_loss"] for d in range(1, 6)) / 5
    curve["half_gap"] = hard - sum(curve[f"decile_{d}_loss"] for d in range(6, 11)) / 5
    return curve


def conclude(o, runs):
    """Print the conclusion and a table a claim, at equal mean training loss; return rows and sentence."""
    rows = common.readings(runs, derive)
    pairs = common.differences(rows, ["gap", "half_gap", "test_loss", *(f"decile_{d}_loss" for d in range(1, 11))])
    conclusion = common.verdict(runs, rows, pairs, "mean_train_loss", "gap", "rich networks lag more on hard deciles",
                                o.about)
    print(f"\n{conclusion}")
    common.print_table("Gap: loss of decile 1 (hardest) minus loss of decile 10 (easiest)", rows, pairs,
                       "mean_train_loss", "gap")
    common.print_table("Half gap: mean loss of deciles 1 to 5 minus that of 6 to 10", rows, pairs, "mean_train_loss",
                       "half_gap")
    for d in DRAWN:
        common.print_table(f"Loss of decile {d}", rows, pairs, "mean_train_loss", f"decile_{d}_loss")
    return rows, pairs, conclusion


def draw(o, rows, pairs):
    """cscore.png: the paper's Figure 2, the paired difference, and the linearity."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 7.8), layout="constrained")
    (losses, difference), (similarity, error) = figure.subplots(2, 2)
    for k, (d, linestyle) in enumerate(DRAWN.items()):
        common.draw(losses, rows, "mean_train_loss", f"decile_{d}_loss", linestyle, f"{d}")
        if "cifar10" in o.dataset and o.loss == "cross_entropy":
            for alpha, points in PAPER.items():
                common.draw_crosses(losses, {alpha: {level: values[k] for level, values in points.items()}})
    losses.set(title="(a) loss of deciles 1 (hardest) to 10", ylabel=f"loss ({o.loss})")
    common.draw_differences(difference, pairs, "mean_train_loss", "gap")
    common.draw_linearity(similarity, error, rows, "mean_train_loss")
    common.save_figure(figure, o.out, "cscore")
    common.draw_alphas(o, rows, "mean_train_loss", "gap")


def main(*words, **options):
    """Train, conclude and draw, with the command line's words, or its options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    o = common.parse(common.image_parser(__file__, __doc__), QUICK, loss_of, words, options)
    return common.sweep(o, run, conclude, draw, load, o)


if __name__ == "__main__":
    common.command_line(main)
