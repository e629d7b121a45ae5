"""Figure 1 of "Lazy vs hasty": a hundred small networks on a 2-d task with easy and hard regions.

    python toy.py --quick                       fewer runs, larger steps: the same picture in 19 seconds
    python toy.py                               the paper's figure
    python toy.py --alpha 1 100 inf             with the exactly linear limit
    python toy.py --alpha 1 10 100 --animate    also toy.gif: one network at equal training losses

The claim: at equal training loss the rich network (alpha = 1) has a larger loss than the lazy one (alpha =
100) inside the two discs, the hard examples, and a smaller one outside, on the easy ones.

The paper's figure took 5 minutes 9 seconds on one of two busy CPU cores (AMD EPYC, 2026-11-25); not timed on
a GPU. It ends with

    At equal training loss 0.4 the test loss of the rich networks (alpha = 1) is 0.131 [0.115, 0.147] higher
    in the discs and 0.046 [0.042, 0.050] lower outside than that of the lazy ones (alpha = 100; 100 runs):
    they hastened to the easy region, as in the paper.
"""
import io
import json
import math
import os
import pathlib
import types

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
MEASURED = ["test_loss", "test_acc", "inside_loss", "outside_loss", *common.LINEARITY]
CENTRES, RADIUS = [(-.5, .5), (.5, -.5)], .3  # of the two discs
OPTIONS = {
    "runs": ("what to run", 100, "at least 1", "networks per alpha, each with its own data"),
    "chunk": ("what to run", 25, "at least 1", "runs trained as one, the unit of resuming; more on a GPU"),
    "animate": ("what to run", False, None, "also write toy.gif: what run 0 predicts as it learns"),
    "extra_dims": ("training", 5, "at least 0", "inputs that mean nothing"),
    "iterations": ("training", 25000, "at least 1", "at most so many steps of gradient descent"),
    "lr": ("training", .1, "above 0", "learning rate, before the division by alpha^2"),
    "width": ("training", 60, "at least 1", "units of each of the three hidden layers"),
    **dict.fromkeys(["seeds", "dataset", "data_dir", "momentum", "batch_size", "epochs", "stop_loss",
                     "subset", "group_size", "levels", "checkpoint_seconds"])}  # shared, but none of ours


def label(x):
    """x (..., 2 or more) -> label +1 or -1 (...), the sign of x2, flipped inside the discs; and whether x is
    inside one (...), which makes it hard."""
    x1, x2 = x[..., 0], x[..., 1]
    inside = torch.zeros_like(x1, dtype=torch.bool)
    for c1, c2 in CENTRES:
        inside |= (x1 - c1)**2 + (x2 - c2)**2 < RADIUS**2
    return torch.where(inside ^ (x2 > 0), 1.0, -1.0).to(x.dtype), inside


def points(run, o):
    """What a run's seed fixes for every alpha, in float64 on the CPU: training examples (POINTS, d),
    those of the linearity measures (o.probe_examples, d), and the test grid (SIDE^2, d), of which x1 and x2
    are the same in every run and the rest is drawn."""
    def draw(what, n):
        generator = common.generator(what, run)
        return 2 * torch.rand(n, 2 + o.extra_dims, generator=generator, dtype=torch.float64) - 1

    axis = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    grid = draw("toy grid", SIDE**2)
    grid[:, 1], grid[:, 0] = torch.cartesian_prod(axis, axis).T  # rows of the map are x2
    return draw("toy train", POINTS), draw("toy probe", o.probe_examples), grid


def network(run, o):
    with common.seeded("init", run):
        return common.mlp([2 + o.extra_dims, o.width, o.width, o.width, 1]).to(o.device, o.dtype)


def loss_of(f, y):
    """The logistic loss of each example, from outputs f and labels y, +1 or -1, of one shape."""
    return F.softplus(-y * f)


# Training, R runs as one. Examples are columns: a CPU multiplies fastest with the long side last.


def forward(theta, x):
    """f_theta(x) of R networks, each on its own examples x (R, d, N) -> (R, 1, N).
    theta: weights (R, outputs, inputs) and biases (R, outputs, 1) in turn."""
    for W, b in zip(theta[:-2:2], theta[1:-2:2]):
        x = torch.baddbmm(b, W, x).relu()
    W, b = theta[-2:]
    return torch.baddbmm(b, W, x)


