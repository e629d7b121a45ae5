"""Figure 1 of "Lazy vs hasty": a hundred small networks on a two-dimensional task with easy and hard regions.

    python toy.py --quick                       fewer runs, larger steps: the same picture in 9 seconds
    python toy.py                               the paper's figure
    python toy.py --alpha 1 100 inf             with the exactly linear limit
    python toy.py --animate                     also toy.gif: how one run's decision function grows

The claim: at equal training loss the rich network (alpha = 1) has a larger loss than the lazy one (alpha = 100) inside
the two discs, the hard examples, and a smaller one outside, on the easy ones.

The paper's figure took 1 minute 53 seconds on two CPU cores (2026-11-24).
It ends with

    median iterations to a training loss, and how many runs reached it
      alpha = 1      ...  0.5: 130 (100/100)  0.4: 158 (100/100)  0.3: 232 (100/100)  ...
      alpha = 100    ...  0.5: 1469 (100/100)  0.4: 4300 (100/100)  0.3: 11866 (97/100)  ...

    test loss in the discs and outside, alpha = 1 minus 100, paired by run (95 % interval)
      loss                inside_loss             outside_loss
       0.5       0.043 [0.036, 0.051]  -0.024 [-0.027, -0.021]
       0.4       0.131 [0.115, 0.147]  -0.046 [-0.050, -0.042]
       0.3       0.263 [0.238, 0.287]  -0.036 [-0.041, -0.031]
"""
import io
import math
import os
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

QUICK = dict(runs=12, lr=.3, iterations=6000)
POINTS = 100  # training examples of a run
SIDE = 60  # the test grid has SIDE x SIDE points
LEVELS = [.6, .5, .4, .3, .2, .1]  # training losses at which runs are compared
MAPS = [.5, .4, .3]  # those of the figure's maps
TASKS = {"yinyang": ([(-.5, .5), (.5, -.5)], .3), "yinyang2": ([(-.5, .5), (-.5, -.5)], .3),  # centres, radius of discs
         "disk": ([(0, 0)], math.sqrt(2 / math.pi)), "disk_flip": ([(0, 0)], math.sqrt(2 / math.pi))}


def make_parser():
    p = common.parser(__doc__, "toy", lr=.1, width=60, seeds=None, dataset=None, data_dir=None, momentum=None,
                      batch_size=None, epochs=None, stop_loss=None, subset=None, levels=None, checkpoint_seconds=None)
    whole = common.number(int, least=1)
    p.add_argument("--runs", type=whole, default=100, help="networks per alpha, each with its own data")
    p.add_argument("--task", choices=list(TASKS), default="yinyang", help="where which label is")
    p.add_argument("--extra-dims", type=common.number(int, least=0), default=5, help="inputs that mean nothing")
    p.add_argument("--iterations", type=whole, default=25000, help="at most so many steps of gradient descent")
    p.add_argument("--chunk", type=whole, default=25, help="runs trained at once, and the unit of resuming; "
                   "more on a GPU")
    p.add_argument("--animate", action="store_true", help="write toy.gif: the decision function of run 0 as it learns")
    return p


def label(task, x):
    """x (..., 2 or more) -> label +1 or -1 (...), and whether x lies inside a disc (...): for yin-yang, is hard."""
    centres, radius = TASKS[task]
    inside = sum((x[..., 0] - a)**2 + (x[..., 1] - b)**2 < radius**2 for a, b in centres) > 0
    positive = inside if task == "disk" else inside != (x[..., 1] > 0)
    return positive * 2. - 1, inside


def points(run, o):
    """What a run's seed fixes for every alpha, in float64 on the CPU: training examples (POINTS, d), the probe's
    (o.probe_examples, d), and the test grid (SIDE^2, d), whose first two columns are the same in every run and the rest
    drawn."""
    def draw(what, n):
        return 2 * torch.rand(n, 2 + o.extra_dims, generator=common.generator(what, run), dtype=torch.float64) - 1

    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    grid = draw("toy grid", SIDE**2)
    grid[:, 1], grid[:, 0] = torch.cartesian_prod(axis, axis).T  # rows of the map are x2
    return draw("toy train", POINTS), draw("toy probe", o.probe_examples), grid


def network(run, o):
    with common.seeded("init", run):
        return common.mlp([2 + o.extra_dims, o.width, o.width, o.width, 1]).to(o.device, o.dtype)


