"""Figure 3 of "Lazy vs hasty": CIFAR-10 with 15 % of the training labels replaced by wrong ones.

    python noisy.py --quick                     a demonstration on synthetic images, no download
    python noisy.py --alpha 1 100               the paper's figure (downloads CIFAR-10)
    python noisy.py --dataset FILE.npz          your own images

The claim: at an equal loss of the clean examples, the rich network (alpha = 1) has learnt the wrong labels less than
the lazy one (alpha = 100). Held-out images with wrong labels, which no network has seen, are watched as a control.

--quick takes 75 s of CPU (AMD EPYC, 2026-11-29). It prints, before the tables, that the claim holds: noisy_loss at
alpha = 1 minus that at alpha = 100 is +0.188 [0.00585, 0.369] at clean_loss 1.61 and +0.305 [0.160, 0.451] at
clean_loss 1.49 (n = 3; resnet18, cross_entropy).
"""
import numpy as np
import torch
import torch.nn.functional as F

import common
import experiment

QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=16, width=16, lr=.0016, batch_size=50, probe_examples=10,
             group_size=150, stop_loss=1.35)
loss_of = F.cross_entropy  # of outputs (n, C) and labels (n,); whatever stands here is trained on, probed and compared
PAPER = {1: {1.0: 3.09, .5: 2.20}, 100: {1.0: 2.44, .5: 1.35}}  # {alpha: {clean loss: noisy loss}}


def network(images, o):
    """What is trained, on standardised images (N, C, H, W): your own goes here."""
    return common.resnet18(int(images["y_train"].max()) + 1, images["x_train"].shape[3], o.width)


def run(alpha, seed, images, o):
    """Train f^alpha from one seed. The data, and the groups that are watched, are the same for every alpha."""
    keep = experiment.training_indices(images, seed, o)
    classes = int(images["y_train"].max()) + 1
    true_labels = images["y_train"][keep]
    labels = experiment.flip_labels(true_labels, o.noise, classes, seed)
    wrong = labels != true_labels
    clean = torch.as_tensor(experiment.draw_some(np.flatnonzero(~wrong), o.group_size, seed), device=o.device)
    noisy = torch.as_tensor(experiment.draw_some(np.flatnonzero(wrong), o.group_size, seed), device=o.device)
    x = experiment.on_device(images["x_train"][keep], o)
    x_test = experiment.on_device(images["x_test"][:o.group_size], o)
    y, y_true = torch.as_tensor(labels, device=o.device), torch.as_tensor(true_labels, device=o.device)
    y_test = torch.as_tensor(images["y_test"][:o.group_size], device=o.device)
    shift = torch.as_tensor(np.random.default_rng(seed).integers(1, classes, len(y_test)), device=o.device)

    # f^alpha(x) = alpha (f_theta(x) - f_theta0(x)), trained at lr / alpha^2.
    with experiment.seeded("init", seed):
        model = network(images, o)
    model = torch.nn.Sequential(common.Standardise(images["mean"], images["std"]), model).to(o.device, o.dtype)
    f = common.center(model, alpha)
    optimizer = common.scaled_sgd(f, o.lr, o.momentum)
    f0, f0_test = experiment.outputs(f.model0, x), experiment.outputs(f.model0, x_test)  # never change: computed once

    def probe():
        f_clean, f_noisy = experiment.outputs(f, x[clean], f0[clean]), experiment.outputs(f, x[noisy], f0[noisy])
        f_test = experiment.outputs(f, x_test, f0_test)
        record = {"clean_loss": loss_of(f_clean, y[clean]).item(), "clean_acc": experiment.accuracy(f_clean, y[clean]),
                  "noisy_loss": loss_of(f_noisy, y[noisy]).item(), "noisy_acc": experiment.accuracy(f_noisy, y[noisy]),
                  "noisy_true_acc": experiment.accuracy(f_noisy, y_true[noisy]),  # against the labels before the noise
                  "test_loss": loss_of(f_test, y_test).item(), "test_acc": experiment.accuracy(f_test, y_test),
                  "held_out_wrong_loss": loss_of(f_test, (y_test + shift) % classes).item()}
        share = wrong.mean().item()
        for what in ("loss", "acc"):  # the groups, weighted by their share of the training set
            record[f"mean_train_{what}"] = (1 - share) * record[f"clean_{what}"] + share * record[f"noisy_{what}"]
        return record

    linearity = experiment.linearity(f, x_test[:o.probe_examples])
    for i in experiment.minibatches(o, seed, f, optimizer, len(y), probe, linearity):
        loss = loss_of(f(x[i], f0[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def derive(curve):
    """What follows from the smoothed curves of a run: the gap, and how far the noise is learnt beyond the control."""
    beyond = curve["noisy_loss"] - curve.get("held_out_wrong_loss", np.nan)
    return {**curve, "noisy_minus_control": beyond, "gap": curve["noisy_loss"] - curve["clean_loss"]}


def conclude(o, runs):
    """Print the conclusion and a table a claim, at equal loss of the clean group; see experiment.sweep."""
    clean, mean = (experiment.at_levels(runs, derive, on) for on in ("clean_loss", "mean_train_loss"))
    conclusion = experiment.verdict(clean, "noisy_loss", "rich networks learn wrong labels later", "when both know the "
                                    "right labels equally well, the rich networks know the wrong ones less", o.about)
    experiment.print_table("Loss of the wrongly labelled examples", clean, "noisy_loss")
    if experiment.difference(clean, "noisy_minus_control").n.any():  # some records in figures/ have no control
        experiment.verdict(clean, "noisy_minus_control", "this is more than better generalisation",
                           "the rich networks have learnt less of the wrong labels by heart", o.about)
        experiment.print_table("The same minus that of held-out images with wrong labels", clean, "noisy_minus_control")
    experiment.print_table("Test loss", clean, "test_loss")
    return [clean, mean], ["noisy_loss", "noisy_minus_control", "gap", "test_loss", "test_acc"], conclusion


def draw(o, clean, mean):
    """noisy.png: the paper's Figure 3, the paired difference, and the linearity."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 7.4), layout="constrained")
    (losses, difference), (similarity, error) = figure.subplots(2, 2)
    experiment.draw(losses, clean, "noisy_loss", "-", "noisy")
    experiment.draw(losses, clean, "test_loss", "--", "test")
    losses.set(title="(a) loss at equal clean loss", ylabel=f"loss ({o.loss})")
    if "cifar10" in o.dataset and o.loss == "cross_entropy":
        for alpha, points in PAPER.items():
            losses.plot(points.keys(), points.values(), "x", color=experiment.look(alpha)["color"], markersize=8)
    experiment.draw_differences(difference, clean, "noisy_loss")
    experiment.draw_linearity(similarity, error, clean)
    experiment.save_figure(figure, o, o.script)


def main(*words, **options):
    """Train, conclude, draw: main("--quick") or main(quick=True). Returns the summary; raises ValueError, OSError."""
    rows = [*experiment.IMAGE_OPTIONS, ("noise", experiment.positive, .15, "share of the training labels replaced")]
    o = experiment.parse(__file__, __doc__, rows, QUICK, loss_of, words, options)
    return experiment.sweep(o, lambda: experiment.load_images(o.dataset, o.data_dir), network, run, conclude, draw)


if __name__ == "__main__":
    experiment.command_line(main)