class Batch:
    """R runs trained as one: examples x (R, d, N), labels y (R, 1, N). What trains is self.theta, as in
    forward; at alpha = inf it holds, in the same shapes, delta = alpha (theta - theta0), at first 0."""

    def __init__(self, runs, alpha, o):
        self.runs, self.alpha, self.lr = list(runs), alpha, o.lr
        self.theta0 = []
        for same in zip(*(network(run, o).parameters() for run in runs)):  # one parameter of every run
            self.theta0.append(torch.stack(same).detach().view(len(runs), len(same[0]), -1))
        x = torch.stack([points(run, o)[0] for run in runs]).to(o.device, o.dtype)  # (R, N, d)
        self.x, self.y = x.mT.contiguous(), label(x)[0][:, None]
        self.f0 = forward(self.theta0, self.x)  # never changes: computed once
        self.theta = [p.clone().requires_grad_() for p in self.theta0]
        if alpha == math.inf:
            self.theta = [torch.zeros_like(p).requires_grad_() for p in self.theta0]

    def loss(self):
        """The training loss of every run, (R,)."""
        if self.alpha == math.inf:  # grad f_theta0(x) . delta
            f = torch.func.jvp(lambda theta: forward(theta, self.x), (self.theta0,), (self.theta,))[1]
        else:
            f = self.alpha * (forward(self.theta, self.x) - self.f0)
        return loss_of(f, self.y).mean((1, 2))

    def step(self, loss):
        """One step of gradient descent. A run's loss depends on its own weights alone, so that the gradient
        of the sum holds the gradient of each."""
        lr = self.lr if self.alpha == math.inf else self.lr / self.alpha**2
        loss.sum().backward()
        with torch.no_grad():
            for p in self.theta:
                p.sub_(p.grad, alpha=lr)
                p.grad = None

    def keep(self, places):
        """Drop the runs that are not at `places`; what trains goes on in fresh leaves."""
        self.runs = [self.runs[place] for place in places]
        self.x, self.y, self.f0 = self.x[places], self.y[places], self.f0[places]
        self.theta0 = [p[places] for p in self.theta0]
        self.theta = [p.detach()[places].requires_grad_() for p in self.theta]

    @torch.no_grad()
    def copy_into(self, parameters, place):
        """Put what trains in the run at `place` into the parameters of a plain network."""
        for parameter, p in zip(parameters, self.theta):
            parameter.copy_(p[place].view_as(parameter))


def train(runs, alpha, o, levels, curves):
    """Full-batch gradient descent, all `runs` at once, each to the last of `levels` or o.iterations.

    Yields (batch, place, record) for the run at that place of the batch: at the first iteration whose
    training loss is at or below a level, and at its end. Iteration n is the network after n steps, so 0 is
    theta0. curves: {run: list} to which training losses at curve_marks are added.
    """
    batch, ahead = Batch(runs, alpha, o), {run: list(levels) for run in runs}
    progress = common.Progress(f"alpha={alpha:g} runs {runs[0]} to {runs[-1]}", o.iterations)
    marks, next_level = set(curve_marks(o.iterations)), math.inf
    for iteration in range(o.iterations + 1):
        loss, last = batch.loss(), iteration == o.iterations
        if iteration in marks:
            for run, value in zip(batch.runs, loss.tolist()):
                curves[run].append(value)
        if iteration % 50 == 0:
            progress.status(iteration, f"iteration {iteration}  loss {loss.mean().item():.4f}")
        if last or not (loss > next_level).all():  # also at nan; on a GPU the only wait of most steps
            stay = []
            for place, (run, value) in enumerate(zip(batch.runs, loss.tolist())):
                record = {"run": run, "level": None, "iteration": iteration, "train_loss": value}
                while ahead[run] and value <= ahead[run][0]:
                    yield batch, place, {**record, "level": ahead[run].pop(0)}
                if not math.isfinite(value):
                    yield batch, place, {**record, "ended": "diverged"}
                elif not ahead[run]:
                    yield batch, place, {**record, "ended": "loss"}
                elif last:
                    yield batch, place, {**record, "ended": "iterations"}
                else:
                    stay.append(place)
            if not stay:
                return
            if len(stay) < len(batch.runs):
                batch.keep(stay)
                loss = batch.loss()
            next_level = torch.tensor([ahead[run][0] for run in batch.runs], dtype=o.dtype, device=o.device)
        batch.step(loss)


