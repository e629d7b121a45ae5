"""Figure 1 of "Lazy vs hasty": a hundred small networks on a 2-d task with easy and hard regions.

    python toy.py --quick                                   fewer runs, larger steps: the same picture in 20 seconds
    python toy.py                                           the paper's figure
    python toy.py --alpha 0.1 0.3 1 3 10 30 100 1000 inf    also toy_alphas.png: how large must alpha be?
    python toy.py --quick --alpha 1 10 100 --animate        also toy.gif: one network at equal training losses

The claim: at equal training loss the rich network (alpha = 1) has a larger loss than the lazy one (alpha = 100) inside
the two discs, the hard examples, and a smaller one outside, on the easy ones. The gap is the loss inside minus outside.

The paper's figure took 13 minutes on one busy CPU core (AMD EPYC, 2026-11-27); not timed on a GPU. It prints, and then
the tables,

    The claim that rich networks learn the hard discs last holds in these runs: gap at alpha = 1 minus that at alpha =
    100 is +0.068 [0.059, 0.077] at train_loss 0.5 and +0.177 [0.158, 0.196] at train_loss 0.4 (n = 100; MLP, softplus).
"""
import argparse
import io
import math
import os
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
PAPER = {1: {.5: 124, .3: 218, .1: 453}, 100: {.6: 425, .5: 1377, .4: 3740}}  # {alpha: {loss: median iterations}}


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
# torch.func.vmap takes 1.5 times as long.)


def network(run, o):
    with common.seeded("init", run):
        return common.mlp([2 + o.extra_dims, o.width, o.width, o.width, 1]).to(o.device, o.dtype)


def initialisations(runs, o):
    """theta0 of R networks: weights (R, outputs, inputs) and biases (R, outputs, 1) in turn."""
    theta0 = []
    for same in zip(*(network(run, o).parameters() for run in runs)):  # one parameter of every run
        theta0.append(torch.stack(same).detach().view(len(runs), len(same[0]), -1))
    return theta0


def forward(theta, x):
    """f_theta(x) of R networks, each on its own examples x (R, d, N) -> (R, 1, N)."""
    for W, b in zip(theta[:-2:2], theta[1:-2:2]):
        x = torch.baddbmm(b, W, x).relu()
    W, b = theta[-2:]
    return torch.baddbmm(b, W, x)


def centred(theta, theta0, x, alpha, f0=None):
    """f^alpha(x) of R networks, (R, 1, N). At alpha = inf theta is delta = alpha (theta - theta0).
    f0: forward(theta0, x), if it is known."""
    if alpha == math.inf:
        return torch.func.jvp(lambda theta: forward(theta, x), (theta0,), (theta,))[1]
    return alpha * (forward(theta, x) - (forward(theta0, x) if f0 is None else f0))


def loss_of(f, y):
    """The logistic loss of each example, from outputs f and labels y, +1 or -1, of one shape."""
    return F.softplus(-y * f)


def train(runs, alpha, o, levels, curves):
    """Full-batch gradient descent, all `runs` at once, each to the last of `levels` or o.iterations.

    Yields (run, level, iteration, theta, theta0) at the first iteration whose training loss is at or below a level;
    theta and theta0 are that run's. Iteration n is the network after n steps, so 0 is theta0. curves: {run: list}, to
    which the training losses at curve_marks are added, and nan where a run diverges."""
    lr = o.lr if alpha == math.inf else o.lr / alpha**2
    runs, ahead, marks = list(runs), {run: list(levels) for run in runs}, set(curve_marks(o.iterations))
    theta0 = initialisations(runs, o)
    x = torch.stack([points(run, o)[0] for run in runs]).to(o.device, o.dtype)  # (R, N, d)
    x, y = x.mT.contiguous(), label(x)[0][:, None]
    f0 = forward(theta0, x)  # never changes: computed once
    theta = [(torch.zeros_like(p) if alpha == math.inf else p.clone()).requires_grad_() for p in theta0]
    next_level = torch.full((len(runs),), math.inf, device=o.device)
    for iteration in range(o.iterations + 1):
        loss = loss_of(centred(theta, theta0, x, alpha, f0), y).mean((1, 2))  # (R,)
        if iteration in marks:
            for run, value in zip(runs, loss.tolist()):
                curves[run].append(value)
            common.progress(f"alpha={alpha:g} runs {runs[0]} to {runs[-1]}  iteration {iteration}  "
                            f"loss {loss.mean().item():.4f}", probe=False)
        if iteration == o.iterations or not (loss > next_level).all():  # also at nan; else the only wait of a GPU
            stay = []
            for place, (run, value) in enumerate(zip(runs, loss.tolist())):
                while ahead[run] and value <= ahead[run][0]:
                    own = [p[place:place + 1].detach() for p in theta], [p[place:place + 1] for p in theta0]
                    yield run, ahead[run].pop(0), iteration, *own
                if not math.isfinite(value):
                    curves[run].append(math.nan)
                elif ahead[run]:
                    stay.append(place)
            if iteration == o.iterations or not stay:
                return
            if len(stay) < len(runs):
                runs = [runs[place] for place in stay]
                x, y, f0, theta0 = x[stay], y[stay], f0[stay], [p[stay] for p in theta0]
                theta = [p.detach()[stay].requires_grad_() for p in theta]
                loss = loss_of(centred(theta, theta0, x, alpha, f0), y).mean((1, 2))
            next_level = torch.tensor([ahead[run][0] for run in runs], dtype=o.dtype, device=o.device)
        loss.sum().backward()  # a run's loss depends on its own weights alone
        with torch.no_grad():
            for p in theta:
                p.sub_(p.grad, alpha=lr)
                p.grad = None