class Batch:
    """R runs trained as one: weights (R, out, in), biases (R, out, 1), examples x (R, d, N), labels y (R, 1, N).

    Examples are columns: CPU matrix products are fastest with the long side last, above all those of the last layer,
    whose other side is 1. The backward pass is written by hand: on two CPU cores autograd on the same batched products
    takes 30 % longer and torch.func's vmap 2.2 times as long; and it serves the linear limit unchanged. 25 runs are a
    few megabytes, which stay in cache.
    """

    def __init__(self, runs, alpha, o):
        self.runs, self.alpha, self.lr = list(runs), alpha, o.lr
        layers = zip(*([m for m in network(run, o) if isinstance(m, nn.Linear)] for run in runs))
        theta = [[torch.stack([m.weight.detach() for m in same]),
                  torch.stack([m.bias.detach()[:, None] for m in same])] for same in layers]
        self.W, self.b = map(list, zip(*theta))
        x = torch.stack([points(run, o)[0] for run in runs]).to(o.device, o.dtype)
        self.x, self.y = x.mT.contiguous(), label(o.task, x)[0][:, None].to(o.dtype)
        self.f0 = self.network()  # never changes: computed once
        self.W0 = []
        if alpha == math.inf:  # theta stays at theta0, and with it the layers' inputs h; the displacement trains
            self.W0, self.W, self.b = self.W, *([torch.zeros_like(t) for t in ts] for ts in (self.W, self.b))

    def network(self):
        """The raw f_theta(x), (R, 1, N); keeps the input of every layer in self.h."""
        self.h = [self.x]
        for W, b in zip(self.W[:-1], self.b[:-1]):
            self.h.append(torch.baddbmm(b, W, self.h[-1]).relu_())
        return torch.baddbmm(self.b[-1], self.W[-1], self.h[-1])

    def tangent(self):
        """grad f_theta0(x) . delta, (R, 1, N), by the product rule: each layer's delta acts on the inputs that theta0
        gives, and passes through theta0's weights and theta0's ReLU pattern from there on."""
        t = torch.baddbmm(self.b[0], self.W[0], self.h[0])
        for h, W0, W, b in zip(self.h[1:], self.W0[1:], self.W[1:], self.b[1:]):
            t = torch.baddbmm(b, W0, relu_backward(t, h)).baddbmm_(W, h)
        return t

    def outputs(self):
        """f^a(x) = a (f(x) - f0(x)), (R, 1, N)."""
        return self.tangent() if self.alpha == math.inf else self.alpha * (self.network() - self.f0)

    def step(self, slope):
        """One step of gradient descent, given slope = d loss / d f^a, (R, 1, N), at the outputs just computed."""
        if self.alpha == math.inf:
            g, step, through = slope, self.lr, self.W0
        else:
            g, step, through = self.alpha * slope, self.lr / self.alpha**2, self.W
        for k in reversed(range(len(self.W))):  # g: d loss / d (what layer k returns)
            below = relu_backward(through[k].mT @ g, self.h[k]) if k else None  # before W changes
            self.W[k].baddbmm_(g, self.h[k].mT, alpha=-step)
            self.b[k].sub_(g.sum(2, keepdim=True), alpha=step)
            g = below

    def keep(self, places):
        """Drop the runs that are not in `places`."""
        self.runs = [self.runs[i] for i in places]
        self.x, self.y, self.f0 = self.x[places], self.y[places], self.f0[places]
        self.W, self.b, self.W0, self.h = ([t[places] for t in list_] for list_ in (self.W, self.b, self.W0, self.h))

    @torch.no_grad()
    def copy_into(self, centered, i):
        """Put run i's parameters into the plain network of common.center: what is measured there is one network's."""
        stacked = [t for layer in zip(self.W, self.b) for t in layer]
        for p, t in zip((p for p in centered.parameters() if p.requires_grad), stacked):
            p.copy_(t[i].view(p.shape))


def relu_backward(g, h):
    """g where the ReLU that returned h was active, else 0: one pass over memory instead of the two of g * (h > 0)."""
    return torch.ops.aten.threshold_backward(g, h, 0)