def curve_marks(iterations):
    """The iterations at which the loss curves are kept, about 40 a decade."""
    return np.unique(np.geomspace(1, iterations, 176).round().astype(int)).tolist()


def watch(run, alpha, o):
    """A plain network for one run. Returns measure(batch, place) -> (what a record says of the run at that
    place, its loss on the test grid (SIDE, SIDE))."""
    f = common.center(network(run, o), alpha)
    optimizer = common.scaled_sgd(f, o.lr)
    x, x_probe, x_grid = (x.to(o.device, o.dtype) for x in points(run, o))
    y, (y_grid, inside) = label(x)[0], label(x_grid)
    linearity = common.Linearity(f, x_probe, label(x_probe)[0])

    def step():
        optimizer.zero_grad()
        loss_of(f(x)[:, 0], y).mean().backward()
        optimizer.step()

    @torch.no_grad()
    def measure(batch, place):
        batch.copy_into(optimizer.param_groups[0]["params"], place)
        f_grid = f(x_grid)[:, 0]  # (SIDE^2,)
        loss, correct = loss_of(f_grid, y_grid), f_grid * y_grid > 0
        measured = {"test_loss": loss.mean().item(), "test_acc": correct.double().mean().item(),
                    "inside_loss": loss[inside].mean().item(), "outside_loss": loss[~inside].mean().item(),
                    **linearity(), "update_noise": common.update_noise(optimizer, step)}
        return measured, loss.view(SIDE, SIDE).cpu()

    return measure


def train_chunk(runs, alpha, o):
    """Train and measure some runs. Returns alpha, their records, and arrays "runs" (R,), "maps" of test loss
    (R, MAPS, SIDE, SIDE) and "curves" of training loss (R, marks), nan after a run's end."""
    measures, records, curves = {}, [], {run: [] for run in runs}
    maps = {run: np.full((len(MAPS), SIDE, SIDE), np.nan, np.float16) for run in runs}
    for batch, place, record in train(runs, alpha, o, LEVELS, curves):
        run, level = record["run"], record["level"]
        if level is not None:
            if run not in measures:
                measures[run] = watch(run, alpha, o)
            measured, test_loss = measures[run](batch, place)
            record.update(measured)
            if level in MAPS:
                maps[run][MAPS.index(level)] = test_loss
        records.append(record)
    lines = np.full((len(runs), len(curve_marks(o.iterations))), np.nan, np.float32)
    for line, curve in zip(lines, curves.values()):
        line[:len(curve)] = curve
    return alpha, records, {"runs": np.array(runs), "maps": np.stack(list(maps.values())), "curves": lines}


# The folders OUT/alpha=ALPHA: log.jsonl has a line for each crossing of a run and one for its end, maps.npz
# the arrays.


def train_missing(o, data):
    """Train the runs that --out does not hold yet. Under torchrun each process takes some of the alphas."""
    chunks = []
    for alpha in common.share_of_rank(o.alpha):
        folder = common.run_folder(o, pathlib.Path(o.out) / f"alpha={alpha:g}", data, network(0, o).parameters())
        _, arrays = read_run(folder, o)
        missing = [run for run in range(o.runs) if run not in arrays["runs"]]
        for first in range(0, len(missing), o.chunk):
            chunks.append((missing[first:first + o.chunk], alpha, o))
        if not missing:
            print(f"alpha={alpha:g}: already finished")
    progress, done = common.Progress("toy", len(chunks)), 0

    def look():
        progress.status(done, f"{done} of {len(chunks)} chunks of runs are done")

    for alpha, records, arrays in common.side_by_side(o, train_chunk, chunks, look):
        store(pathlib.Path(o.out) / f"alpha={alpha:g}", records, arrays, o)
        done += 1
        progress.line(f"{done} of {len(chunks)} chunks of runs are done (alpha = {alpha:g})")


