"""Runs: records, probes on a schedule, going on, refusals, options and processes, through noisy.py on tiny data."""
import itertools
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import cscore
import experiment
import noisy
from conftest import ROOT, TINY, records_of, refused, tiny_arrays

RESNET = noisy.network
LONG = {"alpha": [1], "epochs": 14}
SCHEDULE = [*range(21), 22, 24, 26, 28, 30, 33, 36, 39, 42, 46, 50, 55, 60, 66, 72, 78, 84]  # 6 steps an epoch
STOPPED = ".py: stopped; the same command goes on from the last checkpoint"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Data and a finished run, which no test changes; and meanwhile a network fifty times as fast, and no pictures."""
    torch.set_num_threads(1)
    folder, layers = tmp_path_factory.mktemp("whole"), lambda o: common.mlp([192, 4 * o.width, 3])
    np.savez(folder / "tiny.npz", **tiny_arrays())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noisy, "network", lambda images, o: nn.Sequential(nn.Flatten(), layers(o)))
        patch.setattr(experiment, "save_figure", lambda figure, o, name: (o.out / f"{name}.png").touch())
        tiny_run(folder, folder / "run", **LONG)
        yield folder


def tiny_run(whole, out, script=noisy, **more):
    return script.main(**{**TINY, "dataset": whole / "tiny.npz", "out": out, **more})


def records(out, run="alpha=1_seed=0"):
    """But for the times."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records_of(out / run)]


def words(**options):
    """A run's options as a command line."""
    pairs = [["--" + name.replace("_", "-"), *np.ravel(value)] for name, value in {**TINY, **options}.items()]
    return list(map(str, sum(pairs, [])))