@torch.no_grad()
def train(runs, alpha, o, levels, crossing, progress):
    """Full-batch gradient descent on the logistic loss, all `runs` at once, to the last of `levels` or o.iterations.

    crossing(batch, i, level, iteration, loss): called for the run at place i at the first iteration whose training loss
    is <= level; iteration n is the network after n steps, so 0 is theta0. Returns {run: training loss at curve_marks,
    nan after its end} and {run: {"iteration", "train_loss", "ended"}}.
    """
    batch, ahead, ends = Batch(runs, alpha, o), {run: list(levels) for run in runs}, {}
    marks = {n: k for k, n in enumerate(curve_marks(o.iterations))}
    curves = {run: np.full(len(marks), np.nan, np.float32) for run in runs}
    goal = lambda: torch.tensor([ahead[run][0] for run in batch.runs], dtype=o.dtype, device=o.device)
    wanted = goal()
    for iteration in range(o.iterations + 1):
        margin = batch.y * batch.outputs()
        loss = F.softplus(-margin).mean((1, 2))  # (R,)
        if iteration in marks:
            for run, value in zip(batch.runs, loss.float().tolist()):
                curves[run][marks[iteration]] = value
        if iteration % 50 == 0:
            progress.status(iteration, loss.mean().item())
        last = iteration == o.iterations
        if last or not (loss > wanted).all():  # also at nan; the only wait for a GPU in most steps
            for i, (run, value) in enumerate(zip(batch.runs, loss.tolist())):
                while ahead[run] and value <= ahead[run][0]:
                    crossing(batch, i, ahead[run].pop(0), iteration, value)
                finite = math.isfinite(value)
                if last or not finite or not ahead[run]:
                    why = "diverged" if not finite else "loss" if not ahead[run] else "iterations"
                    ends[run] = {"iteration": iteration, "train_loss": value, "ended": why}
            stay = [i for i, run in enumerate(batch.runs) if run not in ends]
            if not stay:
                return curves, ends
            if len(stay) < len(batch.runs):
                batch.keep(stay)
                margin = margin[stay]
            wanted = goal()
        batch.step(-batch.y * torch.sigmoid(-margin) / POINTS)


def curve_marks(iterations):
    """The iterations at which the loss curves are kept: 0, and about 40 a decade."""
    return sorted({0, iterations, *(round(10**(k / 40)) for k in range(int(40 * math.log10(iterations)) + 1))})


def watch(run, alpha, o):
    """The plain network of one run, and measure() -> (its part of a record, test loss on the grid (SIDE, SIDE))."""
    centered = common.center(network(run, o), alpha)
    x, probe_x, grid = (x.to(o.device, o.dtype) for x in points(run, o))
    (y, _), (y_grid, inside) = label(o.task, x), label(o.task, grid)
    linearity, optimizer = common.LinearityProbe(centered, probe_x), common.scaled_sgd(centered, o.lr)

    def measure():
        loss, correct = common.losses(centered(grid), y_grid > 0)
        with torch.enable_grad():
            train_loss = common.losses(centered(x), y > 0)[0].mean()
            gradients = torch.autograd.grad(train_loss, optimizer.param_groups[0]["params"])
        return {"test_loss": loss.mean().item(), "test_acc": correct.double().mean().item(),
                "inside_loss": loss[inside].mean().item(), "outside_loss": loss[~inside].mean().item(), **linearity(),
                "forward_noise": common.forward_noise(centered, probe_x[:32]),
                "update_noise": common.update_noise(optimizer, gradients)}, loss.view(SIDE, SIDE).cpu()

    return centered, measure


def train_chunk(runs, alpha, o, progress):
    """Train and measure some runs. Returns their records, and {run: (maps (MAPS, SIDE, SIDE), loss curve)}."""
    records, watched = {run: [] for run in runs}, {}
    maps = {run: np.full((len(MAPS), SIDE, SIDE), np.nan, np.float16) for run in runs}

    def crossing(batch, i, level, iteration, train_loss):
        run = batch.runs[i]
        if run not in watched:
            watched[run] = watch(run, alpha, o)
        centered, measure = watched[run]
        batch.copy_into(centered, i)
        entry, test_loss = measure()
        records[run].append({"run": run, "level": level, "iteration": iteration, "train_loss": train_loss, **entry})
        if level in MAPS:
            maps[run][MAPS.index(level)] = test_loss

    curves, ends = train(runs, alpha, o, LEVELS, crossing, progress)
    lines = [r for run in runs for r in [*records[run], {"run": run, "level": None, **ends[run]}]]
    return lines, {run: (maps[run], curves[run]) for run in runs}


