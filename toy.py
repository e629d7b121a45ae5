"""Figure 1 of "Lazy vs hasty": a hundred small networks on a 2-d task with easy and hard regions.

    python toy.py --quick                                   fewer runs, larger steps: the same picture in 10 seconds
    python toy.py                                           the paper's figure
    python toy.py --alpha 0.1 0.3 1 3 10 30 100 1000 inf    also toy_alphas.png: how large must alpha be?
    python toy.py --quick --alpha 1 10 100 --animate        also toy.gif: one network at equal training losses

The claim: at equal training loss the rich network (alpha = 1) has a larger loss than the lazy one (alpha = 100) inside
the two discs, the hard examples, and a smaller one outside, on the easy ones. The gap is the loss inside minus outside.
The paper's figure took 2 minutes on two idle CPU cores (AMD EPYC, 2026-11-29); not timed on a GPU. First it prints

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
loss_of = F.softplus  # of -y f, the logistic loss of labels +1 and -1; records and pictures carry its name
PAPER = {1: {124: .5, 218: .3, 453: .1}, 100: {425: .6, 1377: .5, 3740: .4}}  # {alpha: {median iterations: loss}}


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
    d = 2 + o.extra_dims
    train = 2 * torch.rand(POINTS, d, generator=common.generator("toy train", run), dtype=torch.float64) - 1
    grid = 2 * torch.rand(SIDE**2, d, generator=common.generator("toy grid", run), dtype=torch.float64) - 1
    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    grid[:, 1], grid[:, 0] = torch.cartesian_prod(axis, axis).T  # rows of the map are x2
    return train, grid


def network(run, o):
    with common.seeded("init", run):
        return common.mlp([2 + o.extra_dims, o.width, o.width, o.width, 1]).to(o.device, o.dtype)


def forward(theta, x):
    """f_theta(x) of R networks, each on its own examples x (R, d, N) -> (R, 1, N). theta: weights (R, outputs, inputs)
    and biases (R, outputs, 1) in turn. (Written out, since torch.func.vmap takes 1.5 times as long.)"""
    for W, b in zip(theta[:-2:2], theta[1:-2:2]):
        x = torch.baddbmm(b, W, x).relu()
    W, b = theta[-2:]
    return torch.baddbmm(b, W, x)


def centred(theta, theta0, x, alpha, f0=None):
    """f^alpha(x) = alpha (f_theta(x) - f_theta0(x)) of R networks, (R, 1, N). At alpha = inf it is linear in theta,
    which stands for alpha (theta - theta0). f0: forward(theta0, x), if it is known."""
    f = lambda theta: forward(theta, x)
    if alpha == math.inf:
        return torch.func.jvp(f, (theta0,), (theta,))[1]
    if f0 is None:
        f0 = f(theta0)
    return alpha * (f(theta) - f0)


def train(runs, alpha, o, levels, curves):
    """Full-batch gradient descent, all `runs` at once, until each has come to the last of `levels`, or o.iterations.

    Yields (run, level, iteration, theta, theta0) at the first iteration whose training loss is at or below a level;
    theta and theta0 are that run's. Iteration n is the network after n steps, so 0 is theta0. curves: {run: list}, to
    which a run's training losses at curve_marks are added, as far as its last level, or a loss that is not finite."""
    lr = o.lr if alpha == math.inf else o.lr / alpha**2
    stacked, _ = torch.func.stack_module_state([network(run, o) for run in runs])  # biases (R, outputs)
    theta0 = [p.detach().view(*p.shape[:2], -1) for p in stacked.values()]
    theta = [p.clone() if alpha < math.inf else torch.zeros_like(p) for p in theta0]
    optimizer = torch.optim.SGD([p.requires_grad_() for p in theta], lr)
    x = torch.stack([points(run, o)[0] for run in runs]).to(o.device, o.dtype).mT.contiguous()  # (R, d, N)
    y = label(x.mT)[0][:, None]  # (R, 1, N)
    f0 = forward(theta0, x)  # never changes: computed once
    marks = set(curve_marks(o.iterations))
    ahead = {run: list(levels) for run in runs}
    next_level = torch.full((len(runs),), levels[0], dtype=o.dtype, device=o.device)  # (R,)
    for iteration in range(o.iterations + 1):
        loss = loss_of(-y * centred(theta, theta0, x, alpha, f0)).mean((1, 2))  # (R,)
        if iteration in marks or (loss <= next_level).any():  # on a GPU the only wait of a step
            for place, (run, value) in enumerate(zip(runs, loss.tolist())):
                if ahead[run] and (iteration in marks or not math.isfinite(value)):
                    curves[run].append(value)
                if not math.isfinite(value):
                    ahead[run] = []
                while ahead[run] and value <= ahead[run][0]:
                    one = slice(place, place + 1)
                    yield run, ahead[run].pop(0), iteration, [p[one].detach() for p in theta], [p[one] for p in theta0]
            if not any(ahead.values()):
                return
            next_level = loss.new_tensor([max(ahead[run], default=-math.inf) for run in runs])
        optimizer.zero_grad()
        loss.sum().backward()  # a run's loss depends on its own weights alone
        optimizer.step()