def command(monkeypatch, *given, main=noisy.main, script="noisy.py"):
    """The exit code of a command line, whose first process is this one. What it changes is undone after a test."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *given])
    monkeypatch.setattr(experiment, "COMMAND", [])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("MPLBACKEND", "agg")
    with pytest.raises(SystemExit) as end:
        experiment.command_line(main)
    return end.value.code


def edited(tmp_path, old, new):
    """noisy.py with one place changed, as a module."""
    source, module = (ROOT / "noisy.py").read_text(), types.ModuleType("edited")
    assert source.count(old) == 1
    (tmp_path / "noisy.py").write_text(source.replace(old, new))
    module.__file__ = str(tmp_path / "noisy.py")
    exec(source.replace(old, new), vars(module))
    return module


def test_probes_come_on_a_schedule_that_no_loss_can_influence(whole, tmp_path):
    """And five of them decide whether a run ends at --stop-loss."""
    log = records(whole / "run")
    assert [record["iteration"] for record in log] == SCHEDULE == sorted(experiment.schedule(6, 84))
    for k, record in enumerate(log):
        assert record["epoch"] == SCHEDULE[k] / 6 and ("ntk_alignment" in record) == (k % 5 == 0 or k == 37)
        assert record["mean_train_loss"] == pytest.approx(.85 * record["clean_loss"] + .15 * record["noisy_loss"])
    assert log[0]["mean_train_loss"] == pytest.approx(math.log(3)) and log[0]["linearisation_error"] is None  # 0 / 0
    assert [record.get("ended") for record in log] == [None] * 37 + ["epochs"]
    tiny_run(whole, tmp_path, stop_loss=.8, **LONG)
    means = np.convolve([record["mean_train_loss"] for record in log], np.ones(5) / 5, "valid")
    *before, last = records(tmp_path)
    assert before == log[:4 + np.argmax(means < .8)] and len(before) < 37
    assert last["ended"] == "stop-loss" and "ntk_alignment" in last


def test_the_seed_alone_decides_and_a_probe_changes_nothing(whole, tmp_path):
    with torch.inference_mode():  # whatever the caller does
        tiny_run(whole, tmp_path / "a", alpha=[1], seeds=[0, 1], epochs=2)
    tiny_run(whole, tmp_path / "b", alpha=[1], epochs=2, probe_examples=3, group_size=7)  # another way to look
    assert records(tmp_path / "a")[:-1] == records(whole / "run")[:12]
    runs = ("a/alpha=1_seed=0", "b/alpha=1_seed=0", "a/alpha=1_seed=1")
    p, q, r = (torch.load(tmp_path / run / "checkpoint.pt")[1]["model.1.1.0.weight"] for run in runs)
    assert torch.equal(p, q) and not torch.equal(p, r)


def test_training_equals_a_loop_written_out(whole, tmp_path, monkeypatch):
    """The trajectory against a plain loop: own forward passes, own gradient step, same data and order."""
    monkeypatch.setattr(noisy, "network", RESNET)
    tiny_run(whole, tmp_path, alpha=[10], epochs=2, dtype="float64", momentum=.9)
    images = experiment.load_images(whole / "tiny.npz")
    with experiment.seeded("init", 0):
        model = common.resnet18(3, width=TINY["width"]).double()
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    velocity = [torch.zeros_like(p) for p in theta.values()]
    y = torch.as_tensor(experiment.flip_labels(images["y_train"], .15, 3, 0))
    mean, std = (torch.tensor(images[name], dtype=torch.float32).double() for name in ("mean", "std"))
    x = ((torch.as_tensor(images["x_train"]).double() / 255 - mean) / std).permute(0, 3, 1, 2)
    for epoch in range(2):
        order = torch.randperm(60, generator=experiment.generator(f"order {epoch}", 0))
        for batch in order.split(10):
            f = torch.func.functional_call(model, theta, (x[batch],))
            loss = F.cross_entropy(10 * (f - model(x[batch]).detach()), y[batch])
            gradients = torch.autograd.grad(loss, list(theta.values()))
            for p, v, g in zip(theta.values(), velocity, gradients):
                v.mul_(.9).add_(g)
                p.data.sub_(TINY["lr"] / 10**2 * v)
    _, of_f, of_sgd = torch.load(tmp_path / "alpha=10_seed=0" / "checkpoint.pt")
    for (name, p), v, kept in zip(theta.items(), velocity, of_sgd["state"].values(), strict=True):
        assert torch.allclose(p, of_f[f"model.1.{name}"], rtol=1e-9, atol=1e-12)
        assert torch.allclose(v, kept["momentum_buffer"], rtol=1e-9, atol=1e-12)


def test_a_run_that_goes_off_is_called_diverged_and_the_others_go_on(whole, tmp_path, capsys, monkeypatch):
    """Not a number (alpha = 1), or finite but far above its start (the linear network)."""
    line = words(dataset=whole / "tiny.npz", lr=1e9, alpha=[1, "inf"], epochs=1, out=tmp_path)
    assert command(monkeypatch, *line) == 1
    rich, linear = (records(tmp_path, f"alpha={alpha}_seed=0")[-1] for alpha in ("1", "inf"))
    assert rich["ended"] == linear["ended"] == "diverged"
    assert rich["mean_train_loss"] is None and linear["mean_train_loss"] > 2
    assert "; diverged, try a smaller --lr: alpha=1_seed=0, alpha=inf_seed=0\n" in capsys.readouterr().out


def test_in_steps_equals_the_whole_at_once(whole, tmp_path, capsys, monkeypatch):
    """Epochs, stop-loss, seeds and alphas, some of them going back; and torchrun's shares, here one after the other."""
    everything = dict(epochs=4, seeds=[0, 1], alpha=[1, "inf"])
    at_once = tiny_run(whole, tmp_path / "a", **everything)
    for changed in (dict(epochs=2), dict(epochs=1), dict(epochs=4, stop_loss=1.05, seeds=[1]),
                    dict(epochs=3, alpha=["inf"]), everything):
        tiny_run(whole, tmp_path / "b", **{"alpha": [1], **changed})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert tiny_run(whole, tmp_path / "c", **everything) == {} and len(list(tmp_path.glob("c/*"))) == 2 << int(rank)
        said = f"{rank} of 2 has trained its share; when all have, --draw-only --out {tmp_path}/c concludes"
        assert capsys.readouterr().out.splitlines()[-1] == said
    for out in (tmp_path / "b", tmp_path / "c"):
        for run in ("alpha=1_seed=0", "alpha=1_seed=1", "alpha=inf_seed=0", "alpha=inf_seed=1"):
            assert records(out, run) == records(tmp_path / "a", run)
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=len, flush=lambda: None))  # one without isatty
        again = tiny_run(whole, out, epochs=1, alpha=["inf"])  # nothing is left to train: it is drawn
        assert again["readings"] == at_once["readings"] and noisy.main(out=out, draw_only=True) == again


