"""Figure 3 of "Lazy vs hasty": CIFAR-10 with 15 % of the training labels replaced by wrong ones.

    python noisy.py --quick                     a demonstration on synthetic images, no download
    python noisy.py --alpha 1 100               the paper's figure (downloads CIFAR-10)
    python noisy.py --dataset FILE.npz          your own images

The claim: at an equal loss of the clean examples, the rich network (alpha = 1) has learnt the wrong labels less than
the lazy one (alpha = 100). It hastens towards what is easy; its noisy group's loss stays above.

--quick takes 53 seconds on two CPU cores (AMD EPYC, 2026-11-25), an epoch of 40,000 images one to two minutes; not
timed on a GPU. --quick ends with

    At equal clean loss 1.5 the noisy loss is 2.658 at alpha = 1 and 2.317 at alpha = 100, paired difference 0.341
    [0.255, 0.427] (3): the rich network has learnt the wrong labels less, as in the paper.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

OPTIONS = {"noise": ("training", .15, "above 0, below 1", "share of the training labels that are replaced")}
QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=16, width=16, lr=.0008, batch_size=25, probe_examples=25,
             group_size=250, stop_loss=1.35, levels=[1.7, 1.6, 1.5, 1.4])
loss_of = F.cross_entropy  # of outputs (n, C) and labels (n,); whatever stands here is trained on, probed and compared


def run(alpha, seed, images, o):
    """Train f^alpha from one seed; its records go to OUT/alpha=ALPHA_seed=SEED/log.jsonl."""
    # The data, and the groups that are watched: the same for every alpha.
    keep = common.training_indices(images, seed, o)
    classes = int(images["y_train"].max()) + 1
    true_labels = images["y_train"][keep]
    labels = common.flip_labels(true_labels, o.noise, classes, seed)
    wrong = labels != true_labels
    clean = torch.as_tensor(common.draw_some(np.flatnonzero(~wrong), o.group_size, seed), device=o.device)
    noisy = torch.as_tensor(common.draw_some(np.flatnonzero(wrong), o.group_size, seed), device=o.device)
    x, x_test = common.on_device(images["x_train"][keep], o), common.on_device(images["x_test"][:o.group_size], o)
    y, y_true = torch.as_tensor(labels, device=o.device), torch.as_tensor(true_labels, device=o.device)
    y_test = torch.as_tensor(images["y_test"][:o.group_size], device=o.device)

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
        f_clean, f_noisy = common.outputs(f, x[clean], f0[clean]), common.outputs(f, x[noisy], f0[noisy])
        f_test = common.outputs(f, x_test, f0_test)
        record = {"clean_loss": loss_of(f_clean, y[clean]).item(), "clean_acc": accuracy(f_clean, y[clean]),
                  "noisy_loss": loss_of(f_noisy, y[noisy]).item(), "noisy_acc": accuracy(f_noisy, y[noisy]),
                  "noisy_true_acc": accuracy(f_noisy, y_true[noisy]),  # against the labels before the noise
                  "test_loss": loss_of(f_test, y_test).item(), "test_acc": accuracy(f_test, y_test)}
        for what in ("loss", "acc"):  # the groups, weighted by their share of the training set
            record[f"mean_train_{what}"] = float(
                (1 - wrong.mean()) * record[f"clean_{what}"] + wrong.mean() * record[f"noisy_{what}"])
        return record

    linearity = common.Linearity(f, x_test[:o.probe_examples], y_test[:o.probe_examples])
    training = common.Run(o, seed, f, optimizer, images, len(y), linearity)
    step = common.graphed(step, training)  # on a GPU one CUDA graph; on a CPU step itself
    for i in training.minibatches(probe):
        step(i)


def accuracy(f, y):
    return (f.argmax(1) == y).double().mean().item()


def quantities(curve):
    """What is compared at equal loss, from the smoothed curves of one run."""
    return {"gap": curve["noisy_loss"] - curve["clean_loss"], "noisy_loss": curve["noisy_loss"],
            "test_loss": curve["test_loss"], "test_acc": curve["test_acc"], "noisy_true_acc": curve["noisy_true_acc"]}


def conclude(o, runs):
    """Print a table a claim and return the summary; the claim itself is read at equal loss of the clean group."""
    levels = common.loss_levels(runs, o.levels)
    summary = common.summarise(runs, quantities, levels)
    at_clean = common.summarise(runs, quantities, levels, on="clean_loss")
    # The paper's last level, too: both networks have learnt the wrong labels there, so nothing is concluded from it.
    shown = common.summarise(runs, quantities, [*levels, .1], on="clean_loss")
    summary["at_clean_loss"] = shown
    common.print_claim("Loss of the noisy examples at equal loss of the clean ones", shown, "noisy_loss")
    common.print_claim("Test loss at equal loss of the clean examples", shown, "test_loss")
    common.print_claim("Gap, loss of the noisy minus loss of the clean, at equal mean training loss", summary, "gap")
    print()
    for alpha, seeds in runs.items():
        lowest = [smallest_test_loss(records) for records in seeds.values()]
        best = {"loss": common.spread([loss for loss, _ in lowest]),
                "at_clean_loss": common.spread([clean for _, clean in lowest])}
        summary["alphas"][f"{alpha:g}"]["smallest_test_loss"] = best
        print(f"alpha = {alpha:g}: smallest test loss {common.cell(best['loss'])}, at clean loss "
              f"{common.cell(best['at_clean_loss'])}")
    summary["conclusion"] = common.sentence(
        runs, at_clean, "noisy_loss", "At equal clean loss {level} the noisy loss is",
        "the rich network has learnt the wrong labels less, as in the paper",
        "the rich network has learnt the wrong labels more, against the paper")
    return summary


def smallest_test_loss(records):
    """(its value, the clean loss there) along the smoothed run; (None, None) for a run that diverged."""
    curve = common.curve(records)
    if records[-1].get("ended") == "diverged" or len(curve["test_loss"]) == 0:
        return None, None
    k = int(np.argmin(curve["test_loss"]))
    return float(curve["test_loss"][k]), float(curve["clean_loss"][k])


def draw(o, runs):
    """noisy.png, the paper's Figure 3; noisy_curves.png, the same runs against iterations: why equal time is no
    comparison."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    styles = {"noisy_loss": "-", "test_loss": "--"}
    for alpha, seeds in runs.items():
        for key, style in styles.items():
            common.draw_band(left, seeds, "clean_loss", key, color=common.colour(alpha), linestyle=style)
    left.set(title="Loss at equal clean loss", ylabel="loss")
    common.legend_below(left, runs, {"noisy examples": "-", "test": "--"})
    common.draw_linearity(middle, right, runs, "clean_loss")
    for ax in (left, middle, right):
        ax.invert_xaxis()
        ax.set_xlabel("clean loss (training: to the right)")
    common.save_figure(figure, o.out, "noisy")

    figure = Figure(figsize=(8.3, 4.4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    styles = {"clean": "-", "noisy": "--", "test": ":"}
    for alpha, seeds in runs.items():
        for name, style in styles.items():
            for ax, what in ((losses, "loss"), (accuracies, "acc")):
                common.draw_band(ax, seeds, "iteration", f"{name}_{what}", np.interp,
                                 color=common.colour(alpha), linestyle=style)
    for ax, what in ((losses, "loss"), (accuracies, "accuracy")):
        ax.set(xscale="symlog", xlabel="iteration", ylabel=what)
        common.legend_below(ax, runs, styles)
    common.save_figure(figure, o.out, "noisy_curves")


def load(o):
    return common.load_images(o.dataset, o.data_dir)


def main(**options):
    """Train, conclude and draw, with the command line's options as keywords: main(alpha=[1, 100], quick=True). Returns
    the summary; raises ValueError or OSError for bad input."""
    o = common.options("noisy", OPTIONS, QUICK, options, __file__)
    return common.sweep(o, load, run, conclude, draw)


if __name__ == "__main__":
    common.command_line("noisy", main, OPTIONS, QUICK, __doc__)