def run(alpha, o):
    """Train the runs of one alpha, a chunk at a time; records go to OUT/alpha=ALPHA/log.jsonl, maps and loss curves of
    every run to maps.npz. A chunk counts as done once it is in log.jsonl, which is written last and whole."""
    folder = pathlib.Path(o.out) / f"alpha={alpha:g}"
    options = {k: str(v) if k == "dtype" else v for k, v in vars(o).items() if k not in common.NOT_IDENTITY | {"chunk"}}
    identity = {"alpha": f"{alpha:g}", **options, "data_crc32": common.crc32(*points(0, o)),
                "theta0_crc32": common.crc32(*network(0, o).state_dict().values())}
    with common.run_folder(o, folder, identity) as folder:
        records, done = read_run(folder)
        todo = [r for r in range(o.runs) if r not in done]
        chunks = [todo[k:k + o.chunk] for k in range(0, len(todo), o.chunk)]
        if not chunks:
            print(f"{folder.name}: already finished")
        for k, chunk in enumerate(chunks):
            name, begin = f"{folder.name} runs {chunk[0]} to {chunk[-1]}", time.monotonic()
            progress = common.Progress(name, (len(chunks) - k) * o.iterations, 0)
            new, arrays = train_chunk(chunk, alpha, o, progress)
            records, done, buffer = records + new, {**done, **arrays}, io.BytesIO()
            maps, curves = map(np.stack, zip(*done.values()))
            np.savez(buffer, runs=list(done), maps=maps, curves=curves)
            common.write_atomically(folder / "maps.npz", buffer.getbuffer())
            common.write_atomically(folder / "log.jsonl", b"".join(map(common.json_line, records)))
            progress.done()
            reached = "  ".join(f"{level:g}: {sum(r['level'] == level for r in new)}" for level in LEVELS)
            print(f"{name:<26} {time.monotonic() - begin:6.0f} s   runs that reached a loss of  {reached}", flush=True)
        for noise, limit in (("forward_noise", .01), ("update_noise", .02)):
            typical = np.median([r[noise] or 0 for r in records if r["level"]] or [0])
            if typical > limit:
                print(f"{folder.name}: warning: rounding matters ({noise} {typical:.2g}, above {limit:g}): use "
                      "--dtype float64, or --alpha inf for the limit")


def read_run(folder):
    """The records of a run folder, and {run: (maps, loss curve)} of the runs that are done. ValueError: maps.npz is
    damaged, or lacks one."""
    records = common.read_log(folder / "log.jsonl")
    done = [r["run"] for r in records if r["level"] is None]
    if not done:
        return [], {}
    file = common.read_npz(folder / "maps.npz")
    try:
        arrays = {run: (maps.reshape(len(MAPS), SIDE, SIDE), curve.reshape(-1))
                  for run, maps, curve in zip(file["runs"].tolist(), file["maps"], file["curves"])}
        return records, {run: arrays[run] for run in done}  # without a chunk that did not get into log.jsonl
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{folder}/maps.npz does not fit log.jsonl; --fresh moves the run aside") from None


def read_runs(o):
    """{alpha: (records, {run: (maps, curve)})} of what --out holds. The task is then what their args.json say.
    ValueError: there is nothing, or not of one task."""
    found, args = {}, []
    for alpha in sorted(o.alpha):
        folder = pathlib.Path(o.out) / f"alpha={alpha:g}"
        records, arrays = read_run(folder)
        if records:
            found[alpha] = records, arrays
            args.append({**common.read_args(folder)["run"], "alpha": None})
            if args[-1] != args[0]:
                raise ValueError(f"{o.out}: the alphas there differ in task or options: choose another --out")
    if not found:
        raise ValueError(f"{o.out}: no records of alpha {[f'{a:g}' for a in o.alpha]}")
    o.task, o.extra_dims, o.iterations = (args[0][key] for key in ("task", "extra_dims", "iterations"))
    o.what = {key: value for key, value in args[0].items() if key not in ("alpha", "theta0_crc32")}
    return found


def reached(found, level, *alphas):
    """[(record under the first alpha, under the second, ...)] of the runs that reached `level` under all of them."""
    at = [{r["run"]: r for r in found[alpha][0] if r["level"] == level} for alpha in alphas]
    return [tuple(records[run] for records in at) for run in at[0] if all(run in records for records in at)]


def mean_difference(found, level, a, b):
    """The mean map of test loss at `level`, alpha a minus alpha b: (SIDE, SIDE), or None if no run reached it."""
    k, runs = MAPS.index(level), [p["run"] for p, _ in reached(found, level, a, b)]
    maps = [found[a][1][run][0][k].astype(float) - found[b][1][run][0][k] for run in runs]
    return np.mean(maps, 0) if runs else None


