"""Figure 1 of "Lazy vs hasty": a hundred small networks on a 2-d task with easy and hard regions.

    python toy.py --quick                                   fewer runs, larger steps: nearly the same picture
    python toy.py                                           the paper's figure
    python toy.py --alpha 0.1 0.3 1 3 10 30 100 1000 inf    also toy_alphas.png: how large must alpha be?
    python toy.py --quick --alpha 1 10 100 --animate        also toy.gif: one network at equal training losses

The claim: at equal training loss the rich network (alpha = 1) has a larger loss than the lazy one (alpha = 100) inside
the two discs, the hard examples, and a smaller one outside, on the easy ones. The gap is the loss inside minus outside.

--quick takes 20 s of CPU, the paper's figure 4 minutes (AMD EPYC, 2026-11-29). --quick prints, before the tables, that
the claim holds: gap at alpha = 1 minus that at alpha = 100 is +0.0482 [0.0152, 0.0812] at train_loss 0.5 and +0.130
[0.0834, 0.177] at train_loss 0.4 (n = 12; mlp, softplus).
"""
import argparse
import io
import math

import numpy as np
import torch
import torch.nn.functional as F

import common
import experiment

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
    """x (..., 2 or more) -> label +1 or -1 (...), the sign of x2, flipped inside the discs; whether x is in one."""
    x1, x2 = x[..., 0], x[..., 1]
    inside = torch.zeros_like(x1, dtype=torch.bool)
    for c1, c2 in CENTRES:
        inside |= (x1 - c1)**2 + (x2 - c2)**2 < RADIUS**2
    return torch.where(inside ^ (x2 > 0), 1.0, -1.0).to(x.dtype), inside


def points(run, o):
    """The training examples (POINTS, d) of a run and its test grid (SIDE^2, d), of which only x1 and x2 are a grid."""
    d = 2 + o.extra_dims
    train = 2 * torch.rand(POINTS, d, generator=experiment.generator("toy train", run), dtype=torch.float64) - 1
    grid = 2 * torch.rand(SIDE**2, d, generator=experiment.generator("toy grid", run), dtype=torch.float64) - 1
    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    grid[:, 1], grid[:, 0] = torch.cartesian_prod(axis, axis).T  # rows of the map are x2
    return train, grid


def network(run, o):
    with experiment.seeded("init", run):
        return common.mlp([2 + o.extra_dims, o.width, o.width, o.width, 1]).to(o.device, o.dtype)


def forward(theta, x):
    """f_theta(x), (R, 1, N), of R networks of weights (R, outputs, inputs) and biases (R, outputs, 1), x (R, d, N)."""
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
    f0 = f(theta0) if f0 is None else f0
    return alpha * (f(theta) - f0)


def train(runs, alpha, o, levels, curves):
    """Full-batch gradient descent of all `runs` at once, for o.iterations or until each has come to its last level.
    Yields (run, level, iteration, theta, theta0) at the first iteration whose training loss is at or below a level.
    curves {run: list}: training losses at curve_marks are added, as far as the last level or one that is not finite."""
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
    """The iterations at which the loss curves are kept."""
    return np.unique(np.geomspace(1, iterations, 176).round().astype(int)).tolist()


def measure(run, alpha, theta, theta0, o):
    """The test losses of a run's network, {name: number}, and its loss at every point of the grid, (SIDE, SIDE)."""
    x = points(run, o)[1].to(o.device, o.dtype)
    y, inside = label(x)
    f = centred(theta, theta0, x.T[None], alpha)[0, 0]  # (SIDE^2,)
    loss = loss_of(-y * f)
    return {"test_loss": loss.mean().item(), "test_acc": (f * y > 0).double().mean().item(), "inside_loss":
            loss[inside].mean().item(), "outside_loss": loss[~inside].mean().item()}, loss.view(SIDE, SIDE)


