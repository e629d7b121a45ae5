"""Figure 2 of "Lazy vs hasty": CIFAR-10 by difficulty, measured by C-score.

    python cscore.py --quick                    a demonstration on synthetic images, no download
    python cscore.py --alpha 1 100              the paper's figure (downloads CIFAR-10)
    python cscore.py --dataset FILE.npz         your own images, with score_train and score_test

The claim: at an equal mean training loss, the rich network (alpha = 1) is further ahead on easy examples and further
behind on hard ones than the lazy network (alpha = 100).

The C-score of an example (Jiang, Zhang, Talwar, Mozer, ICML 2021) is how well networks trained without it predict its
label: near 1 for a typical image, near 0 for an odd one. Decile 1 holds the lowest tenth (hardest), decile 10 the
highest.

--quick takes 99 s of CPU (AMD EPYC, 2026-11-30). It prints, before the tables, that the claim holds: gap (decile 1's
loss minus decile 10's) at alpha = 1 minus that at alpha = 100 is +0.126 [0.00317, 0.249] at mean_train_loss 1.61 and
+0.187 [0.0301, 0.343] at mean_train_loss 1.49 (n = 3; resnet18, cross_entropy).
"""
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

import common
import experiment

QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=16, width=16, lr=.0008, batch_size=25, probe_examples=10,
             stop_loss=1.45)
SCORES = "cifar10-cscores-orig-order.npz"
SCORES_URL = "https://pluskid.github.io/structural-regularity/cscores/" + SCORES
loss_of = F.cross_entropy  # of outputs (n, C) and labels (n,); whatever stands here is trained on, probed and compared
DRAWN = {1: "-", 3: "--", 8: "-.", 10: ":"}  # the deciles of the picture, as in the paper
PAPER = {1: {1.0: [2.01, 1.46, .51, .32], .5: [1.37, .74, .17, .07]},  # {alpha: {mean training loss: their losses}}
         100: {1.0: [1.72, 1.33, .68, .38], .5: [.92, .68, .32, .15]}}


def load(o):
    """The data set, with C-scores."""
    images = experiment.load_images(o.dataset, o.data_dir)
    if o.dataset == "cifar10":
        scores = fetch_scores(o.data_dir, np.concatenate([images["y_train"], images["y_test"]]))
        images["score_train"], images["score_test"] = np.split(scores, [len(images["y_train"])])
    if not {"score_train", "score_test"} <= images.keys():
        raise experiment.BadInput(f"{o.dataset}: cscore.py needs score_train and score_test (higher = easier)")
    return images


def fetch_scores(data_dir, labels):
    """The C-scores of the 50,000 CIFAR-10 training images, from data_dir or else from the authors' page.

    Raises BadInput: no file, or scores that are not those of `labels` (N,) in their order. No checksum was published,
    so the labels are the check: some loaders order CIFAR-10 differently, and scores would go to other images."""
    from torchvision.datasets.utils import download_url
    path = pathlib.Path(data_dir).absolute() / SCORES
    part = path.with_suffix(".part")
    with experiment.explained(f"C-scores could not be had: put {SCORES} from {SCORES_URL} into {path.parent} by hand, "
                              "over what is there, or try --dataset synthetic (offline)"):
        if not path.exists():
            part.unlink(missing_ok=True)  # torchvision would take what is left of an earlier call for the file
            download_url(SCORES_URL, path.parent, part.name)
            part.rename(path)
        arrays = experiment.read_npz(path)
        scores, theirs = arrays["scores"], arrays["labels"]
        if scores.shape != labels.shape or scores.dtype.kind != "f" or not np.isfinite(scores).all():
            raise ValueError(f"scores must be {len(labels)} finite numbers")
        if not np.array_equal(theirs, labels):
            raise ValueError("its labels differ from CIFAR-10's: these scores are for another ordering of the images")
        return scores.astype(np.float64)


def deciles(score):
    """Indices of the ten groups by rank of score (N,), lowest first, ties in their order; sizes differ by 1."""
    if len(score) < 10 or score.min() == score.max():
        raise experiment.BadInput(f"{len(score)} scores from {score.min():g} to {score.max():g} have no deciles")
    return np.array_split(np.argsort(score, kind="stable"), 10)


def network(images, o):
    """What is trained, on standardised images (N, C, H, W): your own goes here."""
    return common.resnet18(int(images["y_train"].max()) + 1, images["x_train"].shape[3], o.width)


