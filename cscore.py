"""Figure 2 of "Lazy vs hasty": CIFAR-10 by difficulty, measured by C-score.

    python cscore.py --quick                    a demonstration on synthetic images, no download
    python cscore.py --alpha 1 100              the paper's figure (downloads CIFAR-10 and the C-scores)
    python cscore.py --dataset FILE.npz         your own images, with score_train and score_test

The claim: at an equal mean training loss, the rich network (alpha = 1) is further ahead on easy examples and further
behind on hard ones than the lazy network (alpha = 100).

--quick takes 40 seconds on two CPU cores; the paper's figure 33 seconds an epoch (2026-11-24; not timed on a GPU).
--quick prints, among other tables, the gap in loss between decile 1 and 10,

    alpha = 1 - 100, paired by seed (95 % interval from three seeds on)
      loss                        gap                 decile_1                decile_10                 test_gap
       1.6       0.086 [0.059, 0.113]     0.064 [0.017, 0.110]   -0.022 [-0.058, 0.013]    0.074 [-0.151, 0.299]
       1.5       0.187 [0.112, 0.262]     0.138 [0.043, 0.233]  -0.049 [-0.075, -0.024]    0.155 [-0.012, 0.321]

The C-score of an example (Jiang, Zhang, Talwar, Mozer, ICML 2021) is how well networks trained without it predict its
label: near 1 for a typical image, near 0 for an odd one. Decile 1 holds the lowest tenth (hardest), decile 10 the
highest.
"""
import itertools
import os
import pathlib

import numpy as np
import torch

import common

QUICK = dict(dataset="synthetic", seeds=[0, 1, 2], epochs=26, width=16, lr=.0005, batch_size=25, probe_examples=25,
             stop_loss=1.25, levels=[1.7, 1.6, 1.5, 1.4, 1.3])
SCORES = "cifar10-cscores-orig-order.npz"
SCORE_URLS = ["https://pluskid.github.io/structural-regularity/cscores/" + SCORES,
              "https://raw.githubusercontent.com/pluskid/structural-regularity/HEAD/docs/cscores/" + SCORES]


def make_parser():
    p = common.parser(__doc__, "cscore", levels=[1.6, 1.2])
    p.add_argument("--deciles", type=common.number(int, least=1, most=10), nargs="+", default=[1, 3, 8, 10],
                   help="which deciles to draw; 1 = hardest")
    return p


# --- the scores ---


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


def load(o):
    images = common.load_images(o.dataset, o.data_dir)
    if o.dataset == "cifar10":
        scores = fetch_scores(o.data_dir, np.concatenate([images["y_train"], images["y_test"]]))
        images["score_train"], images["score_test"] = np.split(scores, [len(images["y_train"])])
    missing = [name for name in ("score_train", "score_test") if name not in images]
    if missing:
        raise ValueError(f"{o.dataset}: has no {' and no '.join(missing)}; cscore.py needs a difficulty score for each "
                         "image (higher = easier)")
    return images


def deciles(score):
    """Indices of the ten groups by rank of score (N,), lowest first, ties in their order; sizes differ by 1."""
    if len(score) < 10:
        raise ValueError(f"{len(score)} examples cannot be split into ten deciles")
    return np.array_split(np.argsort(score, kind="stable"), 10)


# --- one run ---


def run(alpha, seed, images, o):
    """Train f^alpha from one seed; its records go to OUT/alpha=ALPHA_seed=SEED/log.jsonl."""
    x, y, score = common.draw_training_set(images, seed, o)
    classes = int(images["y_train"].max()) + 1
    statistics = images["mean"], images["std"]
    train = common.Examples(x, y, *statistics, o)
    test = common.Examples(images["x_test"], images["y_test"], *statistics, o)
    groups = {}
    for prefix, examples, s in (("decile", train, score), ("test_decile", test, images["score_test"])):
        for d, members in enumerate(deciles(s), 1):
            index = torch.as_tensor(common.some(members, 1000, seed), device=o.device)
            groups[f"{prefix}_{d}"] = examples, index, len(members) / len(s)

    with common.seeded("init", seed):
        model = common.resnet18(classes, in_channels=train.x.shape[1], width=o.width)
    model = model.to(o.device, o.dtype)
    identity = common.identity_of(o, alpha, seed, images, model)
    with common.run_folder(o, common.folder_of(o, alpha, seed), identity) as folder:
        centered = common.center(model, alpha)
        test.cache_f0(centered)

        def evaluate():
            entry = {"mean_train_loss": 0.0, "mean_train_acc": 0.0, "test_loss": 0.0, "test_acc": 0.0}
            for name, (examples, index, share) in groups.items():
                loss, acc = common.measure(examples.predict(centered, index), examples.y[index])
                entry[f"{name}_loss"], entry[f"{name}_acc"] = loss, acc
                split = "test" if examples is test else "mean_train"
                entry[f"{split}_loss"] += share * loss
                entry[f"{split}_acc"] += share * acc
            return entry

        probe_x = test.pixels(test.index()[:o.probe_examples])
        return common.train(folder, centered, train, probe_x, evaluate, o, seed, classes)