def curve_marks(iterations):
    """The iterations at which the loss curves are kept, about 40 a decade."""
    return np.unique(np.geomspace(1, iterations, 176).round().astype(int)).tolist()


def measure(run, alpha, theta, theta0, o):
    """The test losses of a run's network, {name: number}, and its loss at every point of the grid, (SIDE, SIDE)."""
    x = points(run, o)[1].to(o.device, o.dtype)
    y, inside = label(x)
    f = centred(theta, theta0, x.T[None], alpha)[0, 0]  # (SIDE^2,)
    loss = loss_of(-y * f)
    values = {"test_loss": loss.mean().item(), "test_acc": (f * y > 0).double().mean().item(),
              "inside_loss": loss[inside].mean().item(), "outside_loss": loss[~inside].mean().item()}
    return values, loss.view(SIDE, SIDE)


def train_chunk(runs, alpha, o):
    """Train and measure some runs, and write OUT/alpha=ALPHA/runs=FIRST-LAST.npz: "runs" (R,), each of MEASURED
    (R, LEVELS), "maps" of test loss (R, MAPS, SIDE, SIDE), "marks" and "curves" of training loss (R, marks), "diverged"
    (R,); nan where a run has not come."""
    marks, curves = curve_marks(o.iterations), {run: [] for run in runs}
    found = {"runs": np.array(runs), "marks": np.array(marks), "diverged": np.zeros(len(runs), bool),
             "maps": np.full((len(runs), len(MAPS), SIDE, SIDE), np.nan, np.float16),
             "curves": np.full((len(runs), len(marks)), np.nan)}
    for name in MEASURED:
        found[name] = np.full((len(runs), len(LEVELS)), np.nan)
    for run, level, iteration, theta, theta0 in train(runs, alpha, o, LEVELS, curves):
        row, column = runs.index(run), LEVELS.index(level)
        values, test_loss = measure(run, alpha, theta, theta0, o)
        for name, value in {"iteration": iteration, **values}.items():
            found[name][row, column] = value
        if level in MAPS:  # in steps of 1/32, for a third of the size; the mean of 100 runs is within .005
            found["maps"][row, MAPS.index(level)] = (32 * test_loss).round().cpu() / 32
    for row, run in enumerate(runs):
        found["curves"][row, :len(curves[run])] = curves[run]
        found["diverged"][row] = not np.isfinite(curves[run]).all()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **found)
    path = pathlib.Path(o.out) / f"alpha={alpha:g}" / f"runs={runs[0]}-{runs[-1]}.npz"
    common.write_atomically(path, buffer.getvalue())
    return f"{path} is written"


def train_missing(o, args):
    """Train the runs that --out does not hold yet, a chunk at a time. Under torchrun each process takes its share."""
    found, chunks = read(o.out), []
    for alpha in o.alpha:
        done = found[alpha]["runs"] if alpha in found else []
        missing = [run for run in range(o.runs) if run not in done]
        if missing:
            common.write_atomically(pathlib.Path(o.out) / f"alpha={alpha:g}" / "args.json", common.json_line(args))
        for first in range(0, o.runs, o.chunk):
            chunks.append(([run for run in missing if first <= run < first + o.chunk], alpha, o))
    chunks = [task for task in common.share_of_rank(chunks) if task[0]]  # the same share whatever others have trained
    for k, written in enumerate(common.side_by_side(o, train_chunk, chunks, threads=1)):
        common.progress(f"{k + 1} of {len(chunks)}: {written}", "\n")


