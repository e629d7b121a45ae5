"""Runs: records, probes on a schedule, resuming, refusals and options, through noisy.py on tiny data."""
import contextlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import cscore
import noisy
from conftest import ROOT, TINY, records_of, small_arrays, tiny_arrays

LONG = dict(alpha=[1], epochs=40)
LOSS, NETWORK = "F.cross_entropy", "common.resnet18(classes, in_channels=x.shape[1], width=o.width)"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Two thirds of a tiny run's time are matplotlib's; pictures are tested with spurious.py and the README."""
    monkeypatch.setattr(common, "save_figure", lambda figure, out, name: (pathlib.Path(out) / f"{name}.png").touch())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, and a finished run on it, for the tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "tiny.npz", **tiny_arrays())
    torch.set_num_threads(1)
    tiny_run(folder / "tiny.npz", folder / "run", alpha=[1], epochs=1)
    return folder


def tiny_run(tiny, out, **more):
    return noisy.main(**{"dataset": tiny, "out": out, **TINY, **more})


def records(out, run="alpha=1_seed=0"):
    return records_of(pathlib.Path(out) / run)


def assert_same(a, b, *runs):
    """Bit for bit, but for the times."""
    for run in runs or ["alpha=1_seed=0"]:
        one, other = records(a, run), records(b, run)
        for record in one + other:
            record.pop("seconds")
        assert one == other, run


def words(options):
    """Options as a command line."""
    result = []
    for name, value in options.items():
        result.append("--" + name.replace("_", "-"))
        if value is not True:
            result += map(str, value if isinstance(value, list) else [value])
    return result


def start(script, **options):
    return subprocess.Popen([sys.executable, script, *words({**TINY, **options})], text=True, env=ENVIRONMENT, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def command(monkeypatch, *given):
    """The exit code of a command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["noisy.py", "--jobs", "1", *given])
    with pytest.raises(SystemExit) as end:
        common.command_line(noisy.main)
    return end.value.code


