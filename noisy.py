"""Figure 3 of "Lazy vs hasty": CIFAR-10 with 15 % of the training labels replaced by wrong ones.

    python noisy.py --quick                     a demonstration on synthetic images, no download
    python noisy.py --alpha 1 100               the paper's figure (downloads CIFAR-10)
    python noisy.py --dataset FILE.npz          your own images

The claim: at an equal loss of the clean examples, the rich network (alpha = 1) has learnt the wrong labels less than
the lazy one (alpha = 100). It hastens towards what is easy; its noisy group's loss stays above.

--quick takes 48 seconds on two CPU cores; the paper's figure 33 seconds an epoch: the rich network reaches a clean loss
of .3 after 13, the lazy one 1.0 after about 70 (2026-11-24; not timed on a GPU). --quick prints, among other tables,

    alpha = 1 - 100, paired by seed (95 % interval from three seeds on)
      loss                        gap                 test_acc
       1.7       0.230 [0.010, 0.450]    0.089 [-0.011, 0.189]
       1.5       0.577 [0.331, 0.822]     0.126 [0.087, 0.165]
    ...
    alpha = 1: smallest test loss 1.055 +- 0.025 (n=3), at clean loss 0.861 +- 0.017 (n=3)
    alpha = 100: smallest test loss 1.560 +- 0.115 (n=3), at clean loss 1.163 +- 0.191 (n=3)
"""
import itertools

import numpy as np
import torch

import common

QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=26, width=16, lr=.0005, batch_size=25, probe_examples=25,
             stop_loss=1.25, levels=[1.7, 1.6, 1.5, 1.4, 1.3])


def make_parser():
    p = common.parser(__doc__, "noisy", levels=[1.6, 1.2])
    p.add_argument("--noise", type=common.number(float, above=0, below=1), default=.15,
                   help="share of the training labels that are replaced")
    return p


def run(alpha, seed, images, o):
    """Train f^alpha from one seed; its records go to OUT/alpha=ALPHA_seed=SEED/log.jsonl."""
    # The data: training images with noisy labels, and the groups that are watched; for every alpha the same.
    x, true_labels, _ = common.draw_training_set(images, seed, o)
    classes = int(images["y_train"].max()) + 1
    labels = common.flip_labels(true_labels, o.noise, classes, seed)
    statistics = images["mean"], images["std"]
    train = common.Examples(x, labels, *statistics, o)
    test = common.Examples(images["x_test"][:1000], images["y_test"][:1000], *statistics, o)
    wrong = labels != true_labels
    share = float(wrong.mean())
    clean, noisy = (torch.as_tensor(common.some(np.flatnonzero(members), 1000, seed), device=o.device)
                    for members in (~wrong, wrong))
    true_labels = torch.as_tensor(true_labels, device=o.device)[noisy]

    with common.seeded("init", seed):
        model = common.resnet18(classes, in_channels=train.x.shape[1], width=o.width)
    model = model.to(o.device, o.dtype)
    identity = common.identity_of(o, alpha, seed, images, model)
    with common.run_folder(o, common.folder_of(o, alpha, seed), identity) as folder:
        centered = common.center(model, alpha)
        test.cache_f0(centered)

        def evaluate():
            entry = {}
            for name, examples, index in (("clean", train, clean), ("noisy", train, noisy),
                                          ("test", test, test.index())):
                f = examples.predict(centered, index)
                entry[f"{name}_loss"], entry[f"{name}_acc"] = common.measure(f, examples.y[index])
                if name == "noisy":  # the same outputs against the labels before the noise
                    entry["noisy_true_acc"] = common.measure(f, true_labels)[1]
            for what in ("loss", "acc"):  # weighted by the groups' shares of the training set
                entry[f"mean_train_{what}"] = (1 - share) * entry[f"clean_{what}"] + share * entry[f"noisy_{what}"]
            return entry

        probe_x = test.pixels(test.index()[:o.probe_examples])
        return common.train(folder, centered, train, probe_x, evaluate, o, seed, classes)