# --- what came out ---


COLUMNS = {"gap": lambda r: common.minus(r["decile_1_loss"], r["decile_10_loss"]),
           **{f"decile_{d}": (lambda r, d=d: r[f"decile_{d}_loss"]) for d in (1, 3, 8, 10)},
           "test_gap": lambda r: common.minus(r["test_decile_1_loss"], r["test_decile_10_loss"]),
           "test_loss": lambda r: r["test_loss"], "test_acc": lambda r: r["test_acc"]}


def half_way(records, key):
    """The mean training loss at which a decile's loss first fell to half its initial value; None if it has not."""
    start = records[0][key]
    for before, after in zip(records, records[1:]):
        a, b, half = before[key], after[key], start / 2
        if None not in (a, b, after["mean_train_loss"]) and b <= half < a:
            share = (a - half) / (a - b)
            return before["mean_train_loss"] * (1 - share) + after["mean_train_loss"] * share


def summarise(o, runs, classes):
    """Tables at equal mean training loss, and the order in which the deciles are learnt; prints and returns them."""
    levels = common.loss_levels(classes, *o.levels)
    summary = common.summarise(runs, COLUMNS, levels)
    for alpha, seeds in runs.items():
        part = summary["alphas"][f"{alpha:g}"]
        part["half_way"] = {f"decile_{d}": common.spread([half_way(records, f"decile_{d}_loss")
                                                          for records in seeds.values()]) for d in range(1, 11)}
        common.print_table(f"alpha = {alpha:g}, at equal mean training loss", part,
                           ["gap", "decile_1", "decile_3", "decile_8", "decile_10", "test_acc"], levels)
    for pair, part in summary["paired"].items():
        common.print_table(f"alpha = {pair}, paired by seed (95 % interval from three seeds on)", part,
                           ["gap", "decile_1", "decile_10", "test_gap"], levels)
    common.print_linearity(summary, levels)
    print("\nMean training loss at which each decile has fallen to half its initial loss (hardest to easiest)")
    for alpha in runs:
        half = summary["alphas"][f"{alpha:g}"]["half_way"].values()
        print(f"alpha = {alpha:<5g} " + "".join(f"{h['mean']:>7.2f}" if h else "      -" for h in half))
    return summary


def draw(o, runs):
    """cscore.png, the paper's Figure 2, and cscore_curves.png: the test split, and the same runs against iterations."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    of = lambda key: lambda r: r.get(key)
    colours = {d: colormaps["plasma"](.85 * (d - 1) / 9) for d in sorted(set(o.deciles))}
    styles = dict(zip(runs, itertools.cycle(["-", "--", ":", "-."])))

    def panel(ax, prefix, x):
        for (alpha, style), (d, colour) in itertools.product(styles.items(), colours.items()):
            common.band(ax, runs[alpha].values(), of(x), of(f"{prefix}_{d}_loss"), color=colour, linestyle=style)
        ax.set(xlabel=x.replace("_", " "), ylabel="loss")
        common.legend_below(ax, {f"decile {d}": colour for d, colour in colours.items()},
                            {common.alpha_label(alpha): style for alpha, style in styles.items()})

    figure = Figure(figsize=(8.3, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, "decile", "mean_train_loss")
    left.set(title="Loss by C-score decile (1 = hardest)", xlabel="mean training loss (training goes to the right)")
    common.draw_linearity(right, runs, of("mean_train_loss"))
    right.set(xlabel="mean training loss")
    left.invert_xaxis()
    right.invert_xaxis()
    common.save_figure(figure, o.out, "cscore")

    figure = Figure(figsize=(8.3, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, "test_decile", "mean_train_loss")
    left.set(title="Test loss by decile")
    left.invert_xaxis()
    panel(right, "decile", "iteration")
    right.set(title="Training loss by decile", xscale="symlog", xlim=(1, None))
    common.save_figure(figure, o.out, "cscore_curves")


def main(argv=None, **options):
    """Run, draw and conclude, with the command line's options as keywords: main(alpha=[1, 100], quick=True). Returns
    the summary; raises ValueError or OSError for bad input."""
    o = common.parse(make_parser(), QUICK, argv, options)
    images = None if o.draw_only else load(o)
    return common.sweep(o, lambda alpha, seed: run(alpha, seed, images, o), summarise, draw)


if __name__ == "__main__":
    common.command_line(main)