def swapped(tmp_path, old, new):
    """noisy.py with one place changed, as a module."""
    source = (ROOT / "noisy.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "noisy.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("noisy_swapped", tmp_path / "noisy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_probes_come_on_a_schedule_that_no_loss_can_influence(tiny, tmp_path, capsys, monkeypatch):
    """And into a pipe goes one aligned line each, however slow the steps between two are."""
    clock = itertools.count(step=60.)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tiny_run(tiny, tmp_path, **LONG, stop_loss=0)
    tiny_run(tiny, tmp_path / "other", **LONG, stop_loss=0, lr=1e-5)
    log, other = records(tmp_path), records(tmp_path / "other")
    expected = list(range(21)) + [22, 24, 26, 28, 30, 33, 36, 39, 42, 46, 50, 55, 60]  # a tenth further ...
    expected += list(range(66, 240, 6)) + [240]  # ... at most an epoch of 6 steps; and the end
    assert [record["iteration"] for record in log] == [record["iteration"] for record in other] == expected
    for k, record in enumerate(log):
        assert record["epoch"] == expected[k] / 6 and ("ntk_alignment" in record) == (k % 5 == 0 or k == len(log) - 1)
        assert record["mean_train_loss"] == pytest.approx(.85 * record["clean_loss"] + .15 * record["noisy_loss"])
    assert log[0]["mean_train_loss"] == pytest.approx(math.log(3)) and log[0]["linearisation_error"] is None  # 0 / 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alpha=1_seed=0 ")]
    assert [int(line.split()[2]) for line in lines] == expected * 2
    assert len({line.index("test_acc") for line in lines}) == 1


def test_the_seed_alone_decides_and_a_probe_changes_nothing(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "a", alpha=[1], seeds=[0, 1], epochs=2)
    tiny_run(tiny, tmp_path / "b", alpha=[1], epochs=2, probe_examples=3)  # another measurement of the same trajectory
    torch.set_default_dtype(torch.float64)  # whatever the caller has set
    with torch.inference_mode():
        tiny_run(tiny, tmp_path / "c", alpha=[1], epochs=2)
    torch.set_default_dtype(torch.float32)
    assert_same(tmp_path / "a", tmp_path / "c")
    end = {}
    for out, seed in (("a", 0), ("b", 0), ("a", 1)):
        end[out, seed] = torch.load(tmp_path / out / f"alpha=1_seed={seed}" / "checkpoint.pt")["tensors"]
    for p, q, r in zip(end["a", 0], end["b", 0], end["a", 1], strict=True):
        assert torch.equal(p, q) and not torch.equal(p, r)


def test_training_equals_a_loop_written_out(tiny, tmp_path):
    """The recorded trajectory against a plain loop: own forward passes, own gradient step, same data and order."""
    tiny_run(tiny, tmp_path, alpha=[10], epochs=2, dtype="float64", momentum=.9)
    images = common.load_images(tiny)
    with common.seeded("init", 0):
        model = common.resnet18(3, width=TINY["width"]).double()
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    velocity = [torch.zeros_like(p) for p in theta.values()]
    y = torch.as_tensor(common.flip_labels(images["y_train"], .15, 3, 0))
    mean, std = (torch.tensor(images[name], dtype=torch.float32).double() for name in ("mean", "std"))
    x = ((torch.as_tensor(images["x_train"]).double() / 255 - mean) / std).permute(0, 3, 1, 2)
    for epoch in range(2):
        order = torch.randperm(60, generator=common.generator(f"order {epoch}", 0))
        for batch in order.split(10):
            f = torch.func.functional_call(model, theta, (x[batch],))
            loss = F.cross_entropy(10 * (f - model(x[batch]).detach()), y[batch])
            gradients = torch.autograd.grad(loss, list(theta.values()))
            for p, v, g in zip(theta.values(), velocity, gradients):
                v.mul_(.9).add_(g)
                p.data.sub_(TINY["lr"] / 10**2 * v)
    saved = torch.load(tmp_path / "alpha=10_seed=0" / "checkpoint.pt")["tensors"]
    for mine, theirs in zip([*theta.values(), *velocity], saved, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_run_that_goes_off_is_called_diverged_and_the_others_go_on(tiny, tmp_path, capsys, monkeypatch):
    """Not a number (alpha = 1), or finite but far above its start (the linear network)."""
    options = {**TINY, "lr": 1e3, "alpha": [1, 1e10, "inf"], "epochs": 1, "dtype": "float64"}
    assert command(monkeypatch, *words({"dataset": tiny, "out": tmp_path, **options})) == 1
    out, last = capsys.readouterr().out, {}
    for alpha in ("1", "1e+10", "inf"):
        last[alpha] = records(tmp_path, f"alpha={alpha}_seed=0")[-1]
        assert last[alpha]["ended"] == "diverged"
        said, = [line for line in out.splitlines() if line.startswith(f"alpha={alpha}_seed=0: diverged")]
        assert "smaller --lr" in said
    assert last["1"]["mean_train_loss"] is None and last["inf"]["mean_train_loss"] > 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["diverged"]) == 3 and summary["conclusion"].startswith("Nothing is concluded")
    assert "more epochs" in summary["conclusion"] and "smaller --lr" in summary["conclusion"]


def test_in_steps_equals_the_whole_at_once(tiny, tmp_path, capsys):
    """Epochs, stop-loss, seeds and alphas, some of them going back."""
    for changed in (dict(epochs=2), dict(epochs=1), dict(epochs=6, stop_loss=1.05, seeds=[1]),
                    dict(epochs=4, alpha=["inf"]), dict(epochs=6, seeds=[0, 1], alpha=[1, "inf"])):
        tiny_run(tiny, tmp_path / "a", **{"alpha": [1], **changed})
    whole = tiny_run(tiny, tmp_path / "b", epochs=6, seeds=[0, 1], alpha=[1, "inf"])
    runs = ["alpha=1_seed=0", "alpha=1_seed=1", "alpha=inf_seed=0", "alpha=inf_seed=1"]
    assert_same(tmp_path / "a", tmp_path / "b", *runs)
    (tmp_path / "a" / "noisy.png").unlink()
    out = capsys.readouterr().out
    assert 0 < out.rindex(whole["conclusion"]) < out.rindex("Loss of the wrongly labelled")  # it comes first
    again = tiny_run(tiny, tmp_path / "a", epochs=1, alpha=["inf"])  # nothing to train: it draws what is there
    assert again["readings"] == whole["readings"] and (tmp_path / "a" / "noisy.png").exists()
    assert "iteration" not in capsys.readouterr().out and noisy.main(out=tmp_path / "a", draw_only=True) == again


def test_stop_loss_ends_a_run_by_the_mean_of_five_probes(tiny, tmp_path):
    tiny_run(tiny, tmp_path, stop_loss=.8, **LONG)
    log = records(tmp_path)
    means = np.convolve([record["mean_train_loss"] for record in log], np.ones(5) / 5, "valid")
    assert means[-1] < .8 <= min(means[:-1]) and "ntk_alignment" in log[-1] and log[-1]["ended"] == "stop-loss"


def test_goes_on_after_whatever_ended_it(tiny, tmp_path, capsys):
    tiny_run(tiny, tmp_path / "whole", **LONG)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / str(code)
        process = start("noisy.py", dataset=tiny, out=out, checkpoint_seconds=0, **LONG)
        log = out / "alpha=1_seed=0" / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 5):
            time.sleep(.002)
        process.send_signal(number)
        err = process.communicate()[1].strip()
        assert process.returncode == code and 5 <= len(records(out)) < 30
        assert err == ("noisy.py: stopped; the same command goes on from here" if number == signal.SIGINT else "")
        noisy.main(out=out, draw_only=True)
        assert "alpha=1_seed=0 has not ended" in capsys.readouterr().out
        tiny_run(tiny, out, **LONG)
        assert_same(out, tmp_path / "whole")


@pytest.mark.parametrize("key, changed", [
    ("lr", .03), ("momentum", 0.0), ("batch_size", 12), ("noise", .2), ("width", 3), ("dtype", "float64"),
    ("subset", 40), ("group_size", 20), ("probe_examples", 5), ("data_crc32", {"y_test": np.arange(30) % 2}),
    ("data_crc32", {"mean": [.1] * 3, "std": [.4] * 3}), ("loss", (LOSS, "F.multi_margin_loss")),
    ("network", (NETWORK, "nn.Sequential(nn.Flatten(), nn.Linear(192, classes))")), ("script", cscore),
    ("parameters", (NETWORK, NETWORK.replace("o.width", "3")))])
def test_another_run_in_the_same_folder_is_refused(trained, tmp_path, key, changed):
    """Before anything trains, naming the folder and the difference."""
    script, options = noisy, {"dataset": trained / "tiny.npz", **TINY, "alpha": [.5, 1], "epochs": 3}
    if key == "data_crc32":
        options["dataset"] = tmp_path / "other.npz"
        np.savez(tmp_path / "other.npz", **{**tiny_arrays(), **changed})
    elif key == "script":
        script = changed
    elif isinstance(changed, tuple):
        script = swapped(tmp_path, *changed)
    else:
        options[key] = changed
    with pytest.raises(ValueError, match=f"run/alpha=1_seed=0 holds a run with {key} = .*, not .*another --out"):
        script.main(out=trained / "run", **options)
    assert len(records(trained / "run")) == 7 and not (trained / "run" / "alpha=0.5_seed=0").exists()


def test_another_text_is_a_line_of_warning_and_another_path_is_nothing(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "copy")
    tiny_run(tmp_path / "copy" / "tiny.npz", tmp_path / "copy" / "run", alpha=[1], epochs=1)
    assert "warning" not in capsys.readouterr().out
    other = swapped(tmp_path, '"""Figure 3', '"""Our figure 3')
    other.main(dataset=trained / "tiny.npz", out=tmp_path / "copy" / "run", **{**TINY, "alpha": [10], "epochs": 1})
    warning, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warning.endswith("alpha=1_seed=0 is by another text of noisy.py")


def test_what_cannot_be_read_or_written_is_one_line_that_names_it(trained, tmp_path, monkeypatch):
    run, tiny = tmp_path / "run", trained / "tiny.npz"
    shutil.copytree(trained / "run", run)
    folder = run / "alpha=1_seed=0"
    log = (folder / "log.jsonl").read_text()
    for name, text in (("args.json", ""), ("args.json", "[1]"), ("log.jsonl", ""), ("log.jsonl", "no json\n"),
                       ("log.jsonl", "[]\n"), ("log.jsonl", "{}\n"), ("log.jsonl", log * 2)):  # does not ascend
        whole = (folder / name).read_text()
        (folder / name).write_text(text)
        for draw_only in (False, True):
            with pytest.raises(ValueError, match=f"alpha=1_seed=0/{name} is (missing or )?damaged.*delete"):
                tiny_run(tiny, run, alpha=[1], draw_only=draw_only)
        (folder / name).write_text(whole)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read.*delete"):
        tiny_run(tiny, run, alpha=[1], epochs=3)
    (folder / "checkpoint.pt").unlink()
    tiny_run(tiny, run, alpha=[1], epochs=1)  # nothing is left to train: only drawn
    with pytest.raises(ValueError, match="alpha=1_seed=0 has records of an unfinished run but not its checkpoint"):
        tiny_run(tiny, run, alpha=[.5, 1], epochs=3)
    assert not (run / "alpha=0.5_seed=0").exists() and (folder / "log.jsonl").read_text() == log
    monkeypatch.setattr(pathlib.Path, "write_bytes", lambda path, data: path.touch() or os.write(-1, b""))  # disk full
    with pytest.raises(OSError, match="could not be written.*make room"):
        tiny_run(tiny, tmp_path / "full")
    assert not list(tmp_path.rglob("*.part"))


def test_keywords_and_command_line_mean_the_same(capsys, monkeypatch):
    def parsed(*given_words, **given):
        made = common.image_parser(noisy.__file__, noisy.__doc__)
        return common.parse(made, noisy.QUICK, noisy.loss_of, given_words, given)

    a = parsed("--alpha", "1", "--alpha", "inf", "--lr", "0.25", "--quick", "--out", "~/here")
    b = parsed(alpha=[1, math.inf], lr=np.float32(.25), quick=True, out=pathlib.Path.home() / "here")
    assert vars(a) == vars(b)
    assert (a.alpha, a.dataset, a.lr, a.seeds) == ([1, math.inf], "synthetic", .25, [0, 1, 2])  # what is given wins
    assert parsed(quick=True).out == "runs/noisy_quick" and parsed().out == "runs/noisy"
    o = parsed(epochs=np.int64(3), alpha=np.array([10, 1]), seeds=range(3), momentum=0, subset=None, quick=False)
    assert (o.epochs, o.alpha, o.seeds, o.momentum, o.subset, o.quick) == (3, [1, 10], [0, 1, 2], 0, None, False)
    for wrong in (dict(momentum=False), dict(epochs=True), dict(lr=[1, 2]), dict(seeds=[]), dict(draw=1)):
        with pytest.raises(ValueError, match="unrecognized|expected"):
            parsed(**wrong)
    with contextlib.redirect_stdout(io.StringIO()):  # a notebook's %run
        assert command(monkeypatch, "--draw-only", "--out", "none") == 2
    assert command(monkeypatch, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.01)" in out and "The claim" in out and "--quick: dataset synthetic, seeds [0, 1, 2]" in out


@pytest.mark.parametrize("says, lines", [
    ("above 0, not", ["--alpha 0", "--alpha -1", "--alpha nan", "--alpha abc", "--lr inf", "--lr 0", "--lr 1e999"]),
    ("separate several by spaces", ["--alpha 1,100"]), ("six digits", ["--alpha 1.234567"]),
    ("must be a whole number", ["--epochs 0", "--epochs 1.5", "--width four", "--seeds 0 -1", "--jobs -1"]),
    ("below 1", ["--noise 1.5", "--momentum 1"]), ("at least 0", ["--stop-loss nan"]), ("expected", ["--lr"]),
    ("invalid choice", ["--device abacus", "--dtype float16"]),
    ("unrecognized", ["--seed 1", "--lr 1 2", "100"]), ("cifar10, synthetic or a file", ["--dataset mnist"]),
    ("none.npz", ["--dataset none.npz"]), ("no records", ["--out empty --draw-only"]),
    ("larger than the training set", ["--dataset tiny.npz --batch-size 61", "--dataset tiny.npz --subset 61"]),
    ("tiny.npz", ["--dataset tiny.npz --batch-size 9 --width 4 --probe-examples 2 --out tiny.npz"])])
def test_bad_input_is_one_line_and_exit_code_2(trained, tmp_path, capsys, monkeypatch, says, lines):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "tiny.npz", tmp_path)
    for line in lines:
        assert command(monkeypatch, *line.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("noisy.py: error: ") and says in err and err.count("\n") == 1 and len(err) < 300, err
    assert not list(tmp_path.rglob("log.jsonl")) and not (tmp_path / "empty").exists()


def test_a_copied_script_works_under_its_own_name_on_a_terminal_without_accents(tiny, tmp_path):
    for name in ("noisy.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path / name.replace("noisy", "mine"))
    shutil.copy(tiny, tmp_path / "é.npz")
    mine = [sys.executable, "mine.py", *words({**TINY, "alpha": [1, 1e4], "epochs": 1, "jobs": 1}), "--dataset"]
    done = subprocess.run([*mine, "é.npz"], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("warning: above alpha = 1000 float32") == done.stdout.count("warning") == 1
    assert (tmp_path / "runs" / "mine" / "summary.json").exists()
    refused = subprocess.run([*mine, "é.npy"], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert refused.returncode == 2 and refused.stderr.startswith("mine.py: error: --dataset ")


class Net(nn.Module):
    """Networks without nn.ReLU, on the rows of an image, (N, 8, 24), or on the image."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(24, 3)
        self.body = {"transformer": nn.TransformerEncoderLayer(24, 2, 16, dropout=0, batch_first=True),
                     "lstm": nn.LSTM(24, 24, batch_first=True), "cnn": nn.Conv2d(3, 24, 3)}[kind]

    def forward(self, x):
        if self.kind == "cnn":
            return self.head(F.gelu(F.relu(self.body(x))).mean((2, 3)))
        h = self.body(x.transpose(1, 2).flatten(2))
        return self.head(input=h.mean(1) if self.kind == "transformer" else h[0][:, -1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["resnet", "transformer", "lstm", "cnn"])
def test_another_network_is_one_line(tiny, tmp_path, capsys, kind):
    """It trains at every alpha, ever more linearly, with the measures that apply."""
    script = noisy
    if kind != "resnet":
        script = swapped(tmp_path, NETWORK, f"Net('{kind}')")
        script.Net = Net
    options = {**TINY, "alpha": [1, 1e3, "inf"], "epochs": 3, "dtype": "float64", "lr": .01 if kind == "resnet" else .1}
    summary = script.main(dataset=tiny, out=tmp_path / "run", **options)
    assert {(row["alpha"], row["minus"]) for row in summary["differences"]} == {(1, "inf"), (1000, "inf")}
    last = {}
    for alpha in ("1", "1000", "inf"):
        last[alpha] = records(tmp_path / "run", f"alpha={alpha}_seed=0")[-1]
        assert {"ntk_alignment", "repr_alignment", "linearisation_error"} <= set(last[alpha])
        assert ("sign_similarity" in last[alpha]) == (kind == "resnet") and last[alpha]["mean_train_loss"] < math.log(3)
    assert last["1000"]["clean_loss"] == pytest.approx(last["inf"]["clean_loss"], rel=1e-3)
    assert last["1"]["clean_loss"] != pytest.approx(last["inf"]["clean_loss"], rel=1e-2)
    rich, lazy, linear = (last[alpha]["linearisation_error"] for alpha in ("1", "1000", "inf"))
    assert 0 == linear < lazy < rich / 20 and last["inf"]["ntk_alignment"] == pytest.approx(1)
    assert summary["options"]["network"] == ("ResNet18" if kind == "resnet" else "Net")
    assert capsys.readouterr().out.count("not measured") == (0 if kind == "resnet" else 3)  # no nn.ReLU: once a run


def test_another_loss_is_one_line(tiny, tmp_path):
    squared = swapped(tmp_path, LOSS, "lambda f, y: F.mse_loss(f, F.one_hot(y, f.shape[1]).to(f.dtype))")
    summary = squared.main(dataset=tiny, out=tmp_path / "run", **{**TINY, "epochs": 20, "lr": .02})
    assert records(tmp_path / "run")[0]["mean_train_loss"] == pytest.approx(1 / 3)  # f = 0 against one-hot labels
    levels = {row["level"] for row in summary["readings"]}
    assert len(levels) > 3 and max(levels) == .316 and "<lambda>" in summary["conclusion"]


@pytest.mark.parametrize("alpha", [1, 100, math.inf])
@pytest.mark.parametrize("script", ["noisy", "cscore", "spurious"])
def test_the_step_never_leaves_the_device(tmp_path, script, alpha, monkeypatch):
    """On torch's meta device, where reading a value, or a tensor left on the CPU, raises: what a CUDA graph needs."""
    steps = []

    class OnMeta:
        def __init__(self, o, *rest):
            self.o = o

        def minibatches(self, probe):
            for _ in range(3):
                yield torch.arange(10, device="meta")
                steps.append(alpha)

    def one_run(o, run, conclude, draw, load, *what):
        images, o.device = load(*what), torch.device("meta")
        run(alpha, 0, images, o)

    monkeypatch.setattr(common, "Run", OnMeta)
    monkeypatch.setattr(common, "Linearity", lambda *rest: None)
    monkeypatch.setattr(common, "sweep", one_run)
    np.savez(tmp_path / "all.npz", **small_arrays())
    importlib.import_module(script).main(dataset=tmp_path / "all.npz", **TINY)
    assert len(steps) == 3


def test_jobs_make_the_same_records_and_end_together(tiny, tmp_path, monkeypatch):
    pool, sizes = common.concurrent.futures.ProcessPoolExecutor, []
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda *task: sizes.append(len(pickle.dumps(task[1:]))) or submit(*task))
    one = tiny_run(tiny, tmp_path / "one", epochs=3)
    two = tiny_run(tiny, tmp_path / "two", epochs=3, jobs=2)
    assert one["readings"] == two["readings"]
    assert max(sizes) < 8000  # no images: where a child has died, a pipe that is full (64 KB) blocks
    assert_same(tmp_path / "one", tmp_path / "two", "alpha=1_seed=0", "alpha=100_seed=0")
    monkeypatch.setattr(noisy, "loss_of", F.multi_margin_loss)  # a child would not know of it
    with pytest.raises(ValueError, match="loss is not"):
        tiny_run(tiny, tmp_path / "three", jobs=2)
    monkeypatch.undo()
    (tmp_path / "two" / "alpha=100_seed=0" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):  # an error in a child is the parent's one line
        tiny_run(tiny, tmp_path / "two", epochs=4000, jobs=2)
    assert not multiprocessing.active_children()


def test_children_of_a_killed_parent_end(tiny, tmp_path):
    process = start("noisy.py", dataset=tiny, out=tmp_path, epochs=4000, jobs=2)
    while len(list(tmp_path.glob("*/log.jsonl"))) < 2:
        assert process.poll() is None
        time.sleep(.05)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    left, deadline = children, time.monotonic() + 20
    while left and time.monotonic() < deadline:
        time.sleep(.1)
        left = [child for child in left if pathlib.Path(f"/proc/{child}").exists()]
    assert len(children) >= 2 and not left


def test_torchrun_shares_the_runs(tiny, tmp_path, monkeypatch):
    """As its processes would, one after the other: each trains its share, the last concludes."""
    one = tiny_run(tiny, tmp_path / "one", epochs=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert tiny_run(tiny, tmp_path / "two", epochs=2) == {}
    assert [path.name for path in tmp_path.glob("two/*")] == ["alpha=1_seed=0"]
    monkeypatch.setenv("RANK", "1")
    assert tiny_run(tiny, tmp_path / "two", epochs=2)["readings"] == one["readings"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the CUDA graph path")
def test_cuda_graph_equals_the_plain_step_and_the_cpu(tiny, tmp_path, monkeypatch):
    tiny_run(tiny, tmp_path / "graph", device="cuda", dtype="float64")
    tiny_run(tiny, tmp_path / "cpu", dtype="float64")
    monkeypatch.setattr(common, "graphed", lambda step, training: step)
    tiny_run(tiny, tmp_path / "plain", device="cuda", dtype="float64")
    for run in ("alpha=1_seed=0", "alpha=100_seed=0"):
        graph, plain, cpu = (records(tmp_path / name, run) for name in ("graph", "plain", "cpu"))
        for a, b, c in zip(graph, plain, cpu, strict=True):
            assert a["mean_train_loss"] == pytest.approx(b["mean_train_loss"], rel=1e-7)
            assert a["mean_train_loss"] == pytest.approx(c["mean_train_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noisy", "cscore", "spurious"])
def test_quick_shows_the_effect(name, tmp_path):
    """For each seed the gap of alpha = 1 is larger at three levels or more, by more than .02 ln C."""
    unit = .02 * math.log(2 if name == "spurious" else 10)
    for seed in (0, 1, 2):
        summary = importlib.import_module(name).main(quick=True, seeds=[seed], out=tmp_path / str(seed), device="cpu")
        gaps = [row["mean"] for row in summary["differences"] if row["quantity"] == "gap"
                and row["on"] == "mean_train_loss" and row["level"] < 40 * unit]
        assert sum(gap > unit for gap in gaps) >= 3, (seed, gaps)