def train_chunk(runs, alpha, o):
    """Train and measure some runs, and write OUT/alpha=ALPHA/runs=FIRST-LAST.npz; nan where a run has not come."""
    if not runs:
        return
    marks, curves = curve_marks(o.iterations), {run: [] for run in runs}
    found = {"runs": np.array(runs), "marks": np.array(marks), "diverged": np.zeros(len(runs), bool),
             "maps": np.full((len(runs), len(MAPS), SIDE, SIDE), np.nan, np.float16),
             "curves": np.full((len(runs), len(marks)), np.nan)}
    found.update({name: np.full((len(runs), len(LEVELS)), np.nan) for name in MEASURED})
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
    path = o.out / f"alpha={alpha:g}" / f"runs={runs[0]}-{runs[-1]}.npz"
    experiment.write_atomically(path, buffer.getvalue())
    print(f"{path} is written", flush=True)


def train_missing(o):
    """Train the runs that --out does not hold yet, a chunk at a time; returns whether all are done."""
    found, chunks, args = read(o.out), [], experiment.json_line(experiment.identity(o))
    for alpha in o.alpha:
        experiment.write_atomically(o.out / f"alpha={alpha:g}" / "args.json", args)
        done = found[alpha]["runs"] if alpha in found else []
        for first in range(0, o.runs, o.chunk):  # the same shares, whatever others have trained
            runs = [run for run in range(first, min(first + o.chunk, o.runs)) if run not in done]
            chunks.append((runs, alpha, o))
    return not any(runs for runs, _, _ in chunks) or experiment.train_share(o, chunks, train_chunk)


def read(out):
    """What a folder holds, {alpha: {name: array}}, see train_chunk, each run once, ascending."""
    found, names = {}, ["runs", "maps", "curves", "diverged", *MEASURED]
    for folder in out.glob("alpha=*"):
        files = [experiment.read_npz(path) for path in sorted(folder.glob("runs=*.npz"))]
        if files:
            arrays = {name: np.concatenate([file[name] for file in files]) for name in names}
            _, places = np.unique(arrays["runs"], return_index=True)
            arrays = {name: array[places] for name, array in arrays.items()}
            found[float(folder.name.removeprefix("alpha="))] = {"marks": files[0]["marks"], **arrays}
    return dict(sorted(found.items()))


def readings(found):
    """What is read off the runs, see experiment.Readings: here of training losses as they are."""
    alphas, runs = list(found), sorted(set().union(*(arrays["runs"].tolist() for arrays in found.values())))
    values = {name: np.full((len(alphas), len(runs), len(LEVELS)), np.nan) for name in MEASURED}
    for row, arrays in enumerate(found.values()):
        for name in MEASURED:
            values[name][row, np.searchsorted(runs, arrays["runs"])] = arrays[name]
    values["gap"] = values["inside_loss"] - values["outside_loss"]
    values["train_loss"] = np.where(np.isfinite(values["iteration"]), LEVELS, np.nan)
    counts = [len(arrays["runs"]) for arrays in found.values()]
    return experiment.Readings("train_loss", LEVELS, alphas, runs, values, counts)


def draw(o, found, table):
    """toy.png, the paper's Figure 1: task, training, and where test losses differ at equal training loss."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 5.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    task, training = top.subplots(1, 2, width_ratios=[1, 1.9])
    axis = torch.linspace(-1, 1, 400)
    sides, _ = label(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    task.imshow(sides.numpy(), cmap="RdBu_r", vmin=-4, vmax=4, **PLANE)
    draw_task(task, o, torch.ones(POINTS, dtype=bool))
    task.set_title("(a) task, one run's data")
    draw_training(training, o, found)
    rich, lazy = 1.0 if 1 in table.alphas[:-1] else table.alphas[0], table.alphas[-1]
    _, of_rich, of_lazy = np.intersect1d(found[rich]["runs"], found[lazy]["runs"], return_indices=True)
    bottom.suptitle(f"Test loss at alpha = {rich:g} minus that at {lazy:g}; red: the rich have the larger loss")
    for k, ax in enumerate(bottom.subplots(1, len(MAPS))):
        maps = found[rich]["maps"][of_rich, k].astype(float) - found[lazy]["maps"][of_lazy, k]  # (runs, SIDE, SIDE)
        maps = maps[np.isfinite(maps).all((1, 2))]  # nan: not reached
        mean = maps.sum(0) / max(len(maps), 1)
        most = max(abs(mean).max(), 1e-6)
        image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most, **PLANE)
        bottom.colorbar(image, ax=ax, shrink=.7, ticks=[-most, 0, most], format="%.2f")
        draw_task(ax, o)
        ax.set(title=f"({'cde'[k]}) training loss {MAPS[k]:g}", xlabel=f"mean of {len(maps)} runs")
    experiment.save_figure(figure, o, o.script)
    if len(found) > 3:
        draw_alphas(o, table)


def draw_alphas(o, table):
    """toy_alphas.png, how large must alpha be? The gap minus that at the largest alpha, with 95 % intervals."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 4.2), layout="constrained")
    ax, found = figure.subplots(), experiment.difference(table, "gap")
    for level in MAPS:
        mean, _, high, _ = (array[:-1, LEVELS.index(level)] for array in found)
        ax.errorbar(table.alphas[:-1], mean, high - mean, fmt="o-", label=f"training loss {level:g}")
    ax.axhline(0, color="black", linewidth=.8)
    ax.set(xscale="log", xlabel="α", ylabel=f"gap minus that at α = {table.alphas[-1]:g}".replace("inf", "∞"))
    ax.legend()
    experiment.save_figure(figure, o, "toy_alphas")