def read(out):
    """What a folder holds, {alpha: {name: array}}, see train_chunk, each run once, ascending. ValueError names a file
    that cannot be read."""
    found, names = {}, ["runs", "maps", "curves", "diverged", *MEASURED]
    for folder in pathlib.Path(out).glob("alpha=*"):
        files = []
        for path in sorted(folder.glob("runs=*.npz")):
            files.append(common.read_npz(path))
            if not files[-1].keys() >= {"marks", *names}:
                raise ValueError(f"{path} does not hold what toy.py writes: delete it")
        if files:
            arrays = {name: np.concatenate([file[name] for file in files]) for name in names}
            _, places = np.unique(arrays["runs"], return_index=True)
            arrays = {name: array[places] for name, array in arrays.items()}
            found[float(folder.name.removeprefix("alpha="))] = {"marks": files[0]["marks"], **arrays}
    return dict(sorted(found.items()))


def readings(found):
    """A row for each run and level that it has reached, as the other scripts' rows."""
    rows = []
    for alpha, arrays in found.items():
        for place, column in np.argwhere(np.isfinite(arrays["iteration"])):
            row = {"alpha": alpha, "seed": int(arrays["runs"][place]), "on": "train_loss", "level": LEVELS[column]}
            for name in MEASURED:
                row[name] = float(arrays[name][place, column])
            rows.append({**row, "gap": row["inside_loss"] - row["outside_loss"]})
    return rows


def conclude(o, found):
    """Print the conclusion and a table a claim; return rows and sentence."""
    rows = readings(found)
    pairs = common.differences(rows, ["gap", "inside_loss", "outside_loss", "test_loss"])
    runs = {alpha: arrays["runs"] for alpha, arrays in found.items()}
    conclusion = common.verdict(runs, rows, pairs, "train_loss", "gap", "rich networks learn the hard discs last",
                                o.about)
    print(f"\n{conclusion}")
    common.print_table("Gap: test loss in the discs minus outside", rows, pairs, "train_loss", "gap")
    common.print_table("Test loss in the discs (hard)", rows, pairs, "train_loss", "inside_loss")
    common.print_table("Test loss outside", rows, pairs, "train_loss", "outside_loss")
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
    """Rich minus lazy: the mean map of test loss over the runs that reached a level under both, and their number."""
    _, a, b = np.intersect1d(found[rich]["runs"], found[lazy]["runs"], return_indices=True)
    k = MAPS.index(level)
    maps = found[rich]["maps"][a, k].astype(float) - found[lazy]["maps"][b, k]  # (runs, SIDE, SIDE)
    maps = maps[np.isfinite(maps).all((1, 2))]  # nan: not reached
    return maps.sum(0) / max(len(maps), 1), len(maps)


def draw(o, found, rows, pairs):
    """toy.png, the paper's Figure 1: task, training, and where test losses differ at equal training loss."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 5.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    task, training = top.subplots(1, 2, width_ratios=[1, 1.9])
    axis = torch.linspace(-1, 1, 400)
    sides, _ = label(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    task.imshow(sides.numpy(), cmap="RdBu_r", vmin=-4, vmax=4, **PLANE)
    draw_task(task, o)
    task.set_title("(a) task, one run's data")
    draw_training(training, o, found)
    rich, lazy = common.rich_and_lazy(found)
    bottom.suptitle(f"Test loss at alpha = {rich:g} minus that at {lazy:g}; red: the rich have the larger loss")
    for ax, level, letter in zip(bottom.subplots(1, len(MAPS)), MAPS, "cde"):
        mean, runs = mean_difference(found, level, rich, lazy)
        most = max(abs(mean).max(), 1e-6)
        image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most, **PLANE)
        bottom.colorbar(image, ax=ax, shrink=.7, ticks=[-most, 0, most], format="%.2f")
        draw_task(ax, o, size=0)
        ax.set(title=f"({letter}) training loss {level:g}", xlabel=f"mean of {runs} runs")
    common.save_figure(figure, o.out, "toy")
    common.draw_alphas(o, rows, "train_loss", "gap", MAPS)


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
    """Training loss of every run against iterations, the median run at LEVELS, and the paper's medians."""
    paper = (o.iterations, o.lr, o.loss) == (25000, .1, "softplus")
    for alpha, arrays in found.items():
        style = {**common.look(alpha), "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        ax.plot(arrays["marks"], arrays["curves"].T, color=style["color"], linewidth=.5, alpha=.25)
        reached = np.isfinite(arrays["iteration"]).mean(0) > .5
        ax.plot(np.nanmedian(arrays["iteration"][:, reached], 0), np.array(LEVELS)[reached], **style)
        if paper and alpha in PAPER:
            common.draw_crosses(ax, {alpha: PAPER[alpha]})
    ax.set(title="(b) training; markers: medians", xlabel="iterations", ylabel=f"training loss ({o.loss})")
    ax.set(xscale="log", ylim=(LEVELS[-1] - .02, .72))
    ax.xaxis.set_major_formatter("{x:g}")  # powers of ten would be too small to read
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), labelspacing=.2, title="×: paper" if paper else None)