@pytest.mark.parametrize("name, code, at", [("SIGINT", 130, 40), ("SIGTERM", 130, 41), ("SIGKILL", -9, 42)])
def test_goes_on_after_whatever_ended_it(whole, tmp_path, capfd, name, code, at):
    """Bit for bit; and where the checkpoint lies past a smaller --epochs, the run ends there at once."""
    def child():  # with a checkpoint a step; ended as one of its files is about to be renamed
        writes, replace = itertools.count(), os.replace
        os.replace = lambda *paths: next(writes) == at and signal.raise_signal(signal.Signals[name]) or replace(*paths)
        experiment.CHECKPOINT_SECONDS = 0
        sys.argv = ["noisy.py", *words(dataset=whole / "tiny.npz", out=tmp_path, **LONG)]
        experiment.command_line(noisy.main)

    (process := multiprocessing.get_context("fork").Process(target=child)).start()
    process.join()
    assert process.exitcode == code and capfd.readouterr().err.strip() == ("noisy" + STOPPED if code == 130 else "")
    noisy.main(out=tmp_path, draw_only=True)
    assert "alpha=1_seed=0 has not ended" in capfd.readouterr().out and 12 < len(records(tmp_path)) < 16
    (iteration, *_), _, _ = torch.load(tmp_path / "alpha=1_seed=0" / "checkpoint.pt")
    tiny_run(whole, tmp_path, alpha=[1], epochs=1)
    assert records(tmp_path)[-1].items() >= {"iteration": iteration, "ended": "epochs"}.items() and iteration > 6
    tiny_run(whole, tmp_path, **LONG)
    assert records(tmp_path) == records(whole / "run")


@pytest.mark.parametrize("says, changed", [
    *[(f"a run with {name} = .*, not {value}; another --out trains anew", {name: value}) for name, value in dict(
        lr=.03, momentum=0.0, batch_size=12, noise=.2, width=3, dtype="float64", subset=40, group_size=20,
        probe_examples=5).items()],
    ("of other data .tiny.npz, not other.npz.; another", {"dataset": {"y_test": np.arange(30) % 2}}),
    ("of other data .tiny.npz, not other.npz.; another", {"dataset": {"mean": np.full(3, .1), "std": np.full(3, .4)}}),
    ("a run with loss = cross_entropy, not multi_margin_loss", {"loss_of": F.multi_margin_loss}),
    ("a run with network = Sequential, not mlp", {"network": lambda images, o: common.mlp([192, 3])}),
    ("a run with parameters = 3139, not 0", {"network": lambda images, o: nn.Sequential(nn.Flatten())}),
    ("a run with script = noisy, not cscore", {"main": cscore.main}),
    ("made by another text of noisy.py: --draw-only draws it; another --out", {"__file__": "noisy.py"})])