def curve_marks(iterations):
    """The iterations at which the loss curves are kept, about 40 a decade."""
    return np.unique(np.geomspace(1, iterations, 176).round().astype(int)).tolist()


def train_chunk(runs, alpha, o):
    """Train and measure some runs, and write OUT/alpha=ALPHA/runs=FIRST-LAST.npz: "runs" (R,), each of MEASURED
    (R, LEVELS), "maps" of test loss (R, MAPS, SIDE, SIDE), "marks" and "curves" of training loss (R, marks), "diverged"
    (R,); nan where a run has not come."""
    marks, curves = curve_marks(o.iterations), {run: [] for run in runs}
    found = {"runs": np.array(runs), "marks": np.array(marks), "diverged": np.zeros(len(runs), bool),
             "maps": np.full((len(runs), len(MAPS), SIDE, SIDE), np.nan, np.float16),
             "curves": np.full((len(runs), len(marks)), np.nan, np.float32)}
    found.update({name: np.full((len(runs), len(LEVELS)), np.nan) for name in MEASURED})
    for run, level, iteration, theta, theta0 in train(runs, alpha, o, LEVELS, curves):
        grid = points(run, o)[1].to(o.device, o.dtype)
        y, inside = label(grid)
        with torch.no_grad():
            f = centred(theta, theta0, grid.T[None], alpha)[0, 0]  # (SIDE^2,)
        loss, row = loss_of(f, y), runs.index(run)
        values = (iteration, loss.mean(), (f * y > 0).double().mean(), loss[inside].mean(), loss[~inside].mean())
        for name, value in zip(MEASURED, values):
            found[name][row, LEVELS.index(level)] = value
        if level in MAPS:
            found["maps"][row, MAPS.index(level)] = loss.view(SIDE, SIDE).cpu()
    for row, curve in enumerate(curves.values()):
        found["diverged"][row] = not np.isfinite(curve).all()
        found["curves"][row, :len(curve)] = curve[:len(marks)]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **found)
    path = pathlib.Path(o.out) / f"alpha={alpha:g}" / f"runs={runs[0]}-{runs[-1]}.npz"
    common.write_atomically(path, buffer.getvalue())
    return f"{path} is written"


def train_missing(o, args):
    """Train the runs that --out does not hold yet, a chunk at a time. Under torchrun each process takes its share."""
    chunks = []
    for alpha in o.alpha:
        folder = pathlib.Path(o.out) / f"alpha={alpha:g}"
        common.write_args(folder, args)
        done = [run for path in folder.glob("runs=*.npz") for run in common.read_npz(path)["runs"].tolist()]
        missing = [run for run in range(o.runs) if run not in done]
        chunks += [(missing[first:first + o.chunk], alpha, o) for first in range(0, len(missing), o.chunk)]
    for k, written in enumerate(common.side_by_side(o, train_chunk, common.share_of_rank(chunks), threads=1)):
        common.progress(f"{k + 1} of {len(chunks)}: {written}")


