"""The machinery of the four scripts, which can be read without it: when to look, what is kept, how it is drawn."""
import argparse
import collections
import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib

import numpy as np
import torch

import common

CHECKPOINT_SECONDS = 60
COMMAND = []  # of which --jobs starts copies; empty where main() is called from Python
MAY_DIFFER = "alpha seeds data_dir out device jobs quick draw_only epochs stop_loss runs chunk animate".split()


class BadInput(ValueError):
    """What a person asked for cannot be done: the command line says so in one line, with exit code 2."""


# 1  The data ---------------------------------------------------------------------------------------
def load_images(dataset, data_dir="data"):
    """A data set, "cifar10", "synthetic", or an .npz, as a dict: x_train uint8 (N, H, W, C), y_train int64 (N,), mean
    and std (C,) of pixels in [0, 1], maybe score_train (higher = easier), attribute_train (0 / 1); test likewise."""
    if dataset == "cifar10":
        return cifar10(data_dir)
    if dataset == "synthetic":
        return with_statistics(synthetic())
    if not str(dataset).endswith(".npz"):
        raise BadInput(f"--dataset {dataset}: must be cifar10, synthetic or a file FILE.npz")
    return with_statistics(check_images(read_npz(dataset), dataset))


def with_statistics(images):
    """Add the training pixels' own mean and standard deviation per channel, if there are none."""
    channels = np.moveaxis(images["x_train"], 3, 0)
    mean = [channel.mean().item() / 255 for channel in channels]
    std = [max(channel.std().item() / 255, 1e-3) for channel in channels]
    return {"mean": mean, "std": std, **images}


def cifar10(data_dir):
    """The paper's split: the first 40,000 training images train, the last 10,000 *training* images test."""
    from torchvision.datasets import CIFAR10
    with explained(f"CIFAR-10: put {CIFAR10.filename} from {CIFAR10.url} into {data_dir}, or try --dataset synthetic"):
        train = CIFAR10(data_dir, train=True, download=True)
    x, y = train.data, np.array(train.targets)
    return {"x_train": x[:40000], "y_train": y[:40000], "x_test": x[40000:], "y_test": y[40000:],
            "mean": [.4914, .4822, .4465], "std": [.2023, .1994, .2010]}


@contextlib.contextmanager
def explained(text):
    """Around a download or the reading of a file: what fails becomes BadInput, of `text` and the reason."""
    try:
        yield
    except Exception as error:  # no network, damaged bytes and the like raise nearly anything
        raise BadInput(f"{text} ({str(error)[:200] or type(error).__name__})") from None


def read_npz(path):
    """The arrays of an .npz, {name: array}, without ever unpickling. Raises BadInput."""
    with explained(f"{path} is missing, or not a readable .npz file"), np.load(path) as file:
        return {name: file[name] for name in file.files}


def check_images(images, path):
    """The arrays of an .npz as load_images returns them. Raises BadInput: the first that does not fit."""
    def need(fits):
        if not fits:
            raise KeyError
    classes = np.unique(images.get("y_train"))
    try:
        for split in ("train", "test"):
            name = f"x_{split}"
            need(images[name].dtype == np.uint8 and images[name].size > 0 and images[name].ndim in (3, 4))
            x = images[name] = images[name].reshape(*images[name].shape[:3], -1)  # (N, H, W) has one channel
            need(x.shape[3] in (1, 3, 4) and x.shape[1:] == images["x_train"].shape[1:])
            name = f"y_{split}"
            need(len(classes) > 1 and np.isin(images[name], range(len(classes))).all())
            images[name] = images[name].astype(np.int64)
            for name in [name, *images.keys() & {f"score_{split}", f"attribute_{split}", "mean", "std"}]:
                shape, most = (x.shape[3:], 1) if name in ("mean", "std") else (x.shape[:1], np.inf)
                need(images[name].shape == shape and np.isfinite(images[name]).all() and images[name].max() <= most)
    except (KeyError, TypeError):
        found = f"{images[name].dtype} {images[name].shape}" if name in images else "missing"
        raise BadInput(f"{path}: {name} ({found}) does not fit. It must hold x_train, x_test: uint8 (N, H, W, C) or "
                       "(N, H, W), C = 1, 3 or 4; y_train, y_test: integers (N,) from 0 on, each in y_train; it may "
                       "hold score_ and attribute_train and _test: finite numbers (N,); mean, std: (C,), of pixels in "
                       "[0, 1]") from None
    return images