def store(folder, new_records, new_arrays, o):
    """Add a chunk to a folder. It counts as done once it is in log.jsonl, written last and whole."""
    records, arrays = read_run(folder, o)
    records = sorted(records + new_records, key=lambda record: record["run"])
    arrays = {name: np.concatenate([arrays[name], new_arrays[name]]) for name in arrays}
    order, buffer = np.argsort(arrays["runs"]), io.BytesIO()
    np.savez(buffer, **{name: array[order] for name, array in arrays.items()})
    common.write_atomically(folder / "maps.npz", buffer.getvalue())
    common.write_atomically(folder / "log.jsonl", b"".join(map(common.json_line, records)))


def read_run(folder, o):
    """Records and arrays (see train_chunk) of the runs of a folder that are done. ValueError: damaged."""
    records = common.read_log(folder, needed=("run", "level", "iteration", "train_loss"))
    empty = {"runs": np.zeros(0, int), "maps": np.zeros((0, len(MAPS), SIDE, SIDE), np.float16),
             "curves": np.zeros((0, len(curve_marks(o.iterations))), np.float32)}
    if not records:
        return [], empty
    arrays = common.read_npz(folder / "maps.npz")
    good = set(arrays) == set(empty) and all(map(good_record, records))
    for name in empty:
        shape = (arrays["runs"].size, *empty[name].shape[1:]) if good else None
        good = good and arrays[name].shape == shape and arrays[name].dtype == empty[name].dtype
    done = [record["run"] for record in records if record.get("level") is None]
    logged = good and np.isin(arrays["runs"], done)  # a chunk that did not get into log.jsonl is left out
    if not good or sorted(arrays["runs"][logged]) != sorted(done):
        raise common.damaged(folder / "log.jsonl or maps.npz")
    records = [record for record in records if record["run"] in done]
    return records, {name: array[logged] for name, array in arrays.items()}


def good_record(record):
    """Whether a line of log.jsonl has what train_chunk writes: a crossing, or the end of a run."""
    keys = {"run", "level", "iteration", "train_loss", "ended"}
    if record.get("level") is not None:
        keys = {"run", "level", "iteration", "train_loss", *MEASURED}
    numbered = set(record) == keys and None not in (record["run"], record["iteration"])
    return numbered and record["level"] in [None, *LEVELS]


def read_runs(o):
    """All that --out holds, by ascending alpha: {alpha: results}, where results.at[level] and results.ends
    are {run: record}, results.maps {run: (MAPS, SIDE, SIDE)} and results.curves (R, marks)."""
    found = {}
    for path in pathlib.Path(o.out).glob("alpha=*/log.jsonl"):
        common.read_args(path.parent)  # refused if it is missing
        records, arrays = read_run(path.parent, o)
        at = {level: {} for level in [*LEVELS, None]}
        for record in records:
            at[record["level"]][record["run"]] = record
            if record["level"] is not None:  # the gap, hard minus easy, as in the other scripts
                record["gap"] = common.minus(record["inside_loss"], record["outside_loss"])
        maps = dict(zip(arrays["runs"].tolist(), arrays["maps"]))
        results = types.SimpleNamespace(at=at, ends=at.pop(None), maps=maps, curves=arrays["curves"])
        if records:
            found[float(path.parent.name.removeprefix("alpha="))] = results
    if not found:
        raise ValueError(f"{o.out} (--out): there are no records of runs")
    return dict(sorted(found.items()))


# The conclusion, at equal training loss.


def rich_and_lazy(found):
    """The two alphas that maps and conclusion compare: 1, or else the smallest, and the largest."""
    lazy = max(found)
    return (1.0 if 1 in found and lazy > 1 else min(found)), lazy


def in_both(found, level, a, b):
    """The runs that reached a level under both alphas."""
    return [run for run in found[a].at[level] if run in found[b].at[level]]


def mean_difference(found, level, a, b):
    """The mean map of test loss at a level, alpha a minus b, over the runs that reached it: (SIDE, SIDE)."""
    k, runs = MAPS.index(level), in_both(found, level, a, b)
    maps = [found[a].maps[run][k].astype(float) - found[b].maps[run][k] for run in runs]
    return np.nan_to_num(np.mean(maps, 0))