COLUMNS = {"gap": lambda r: common.minus(r["noisy_loss"], r["clean_loss"]), "noisy_loss": lambda r: r["noisy_loss"],
           "test_loss": lambda r: r["test_loss"], "test_acc": lambda r: r["test_acc"],
           "noisy_true_acc": lambda r: r["noisy_true_acc"]}


def summarise(o, runs, classes):
    """Tables at equal mean training loss, then, as in the paper, at equal *clean* loss; prints and returns them."""
    levels = common.loss_levels(classes, *o.levels)
    summary = common.summarise(runs, COLUMNS, levels)
    summary["at_clean_loss"] = common.summarise(runs, COLUMNS, levels, on="clean_loss")
    for alpha, part in summary["alphas"].items():
        common.print_table(f"alpha = {alpha}, at equal mean training loss", part,
                           ["gap", "test_loss", "test_acc", "noisy_true_acc"], levels)
    for pair, part in summary["paired"].items():
        common.print_table(f"alpha = {pair}, paired by seed (95 % interval from three seeds on)", part,
                           ["gap", "test_acc"], levels)
    for alpha, part in summary["at_clean_loss"]["alphas"].items():
        common.print_table(f"alpha = {alpha}, at equal loss of the clean group", part,
                           ["noisy_loss", "test_loss", "noisy_true_acc"], levels)
    common.print_linearity(summary, levels)
    print()
    for alpha, seeds in runs.items():
        best = [min((r["test_loss"], r["clean_loss"]) for r in records if None not in (r["test_loss"], r["clean_loss"]))
                for records in seeds.values()]
        loss, clean = (common.spread(values) for values in zip(*best))
        summary["alphas"][f"{alpha:g}"]["smallest_test_loss"] = {"loss": loss, "at_clean_loss": clean}
        print(f"alpha = {alpha:g}: smallest test loss {common.cell(loss)}, at clean loss {common.cell(clean)}")
    return summary


def draw(o, runs):
    """noisy.png, the paper's Figure 3, and noisy_curves.png, the same runs against iterations."""
    from matplotlib.figure import Figure
    of = lambda key: lambda r: r.get(key)

    def panel(ax, x, styles):
        for colour, seeds in zip(itertools.cycle(common.COLOURS), runs.values()):
            for key, style in styles.items():
                common.band(ax, seeds.values(), of(x), of(key), color=colour, linestyle=style)
        names = ["noisy, true labels" if key == "noisy_true_acc" else key.split("_")[0] for key in styles]
        common.legend_below(ax, common.alpha_colours(runs), dict(zip(names, styles.values())))

    figure = Figure(figsize=(8.3, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, "clean_loss", {"noisy_loss": "-", "test_loss": "--"})
    left.invert_xaxis()
    left.set(xlabel="loss of the clean examples (training goes to the right)", ylabel="loss", title="Equal clean loss")
    common.draw_linearity(right, runs, of("clean_acc"))
    right.set(xlabel="accuracy on the clean examples")
    common.save_figure(figure, o.out, "noisy")

    figure = Figure(figsize=(8.3, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, "iteration", {"clean_loss": "-", "noisy_loss": "--", "test_loss": ":"})
    panel(right, "iteration", {"clean_acc": "-", "noisy_acc": "--", "test_acc": ":", "noisy_true_acc": "-."})
    for ax, name in ((left, "loss"), (right, "accuracy")):
        ax.set(xscale="symlog", xlabel="iteration", xlim=(1, None), ylabel=name)
    common.save_figure(figure, o.out, "noisy_curves")


def main(argv=None, **options):
    """Run, draw and conclude, with the command line's options as keywords: main(alpha=[1, 100], quick=True). Returns
    the summary; raises ValueError or OSError for bad input."""
    o = common.parse(make_parser(), QUICK, argv, options)
    images = None if o.draw_only else common.load_images(o.dataset, o.data_dir)
    return common.sweep(o, lambda alpha, seed: run(alpha, seed, images, o), summarise, draw)


if __name__ == "__main__":
    common.command_line(main)