def draw_task(ax, o, learnt=None):
    """The plane of x1 and x2 with the discs, and run 0's training examples, full where they are `learnt` (POINTS,)."""
    from matplotlib.patches import Circle
    for centre in CENTRES:
        ax.add_patch(Circle(centre, RADIUS, fill=False, linewidth=.8, color="black"))
    x = points(0, o)[0]
    y, _ = label(x)
    for sign, colour, marker in ((1, "#b2182b", "o"), (-1, "#2166ac", "^")):
        if learnt is not None:
            x1, x2 = x[y == sign, :2].T
            faces = [colour if right else "white" for right in learnt[y == sign]]
            ax.scatter(x1, x2, s=20, c=faces, edgecolors=colour, marker=marker, linewidths=1)
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal", xlim=(-1, 1), ylim=(-1, 1))


def draw_training(ax, o, found):
    """Training loss of every run against iterations, the median run at LEVELS, and the paper's medians."""
    paper = (o.iterations, o.lr, o.loss) == (25000, .1, "softplus")
    for alpha, arrays in found.items():
        style = {**experiment.look(alpha), "markersize": 7, "markeredgecolor": "white", "linestyle": ""}
        ax.plot(arrays["marks"], arrays["curves"].T, color=style["color"], linewidth=.5, alpha=.25)
        reached = np.isfinite(arrays["iteration"]).mean(0) > .5
        ax.plot(np.nanmedian(arrays["iteration"][:, reached], 0), np.array(LEVELS)[reached], **style)
        if paper and alpha in PAPER:
            ax.plot(PAPER[alpha].keys(), PAPER[alpha].values(), "x", color=style["color"], markeredgewidth=1.5)
    ax.set(title="(b) training; markers: medians", xlabel="iterations", ylabel=f"training loss ({o.loss})")
    ax.set(xscale="log", ylim=(LEVELS[-1] - .02, .72))
    ax.xaxis.set_major_formatter("{x:g}")  # powers of ten would be too small to read
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), labelspacing=.2, title="×: paper" if paper else None)


