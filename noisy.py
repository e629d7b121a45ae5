"""Figure 3 of "Lazy vs hasty": CIFAR-10 with 15 % of the training labels replaced by wrong ones.

    python noisy.py --quick                     a demonstration on synthetic images, no download
    python noisy.py --alpha 1 100               the paper's figure (downloads CIFAR-10); 2 minutes an epoch on a CPU
    python noisy.py --dataset FILE.npz          your own images

The claim: at an equal loss of the clean examples, the rich network (alpha = 1) has learnt the wrong labels less than
the lazy one (alpha = 100). It hastens towards what is easy; its noisy group's loss stays above. Part of that is better
generalisation, so held-out images with wrong labels, which no network has seen, are watched as a control.

--quick took 36 seconds on two idle CPU cores (AMD EPYC, 2026-11-29), 157 on busy ones. It prints, before the tables,

    The claim that rich networks learn wrong labels later holds in these runs: noisy_loss at alpha = 1 minus that at
    alpha = 100 is +0.247 [0.198, 0.297] at clean_loss 1.61 and +0.353 [0.274, 0.432] at clean_loss 1.49 (n = 3;
    ResNet18, cross_entropy).
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=16, width=16, lr=.0008, batch_size=25, probe_examples=25,
             group_size=250, stop_loss=1.35)
loss_of = F.cross_entropy  # of outputs (n, C) and labels (n,); whatever stands here is trained on, probed and compared
PAPER = {1: {1.0: 3.09, .5: 2.20}, 100: {1.0: 2.44, .5: 1.35}}  # {alpha: {clean loss: noisy loss}}


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
    shift = torch.as_tensor(np.random.default_rng(seed).integers(1, classes, len(y_test)), device=o.device)

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
        record = {"clean_loss": loss_of(f_clean, y[clean]).item(), "clean_acc": common.accuracy(f_clean, y[clean]),
                  "noisy_loss": loss_of(f_noisy, y[noisy]).item(), "noisy_acc": common.accuracy(f_noisy, y[noisy]),
                  "noisy_true_acc": common.accuracy(f_noisy, y_true[noisy]),  # against the labels before the noise
                  "test_loss": loss_of(f_test, y_test).item(), "test_acc": common.accuracy(f_test, y_test),
                  "held_out_wrong_loss": loss_of(f_test, (y_test + shift) % classes).item()}
        for what in ("loss", "acc"):  # the groups, weighted by their share of the training set
            record[f"mean_train_{what}"] = float(
                (1 - wrong.mean()) * record[f"clean_{what}"] + wrong.mean() * record[f"noisy_{what}"])
        return record

    training = common.Run(o, seed, f, optimizer, len(y), common.Linearity(f, x_test[:o.probe_examples]))
    step = common.graphed(step, training)  # on a GPU one CUDA graph; on a CPU step itself
    for i in training.minibatches(probe):
        step(i)


def derive(curve):
    """What follows from the smoothed curves of a run: the gap, and how far the noise is learnt beyond the control."""
    curve["gap"] = curve["noisy_loss"] - curve["clean_loss"]
    if "held_out_wrong_loss" in curve:
        curve["noisy_minus_control"] = curve["noisy_loss"] - curve["held_out_wrong_loss"]
    return curve


def conclude(o, runs):
    """Print the conclusion and a table a claim, all at equal loss of the clean group; return rows and sentence."""
    rows = common.readings(runs, derive, on=["clean_loss", "mean_train_loss"])
    pairs = common.differences(rows, ["noisy_loss", "noisy_minus_control", "gap", "test_loss", "test_acc"])
    conclusion = common.verdict(runs, rows, pairs, "clean_loss", "noisy_loss", "rich networks learn wrong labels later",
                                o.about)
    print(f"\n{conclusion}")
    if common.where(pairs, quantity="noisy_minus_control"):  # records of earlier versions have no control
        print(common.verdict(runs, rows, pairs, "clean_loss", "noisy_minus_control",
                             "this is more than better generalisation", o.about))
    common.print_table("Loss of the wrongly labelled examples", rows, pairs, "clean_loss", "noisy_loss")
    common.print_table("The same minus that of held-out images with wrong labels", rows, pairs, "clean_loss",
                       "noisy_minus_control")
    common.print_table("Test loss", rows, pairs, "clean_loss", "test_loss")
    return rows, pairs, conclusion


def draw(o, rows, pairs):
    """noisy.png: the paper's Figure 3, the paired difference, and the linearity."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 7.4), layout="constrained")
    (losses, difference), (similarity, error) = figure.subplots(2, 2)
    common.draw(losses, rows, "clean_loss", "noisy_loss", "-", "noisy")
    common.draw(losses, rows, "clean_loss", "test_loss", "--", "test")
    losses.set(title="(a) loss at equal clean loss", ylabel=f"loss ({o.loss})")
    if "cifar10" in o.dataset and o.loss == "cross_entropy":
        common.draw_crosses(losses, PAPER)
    common.draw_differences(difference, pairs, "clean_loss", "noisy_loss")
    common.draw_linearity(similarity, error, rows, "clean_loss")
    common.save_figure(figure, o.out, "noisy")
    common.draw_alphas(o, rows, "clean_loss", "noisy_loss")


def main(*words, **options):
    """Train, conclude and draw, with the command line's words, or its options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    parser = common.image_parser(__file__, __doc__)
    parser.add_argument("--noise", type=common.number(float, above=0, below=1), default=.15, metavar="X",
                        help="share of the training labels that are replaced")
    o = common.parse(parser, QUICK, loss_of, words, options)
    return common.sweep(o, run, conclude, draw, common.load_images, o.dataset, o.data_dir)


if __name__ == "__main__":
    common.command_line(main)