def synthetic(n_train=1200, n_test=400, classes=10, size=32):
    """Images of known difficulty d: a share d of a smooth pattern of their own, 1 - d of their class's, and noise."""
    rng = np.random.default_rng(0)
    grid = np.arange(size) / size
    waves = []  # 16 cosines of low frequency, (size, size) each
    for u, v, phase in itertools.product(range(3), range(3), (0, np.pi / 2)):
        if u + v > 0:
            waves.append(np.cos(2 * np.pi * (u * grid[:, None] + v * grid) + phase))
    waves = np.stack(waves)

    def smooth_patterns(n):
        return np.einsum("kwc,whv->khvc", rng.normal(size=(n, 16, 3)), waves) / 4  # (n, size, size, 3)

    pattern, images = smooth_patterns(classes), {}
    for split, n in (("train", n_train), ("test", n_test)):
        y = rng.permutation(np.arange(n) % classes)
        d = rng.uniform(0, .9, (n, 1, 1, 1))
        x = (1 - d) * pattern[y] + d * smooth_patterns(n) + 1.4 * rng.normal(size=(n, size, size, 3))
        images[f"x_{split}"] = (128 + 40 * x).clip(0, 255).astype(np.uint8)
        images[f"y_{split}"], images[f"score_{split}"] = y, 1 - d.ravel()
    return images


def flip_labels(y, fraction, num_classes, seed):
    """Replace round(fraction N) of the labels y (N,) by another class, drawn uniformly. (The paper draws each.)"""
    count, rng, noisy = round(fraction * len(y)), np.random.default_rng(seed), np.array(y)
    if not 0 < count < len(y):
        raise BadInput(f"label noise of {fraction} would change {count} of {len(y)} labels")
    flipped = rng.choice(len(y), count, replace=False)
    noisy[flipped] = (noisy[flipped] + rng.integers(1, num_classes, count)) % num_classes
    return noisy


def training_indices(images, seed, o):
    """Which training images a seed trains on, ascending: all, or the --subset that it draws. Raises BadInput."""
    total = len(images["y_train"])
    if not o.batch_size <= (o.subset or total) <= total:
        raise BadInput(f"of {total} images, --subset {o.subset} and --batch-size {o.batch_size} cannot be taken")
    return draw_some(np.arange(total), o.subset, seed)


def draw_some(members, count, seed):
    """Up to `count` (None: all) of the indices `members`, drawn with the seed, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(members)[:count])


def on_device(x, o):
    """Images uint8 (N, H, W, C) as a tensor uint8 (N, C, H, W) on the device."""
    return torch.as_tensor(x).to(o.device).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def outputs(f, *inputs, block=500):
    """f(x), or f(x, f0), for many examples, a block at a time, without gradients: (N, C)."""
    blocks = [whole.split(block) for whole in inputs]
    return torch.cat([f(*parts) for parts in zip(*blocks)])


def accuracy(f, y):
    """Share of outputs f (N, C) whose largest is at the label y (N,)."""
    return (f.argmax(1) == y).double().mean().item()


@contextlib.contextmanager
def seeded(what, seed):
    """Inside, layers are initialised on the CPU from a seed of their own; afterwards all is as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(generator(what, seed).initial_seed())
        yield


def generator(what, seed):
    """One for each purpose, so that no stream of random numbers depends on another's length."""
    return torch.Generator().manual_seed(zlib.crc32(f"{what} {seed}".encode()))