def animate(o):
    """toy.gif: what run 0 predicts where all but x1, x2 are 0; up to four alphas, at equal training loss."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    alphas = sorted({*o.alpha[:3], o.alpha[-1]})
    at = dict(common.side_by_side(o, predictions, [(alpha, o) for alpha in alphas], threads=1))
    levels = [level for level in FRAMES if all(level in at[alpha] for alpha in alphas)]
    if not levels:
        raise ValueError("--animate: run 0 does not learn under every alpha: more --iterations")
    names = {1.0: "rich, ", 100.0: "lazy, ", math.inf: "linear, "}
    figure = Figure(figsize=(2.9 * len(alphas), 3.7), facecolor="white")
    axes = figure.subplots(1, len(alphas), squeeze=False)[0]
    figure.subplots_adjust(left=.02, right=.98, bottom=.02, top=.78, wspace=.06)  # the same in every frame
    writer = PillowWriter(fps=4)
    with writer.saving(figure, pathlib.Path(o.out) / "toy.gif", dpi=90):  # written at its end
        for level in levels + levels[-1:] * 8:  # rests on the last
            figure.suptitle(f"at training loss {level:.2f}", fontsize=14)
            for ax, alpha in zip(axes, alphas):
                iteration, probability = at[alpha][level]
                ax.clear()
                ax.contourf(probability, np.linspace(0, 1, 21), cmap="RdBu_r", vmin=-.3, vmax=1.3, **PLANE)
                ax.contour(probability, levels=[.5], colors="black", linewidths=1.5, **PLANE)
                draw_task(ax, o, size=30)
                label = common.look(alpha)["label"]
                title = f"{names.get(alpha, '')}{label}\niteration {iteration}"
                ax.set(xticks=[], yticks=[], title=title)
            writer.grab_frame()
        common.progress(f"toy.gif: {len(levels)} frames are drawn, to training loss {levels[-1]:.2f}", "\n")


def predictions(alpha, o):
    """Train run 0, for twenty times --iterations, so that lazy networks come to the last frame, too. Returns alpha and
    {level: (iteration, probability of label +1 (SIDE, SIDE))}."""
    common.progress(f"toy.gif: training run 0 once more, at alpha = {alpha:g}")
    longer = argparse.Namespace(**{**vars(o), "iterations": 20 * o.iterations})
    grid, found = points(0, o)[1].to(o.device, o.dtype), {}
    grid[:, 2:] = 0
    for _, level, iteration, theta, theta0 in train([0], alpha, longer, FRAMES, {0: []}):
        f = centred(theta, theta0, grid.T[None], alpha)
        found[level] = iteration, torch.sigmoid(f).view(SIDE, SIDE).cpu().numpy()
    return alpha, found


def main(*words, **options):
    """Train, conclude and draw, with the command line's words, or its options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    parser, count = common.parser(__file__, __doc__), common.number(int, at_least=1)
    parser.set_defaults(lr=.1, width=60)
    add = parser.add_argument
    add("--runs", type=count, default=100, metavar="N", help="networks an alpha, each with its data")
    add("--chunk", type=count, default=25, metavar="N", help="runs trained as one; more on a GPU")
    add("--iterations", type=count, default=25000, metavar="N", help="at most so many steps")
    add("--extra-dims", type=common.number(int, at_least=0), default=5, metavar="N", help="inputs that mean nothing")
    add("--animate", action=argparse.BooleanOptionalAction, default=False, help="also toy.gif: what run 0 predicts")
    o = common.parse(parser, QUICK, loss_of, words, options)
    if o.draw_only and o.animate:
        raise ValueError("--animate trains a network, --draw-only trains nothing: choose one")
    if not o.draw_only:
        o.data_crc32 = common.crc32(x.numpy() for x in points(0, o))
        args = {**common.identity(o), "network": "MLP"}
        common.check_out(o.out, args, warn=True)
        train_missing(o, args)
    found = read(o.out)
    if not found:
        raise ValueError(f"{o.out} (--out): there are no records of runs")
    if not o.draw_only and any(alpha not in found or len(found[alpha]["runs"]) < o.runs for alpha in o.alpha):
        print("not all runs have ended: another process is at work on them, or else the same command goes on")
        return {}
    args = common.read_args(pathlib.Path(o.out) / f"alpha={min(found):g}")
    common.check_out(o.out, args)  # no figure of runs that differ in more than alpha
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
