"""Figure 1 of "Lazy vs hasty": a hundred small networks on a 2-d task with easy and hard regions.

    python toy.py --quick                                   fewer runs, larger steps: the same picture in 20 seconds
    python toy.py                                           the paper's figure
    python toy.py --alpha 0.1 0.3 1 3 10 30 100 1000 inf    also toy_alphas.png: how large must alpha be?
    python toy.py --quick --alpha 1 10 100 --animate        also toy.gif: one network at equal training losses

The claim: at equal training loss the rich network (alpha = 1) has a larger loss than the lazy one (alpha = 100) inside
the two discs, the hard examples, and a smaller one outside, on the easy ones. The gap is the loss inside minus outside.

The paper's figure took 13 minutes on one busy CPU core, 6 of them its own (AMD EPYC, 2026-11-27). It concludes

    The claim that rich networks learn the hard discs last holds in these runs: gap at alpha = 1 minus that at alpha =
    100 is +0.068 [0.059, 0.077] at train_loss 0.5 and +0.177 [0.158, 0.196] at train_loss 0.4 (n = 100; MLP, softplus).
"""
import argparse
import io
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

import common

QUICK = dict(runs=12, lr=.3, iterations=6000)
POINTS = 100  # training examples of a run
SIDE = 60  # the test grid has SIDE x SIDE points
LEVELS = [.6, .5, .4, .3, .2, .1]  # training losses at which runs are compared
MAPS = [.5, .4, .3]  # those of the figure's maps
FRAMES = [k / 100 for k in range(68, 9, -2)]  # those of the animation
PLANE = dict(extent=(-1, 1, -1, 1), origin="lower")  # where matplotlib puts a map
CENTRES, RADIUS = [(-.5, .5), (.5, -.5)], .3  # of the two discs
MEASURED = ("iteration", "test_loss", "test_acc", "inside_loss", "outside_loss")
PAPER = {1: ([124, 218, 453], [.5, .3, .1]), 100: ([425, 1377, 3740], [.6, .5, .4])}  # median iterations, at losses


# The data.


def label(x):
    """x (..., 2 or more) -> label +1 or -1 (...), the sign of x2, flipped inside the discs; and whether x is
    inside one (...), which makes it hard."""
    x1, x2 = x[..., 0], x[..., 1]
    inside = torch.zeros_like(x1, dtype=torch.bool)
    for c1, c2 in CENTRES:
        inside |= (x1 - c1)**2 + (x2 - c2)**2 < RADIUS**2
    return torch.where(inside ^ (x2 > 0), 1.0, -1.0).to(x.dtype), inside


def points(run, o):
    """What a run's seed fixes for every alpha, in float64 on the CPU: training examples (POINTS, d) and the test grid
    (SIDE^2, d), of which x1 and x2 are the same in every run and the rest is drawn."""
    def draw(what, n):
        generator = common.generator(what, run)
        return 2 * torch.rand(n, 2 + o.extra_dims, generator=generator, dtype=torch.float64) - 1

    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    grid = draw("toy grid", SIDE**2)
    grid[:, 1], grid[:, 0] = torch.cartesian_prod(axis, axis).T  # rows of the map are x2
    return draw("toy train", POINTS), grid


# Training, R runs as one. Examples are columns: a CPU multiplies fastest with the long side last. (Written out, since
# torch.func.vmap over functional_call takes 1.4 times as long.)

loss_of = F.softplus  # of -y f: the logistic loss, for labels +1 and -1; records and pictures carry its name


def network(run, o):
    with common.seeded("init", run):
        return common.mlp([2 + o.extra_dims, o.width, o.width, o.width, 1]).to(o.device, o.dtype)


def forward(theta, x):
    """f_theta(x) of R networks, each on its own examples x (R, d, N) -> (R, 1, N). theta: weights (R, outputs, inputs)
    and biases (R, outputs, 1) in turn."""
    for W, b in zip(theta[:-2:2], theta[1:-2:2]):
        x = torch.baddbmm(b, W, x).relu()
    W, b = theta[-2:]
    return torch.baddbmm(b, W, x)


def centred(theta, theta0, x, f0, alpha):
    """f^alpha(x) of R networks, (R, 1, N), with f0 = f_theta0(x). At alpha = inf theta is alpha (theta - theta0)."""
    if alpha == math.inf:
        return torch.func.jvp(lambda theta: forward(theta, x), (theta0,), (theta,))[1]
    return alpha * (forward(theta, x) - f0)