# 2  A run ------------------------------------------------------------------------------------------
def minibatches(o, seed, f, optimizer, examples, probe, linearity):
    """Yield the indices (batch_size,) of minibatch after minibatch, for a step each. Between them, on a schedule,
    probe() returns a record, with mean_train_loss, and linearity() more of it, and OUT/alpha=A_seed=S/ keeps all it
    takes to go on: args.json (what the run is), log.jsonl (the records), checkpoint.pt. Raises BadInput."""
    folder, steps_an_epoch, order = o.out / f"alpha={f.alpha:g}_seed={seed}", examples // o.batch_size, None
    iteration, seconds, records = load(folder, f, optimizer)
    begin, saved, due = time.monotonic() - seconds, -math.inf, schedule(steps_an_epoch, o.epochs * steps_an_epoch)
    while True:
        seconds, epoch, ended = time.monotonic() - begin, iteration / steps_an_epoch, None
        probing = iteration in due or epoch >= o.epochs
        if probing:
            record = {"iteration": iteration, "epoch": epoch, "seconds": round(seconds, 3), **probe()}
            losses = [earlier["mean_train_loss"] for earlier in [*records, record]]
            if o.stop_loss >= losses[0]:
                raise BadInput(f"--stop-loss {o.stop_loss:g} is not below the first loss {losses[0]:.3g} ({o.loss})")
            if not math.isfinite(losses[-1]) or epoch >= o.epochs and losses[-1] > 2 * losses[0]:
                ended = "diverged"
            elif epoch >= o.epochs:
                ended = "epochs"
            elif len(losses) >= 5 and np.mean(losses[-5:]) < o.stop_loss:
                ended = "stop-loss"
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:  # at once, too: no log.jsonl without args.json
            write_atomically(folder / "args.json", json_line(identity(o)))
            save(folder, f, optimizer, iteration, seconds, records)
            saved = time.monotonic()
        if probing:
            if ended != "diverged" and (ended or len(records) % 5 == 0):
                record.update(linearity())
            records.append(json.loads(json_line(record | ({"ended": ended} if ended else {}))))
            write_atomically(folder / "log.jsonl", b"".join(json_line(record) for record in records))
            if ended or len(records) % 5 == 0:
                print(f"{folder.name}  epoch {epoch:.2f}  loss {losses[-1]:.4f}  {ended or ''}", flush=True)
        if ended:
            return save(folder, f, optimizer, iteration, seconds, records)
        k = iteration % steps_an_epoch
        if k == 0 or order is None:  # the last incomplete batch of an epoch is dropped
            order = torch.randperm(examples, generator=generator(f"order {int(epoch)}", seed)).to(o.device)
        yield order[k * o.batch_size:(k + 1) * o.batch_size]
        iteration += 1


def save(folder, f, optimizer, *state):
    buffer = io.BytesIO()
    torch.save([state, f.state_dict(), optimizer.state_dict()], buffer)
    write_atomically(folder / "checkpoint.pt", buffer.getbuffer())


def load(folder, f, optimizer):
    """From its checkpoint: a run's iteration, seconds and records before that; f and its optimizer as they were."""
    if not (folder / "checkpoint.pt").exists():
        if (folder / "log.jsonl").exists():
            raise BadInput(f"{folder} holds records, but no checkpoint to go on from: choose another --out")
        return 0, 0.0, []
    with explained(f"{folder}/checkpoint.pt is damaged, or another version's: choose another --out"):
        (iteration, seconds, records), of_f, of_sgd = torch.load(folder / "checkpoint.pt", "cpu")
        f.load_state_dict(of_f)
        optimizer.load_state_dict(of_sgd)
        return iteration, seconds, [record for record in records if record["iteration"] < iteration]