LINEARITY = ["ntk_alignment", "sign_similarity", "repr_alignment", "repr_alignment_gram", "linearisation_error"]
LOSSES = ["inside_loss", "outside_loss", "test_loss", "test_acc"]


def summarise(o, found):
    """Tables at equal training loss, over the runs that reached it; prints and writes them."""
    summary = {"alphas": {}, "paired": {}}
    for alpha, (_, done) in found.items():
        levels = {}
        for level in LEVELS:
            records = [r for r, in reached(found, level, alpha)]
            if records:
                levels[f"{level:g}"] = {"reached": len(records), "of": len(done),
                                        "median_iteration": float(np.median([r["iteration"] for r in records])),
                                        **{key: common.spread([r[key] for r in records]) for key in LOSSES + LINEARITY}}
        part = summary["alphas"][f"{alpha:g}"] = {"levels": levels}
        common.print_table(f"alpha = {alpha:g}, at equal training loss (mean over the runs that reached it)", part,
                           LINEARITY, LEVELS)
    print("\nmedian iterations to a training loss, and how many runs reached it")
    for name, part in summary["alphas"].items():
        print(f"  alpha = {name:<5}" + "".join(f"  {level}: {v['median_iteration']:.0f} ({v['reached']}/{v['of']})"
                                             for level, v in part["levels"].items()))
    for a, b in [(a, b) for a in found for b in found if a < b]:
        levels = {}
        for level in LEVELS:
            pairs = reached(found, level, a, b)
            if pairs:
                cells = {key: common.spread([common.minus(p[key], q[key]) for p, q in pairs], True) for key in LOSSES}
                largest = {"largest_on_map": float(mean_difference(found, level, a, b).max())} if level in MAPS else {}
                levels[f"{level:g}"] = {**cells, **largest}
        part = summary["paired"][f"{a:g} - {b:g}"] = {"levels": levels}
        common.print_table(f"test loss in the discs and outside, alpha = {a:g} minus {b:g}, paired by run "
                           "(95 % interval)", part, LOSSES[:2], LEVELS)
    ends = {alpha: {r["run"]: [{"mean_train_loss": r["train_loss"]}] for r in records if r["level"] is None}
            for alpha, (records, _) in found.items()}
    return common.write_summary(o, ends, o.what, summary)