def read(out):
    """All that a folder holds, {alpha: {name: array}}, see train_chunk, runs ascending."""
    found = {}
    for folder in sorted(pathlib.Path(out).glob("alpha=*")):
        files = [common.read_npz(path) for path in sorted(folder.glob("runs=*.npz"))]
        if not files:
            continue
        order = np.argsort(np.concatenate([file["runs"] for file in files]))
        arrays = {"marks": files[0]["marks"]}
        for name in ("runs", "maps", "curves", "diverged", *MEASURED):
            arrays[name] = np.concatenate([file[name] for file in files])[order]
        found[float(folder.name.removeprefix("alpha="))] = arrays
    if not found:
        raise ValueError(f"{out} (--out): there are no records of runs")
    return dict(sorted(found.items()))


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
    """Print the conclusion and a table a claim; return rows and sentence."""
    rows = readings(found)
    pairs = common.differences(rows, ["gap", "inside_loss", "outside_loss", "test_loss"])
    runs = {alpha: arrays["runs"] for alpha, arrays in found.items()}
    conclusion = common.verdict(runs, rows, pairs, "train_loss", "gap", "rich networks learn the hard discs last",
                                o.about)
    print(f"\n{conclusion}")
    for title, quantity in (("Gap: test loss in the discs minus outside", "gap"),
                            ("Test loss in the discs (hard)", "inside_loss"), ("Test loss outside", "outside_loss")):
        common.print_table(title, rows, pairs, "train_loss", quantity)
    print("\nMedian iterations to a training loss, and how many runs reached it")
    print(f"{'alpha':>12}" + "".join(f"{level:>16g}" for level in LEVELS))
    for alpha, arrays in found.items():
        line = f"{alpha:>12g}"
        for iterations in arrays["iteration"].T:
            reached = iterations[np.isfinite(iterations)]
            text = f"{np.median(reached):.0f} ({len(reached)}/{len(iterations)})" if len(reached) else "-"
            line += f"{text:>16}"
        print(line)
    return rows, pairs, conclusion


def mean_difference(found, level, rich, lazy):
    """The mean map of test loss at a level, rich minus lazy, over the runs that reached it under both: (SIDE, SIDE) or
    None; and how many runs these are."""
    k, column = MAPS.index(level), LEVELS.index(level)
    places = {}
    for alpha in (rich, lazy):
        reached = np.isfinite(found[alpha]["iteration"][:, column])
        places[alpha] = {run: row for row, run in enumerate(found[alpha]["runs"].tolist()) if reached[row]}
    both = [run for run in places[rich] if run in places[lazy]]
    if not both:
        return None, 0
    maps = [found[alpha]["maps"][[places[alpha][run] for run in both], k].astype(float) for alpha in (rich, lazy)]
    return np.nan_to_num((maps[0] - maps[1]).mean(0)), len(both)


# The pictures.