def animate(o):
    """toy.gif, at equal training losses under up to four alphas: what run 0 predicts where all inputs but x1 and x2 are
    0; its training examples, full where it has them right; and how many all runs have right."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    alphas = sorted({*o.alpha[:3], o.alpha[-1]})
    with common.true_float32():
        at = {alpha: predictions(alpha, o) for alpha in alphas}
    levels = [level for level in FRAMES if all(level in at[alpha] for alpha in alphas)]
    if not levels:
        raise experiment.BadInput("--animate: run 0 does not learn under every alpha: more --iterations")
    figure = Figure(figsize=(2.9 * len(alphas), 4.1))
    axes = figure.subplots(1, len(alphas), squeeze=False)[0]
    figure.subplots_adjust(left=.02, right=.98, bottom=.16, top=.82, wspace=.06)  # the same in every frame
    writer = PillowWriter(fps=4)
    with writer.saving(figure, o.out / "toy.gif", dpi=90):  # written at its end
        for level in levels + levels[-1:] * 8:  # rests on the last
            figure.suptitle(f"at training loss {level:.2f}", fontsize=14)
            for ax, alpha in zip(axes, alphas):
                iteration, probability, learnt, counts = at[alpha][level]
                discs, of_discs, outside, of_outside = np.mean(counts, 0)
                ax.clear()
                ax.contourf(probability, np.linspace(0, 1, 21), cmap="RdBu_r", vmin=-.3, vmax=1.3, **PLANE)
                draw_task(ax, o, learnt)
                ax.set(xticks=[], yticks=[], title=f"{experiment.look(alpha)['label']}\niteration {iteration}",
                       xlabel=f"right, mean of {len(counts)} runs:\ndiscs {discs:.1f} of {of_discs:.1f}, "
                              f"outside {outside:.1f} of {of_outside:.1f}")
            writer.grab_frame()


def predictions(alpha, o):
    """Train all runs anew, ten times longer, for {level: (iteration, probability of label +1 (SIDE, SIDE) and right
    examples (POINTS,) of run 0; how many are right in the discs, of how many, and outside, a row a run)}."""
    longer, found, counts = argparse.Namespace(**{**vars(o), "iterations": 10 * o.iterations}), {}, {}
    curves = {run: [] for run in range(o.runs)}
    for run, level, iteration, theta, theta0 in train(list(curves), alpha, longer, FRAMES, curves):
        x, grid = (each.to(o.device, o.dtype) for each in points(run, o))
        y, hard = label(x)
        learnt = centred(theta, theta0, x.T[None], alpha)[0, 0] * y > 0
        right = [(learnt & hard).sum().item(), hard.sum().item(), (learnt & ~hard).sum().item(), (~hard).sum().item()]
        counts.setdefault(level, []).append(right)
        if run == 0:
            grid[:, 2:] = 0
            probability = torch.sigmoid(centred(theta, theta0, grid.T[None], alpha)).view(SIDE, SIDE).cpu().numpy()
            found[level] = iteration, probability, learnt.cpu(), counts[level]
    return found


def main(*words, **options):
    """Train, conclude, draw: main("--quick") or main(quick=True). Returns the summary; raises ValueError, OSError."""
    rows = [("runs", experiment.count, 100, "networks an alpha, each with its data"),
            ("chunk", experiment.count, 25, "runs trained as one; more on a GPU"),
            ("iterations", experiment.count, 25000, "at most so many steps"),
            ("extra-dims", experiment.natural, 5, "inputs that mean nothing"),
            ("animate", bool, False, "also toy.gif: what run 0 predicts")]
    o = experiment.parse(__file__, __doc__, rows, QUICK, loss_of, words, options, lr=.1, width=60, seeds=[], dataset="")
    torch.set_num_threads(1)  # those of so small networks only wait for each other
    if not o.draw_only:
        train_points, grid = points(0, o)
        experiment.fix_identity(o, {"1": train_points.numpy(), "2": grid.numpy()}, network(0, o))
        if not train_missing(o):
            return {}
    found = read(o.out)
    if not found:
        raise experiment.BadInput(f"{o.out} (--out): there are no records of runs")
    args = experiment.recall_identity(o)
    vars(o).update({name: args[name] for name in ("extra_dims", "iterations", "lr", "width")})
    o.dtype = getattr(torch, args["dtype"])
    table, diverged = readings(found), []
    for alpha, arrays in found.items():
        diverged += [f"alpha={alpha:g} run {run}" for run in arrays["runs"][arrays["diverged"]]]
    conclusion = experiment.verdict(table, "gap", "rich networks learn the hard discs last", "at the same training "
                                    "loss, the rich networks know the discs less and the rest better", o.about)
    quantities = ["gap", "inside_loss", "outside_loss", "test_loss"]
    for quantity in quantities:
        experiment.print_table(f"{quantity.capitalize().replace('_', ' ')} on the test grid", table, quantity)
    if o.animate:
        animate(o)
    return experiment.finish(o, args, diverged, lambda o, table: draw(o, found, table), [table], quantities, conclusion)


if __name__ == "__main__":
    experiment.command_line(main)