def summarise(found):
    """Every alpha at every level, over the runs that reached it; and minus the largest, paired by run."""
    summary, largest = {"alphas": {}, "paired": {}, "diverged": []}, max(found)
    for alpha, results in found.items():
        levels, differences = {}, {}
        for level in LEVELS:
            records, others = results.at[level], found[largest].at[level]
            if records:
                iterations = [record["iteration"] for record in records.values()]
                row = levels[f"{level:g}"] = {"reached": len(records), "of": len(results.ends),
                                              "median_iteration": float(np.median(iterations))}
                for key in ["gap", *MEASURED]:
                    row[key] = common.spread([record[key] for record in records.values()])
            runs = in_both(found, level, alpha, largest)
            if runs:
                row = differences[f"{level:g}"] = {}
                for key in ("gap", "inside_loss", "outside_loss", "test_loss", "test_acc"):
                    values = [common.minus(records[run][key], others[run][key]) for run in runs]
                    row[key] = common.spread(values, interval=True)
                if level in MAPS:
                    row["largest_on_map"] = float(mean_difference(found, level, alpha, largest).max())
        summary["alphas"][f"{alpha:g}"] = {"levels": levels}
        if alpha < largest:
            summary["paired"][f"{alpha:g} - {largest:g}"] = {"levels": differences}
        diverged = [run for run, end in results.ends.items() if end["ended"] == "diverged"]
        summary["diverged"] += [f"alpha={alpha:g} run {run}" for run in diverged]
    return summary


def conclude(o, found):
    """Print a table for each claim, and what rounding did; write summary.json and return what it holds."""
    summary = summarise(found)
    summary["conclusion"] = verdict(found, summary)
    summary["options"] = common.read_args(pathlib.Path(o.out) / f"alpha={min(found):g}")["run"]
    del summary["options"]["theta0_crc32"]  # of run 0 alone
    print("\nmedian iterations to a training loss, and how many runs reached it")
    print(f"{'alpha':>12}" + "".join(f"{level:>16g}" for level in LEVELS))
    for alpha, part in summary["alphas"].items():
        line = f"{alpha:>12}"
        for level in LEVELS:
            cell = "-"
            if f"{level:g}" in part["levels"]:
                row = part["levels"][f"{level:g}"]
                cell = f"{row['median_iteration']:.0f} ({row['reached']}/{row['of']})"
            line += f"{cell:>16}"
        print(line)
    for pair, part in summary["paired"].items():
        rows = {}
        for level, row in part["levels"].items():
            rows[level] = {"in the discs": row["inside_loss"], "outside": row["outside_loss"]}
        title = f"test loss at equal training loss, alpha = {pair.replace('-', 'minus')}, paired by run"
        if rows:
            common.print_table(f"{title}: mean [95 % interval] (runs)", rows, ["in the discs", "outside"])
    for alpha, results in found.items():
        noise = [record["update_noise"] for at in results.at.values() for record in at.values()]
        noise = [value for value in noise if value is not None]
        if noise and np.median(noise) > .02:
            print(f"\nalpha={alpha:g}: warning: rounding swallows part of each step (update_noise "
                  f"{np.median(noise):.2g}, median, above .02): use --dtype float64, or --alpha inf")
    line = common.json_line(summary)
    common.write_atomically(pathlib.Path(o.out) / "summary.json", line)
    return json.loads(line)