def draw(o, found):
    """toy.png, the paper's Figure 1: task, training, and maps of the difference of test loss at equal training loss."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 5.6), layout="constrained")
    top, bottom = figure.add_gridspec(2, 1)
    task, training = map(figure.add_subplot, top.subgridspec(1, 2, width_ratios=[1, 1.9]))
    panels = [figure.add_subplot(cell) for cell in bottom.subgridspec(1, len(MAPS))]

    axis = torch.linspace(-1, 1, 400)
    background, _ = label(o.task, torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    task.imshow(background.numpy(), cmap="RdBu_r", vmin=-4, vmax=4, extent=(-1, 1, -1, 1), origin="lower")
    draw_points(task, o)
    task.set_title("(a) task, and one run's data", fontsize=10)

    for colour, marker, (alpha, (records, arrays)) in zip(common.COLOURS, "osD^vP", found.items()):
        style = dict(color=colour, marker=marker, markeredgecolor="white", markersize=7)
        training.plot([], [], **style, label=common.alpha_label(alpha))
        for _, curve in arrays.values():
            training.plot(curve_marks(o.iterations)[1:], curve[1:], color=colour, linewidth=.5, alpha=.25)
        for level in MAPS:
            crossed = [r["iteration"] for r in records if r["level"] == level]
            if crossed:
                training.plot(np.median(crossed), level, **style)
    for level in MAPS:
        training.axhline(level, color="black", linewidth=.7, linestyle=":")
    training.set(xscale="log", xlim=(1, o.iterations), ylim=(LEVELS[-1], .72), xlabel="iterations",
                 ylabel="training loss")
    training.set_title("(b) training; markers: median at the losses of (c), (d), (e)", fontsize=10)
    training.legend(loc="lower left")

    a, b = (1.0 if 1.0 in found else min(found)), max(found)
    for ax, level, letter in zip(panels, MAPS, "cde"):
        ax.set_title(f"({letter}) training loss {level:g}", fontsize=10)
        mean = mean_difference(found, level, a, b)
        if mean is not None and a != b:
            most = abs(mean).max()
            image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most, extent=(-1, 1, -1, 1), origin="lower")
            figure.colorbar(image, ax=ax, shrink=.66, ticks=[-most, 0, most], format="%.2f")
            draw_discs(ax, o)
            ax.set_xlabel(f"mean of {len(reached(found, level, a, b))} runs")
        else:
            ax.text(0, 0, "needs two alphas" if a == b else "not reached by both", ha="center")
    for ax in (task, *panels):
        ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal", xlim=(-1, 1), ylim=(-1, 1))
    panels[0].set_ylabel(f"test loss,\n{common.alpha_label(a)} minus {common.alpha_label(b)}")
    common.save_figure(figure, o.out, "toy")


def draw_discs(ax, o):
    from matplotlib.patches import Circle
    centres, radius = TASKS[o.task]
    for centre in centres:
        ax.add_patch(Circle(centre, radius, fill=False, linewidth=.8, color="black"))


def draw_points(ax, o):
    x = points(0, o)[0]
    y, _ = label(o.task, x)
    for sign, colour, marker in ((1, "#b2182b", "o"), (-1, "#2166ac", "^")):
        ax.scatter(*x[y == sign, :2].T.numpy(), s=16, color=colour, marker=marker, edgecolors="white", linewidths=.5)
    draw_discs(ax, o)


def animate(o):
    """toy.gif: what run 0 predicts where the other inputs are 0, at the smallest and the largest alpha of the list, at
    equal training losses."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    levels = [round(.68 - .02 * k, 2) for k in range(30)]  # .68 ... .1
    flat = points(0, o)[2].to(o.device, o.dtype)
    flat[:, 2:] = 0
    frames = {}  # alpha -> level -> probability of label +1 on the grid
    for alpha in sorted({min(o.alpha), max(o.alpha)}):
        centered, frames[alpha] = common.center(network(0, o), alpha), {}

        def crossing(batch, i, level, iteration, loss):
            batch.copy_into(centered, i)
            frames[alpha][level] = torch.sigmoid(centered(flat)).view(SIDE, SIDE).cpu().numpy(), iteration

        progress = common.Progress(f"toy.gif, alpha={alpha:g}", o.iterations, 0)
        train([0], alpha, o, levels, crossing, progress)
        progress.done()
    figure = Figure(figsize=(6.4, 3.7), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(frames), squeeze=False)[0]
    writer, part = PillowWriter(fps=4), pathlib.Path(o.out) / "toy.part.gif"
    both = [level for level in levels if all(level in f for f in frames.values())]
    if not both:
        raise ValueError("--animate: run 0 reaches no training loss below .68: more --iterations")
    with writer.saving(figure, part, dpi=100):
        for level in both + both[-1:] * 6:  # rests on the last
            for ax, (alpha, at) in zip(axes, frames.items()):
                ax.clear()
                ax.imshow(at[level][0], cmap="RdBu_r", vmin=-.3, vmax=1.3, extent=(-1, 1, -1, 1), origin="lower")
                ax.contour(at[level][0], levels=[.5], colors="black", linewidths=1, extent=(-1, 1, -1, 1))
                draw_points(ax, o)
                ax.set(title=f"{common.alpha_label(alpha)}, iteration {at[level][1]}", xticks=[], yticks=[])
            figure.suptitle(f"training loss {level:.2f}")
            writer.grab_frame()
    os.replace(part, part.with_name("toy.gif"))
    print(f"wrote {o.out}/toy.gif")


def main(argv=None, **options):
    """Run, draw and conclude, with the command line's options as keywords: main(alpha=[1, 100], quick=True). Returns
    the summary; raises ValueError or OSError for bad input."""
    o = common.parse(make_parser(), QUICK, argv, options)
    if o.draw_only and o.animate:
        raise ValueError("--animate trains a network, --draw-only trains nothing: choose one")
    if not o.draw_only:
        for alpha, _ in common.my_share(o):  # under torchrun: this process's
            run(alpha, o)
    found = read_runs(o)
    if not o.draw_only and any(a not in found or len(found[a][1]) < o.runs for a in o.alpha):
        return {}  # another process is still at work, and will draw
    summary = summarise(o, found)
    draw(o, found)
    print(f"\nwrote {o.out}/toy.png, toy.pdf, summary.json")
    if o.animate:
        animate(o)
    return summary


if __name__ == "__main__":
    common.command_line(main)