def train(runs, alpha, o, levels, iterations):
    """Full-batch gradient descent, all R runs at once, until each has passed the last of `levels`.

    Yields (iteration, losses, passed, outputs) at curve_marks and where a run passes a level. losses (R,): of training;
    passed: [(row, level), ...], the runs whose loss is at or below a level for the first time; outputs(row, x): f^alpha
    of a run, x (N, d) -> (N,). Iteration n is the network after n steps, so 0 is theta0."""
    x = torch.stack([points(run, o)[0] for run in runs]).to(o.device, o.dtype)  # (R, N, d)
    x, y = x.mT.contiguous(), label(x)[0][:, None]
    stacked, _ = torch.func.stack_module_state([network(run, o) for run in runs])
    theta0 = [p.detach().view(len(runs), p.shape[1], -1) for p in stacked.values()]
    theta = [(torch.zeros_like(p) if alpha == math.inf else p.clone()).requires_grad_() for p in theta0]
    f0 = forward(theta0, x)  # never changes: computed once
    lr = o.lr if alpha == math.inf else o.lr / alpha**2

    @torch.no_grad()
    def outputs(row, x):
        own, own0 = [p[row:row + 1] for p in theta], [p[row:row + 1] for p in theta0]
        x = x.T[None].to(o.device, o.dtype)
        return centred(own, own0, x, forward(own0, x), alpha)[0, 0]

    marks, ahead = set(curve_marks(iterations)), [[*levels, -math.inf] for _ in runs]
    next_level = torch.full((len(runs),), levels[0], dtype=o.dtype, device=o.device)
    for iteration in range(iterations + 1):
        loss = loss_of(-y * centred(theta, theta0, x, f0, alpha)).mean((1, 2))  # (R,)
        if iteration in marks or (loss <= next_level).any():  # on a GPU the only wait
            losses, passed = loss.detach().cpu().numpy(), []
            for row, value in enumerate(losses):
                while value <= ahead[row][0]:
                    passed.append((row, ahead[row].pop(0)))
            yield iteration, losses, passed, outputs
            next_level = torch.tensor([ahead_of_run[0] for ahead_of_run in ahead], dtype=o.dtype, device=o.device)
            if next_level.max() == -math.inf or not np.isfinite(losses).any():
                return
        loss.sum().backward()  # a run's loss depends on its own parameters alone
        with torch.no_grad():
            for p in theta:
                p.sub_(p.grad, alpha=lr)
                p.grad = None


def curve_marks(iterations):
    """The iterations at which the loss curves are kept, about 40 a decade."""
    return np.unique(np.geomspace(1, iterations, 176).round().astype(int)).tolist()


def train_chunk(runs, alpha, o):
    """Train and measure some runs, and write OUT/alpha=ALPHA/runs=FIRST-LAST.npz: "runs" (R,), "diverged" (R,), each of
    MEASURED (R, LEVELS), "maps" of test loss (R, MAPS, SIDE, SIDE), "curves" of training loss (R, curve_marks); nan at
    what a run has not passed."""
    marks = curve_marks(o.iterations)
    found = {"runs": np.array(runs), "curves": np.full((len(runs), len(marks)), np.nan, np.float32),
             "maps": np.full((len(runs), len(MAPS), SIDE, SIDE), np.nan, np.float16)}
    for name in MEASURED:
        found[name] = np.full((len(runs), len(LEVELS)), np.nan)
    for iteration, losses, passed, outputs in train(runs, alpha, o, LEVELS, o.iterations):
        not_ended = np.isnan(found["iteration"][:, -1])
        if iteration in marks:
            found["curves"][not_ended, marks.index(iteration)] = losses[not_ended]
            common.progress(f"alpha={alpha:g} runs {runs[0]} to {runs[-1]}  iteration {iteration}  "
                            f"loss {losses.mean():.4f}", probe=False)
        for row, level in passed:
            grid = points(runs[row], o)[1]
            y, inside = label(grid)
            f = outputs(row, grid).cpu()  # (SIDE^2,)
            loss = loss_of(-y * f)
            values = (iteration, loss.mean(), (f * y > 0).double().mean(), loss[inside].mean(), loss[~inside].mean())
            for name, value in zip(MEASURED, values):
                found[name][row, LEVELS.index(level)] = value
            if level in MAPS:  # in steps of 1/32, for half the size; the mean of 100 runs is within .005
                found["maps"][row, MAPS.index(level)] = (32 * loss).round().view(SIDE, SIDE) / 32
    found["diverged"] = np.isnan(found["iteration"][:, -1]) & ~(losses <= 2 * math.log(2))  # the first loss: log 2
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **found)
    path = pathlib.Path(o.out) / f"alpha={alpha:g}" / f"runs={runs[0]}-{runs[-1]}.npz"
    common.write_atomically(path, buffer.getvalue())
    return f"{path} is written"