def verdict(found, summary):
    """The conclusion in a sentence, at the lowest level that every run has under both alphas, or most do."""
    rich, lazy = rich_and_lazy(found)
    counts = {level: len(in_both(found, level, rich, lazy)) for level in LEVELS}
    most = max(counts.values())
    if rich == lazy:
        return "One alpha is no comparison: --alpha 1 100 makes one."
    if most == 0:
        return f"No run reached a training loss of {LEVELS[0]:g} under both alphas: nothing is concluded."
    level = min(level for level in LEVELS if counts[level] == most)
    row = summary["paired"][f"{rich:g} - {lazy:g}"]["levels"][f"{level:g}"]
    inside, outside = row["inside_loss"] or {}, row["outside_loss"] or {}
    if "interval" not in inside or "interval" not in outside:
        return f"{most} run(s) have both alphas at {level:g}, an interval takes three: nothing is concluded."
    (low, high), (outside_low, outside_high) = inside["interval"], outside["interval"]
    if low > 0 > outside_high:
        return (f"At equal training loss {level:g} the test loss of the rich networks (alpha = {rich:g}) is "
                f"{inside['mean']:.3f} [{low:.3f}, {high:.3f}] higher in the discs and "
                f"{-outside['mean']:.3f} [{-outside_high:.3f}, {-outside_low:.3f}] lower outside than that "
                f"of the lazy ones (alpha = {lazy:g}; {most} runs): they hastened to the easy region, "
                "as in the paper.")
    return (f"At equal training loss {level:g} the test loss of alpha = {rich:g} minus that of alpha = "
            f"{lazy:g} is {common.cell(inside)} in the discs and {common.cell(outside)} outside: "
            "these runs do not show that rich networks hasten to the easy region.")


# The pictures.


def draw(o, found):
    """toy.png, the paper's Figure 1: task, training, and where test losses differ at equal training loss."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.3, 5.9), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    task, training = top.subplots(1, 2, width_ratios=[1, 1.9])
    axis = torch.linspace(-1, 1, 400)
    background, _ = label(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))
    task.imshow(background.numpy(), cmap="RdBu_r", vmin=-4, vmax=4, **PLANE)
    draw_task(task, o)
    task.set_title("(a) task, and one run's data", fontsize=10)
    draw_training(training, o, found)
    draw_maps(bottom, o, found)
    common.save_figure(figure, o.out, "toy")


def draw_task(ax, o, examples=True):
    """The plane of x1 and x2 with the discs, and the training examples of run 0."""
    from matplotlib.patches import Circle
    for centre in CENTRES:
        ax.add_patch(Circle(centre, RADIUS, fill=False, linewidth=.8, color="black"))
    x = points(0, o)[0]
    y, _ = label(x)
    for sign, colour, marker in ((1, "#b2182b", "o"), (-1, "#2166ac", "^")):
        if examples:
            x1, x2 = x[y == sign, :2].T
            ax.scatter(x1, x2, s=16, color=colour, marker=marker, edgecolors="white", linewidths=.5)
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal", xlim=(-1, 1), ylim=(-1, 1))


def draw_training(ax, o, found):
    """Training loss of every run against iterations, and where the median run is at the maps' losses."""
    for k, (alpha, results) in enumerate(found.items()):
        colour = common.colour(alpha)
        style = dict(color=colour, marker="osD^vP"[k % 6], markeredgecolor="white", markersize=7)
        ax.plot([], [], **style, label=common.alpha_label(alpha))
        ax.plot(curve_marks(o.iterations), results.curves.T, color=colour, linewidth=.5, alpha=.25)
        for level in MAPS:
            iterations = [record["iteration"] for record in results.at[level].values()]
            if iterations:
                ax.plot(np.median(iterations), level, **style)
    for level in MAPS:
        ax.axhline(level, color="black", linewidth=.7, linestyle=":")
    ax.set(xscale="log", xlim=(1, max(o.iterations, 2)), ylim=(LEVELS[-1], .72))
    ax.set(xlabel="iterations", ylabel="training loss")
    ax.set_title("(b) training; markers: median at the losses of (c), (d), (e)", fontsize=10)
    ax.legend(loc="lower left")


def draw_maps(figure, o, found):
    """Where on the plane the rich networks have the larger test loss, at equal training loss."""
    rich, lazy = rich_and_lazy(found)
    for ax, level, letter in zip(figure.subplots(1, len(MAPS)), MAPS, "cde"):
        draw_task(ax, o, examples=False)
        ax.set_title(f"({letter}) at training loss {level:g}", fontsize=10)
        runs = len(in_both(found, level, rich, lazy))
        if rich == lazy:
            ax.text(0, 0, "needs two alphas", ha="center")
        elif runs == 0:
            ax.text(0, 0, "no run reached it\nunder both alphas", ha="center")
        else:
            mean = mean_difference(found, level, rich, lazy)
            most = max(abs(mean).max(), 1e-6)
            image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most, **PLANE)
            figure.colorbar(image, ax=ax, shrink=.7, ticks=[-most, 0, most], format="%.2f")
            ax.set_xlabel(f"mean of {runs} runs")
    a, b = common.alpha_label(rich), common.alpha_label(lazy)
    figure.suptitle(f"Test loss of {a} minus test loss of {b}.  "
                    f"Red: rich ({a}) has the larger loss; blue: lazy ({b}) has", fontsize=10)