def draw(o, found, rows, pairs):
    """toy.png, the paper's Figure 1: task, training, and where test losses differ at equal training loss."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 6.2), layout="constrained")
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
        draw_task(ax, o, size=0)
        ax.set_title(f"({letter}) at training loss {level:g}", fontsize=10)
        mean, runs = mean_difference(found, level, rich, lazy)
        ax.set_xlabel(f"mean of {runs} runs")
        if runs:
            most = max(abs(mean).max(), 1e-6)
            image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most, **PLANE)
            bottom.colorbar(image, ax=ax, shrink=.7, ticks=[-most, 0, most], format="%.2f")
    a, b = common.alpha_label(rich), common.alpha_label(lazy)
    bottom.suptitle(f"Test loss of {a} minus that of {b}. Red: rich ({a}) has the larger loss, blue: lazy ({b})",
                    fontsize=10)
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
        ax.plot(arrays["marks"], arrays["curves"].T, color=style["color"], linewidth=.5, alpha=.25)
        reached = np.isfinite(arrays["iteration"]).sum(0) * 2 > len(arrays["runs"])
        ax.plot(np.nanmedian(arrays["iteration"][:, reached], 0), np.array(LEVELS)[reached], **style)
        if (o.iterations, o.lr) == (25000, .1):
            for level, iteration in PAPER.get(alpha, {}).items():
                common.draw_crosses(ax, {alpha: {iteration: level}})
    ax.set(xscale="log", ylim=(LEVELS[-1] - .02, .72), xlabel="iterations", ylabel=f"training loss ({o.loss})")
    ax.set_title("(b) training; markers: median run", fontsize=10)
    ax.legend(loc="lower left")


def animate(o):
    """toy.gif: what run 0 predicts where all but x1, x2 are 0; up to four alphas, at equal training loss."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    alphas = o.alpha if len(o.alpha) <= 4 else [*o.alpha[:3], o.alpha[-1]]
    print("toy.gif: training run 0 once more", flush=True)
    at = dict(common.side_by_side(o, predictions, [(alpha, o) for alpha in alphas], threads=1))
    levels = [level for level in FRAMES if all(level in at[alpha] for alpha in alphas)]
    if not levels:
        raise ValueError("--animate: run 0 does not learn under every alpha: more --iterations")
    names = {1.0: "rich, ", 100.0: "lazy, ", math.inf: "linear, "}
    figure = Figure(figsize=(2.9 * len(alphas), 3.7), facecolor="white")
    axes = figure.subplots(1, len(alphas), squeeze=False)[0]
    figure.subplots_adjust(left=.02, right=.98, bottom=.02, top=.78, wspace=.06)  # the same in every frame
    writer, part = PillowWriter(fps=4), pathlib.Path(o.out) / "toy.part.gif"
    with writer.saving(figure, part, dpi=90):
        for level in levels + levels[-1:] * 8:  # rests on the last
            figure.suptitle(f"at training loss {level:.2f}", fontsize=14)
            for ax, alpha in zip(axes, alphas):
                iteration, probability = at[alpha][level]
                ax.clear()
                ax.contourf(probability, np.linspace(0, 1, 21), cmap="RdBu_r", vmin=-.3, vmax=1.3, **PLANE)
                ax.contour(probability, levels=[.5], colors="black", linewidths=1.5, **PLANE)
                draw_task(ax, o, size=30)
                title = f"{names.get(alpha, '')}{common.alpha_label(alpha)}\niteration {iteration}"
                ax.set(xticks=[], yticks=[], title=title)
            writer.grab_frame()
            common.progress(f"toy.gif: frame at training loss {level:.2f}", probe=level == levels[-1])
    os.replace(part, part.with_name("toy.gif"))


def predictions(alpha, o):
    """Train run 0, for twenty times --iterations, so that lazy networks come to the last frame, too. Returns alpha and
    {level: (iteration, probability of label +1 (SIDE, SIDE))}."""
    o = argparse.Namespace(**{**vars(o), "iterations": 20 * o.iterations})
    grid, found = points(0, o)[1].to(o.device, o.dtype), {}
    grid[:, 2:] = 0
    for _, level, iteration, theta, theta0 in train([0], alpha, o, FRAMES, {0: []}):
        with torch.no_grad():
            f = centred(theta, theta0, grid.T[None], alpha)
        found[level] = iteration, torch.sigmoid(f).view(SIDE, SIDE).cpu().numpy()
    return alpha, found


def main(*words, **options):
    """Train, conclude and draw, with the command line's words, or its options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    parser, count = common.parser(__file__, __doc__), common.number(int, at_least=1)
    parser.set_defaults(lr=.1, width=60)
    parser.add_argument("--runs", type=count, default=100, metavar="N", help="networks an alpha, each with its data")
    parser.add_argument("--chunk", type=count, default=25, metavar="N", help="runs trained as one; more on a GPU")
    parser.add_argument("--iterations", type=count, default=25000, metavar="N", help="at most so many steps")
    parser.add_argument("--extra-dims", type=common.number(int, at_least=0), default=5, metavar="N",
                        help="inputs that mean nothing")
    parser.add_argument("--animate", action=argparse.BooleanOptionalAction, default=False,
                        help="also write toy.gif: what run 0 predicts as it learns")
    o = common.parse(parser, QUICK, words, options)
    if o.draw_only and o.animate:
        raise ValueError("--animate trains a network, --draw-only trains nothing: choose one")
    o.loss, o.about, o.data_crc32 = "softplus", "MLP, softplus", common.crc32(x.numpy() for x in points(0, o))
    if not o.draw_only:
        args = {**common.identity(o), "network": "MLP"}
        common.check_out(o, args)
        train_missing(o, args)
    found = read(o.out)
    if not o.draw_only and any(alpha not in found or len(found[alpha]["runs"]) < o.runs for alpha in o.alpha):
        return {}  # another process of torchrun is still at work, and will draw
    args = common.read_args(pathlib.Path(o.out) / f"alpha={min(found):g}")
    o.extra_dims, o.iterations, o.lr = args["extra_dims"], args["iterations"], args["lr"]
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