def train_missing(o, args):
    """Train the runs that --out does not hold yet, a chunk at a time. Under torchrun each process takes its share."""
    found, chunks = read(o.out), []
    for alpha in o.alpha:
        common.write_args(pathlib.Path(o.out) / f"alpha={alpha:g}", args)
        done = found[alpha]["runs"] if alpha in found else []
        missing = [run for run in range(o.runs) if run not in done]
        for first in range(0, len(missing), o.chunk):
            chunks.append((missing[first:first + o.chunk], alpha, o))
    for k, written in enumerate(common.side_by_side(o, train_chunk, common.share_of_rank(chunks), threads=1)):
        common.progress(f"{k + 1} of {len(chunks)}: {written}")


def read(out):
    """What a folder holds, {alpha: {name: array}} as in train_chunk, each run once, ascending. ValueError: damaged."""
    files, found = {}, {}
    for path in sorted(pathlib.Path(out).glob("alpha=*/runs=*.npz")):
        arrays = common.read_npz(path)
        if not arrays.keys() >= {"runs", "diverged", "maps", "curves", *MEASURED}:
            raise ValueError(f"{path} holds no runs of toy.py: delete it")
        files.setdefault(float(path.parent.name.removeprefix("alpha=")), []).append(arrays)
    for alpha in sorted(files):
        _, rows = np.unique(np.concatenate([arrays["runs"] for arrays in files[alpha]]), return_index=True)
        found[alpha] = {}
        for name in ("runs", "diverged", "maps", "curves", *MEASURED):
            found[alpha][name] = np.concatenate([arrays[name] for arrays in files[alpha]])[rows]
    return found


# What came out, at equal training loss.


def readings(found):
    """A row for each run and level that it has reached, as the other scripts' rows."""
    rows = []
    for alpha, arrays in found.items():
        for row, run in enumerate(arrays["runs"].tolist()):
            for column, level in enumerate(LEVELS):
                if np.isfinite(arrays["iteration"][row, column]):
                    values = {name: float(arrays[name][row, column]) for name in MEASURED}
                    rows.append({"alpha": alpha, "seed": run, "on": "train_loss", "level": level, **values,
                                 "gap": values["inside_loss"] - values["outside_loss"]})
    return rows


def conclude(o, found):
    """Print the conclusion and a table a claim; return rows, paired differences and the sentence."""
    rows = readings(found)
    pairs = common.differences(rows, ["gap", "inside_loss", "outside_loss", "test_loss"])
    runs = {alpha: arrays["runs"] for alpha, arrays in found.items()}
    conclusion = common.verdict(runs, rows, pairs, "train_loss", "gap", "rich networks learn the hard discs last",
                                o.about)
    print(f"\n{conclusion}")
    common.print_table("Gap: test loss in the discs minus outside", rows, pairs, "train_loss", "gap")
    common.print_table("Test loss in the discs (hard)", rows, pairs, "train_loss", "inside_loss")
    common.print_table("Test loss outside (easy)", rows, pairs, "train_loss", "outside_loss")
    print("\nMedian iterations to a training loss, and how many runs reached it")
    print(f"{'alpha':>12}" + "".join(f"{level:>16g}" for level in LEVELS))
    for alpha in found:
        print(f"{alpha:>12g}", end="")
        for level in LEVELS:
            reached = [row["iteration"] for row in common.where(rows, alpha=alpha, level=level)]
            text = f"{np.median(reached):.0f} ({len(reached)}/{len(runs[alpha])})" if reached else "-"
            print(f"{text:>16}", end="")
        print()
    return rows, pairs, conclusion