def schedule(steps_an_epoch, total):
    """Iterations of a run's probes: 0, a tenth further each time (an epoch at most), the end; never by its loss."""
    due, iteration = {total}, 0
    while iteration < total:
        due.add(iteration)
        iteration += min(max(iteration // 10, 1), steps_an_epoch)
    return due


LINEARITY = {  # what is taken of the network on x, and how it is compared with the same at theta0
    "ntk_alignment": (common.empirical_ntk, common.kernel_alignment),
    "sign_similarity": (common.relu_signs, common.sign_similarity),
    "repr_alignment": (common.representation, common.representation_alignment),
    "repr_alignment_gram": (common.representation, lambda R, R0: common.representation_alignment(R, R0, True)),
    "linearisation_error": (common.linearisation_error, lambda error, error0: error)}


def linearity(f, x):
    """A function () -> {measure: number}, against theta0, now, on x (N, ...). What fails is said once and left out."""
    most, measures = max(2, 1000 // f.model0(x[:1]).numel()), dict(LINEARITY)
    if len(x) > most:
        print(f"{most} of {len(x)} --probe-examples are taken: the kernel keeps to 1,000 rows")

    def take():
        taken = {}
        for name in list(measures):
            try:
                taken[name] = measures[name][0](f if name == "linearisation_error" else f.model, x[:most])
            except ValueError as error:
                print(f"{name} is not measured: {error}", flush=True)
                del measures[name]
        return taken

    def measure():
        now = take() if f.alpha < math.inf else start  # at a = inf delta moves, the network does not
        return {name: measures[name][1](now[name], start[name]) for name in now}

    start = take()
    return measure


def identity(o):
    """What a run is: the script, its text and data, network and loss, and all options but those that MAY_DIFFER."""
    run = {**vars(o), "dtype": str(o.dtype).removeprefix("torch."), "dataset": os.path.basename(o.dataset)}
    return {name: value for name, value in run.items() if name not in MAY_DIFFER}


def check_out(out, wanted):
    """Raise BadInput if `out` holds another run than `wanted` (see identity), with the first difference in words."""
    for path in sorted(out.glob("alpha=*/*.js*[nl]")):  # args.json, and log.jsonl, which is nothing without it
        there = read_json(path.with_name("args.json"))[0]
        for key, value in wanted.items():
            if there.get(key) != value and key != "dataset":  # its checksum is compared
                words = {"script_crc32": f"was made by another text of {there['script']}.py: --draw-only draws it",
                         "data_crc32": f"is of other data ({there.get('dataset')}, not {wanted['dataset']})"}
                difference = words.get(key, f"is a run with {key} = {there.get(key)}, not {value}")
                raise BadInput(f"{path.parent} {difference}; another --out trains anew")


def has_ended(o, alpha, seed):
    """Whether these options leave a run nothing to train. (More epochs, or a lower stop-loss, do.)"""
    log = o.out / f"alpha={alpha:g}_seed={seed}" / "log.jsonl"
    records = read_json(log) if log.exists() else [{}]
    ended, losses = records[-1].get("ended"), [record.get("mean_train_loss") for record in records[-5:]]
    if ended == "stop-loss":
        return sum(losses) < o.stop_loss * len(losses)
    return ended == "diverged" or ended == "epochs" and records[-1]["epoch"] >= o.epochs


def read_runs(out):
    """The records of every run in a folder, {alpha: {seed: [record, ...]}}, ascending. Raises BadInput."""
    runs = collections.defaultdict(dict)
    for path in pathlib.Path(out).glob("alpha=*_seed=*/log.jsonl"):
        alpha, seed = path.parent.name.removeprefix("alpha=").split("_seed=")
        if seed.isdecimal():  # else a copy that somebody keeps
            runs[float(alpha)][int(seed)] = read_json(path)
    if not runs:
        raise BadInput(f"{out}: there are no records of runs (--out)")
    return {alpha: dict(sorted(runs[alpha].items())) for alpha in sorted(runs)}


def read_json(path):
    """The lines of args.json or log.jsonl, [dict, ...]. BadInput: it is missing or damaged."""
    with explained(f"{path} is missing or damaged: choose another --out, or delete its folder"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1].items()  # there is one, and it is a dict
        return lines


def json_line(entry):
    """Strict JSON, a line: numbers that are not finite become null."""
    finite = json.loads(json.dumps(entry), parse_constant=lambda name: None)  # NaN, Infinity or -Infinity
    return (json.dumps(finite) + "\n").encode()


def write_atomically(path, data):
    """Write bytes to a temporary file and rename it to `path`: whole, or not at all. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


# 3  Equal training loss ----------------------------------------------------------------------------
# Where `on` passes L levels: values {quantity: (alphas, seeds, L)}, nan where a run does not; runs: how many each.
Readings = collections.namedtuple("Readings", "on levels alphas seeds values runs")
Interval = collections.namedtuple("Interval", "mean low high n")  # arrays (alphas, L); of 95 %, nan below three runs


def at_levels(runs, derive, on):
    """Readings of runs where `on` first passes loss_levels, or, an accuracy, .8 to .95 after its lowest value."""
    sign, levels = (-1, [.8, .85, .9, .95]) if on.endswith("acc") else (1, loss_levels(runs))
    seeds = sorted(set().union(*runs.values()))
    values = collections.defaultdict(lambda: np.full((len(runs), len(seeds), len(levels)), np.nan))
    for row, of_seed in enumerate(runs.values()):
        for seed, records in of_seed.items():
            columns = curve(records)
            if columns:  # else it has diverged at once
                columns = derive(columns)
                loss = sign * columns[on]
                start = np.argmax(loss) if sign < 0 else 0
                places = [first_passage(loss, sign * level, start) for level in levels]
                for quantity, column in columns.items():
                    values[quantity][row, seeds.index(seed)] = np.interp(places, np.arange(len(column)), column)
    return Readings(on, levels, list(runs), seeds, values, list(map(len, runs.values())))


def first_passage(loss, level, start=0):
    """The fractional index where `loss` (n,) first falls to `level`; nan if never, or if it is there at `start`."""
    passed = np.flatnonzero(loss[start:] <= level) + start
    if len(passed) == 0 or passed[0] == start:
        return math.nan
    k = passed[0]
    return k - 1 + (loss[k - 1] - level) / (loss[k - 1] - loss[k])


def curve(records):
    """A run's records as {key: array (n,)}, each the centred average over five probes. The window shrinks at the
    start, and the last two, a record off the schedule and all from a loss that is not finite on are left out, so
    that no reading changes when the run goes on. What few probes measure is a line between them, nan outside."""
    kept, columns = [], {}
    for record in records:
        if record["mean_train_loss"] is None or record.get("ended") in ("epochs", "diverged"):
            break
        kept.append(record)
    places = range(len(kept) - 2)
    for key in set().union(*kept) - {"ended", "seconds"} if places else ():
        values = np.array([record.get(key) for record in kept], float)  # None becomes nan
        measured = np.flatnonzero(np.isfinite(values))
        if len(measured) == len(kept):
            columns[key] = np.array([np.mean(values[k - min(k, 2):k + min(k, 2) + 1]) for k in places])
        elif len(measured):
            columns[key] = np.interp(places, measured, values[measured], np.nan, np.nan)
    return columns


def loss_levels(runs):
    """.95, .9, ... .05 times the first mean training loss at the smallest alpha, and the paper's 1.0 and .5."""
    records = list(runs[min(runs)].values())[0]
    start = float(f"{records[0]['mean_train_loss'] or 0:.3g}")  # null where it is not finite
    levels = {1.0, .5, *(float(f"{k / 20 * start:.3g}") for k in range(1, 20))}
    return sorted((level for level in levels if 0 < level < start), reverse=True)


def interval(values):
    """The Interval of values (alphas, seeds, L), by Student's t."""
    t = np.array("12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 "
                 "2.110 2.101 2.093 2.086".split(), float)  # beyond, 1.96 + 2.5 / freedom is right to .0014
    n = np.isfinite(values).sum(1)
    mean = np.nansum(values, 1) / np.where(n, n, np.nan)
    freedom = np.where(n > 2, n - 1, np.nan)
    quantile = np.where(n > 21, 1.96 + 2.5 / freedom, np.take(t, n - 2, mode="clip"))
    half = quantile * np.sqrt(np.nansum((values - mean[:, None])**2, 1) / freedom / (freedom + 1))
    return Interval(mean, mean - half, mean + half, n)


def difference(read, quantity):
    """Each alpha minus the largest, seed by seed, since a seed fixes everything but alpha: an Interval."""
    return interval(read.values[quantity] - read.values[quantity][-1])


def verdict(read, quantity, claim, plain, about):
    """Print and return the conclusion: whether `quantity` at the rich alpha (1, or the smallest) minus that at the
    largest is above 0 at both of the two lowest levels that every run of both has. plain: for a beginner."""
    on, alphas, found = read.on, read.alphas, difference(read, quantity)
    row = alphas.index(1) if 1 in alphas[:-1] else 0  # of the rich; the lazy are the last
    complete = np.isfinite(read.values[on]).sum(1) == np.array(read.runs)[:, None]  # (alphas, L)
    lowest = np.flatnonzero(complete[row] & complete[-1] & (found.n[row] > 0))[-2:]
    if len(lowest) < 2 or len(alphas) < 2:
        sentence = (f"Nothing is concluded: it takes two levels of {on} that every run of two alphas passed. Train "
                    "longer (epochs, iterations, a lower stop-loss); where the loss does not fall, try a smaller --lr.")
        print(f"\n{sentence}")
        return sentence
    word, meaning, n = "is not shown by these runs", "perhaps ", found.n[row, lowest[0]]
    if n < 3:
        word = "is not judged (an interval takes three seeds)"
    if (found.low[row, lowest] > 0).all():
        word, meaning = "holds in these runs", ""
    elif (found.high[row, lowest] < 0).all():
        word, meaning = "is contradicted by these runs", "it is not so that "
    cells = " and ".join(f"{cell(found, row, k)} at {on} {read.levels[k]:g}" for k in lowest)
    sentence = (f"The claim that {claim} {word}: {quantity} at alpha = {alphas[row]:g} minus that at alpha = "
                f"{alphas[-1]:g} is {cells} (n = {n}; {about}).")
    print(f"\n{sentence}\nIn words: {meaning}{plain}.")
    return sentence


def cell(found, row, k):
    """A difference for a table or sentence: mean [95 % interval]."""
    mean, low, high, n = (array[row, k] for array in found)
    return f"{mean:+#.3g} [{low:#.3g}, {high:#.3g}]" if n > 2 else f"{mean:+#.3g}"


def print_table(title, read, quantity):
    """At each level each alpha's mean of `quantity`, minus the largest alpha's, of the seeds that both have."""
    found, values = difference(read, quantity), read.values[quantity]
    means = interval(np.where(np.isfinite(values - values[-1]), values, np.nan)).mean
    print(f"\n{title}\n{read.on:>18}" + "".join(f"{f'alpha = {alpha:g} - {read.alphas[-1]:g} (runs)':>48}"
                                                for alpha in read.alphas[:-1]))
    for k in np.flatnonzero(found.n[:-1].any(0)):
        line = f"{read.levels[k]:>18g}"
        for row in range(len(means) - 1):
            rich, n = means[row, k], found.n[row, k]
            text = f"{rich:#.3g} - {rich - found.mean[row, k]:#.3g} = {cell(found, row, k)} ({n})"
            line += f"  {text if n else '-':>46}"
        print(line)


def look(alpha):
    """How an alpha is drawn: warm is rich, cold is lazy; the lazier the thinner, to show what it covers."""
    from matplotlib import colormaps
    place = min(max(math.log10(alpha) + 1, 0), 4.5)  # 0 of .1, 1 of 1, ... 4 of 1000, 4.5 of inf
    return {"color": colormaps["plasma"](.9 - place / 5), "marker": "vDophs^>Px"[round(2 * place)], "markersize": 4,
            "linewidth": 2 - place / 4, "label": f"α = {alpha:g}".replace("inf", "∞")}


def draw(ax, read, quantity, linestyle="-", name=""):
    """A line an alpha: its mean at the levels that all of its runs pass. name: what this linestyle means."""
    ax.set(xlabel=read.on.replace("_", " "), xmargin=.08)
    ax.xaxis.set_inverted(read.on.endswith("loss"))  # training goes to the right
    for alpha, mean, n, runs in zip(read.alphas, *interval(read.values[quantity])[::3], read.runs):
        line, = ax.plot(read.levels, np.where(n == runs, mean, np.nan), linestyle=linestyle, **look(alpha))
        line.set_label(line.get_label() if linestyle == "-" else "")
    ax.plot([], [], color="grey", linestyle=linestyle, label=name)
    ax.legend(labelspacing=.2, framealpha=.5)


def draw_differences(ax, read, quantity):
    """Panel (b): each alpha minus the largest at every level, with its 95 % interval, and a line at 0."""
    ax.axhline(0, color="black", linewidth=.8)
    for alpha, mean, _, high, _ in zip(read.alphas[:-1], *difference(read, quantity)):
        ax.errorbar(read.levels, mean, high - mean, **{**look(alpha), "linestyle": ""})
    ax.set(title=f"(b) {quantity.replace('_', ' ')}, minus that at the largest α", xlabel=read.on.replace("_", " "))
    ax.xaxis.set_inverted(read.on.endswith("loss"))


def draw_linearity(similarity, error, read):
    """Panels (c) and (d): similarities to initialisation, on [0, 1], and distance from the linearisation."""
    for quantity, linestyle in (("sign_similarity", "-"), ("repr_alignment", "--"), ("ntk_alignment", ":")):
        if quantity in read.values:
            draw(similarity, read, quantity, linestyle, quantity.replace("_", " "))
    similarity.set(ylim=(0, 1.05), title="(c) similarity to initialisation")
    draw(error, read, "linearisation_error")
    error.set(ylim=(0, None), title="(d) distance from the linearisation")


def save_figure(figure, o, name):
    """Write OUT/name.png and .pdf."""
    for kind in ("png", "pdf"):
        figure.savefig(f"{o.out}/{name}.{kind}", dpi=150)
        figure.set_layout_engine("none")  # the second is laid out as the first


# 4  The command line -------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def at_least(lowest, kind):
    """An argparse type: a number of a kind, int or float, from `lowest` on (where it is tiny: above 0)."""
    def number(text):
        if not kind(text) >= lowest:
            raise argparse.ArgumentTypeError(f"must be {'above 0' if lowest else '0 or above'}, not {text}")
        return kind(text)
    return number


count, natural, positive = at_least(1, int), at_least(0, int), at_least(1e-300, float)
OPTIONS = [  # of all four scripts: name, type, default, help
    ("alpha", positive, [1.0, 100.0], "of f^a = a (f - f0); 1: rich, 100: lazy, inf: exactly linear"),
    ("lr", positive, .01, "learning rate, before division by alpha^2"),
    ("width", count, 64, "of the network's first layer"),
    ("dtype", str, "float32", "float32, or float64 for alpha of 1000 and above"),
    ("device", str, "", "cpu, cuda or cuda:1; by default a GPU if there is one"),
    ("jobs", count, None, "processes that share the runs; by default one a core, on a GPU one"),
    ("out", str, None, "folder of records and figures; by default runs/ and what runs"),
    ("quick", bool, False, "a demonstration; explicit options win"),
    ("draw-only", bool, False, "train nothing, draw all that --out holds")]
IMAGE_OPTIONS = [  # of the three that train on images
    ("seeds", natural, [0], "one run an alpha and seed"),
    ("dataset", str, "cifar10", "cifar10, synthetic, or a file FILE.npz (see README.md)"),
    ("data-dir", str, "data", "where downloads go"),
    ("epochs", count, 2500, "at most so many passes over the training set"),
    ("stop-loss", positive, .01, "end a run whose mean training loss, over five probes, is below"),
    ("momentum", at_least(0, float), .9, "of SGD"),
    ("batch-size", count, 125, "examples a step"),
    ("subset", count, None, "train on so many examples only, drawn with the seed"),
    ("group-size", count, 1000, "examples of a group that a probe evaluates"),
    ("probe-examples", count, 100, "held-out examples, for the linearity measures")]


def parse(file, doc, rows, quick, loss, words, options, **defaults):
    """One call's options: OPTIONS and `rows`, then defaults, --quick, words, and options as if they were words."""
    script, words = pathlib.Path(file).stem, list(words)
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # torch's own, at its first forward mode
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, np.ravel(value)))]
    made = Parser(prog=f"{script}.py", description=doc, epilog=f"--quick: {quick}", allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, text in OPTIONS + rows:
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        if isinstance(default, list):
            how["nargs"] = "+"
        made.add_argument(f"--{name}", default=default, help=f"{text} (%(default)s)", **how)
    made.set_defaults(**defaults)
    if "--quick" in words:
        made.set_defaults(**quick)
    o = made.parse_args(words)
    o.alpha, o.seeds = sorted({float(f"{alpha:g}") for alpha in o.alpha}), sorted(set(o.seeds))
    o.script, o.script_crc32 = script, zlib.crc32(pathlib.Path(file).read_bytes())
    data = "" if o.dataset == made.get_default("dataset") else f"_{pathlib.Path(o.dataset).stem}"
    if o.out == "":
        raise BadInput("--out must name a folder")
    o.out = pathlib.Path(o.out or f"runs/{script}{data}{'_quick' if o.quick else ''}")
    name = getattr(loss, "__name__", type(loss).__name__)
    o.loss = f"the loss of {script}.py" if name in ("loss_of", "<lambda>") else name
    gpus = torch.cuda.device_count()
    with explained(f"--device {o.device}, --dtype {o.dtype}: not to be had"):
        rank = int(os.environ.get("LOCAL_RANK", 0))
        o.device = torch.device(o.device or (f"cuda:{rank % gpus}" if gpus else "cpu"))
        o.dtype = {"float32": torch.float32, "float64": torch.float64}[o.dtype]
        torch.empty(0, device=o.device)
    if o.dtype == torch.float32 and any(1000 <= alpha < math.inf for alpha in o.alpha):
        print("warning: from alpha = 1000 on float32 rounds part of a step away: --dtype float64 or --alpha inf")
    return o


def sweep(o, load, network, run, conclude, draw):
    """Train what --out does not hold yet, then conclude from all that it holds, and draw. Returns the summary."""
    if not o.draw_only:
        images, tasks = load(), []
        fix_identity(o, images, network(images, o))
        for shift, seed in enumerate(o.seeds):  # rotated, so that each process's share is of all alphas
            tasks += [(alpha, seed) for alpha in np.roll(o.alpha, shift).tolist()]
        missing = [task for task in tasks if not has_ended(o, *task)]

        def train(alpha, seed):
            if (alpha, seed) in missing:
                run(alpha, seed, images, o)

        if missing and not train_share(o, tasks, train):
            return {}
    runs, diverged = read_runs(o.out), []
    args = recall_identity(o)
    for alpha, of_seed in runs.items():
        for seed, records in of_seed.items():
            name, ended = f"alpha={alpha:g}_seed={seed}", records[-1].get("ended")
            if not ended:
                print(f"{name} has not ended: it is read as far as it has come")
            if ended == "diverged":
                diverged.append(name)
    return finish(o, args, diverged, draw, *conclude(o, runs))


def fix_identity(o, images, network):
    """Add to the options what else a run is, and compare it with the runs in --out, see check_out."""
    o.network, o.data_crc32 = type(network).__name__, 0
    o.parameters = sum(p.numel() for p in network.parameters())
    for name, array in sorted(images.items()):
        if isinstance(array, np.ndarray):  # not a mean and std that were computed here
            o.data_crc32 = zlib.crc32(f"{name} {array.shape}".encode() + array.tobytes(), o.data_crc32)
    check_out(o.out, identity(o))


def recall_identity(o):
    """What the runs in --out are, which another text of the script may draw."""
    args = read_json(min(o.out.glob("alpha=*/args.json"), default=o.out / "args.json"))[0]
    args.pop("script_crc32", None)
    check_out(o.out, {**args, "script": o.script})
    o.dataset, o.loss, o.about = args["dataset"], args["loss"], f"{args['network']}, {args['loss']}"
    return args


def train_share(o, tasks, train):
    """train(*task) for each task, or for this process's share of them; returns whether all is done."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    jobs = min(o.jobs or (1 if o.device.type == "cuda" else torch.get_num_threads()), len(tasks))
    if COMMAND and world == 1 and jobs > 1:
        run_copies(jobs)
        return True
    with common.true_float32():  # alpha multiplies what TF32, cuDNN's default, rounds off
        for task in tasks[rank::world]:
            train(*task)
    if world > 1 and "COPY_OF_JOBS" not in os.environ:
        print(f"{rank} of {world} has trained its share; when all have, --draw-only --out {o.out} concludes")
    return world == 1


def run_copies(jobs):
    """Copies of this command, each with its share of runs and cores; the first that fails ends all, in its words."""
    copies = []
    try:
        for rank in map(str, range(jobs)):
            share = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(jobs), "COPY_OF_JOBS": rank,
                     "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
            words = tempfile.TemporaryFile()  # several copies may fail alike: what one says is shown
            copies.append((subprocess.Popen(COMMAND, env={**os.environ, **share}, stderr=words), words))
        while not any(codes := [process.poll() for process, _ in copies]) and None in codes:
            time.sleep(.1)
    finally:
        for process, _ in copies:
            process.kill()
            process.wait()
    for code, (_, words) in zip(codes, copies):
        if code:
            words.seek(0)
            sys.stderr.write(words.read().decode(errors="replace"))
            if code < 0:
                raise BadInput(f"a process of --jobs was killed (signal {-code}; out of memory?): the same "
                               "command goes on from the last checkpoint, fewer --jobs need less memory")
            sys.exit(code)


def finish(o, args, diverged, draw, readings, quantities, conclusion):
    """Write OUT/summary.json, draw, and return what it holds; an alpha of inf is the string "inf" there."""
    rows, pairs = [], []
    for read in readings:
        names = ["inf" if alpha == math.inf else alpha for alpha in read.alphas]
        for alpha, seed, k in np.argwhere(np.isfinite(read.values[read.on])).tolist():
            row = {"alpha": names[alpha], "seed": read.seeds[seed], "on": read.on, "level": read.levels[k]}
            rows.append(row | {name: array[alpha, seed, k] for name, array in sorted(read.values.items())})
        for name in quantities:
            found = difference(read, name)
            for alpha, k in np.argwhere(found.n[:-1] > 0).tolist():
                row = {"alpha": names[alpha], "minus": names[-1], "on": read.on, "level": read.levels[k]}
                numbers = {column: array[alpha, k].item() for column, array in found._asdict().items()}
                pairs.append({**row, "quantity": name, **numbers})
    line = json_line({"options": args, "readings": rows, "differences": pairs, "diverged": diverged,
                      "conclusion": conclusion})
    summary = json.loads(line, parse_float=lambda text: float(f"{float(text):.6g}"))
    write_atomically(o.out / "summary.json", json_line(summary))
    draw(o, *readings)
    print(f"\nThe picture: {o.out}/{o.script}.png; the numbers: {o.out}/summary.json"
          f"{'; diverged, try a smaller --lr: ' if diverged else ''}{', '.join(diverged)}")
    return summary


def command_line(main):
    """Run main as a program: one line and exit code 2 for bad input, 130 for Ctrl-C, 1 if a run diverged."""
    script = os.path.basename(sys.argv[0])
    COMMAND[:] = [sys.executable, *sys.argv]
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own is not always to be had here
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(1 if main(*sys.argv[1:]).get("diverged") else 0)
    except (KeyboardInterrupt, BrokenPipeError):
        print(f"\n{script}: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print to a pipe that is closed
        sys.exit(130)
    except (ValueError, OSError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not isinstance(error, (BadInput, OSError)) and raised_in != common.__file__:
            raise  # the user's own
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