def run(alpha, seed, images, o):
    """Train f^alpha from one seed. The data, and the groups that are watched, are the same for every alpha."""
    keep = experiment.training_indices(images, seed, o)
    x, y = experiment.on_device(images["x_train"][keep], o), torch.as_tensor(images["y_train"][keep], device=o.device)
    watched, watched_test = [], []  # indices of each decile's examples that are watched, up to --group-size
    for members in deciles(images["score_train"][keep]):
        watched.append(torch.as_tensor(experiment.draw_some(members, o.group_size, seed), device=o.device))
    for members in deciles(images["score_test"]):
        watched_test.append(torch.as_tensor(experiment.draw_some(members, o.group_size, seed), device=o.device))
    x_test, y_test = experiment.on_device(images["x_test"], o), torch.as_tensor(images["y_test"], device=o.device)

    # f^alpha(x) = alpha (f_theta(x) - f_theta0(x)), trained at lr / alpha^2.
    with experiment.seeded("init", seed):
        model = network(images, o)
    model = torch.nn.Sequential(common.Standardise(images["mean"], images["std"]), model).to(o.device, o.dtype)
    f = common.center(model, alpha)
    optimizer = common.scaled_sgd(f, o.lr, o.momentum)
    f0, f0_test = experiment.outputs(f.model0, x), experiment.outputs(f.model0, x_test)  # never change: computed once

    def probe():
        record = {}
        for d in range(10):
            i, j = watched[d], watched_test[d]
            f_train, f_test = experiment.outputs(f, x[i], f0[i]), experiment.outputs(f, x_test[j], f0_test[j])
            record[f"decile_{d + 1}_loss"] = loss_of(f_train, y[i]).item()
            record[f"decile_{d + 1}_acc"] = experiment.accuracy(f_train, y[i])
            record[f"test_decile_{d + 1}_loss"] = loss_of(f_test, y_test[j]).item()
            record[f"test_decile_{d + 1}_acc"] = experiment.accuracy(f_test, y_test[j])
        for what in ("loss", "acc"):  # each decile is a tenth of its set
            record[f"mean_train_{what}"] = sum(record[f"decile_{d}_{what}"] for d in range(1, 11)) / 10
            record[f"test_{what}"] = sum(record[f"test_decile_{d}_{what}"] for d in range(1, 11)) / 10
        return record

    linearity = experiment.linearity(f, x_test[:o.probe_examples])
    for i in experiment.minibatches(o, seed, f, optimizer, len(y), probe, linearity):
        loss = loss_of(f(x[i], f0[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def derive(curve):
    """What follows from the smoothed curves of a run."""
    hard = sum(curve[f"decile_{d}_loss"] for d in range(1, 6)) / 5
    easy = sum(curve[f"decile_{d}_loss"] for d in range(6, 11)) / 5
    return {**curve, "gap": curve["decile_1_loss"] - curve["decile_10_loss"], "half_gap": hard - easy}


def conclude(o, runs):
    """Print the conclusion and a table a claim, at equal mean training loss; see experiment.sweep."""
    read = experiment.at_levels(runs, derive, "mean_train_loss")
    conclusion = experiment.verdict(
        read, "gap", "rich networks lag more on hard deciles",
        "at the same training loss, the rich networks know the hard images less and the easy ones better", o.about)
    experiment.print_table("Gap: loss of decile 1 (hardest) minus loss of decile 10 (easiest)", read, "gap")
    experiment.print_table("Half gap: mean loss of deciles 1 to 5 minus that of 6 to 10", read, "half_gap")
    for d in DRAWN:
        experiment.print_table(f"Loss of decile {d}", read, f"decile_{d}_loss")
    return [read], ["gap", "half_gap", "test_loss", *(f"decile_{d}_loss" for d in range(1, 11))], conclusion


def draw(o, read):
    """cscore.png: the paper's Figure 2, the paired difference, and the linearity."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 7.8), layout="constrained")
    (losses, difference), (similarity, error) = figure.subplots(2, 2)
    paper = PAPER if "cifar10" in o.dataset and o.loss == "cross_entropy" else {}
    for k, (d, linestyle) in enumerate(DRAWN.items()):
        experiment.draw(losses, read, f"decile_{d}_loss", linestyle, f"decile {d}")
        for alpha, points in paper.items():
            values = [of_deciles[k] for of_deciles in points.values()]
            losses.plot(points.keys(), values, "x", color=experiment.look(alpha)["color"], markersize=8)
    losses.set(title="(a) loss of deciles 1 (hardest) to 10", ylabel=f"loss ({o.loss})")
    experiment.draw_differences(difference, read, "gap")
    experiment.draw_linearity(similarity, error, read)
    experiment.save_figure(figure, o, o.script)


def main(*words, **options):
    """Train, conclude, draw: main("--quick") or main(quick=True). Returns the summary; raises ValueError, OSError."""
    o = experiment.parse(__file__, __doc__, experiment.IMAGE_OPTIONS, QUICK, loss_of, words, options)
    return experiment.sweep(o, lambda: load(o), network, run, conclude, draw)


if __name__ == "__main__":
    experiment.command_line(main)