def animate(o):
    """toy.gif: what run 0 predicts where all but x1, x2 are 0; up to four alphas, at equal training loss."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    alphas = o.alpha if len(o.alpha) <= 4 else [*o.alpha[:3], o.alpha[-1]]
    at = dict(common.side_by_side(o, predictions, [(alpha, o) for alpha in alphas], lambda: None))
    levels = [level for level in FRAMES if all(level in at[alpha] for alpha in alphas)]
    if not levels:
        raise ValueError("--animate: run 0 does not learn under every alpha: more --iterations")
    names = {1.0: "rich, ", 100.0: "lazy, ", math.inf: "linear, "}
    figure = Figure(figsize=(2.9 * len(alphas), 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(alphas), squeeze=False)[0]
    writer, part = PillowWriter(fps=4), pathlib.Path(o.out) / "toy.part.gif"
    with writer.saving(figure, part, dpi=90):
        for level in levels + levels[-1:] * 8:  # rests on the last
            figure.suptitle(f"at training loss {level:.2f}")
            for ax, alpha in zip(axes, alphas):
                iteration, probability = at[alpha][level]
                ax.clear()
                ax.contourf(probability, np.linspace(0, 1, 21), cmap="RdBu_r", vmin=-.3, vmax=1.3, **PLANE)
                ax.contour(probability, levels=[.5], colors="black", linewidths=1.2, **PLANE)
                draw_task(ax, o)
                title = f"{names.get(alpha, '')}{common.alpha_label(alpha)}\niteration {iteration}"
                ax.set(xticks=[], yticks=[], title=title)
            writer.grab_frame()
    os.replace(part, part.with_name("toy.gif"))
    print(f"wrote {o.out}/toy.gif")


def predictions(alpha, o):
    """Train run 0. Returns alpha and {level: (iteration, probability of label +1 (SIDE, SIDE))}."""
    f = common.center(network(0, o), alpha)
    grid, found = points(0, o)[2].to(o.device, o.dtype), {}
    grid[:, 2:] = 0
    for batch, place, record in train([0], alpha, o, FRAMES, {0: []}):
        batch.copy_into([p for p in f.parameters() if p.requires_grad], place)
        with torch.no_grad():
            probability = torch.sigmoid(f(grid)).view(SIDE, SIDE).cpu().numpy()
        found[record["level"]] = record["iteration"], probability
    return alpha, found


def main(**given):
    """Train, conclude and draw, with the command line's options as keywords: main(alpha=[1, 100],
    quick=True). Returns the summary; raises ValueError or OSError for bad input."""
    o = common.options("toy", OPTIONS, QUICK, given, __file__)
    if o.draw_only and o.animate:
        raise ValueError("--animate trains a network, --draw-only trains nothing: choose one")
    if o.draw_only:  # as the runs that are there were
        for path in sorted(pathlib.Path(o.out).glob("alpha=*/log.jsonl"))[:1]:
            told = common.read_args(path.parent)["run"]
            told = {name: told.get(name) for name in o.part_of_run}
            o = common.options("toy", OPTIONS, QUICK, {**told, **given}, __file__)
    data = {name: x.numpy() for name, x in zip(["train", "probe", "grid"], points(0, o))}
    common.check_folder(o, data)
    if not o.draw_only:
        train_missing(o, data)
    found = read_runs(o)
    if not o.draw_only and any(alpha not in found or len(found[alpha].ends) < o.runs for alpha in o.alpha):
        return {}  # another process of torchrun is still at work, and will draw
    summary = conclude(o, found)
    draw(o, found)
    print(f"\nwrote {o.out}/toy.png, toy.pdf, summary.json")
    if o.animate:
        animate(o)
    print(f"\n{summary['conclusion']}")
    return summary


if __name__ == "__main__":
    common.command_line("toy", main, OPTIONS, QUICK, __doc__)