def mean_difference(found, level, rich, lazy):
    """The mean map of test loss at a level, rich minus lazy (SIDE, SIDE), and of how many runs: all that have both."""
    _, rows, others = np.intersect1d(found[rich]["runs"], found[lazy]["runs"], return_indices=True)
    k = MAPS.index(level)
    differences = found[rich]["maps"][rows, k].astype(float) - found[lazy]["maps"][others, k]
    reached = differences[np.isfinite(differences).all((1, 2))]
    return reached.sum(0) / max(len(reached), 1), len(reached)


def draw(o, found, rows, pairs):
    """toy.png, the paper's Figure 1: task, training, and where test losses differ at equal training loss."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 5.8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    task, training = top.subplots(1, 2, width_ratios=[1, 1.9])
    axis = torch.linspace(-1, 1, 400)
    background, _ = label(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    task.imshow(background.numpy(), cmap="RdBu_r", vmin=-4, vmax=4, **PLANE)
    draw_task(task, o)
    task.set_title("(a) task, one run's data", fontsize=10)
    draw_training(training, o, found)
    rich, lazy = common.rich_and_lazy(found)
    for ax, level, letter in zip(bottom.subplots(1, len(MAPS)), MAPS, "cde"):
        mean, runs = mean_difference(found, level, rich, lazy)
        most = max(abs(mean).max(), 1e-6)
        image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most, **PLANE)
        bottom.colorbar(image, ax=ax, shrink=.7, ticks=[-most, 0, most], format="%.2f")
        draw_task(ax, o, size=0)
        ax.set_title(f"({letter}) at training loss {level:g}", fontsize=10)
        ax.set_xlabel(f"mean of {runs} runs")
    a, b = common.alpha_label(rich), common.alpha_label(lazy)
    bottom.suptitle(f"Red: the rich networks ({a}) have the larger test loss, blue: the lazy ones ({b})", fontsize=10)
    common.save_figure(figure, o.out, "toy")
    common.draw_alphas(o, rows, pairs, "train_loss", "gap", MAPS)


def draw_task(ax, o, size=16):
    """The plane of x1 and x2 with the discs, and the training examples of run 0, of a size."""
    from matplotlib.patches import Circle
    for centre in CENTRES:
        ax.add_patch(Circle(centre, RADIUS, fill=False, linewidth=.8, color="black"))
    x = points(0, o)[0]
    y, _ = label(x)
    for sign, colour, marker in ((1, "#b2182b", "o"), (-1, "#2166ac", "^")):
        x1, x2 = x[y == sign, :2].T
        ax.scatter(x1, x2, s=size, color=colour, marker=marker, edgecolors="white", linewidths=.5 if size else 0)
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal", xlim=(-1, 1), ylim=(-1, 1))


def draw_training(ax, o, found):
    """Training loss of every run against iterations, where the median run is at LEVELS, and the paper's medians."""
    for alpha, arrays in found.items():
        style = {**common.look(alpha), "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        ax.plot(curve_marks(o.iterations), arrays["curves"].T, color=style["color"], linewidth=.5, alpha=.25)
        reached = np.isfinite(arrays["iteration"]).sum(0) * 2 > len(arrays["runs"])
        ax.plot(np.nanmedian(arrays["iteration"][:, reached], 0), np.array(LEVELS)[reached], **style)
        if alpha in PAPER and (o.iterations, o.lr) == (25000, .1):
            ax.plot(*PAPER[alpha], "kx", zorder=9)
    ax.set(xscale="log", ylim=(LEVELS[-1] - .02, .72), xlabel="iterations", ylabel=f"training loss ({o.loss})")
    ax.set_title("(b) training; markers: median run, crosses: the paper's", fontsize=10)
    ax.legend(loc="lower left")


def animate(o):
    """toy.gif: what run 0 predicts where all but x1, x2 are 0, at equal training loss."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    common.progress("toy.gif: training run 0 once more")
    at = dict(common.side_by_side(o, predictions, [(alpha, o) for alpha in o.alpha], threads=1))
    levels = [level for level in FRAMES if all(level in at[alpha] for alpha in o.alpha)]
    if not levels:
        raise ValueError("--animate: run 0 does not learn under every alpha: more --iterations")
    names = {1.0: "rich, ", 100.0: "lazy, ", math.inf: "linear, "}
    figure = Figure(figsize=(2.9 * len(o.alpha), 3.7), facecolor="white")
    axes = figure.subplots(1, len(o.alpha), squeeze=False)[0]
    figure.subplots_adjust(left=.02, right=.98, bottom=.02, top=.78, wspace=.06)  # the same in every frame
    writer = PillowWriter(fps=4)
    with writer.saving(figure, pathlib.Path(o.out) / "toy.gif", dpi=90):
        for level in levels + levels[-1:] * 8:  # rests on the last
            common.progress(f"toy.gif: frame at training loss {level:.2f}", probe=level in levels[::5])
            figure.suptitle(f"at training loss {level:.2f}", fontsize=14)
            for ax, alpha in zip(axes, o.alpha):
                iteration, probability = at[alpha][level]
                ax.clear()
                ax.contourf(probability, np.linspace(0, 1, 21), cmap="RdBu_r", vmin=-.3, vmax=1.3, **PLANE)
                ax.contour(probability, levels=[.5], colors="black", linewidths=1.5, **PLANE)
                draw_task(ax, o, size=30)
                title = f"{names.get(alpha, '')}{common.alpha_label(alpha)}\niteration {iteration}"
                ax.set(xticks=[], yticks=[], title=title)
            writer.grab_frame()


def predictions(alpha, o):
    """Train run 0, for twenty times --iterations, so that lazy networks come to the last frame, too. Returns alpha and
    {level: (iteration, probability of label +1 (SIDE, SIDE))}."""
    grid, found = points(0, o)[1], {}
    grid[:, 2:] = 0
    for iteration, _, passed, outputs in train([0], alpha, o, FRAMES, 20 * o.iterations):
        for row, level in passed:
            found[level] = iteration, torch.sigmoid(outputs(row, grid)).view(SIDE, SIDE).cpu().numpy()
    return alpha, found


def main(*words, **options):
    """Train, conclude and draw, with the command line's words, or its options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    parser, count = common.parser(__file__, __doc__), common.number(int, at_least=1)
    parser.set_defaults(lr=.1, width=60)
    parser.add_argument("--runs", type=count, default=100, metavar="N", help="networks an alpha, each with its data")
    parser.add_argument("--chunk", type=count, default=25, metavar="N", help="runs trained as one; more on a GPU")
    parser.add_argument("--iterations", type=count, default=25000, metavar="N", help="at most so many steps")
    parser.add_argument("--extra-dims", type=common.number(int, at_least=0), default=5, metavar="N", help="idle inputs")
    parser.add_argument("--animate", action=argparse.BooleanOptionalAction, default=False, help="also write toy.gif")
    o = common.parse(parser, QUICK, words, options)
    if o.draw_only and o.animate:
        raise ValueError("--animate trains a network, --draw-only trains nothing: choose one")
    o.loss, o.data_crc32 = common.name_of(loss_of), common.crc32(x.numpy() for x in points(0, o))
    if not o.draw_only:
        args = {**common.identity(o), "network": "MLP"}
        others = common.check_out(o, args)
        if others:
            print(f"warning: runs in {o.out} are by another text of {o.script}.py: {', '.join(others)}")
        train_missing(o, args)
    found = read(o.out)
    if not found:
        raise ValueError(f"{o.out} (--out): there are no records of runs")
    if not o.draw_only and any(alpha not in found or len(found[alpha]["runs"]) < o.runs for alpha in o.alpha):
        return {}  # another process of torchrun is still at work, and will draw
    args = common.read_args(pathlib.Path(o.out) / f"alpha={min(found):g}")
    o.extra_dims, o.iterations, o.lr, o.loss = (args[name] for name in ("extra_dims", "iterations", "lr", "loss"))
    o.about = f"{args['network']}, {o.loss}"
    rows, pairs, conclusion = conclude(o, found)
    draw(o, found, rows, pairs)
    if o.animate:
        animate(o)
    diverged = []
    for alpha, arrays in found.items():
        diverged += [f"alpha={alpha:g} run {run}" for run in arrays["runs"][arrays["diverged"]]]
    return common.write_summary(o, args, rows, pairs, diverged, conclusion)


if __name__ == "__main__":
    common.command_line(main)