def test_another_run_in_the_same_folder_is_refused(whole, tmp_path, monkeypatch, says, changed):
    """Before anything trains, naming the folder and the difference. To draw, only the script must be the same."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("noisy.py").write_text("another text")
    np.savez("other.npz", **{**tiny_arrays(), **changed.get("dataset", {})})
    options = {**TINY, "dataset": whole / "tiny.npz", "alpha": [.5, 1], "out": whole / "run"}
    for name, value in changed.items():
        if hasattr(noisy, name):
            monkeypatch.setattr(noisy, name, value)
        else:
            options[name] = "other.npz" if name == "dataset" else value
    refused(f"run/alpha=1_seed=0 (is|was) {says}", noisy.main, **options)
    assert len(records(whole / "run")) == 38 and not (whole / "run" / "alpha=0.5_seed=0").exists()
    if "main" not in changed:
        assert noisy.main(**options, draw_only=True)["readings"]


def test_what_cannot_be_read_or_written_is_one_line_that_names_it(whole, tmp_path, monkeypatch):
    """Another path of the same data is nothing."""
    shutil.copytree(whole, tmp_path / "copy")
    shutil.move(tmp_path / "copy" / "tiny.npz", tmp_path / "renamed.npz")
    run, folder = tmp_path / "copy" / "run", tmp_path / "copy" / "run" / "alpha=1_seed=0"
    options = {"dataset": tmp_path / "renamed.npz", "alpha": [1]}
    for name, text in zip(["args.json", "args.json", "log.jsonl", "log.jsonl"], ["", "[1]", "[]\n", "no json\n"]):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        for given in (options, {"draw_only": True}):
            refused(f"alpha=1_seed=0/{name} is missing or damaged", tiny_run, whole, run, **given)
        (folder / name).write_text(before)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:-100])
    tiny_run(whole, run, epochs=14, **options)  # nothing is left to train: it is not read
    refused("alpha=1_seed=0/checkpoint.pt is damaged", tiny_run, whole, run, epochs=15, **options)
    (folder / "checkpoint.pt").unlink()
    refused("alpha=1_seed=0 holds records, but no checkpoint", tiny_run, whole, run, epochs=15, **options)
    (folder / "args.json").unlink()
    refused("args.json is missing", tiny_run, whole, run, epochs=15, **options)
    assert records(run) == records(whole / "run")
    refused("empty: there are no records", tiny_run, whole, tmp_path / "empty", draw_only=True)
    refused("tiny.npz", tiny_run, whole, whole / "tiny.npz")
    monkeypatch.setattr(pathlib.Path, "write_bytes", lambda path, data: os.write(-1, b""))  # as on a full disk
    refused("Bad file descriptor", tiny_run, whole, tmp_path)


def test_keywords_and_command_line_mean_the_same(capsys, monkeypatch):
    monkeypatch.setattr(experiment, "sweep", lambda o, *rest: o)
    a = noisy.main(*"--alpha 3 --alpha Inf 1 1.0000001 infinity --lr .25 --quick --out here".split())
    b = noisy.main(alpha=[1, math.inf], lr=np.float32(.25), quick=True, out=pathlib.Path("here"))
    assert vars(a) == vars(b) and (a.alpha, a.lr, a.out) == ([1, math.inf], .25, pathlib.Path("here"))  # given: wins
    assert (a.dataset, a.seeds, a.momentum, a.stop_loss) == ("synthetic", [0, 1, 2], .9, 1.35)
    o = noisy.main(epochs=np.int64(3), alpha=np.array([10, 1]), seeds=range(3), momentum=0, subset=None, quick=False)
    assert (o.epochs, o.alpha, o.seeds, o.momentum, o.subset, o.quick) == (3, [1, 10], [0, 1, 2], 0, None, False)
    for wrong in (dict(epochs=True), dict(lr=[1, 2]), dict(seeds=[]), dict(draw=1), dict(out="")):
        refused("unrecognized|expected|must name", noisy.main, **wrong)
    outs = [noisy.main(dataset=dataset, quick=quick).out for dataset in (None, "a/mine.npz") for quick in (False, True)]
    assert list(map(str, outs)) == ["runs/noisy", "runs/noisy_quick", "runs/noisy_mine", "runs/noisy_mine_quick"]
    assert command(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "(0.01)" in out and "The claim" in out and "--quick: {'dataset': 'synthetic', 'seeds': [0, 1, 2]," in out


@pytest.mark.parametrize("says, lines", [
    ("must be above 0, not", ["--alpha 0", "--alpha 1 -1", "--alpha nan", "--lr 0", "--epochs 0", "--stop-loss nan"]),
    ("invalid", ["--alpha 1,100", "--epochs 1.5", "--width four", "--seeds 0 0.5"]), ("expected", ["--lr"]),
    ("0 or above, not -1", ["--seeds 0 -1", "--momentum -1"]), ("must name a folder", ["--out="]),
    ("unrecognized", ["--seed 1", "--lr 1 2", "100"]), ("cifar10, synthetic or a file", ["--dataset mnist"]),
    ("not to be had", ["--device abacus", "--dtype float16"]), ("none.npz", ["--dataset none.npz"]),
    ("of 60 images, --subset ", ["--batch-size 61", "--subset 61"]), ("of 60 labels", ["--noise 1", "--noise .001"]),
    ("momentum in [0, 1)", ["--lr inf", "--momentum 1"]), ("1.2 is not below the first loss 1.1", ["--stop-loss 1.2"])])
def test_bad_input_is_one_line_and_exit_code_2(whole, tmp_path, capsys, monkeypatch, says, lines):
    """And nothing is written."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(whole / "tiny.npz", tmp_path)
    for line in lines:
        assert command(monkeypatch, *"--dataset tiny.npz --batch-size 9".split(), *line.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("noisy.py: error: ") and says in err and err.count("\n") == 1 and len(err) < 300, err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.npz"]


@pytest.mark.parametrize("network", [
    "TransformerEncoderLayer(64, 2, 16, dropout=0, batch_first=True), torch.nn.Flatten(), torch.nn.Linear(192, 3)",
    "Unflatten(2, (8, 8)), torch.nn.Conv2d(3, 24, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(864, 3)"])
def test_another_network_is_one_line(whole, tmp_path, capsys, monkeypatch, network):
    """It trains at every alpha, ever more linearly; what is not measured is said once a run."""
    script = edited(tmp_path, 'common.resnet18(int(images["y_train"].max()) + 1, images["x_train"].shape[3], o.width)',
                    f"torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.{network})")
    summary = tiny_run(whole, tmp_path, script, alpha=[1, 1e3, "inf"], epochs=3, dtype="float64", lr=.02)
    assert capsys.readouterr().out.count("sign_similarity is not measured: the network calls no nn.ReLU module\n") == 3
    assert {(row["alpha"], row["minus"]) for row in summary["differences"]} == {(1, "inf"), (1000, "inf")}
    rich, lazy, linear = (records(tmp_path, f"alpha={alpha}_seed=0")[-1] for alpha in ("1", "1000", "inf"))
    assert {"ntk_alignment", "repr_alignment"} <= rich.keys() & lazy.keys() and "sign_similarity" not in rich
    assert lazy["clean_loss"] == pytest.approx(linear["clean_loss"], rel=3e-3) and linear["clean_loss"] < 1
    assert rich["clean_loss"] != pytest.approx(linear["clean_loss"], rel=3e-2)
    assert 0 == linear["linearisation_error"] < lazy["linearisation_error"] < rich["linearisation_error"] / 20
    monkeypatch.setattr(experiment, "LINEARITY", {"seen": (lambda model, x: len(x), lambda now, start: now)})
    for classes, examples, seen in ((100, 20, 10), (100, 10, 10), (3, 100, 100), (1000, 5, 2)):
        measure = experiment.linearity(common.center(common.mlp([4, classes]), 1), torch.rand(examples, 4))
        said = f"{seen} of {examples} --probe-examples are taken: the kernel keeps to 1,000 rows\n" * (seen < examples)
        assert measure() == {"seen": seen} and capsys.readouterr().out == said


def test_another_loss_is_one_line(whole, tmp_path, monkeypatch):
    """A user's own error keeps its traceback: a ValueError, as bad input is, but neither of ours nor of common.py."""
    for loss, name, first in (
            ("loss_of = torch.nn.MultiMarginLoss()", "MultiMarginLoss", 2 / 3),
            ("def loss_of(f, y): return F.mse_loss(f, F.one_hot(y, 3).to(f.dtype))", "the loss of noisy.py", 1 / 3)):
        script, out = edited(tmp_path, "loss_of = F.cross_entropy", loss), tmp_path / str(len(loss))
        monkeypatch.setattr(script, "network", noisy.network)
        summary = tiny_run(whole, out, script)
        assert records(out)[0]["mean_train_loss"] == pytest.approx(first)  # at f = 0
        assert summary["options"]["loss"] == name and len(summary["readings"]) > 4
    script = edited(tmp_path, "loss_of = F.cross_entropy", "loss_of = F.binary_cross_entropy_with_logits")
    with pytest.raises(ValueError, match="Target size"):
        command(monkeypatch, *words(dataset=whole / "tiny.npz", out=tmp_path), main=script.main)


def test_a_copied_script_has_its_own_name_and_ends_with_the_pipe_it_writes_to(whole, tmp_path):
    """`python mine.py | head -1`: the same command goes on. And it draws without a stdout, whatever MPLBACKEND is."""
    for name in ("noisy.py", "common.py", "experiment.py"):
        shutil.copy(ROOT / name, tmp_path / name.replace("noisy", "mine"))
    mine = [sys.executable, "mine.py", *words(dataset=whole / "tiny.npz", epochs=4000)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "nowhere", "PYTHONUNBUFFERED": ""}
    how = dict(cwd=tmp_path, env=environment, text=True)
    process = subprocess.Popen(mine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    assert process.stdout.readline().startswith("alpha=1_seed=0  epoch 0.67  loss 1.")
    process.stdout.close()
    err = process.stderr.read().splitlines()
    assert process.wait() == 130 and err[-1] == "mine" + STOPPED and not any("Traceback" in line for line in err)
    shell = ["sh", "-c", f"{sys.executable} mine.py --draw-only --out runs/mine_tiny >&-"]
    done = subprocess.run(shell, capture_output=True, **how)
    assert (done.returncode, done.stderr, (tmp_path / "runs" / "mine_tiny" / "summary.json").exists()) == (0, "", True)


def test_jobs_make_the_same_records_and_end_together(whole, tmp_path, capfd, monkeypatch):
    """Copies of a command line: an error is shown once, one that dies ends all, and the same command goes on."""
    monkeypatch.setattr(noisy, "network", RESNET)
    copies, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: copies.append(popen(*given, **how)) or copies[-1])
    assert tiny_run(whole, tmp_path / "one", epochs=2, jobs=2) and not copies  # from Python there are none
    tiny_run(whole, tmp_path / "two", epochs=1, alpha=[1])
    line = words(dataset=whole / "tiny.npz", epochs=2, jobs=2, out=tmp_path / "two")
    for end, code, says in (("sys.exit('noisy.py: error: alike')", 1, "noisy.py: error: alike\n"),
                            ("os.environ['RANK'] == '0' and os.kill(os.getpid(), 9)", 2, "the same command goes on")):
        (tmp_path / "copy.py").write_text(f"import os, sys, time\n{end}\ntime.sleep(60)")
        assert command(monkeypatch, *line, script=tmp_path / "copy.py") == code
        err = capfd.readouterr().err
        assert says in err and err.count("\n") == 1 and {copy.poll() for copy in copies} <= {1, -9}
    assert command(monkeypatch, *line) == 0 and len(copies) == 6
    for run in ("alpha=1_seed=0", "alpha=100_seed=0"):
        assert records(tmp_path / "one", run) == records(tmp_path / "two", run)
    assert capfd.readouterr().out.count("The picture: ") == 1
