"""Runs: records, probes on a schedule, resuming, refusals and options, through noisy.py on tiny data."""
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
import noisy
from conftest import ROOT, TINY, records_of, tiny_arrays

LONG = dict(epochs=40, lr=.01)


def records(out, run="alpha=1_seed=0"):
    return records_of(pathlib.Path(out) / run)


def without_times(out, run="alpha=1_seed=0"):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(out, run)]


def tiny_run(tiny, out, **more):
    return noisy.main(dataset=str(tiny), out=str(out), **{**TINY, **more})


def words(options):
    """The same options as a command line."""
    result = []
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        result += ["--" + key.replace("_", "-"), *(str(each) for each in values if each is not True)]
    return result


def start(script, **options):
    return subprocess.Popen([sys.executable, str(ROOT / script), *words(options)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def tiny_for_all(tmp_path):
    """Data that serves every script."""
    arrays = tiny_arrays(classes=2)
    arrays.update({f"attribute_{s}": np.arange(len(arrays[f"y_{s}"])) % 5 // 2 % 2 for s in ("train", "test")})
    np.savez(tmp_path / "tiny.npz", **arrays)
    return str(tmp_path / "tiny.npz")


# --- records ---


def test_files_keys_and_summary(tiny, tmp_path):
    """As a subprocess: every file and key that the design names."""
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path / "run"), **{**TINY, "seeds": [0, 1]})
    out, err = process.communicate()
    assert process.returncode == 0, err
    for name in ("noisy.png", "noisy.pdf", "summary.json"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    for run in ("alpha=1_seed=0", "alpha=100_seed=1"):
        assert {p.name for p in (tmp_path / "run" / run).iterdir()} == {"args.json", "log.jsonl", "checkpoint.pt"}
        log = records(tmp_path / "run", run)
        assert {"iteration", "epoch", "seconds", "mean_train_loss", "mean_train_acc", "test_loss", "test_acc", "clean_loss",
                "clean_acc", "noisy_loss", "noisy_acc", "noisy_true_acc", "held_out_wrong_loss"} <= set(log[1])
        for record in (log[0], log[-1]):
            assert {"ntk_alignment", "sign_similarity", "repr_alignment", "repr_alignment_gram",
                    "linearisation_error"} <= set(record)
        assert log[0]["iteration"] == 0 and log[-1]["iteration"] == 36 and log[-1]["ended"] == "epochs"
        assert log[0]["mean_train_loss"] == pytest.approx(math.log(3))
        assert log[0]["linearisation_error"] is None  # 0 / 0
        for record in log:
            assert record["mean_train_loss"] == pytest.approx(.85 * record["clean_loss"] + .15 * record["noisy_loss"])
    args = json.loads((tmp_path / "run" / "alpha=1_seed=0" / "args.json").read_text())
    assert (args["script"], args["loss"], args["network"], args["noise"]) == ("noisy", "cross_entropy", "ResNet18", .15)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"options", "readings", "differences", "diverged", "conclusion"}
    assert summary["conclusion"] in out and out.index(summary["conclusion"]) < out.index("Loss of the wrongly labelled")


def test_probes_come_on_a_schedule_that_no_loss_can_influence(tiny, tmp_path, capsys, monkeypatch):
    """And into a pipe goes one aligned line each, however slow the steps between two are."""
    clock = itertools.count(step=60.)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tiny_run(tiny, tmp_path, alpha=[1], epochs=40, seeds=[0, 1], stop_loss=0)
    log, other = records(tmp_path), records(tmp_path, "alpha=1_seed=1")
    expected = list(range(21)) + [22, 24, 26, 28, 30, 33, 36, 39, 42, 46, 50, 55, 60]  # a tenth further ...
    expected += list(range(66, 240, 6)) + [240]  # ... at most an epoch of 6 steps; and the end
    assert [r["iteration"] for r in log] == [r["iteration"] for r in other] == expected
    assert [("ntk_alignment" in r) for r in log[:-1]] == [i % 5 == 0 for i in range(len(log) - 1)]
    assert [r["epoch"] for r in log] == [i / 6 for i in expected]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alpha=1_seed=0 ")]
    assert [int(line.split()[2]) for line in lines] == expected
    assert len({line.index("test_acc") for line in lines}) == 1


def test_same_seed_same_records_and_probes_change_nothing(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "a", alpha=[1])
    tiny_run(tiny, tmp_path / "b", alpha=[1], seeds=[0, 1])
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    assert without_times(tmp_path / "a") != without_times(tmp_path / "b", "alpha=1_seed=1")
    tiny_run(tiny, tmp_path / "c", alpha=[1], probe_examples=3)  # another measurement of the same trajectory
    a, c = (torch.load(tmp_path / name / "alpha=1_seed=0" / "checkpoint.pt", weights_only=True) for name in "ac")
    assert all(torch.equal(p, q) for p, q in zip(a["tensors"], c["tensors"], strict=True))


def test_training_equals_a_loop_written_out(tiny, tmp_path):
    """The recorded trajectory against a plain loop: own forward passes, own gradient step, same data and order."""
    tiny_run(tiny, tmp_path, alpha=[10], epochs=2, dtype="float64", momentum=.9)
    images = common.load_images(str(tiny))
    with common.seeded("init", 0):
        model = common.resnet18(3, width=TINY["width"]).double()
    theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in theta]
    y = torch.as_tensor(common.flip_labels(images["y_train"], .15, 3, 0))
    mean, std = (torch.tensor(images[name], dtype=torch.float32).double() for name in ("mean", "std"))
    x = ((torch.as_tensor(images["x_train"]).double() / 255 - mean) / std).permute(0, 3, 1, 2)
    names = [name for name, _ in model.named_parameters()]
    for epoch in range(2):
        order = torch.randperm(60, generator=common.generator(f"order {epoch}", 0))
        for batch in order.split(10):
            f = torch.func.functional_call(model, dict(zip(names, theta)), (x[batch],))
            loss = torch.nn.functional.cross_entropy(10 * (f - model(x[batch]).detach()), y[batch])
            for p, v, g in zip(theta, velocity, torch.autograd.grad(loss, theta)):
                v.mul_(.9).add_(g)
                p.data.sub_(TINY["lr"] / 10**2 * v)
    saved = torch.load(tmp_path / "alpha=10_seed=0" / "checkpoint.pt", weights_only=True)["tensors"]
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip([*theta, *velocity], saved, strict=True))


def test_infinite_alpha(tiny, tmp_path):
    summary = tiny_run(tiny, tmp_path, alpha=[1, 100, "inf"], epochs=12)
    assert {row["alpha"] for row in summary["readings"]} == {1, 100, "inf"}
    assert {(row["alpha"], row["minus"]) for row in summary["differences"]} == {(1, "inf"), (100, "inf")}
    last, lazy = (records(tmp_path, f"alpha={alpha}_seed=0")[-1] for alpha in ("inf", 100))
    assert last["linearisation_error"] == 0 and last["ntk_alignment"] == pytest.approx(1)
    assert last["clean_loss"] == pytest.approx(lazy["clean_loss"], rel=.05) and 0 < lazy["linearisation_error"] < .3


def test_a_run_that_goes_off_is_called_diverged(tiny, tmp_path):
    """Not a number, or at its end far above its start; the others go on."""
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path),
                    **{**TINY, "lr": 1e6, "alpha": [1, 1e10], "dtype": "float64"})
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert [line for line in out.splitlines() if line.startswith("alpha=1_seed=0: diverged") and "smaller --lr" in line]
    assert records(tmp_path)[-1]["mean_train_loss"] is None and records(tmp_path)[-1]["ended"] == "diverged"
    assert records(tmp_path, "alpha=1e+10_seed=0")[-1]["mean_train_loss"] is not None
    assert "alpha=1_seed=0" in json.loads((tmp_path / "summary.json").read_text())["diverged"]
    summary = tiny_run(tiny, tmp_path / "finite", alpha=[1], epochs=3, lr=30)
    assert summary["diverged"] == ["alpha=1_seed=0"]
    assert records(tmp_path / "finite")[-1]["mean_train_loss"] is None or (
        records(tmp_path / "finite")[-1]["mean_train_loss"] > 2 * math.log(3))
    assert "smaller --lr" in tiny_run(tiny, tmp_path / "short", epochs=1, lr=1e-9)["conclusion"]  # and "train longer"


# --- extending, resuming ---


@pytest.mark.parametrize("alpha", [1, "inf"])
def test_more_epochs_equal_as_many_at_once(tiny, tmp_path, alpha):
    tiny_run(tiny, tmp_path / "a", alpha=[alpha], epochs=2)
    tiny_run(tiny, tmp_path / "a", alpha=[alpha], epochs=5)
    tiny_run(tiny, tmp_path / "b", alpha=[alpha], epochs=5)
    run = f"alpha={alpha}_seed=0"
    assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)
    assert records(tmp_path / "a", run)[-1]["iteration"] == 30


def test_sequences_of_extensions_equal_the_whole_at_once(tiny, tmp_path):
    """Epochs, stop-loss, seeds and alphas in several steps, some of them going back: the same records."""
    for changed in (dict(epochs=2), dict(epochs=1), dict(epochs=9, stop_loss=.9, seeds=[1]), dict(epochs=4, alpha=[10]),
                    dict(epochs=9, seeds=[0, 1], alpha=[1, 10])):
        tiny_run(tiny, tmp_path / "a", **{"alpha": [1], **changed})
    summary = tiny_run(tiny, tmp_path / "b", epochs=9, seeds=[0, 1], alpha=[1, 10])
    for run in ("alpha=1_seed=0", "alpha=1_seed=1", "alpha=10_seed=0", "alpha=10_seed=1"):
        assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)
    again = tiny_run(tiny, tmp_path / "a", epochs=1, alpha=[10])  # concludes from all that is there
    assert again["readings"] == summary["readings"] and again["differences"] == summary["differences"]


def five(log):
    return [sum(r["mean_train_loss"] for r in log[k - 4:k + 1]) / 5 for k in range(4, len(log))]


def test_stop_loss_ends_the_run_and_a_lower_one_continues_it(tiny, tmp_path):
    more = dict(alpha=[1], epochs=60, lr=.01)
    tiny_run(tiny, tmp_path / "a", stop_loss=.8, **more)
    log = records(tmp_path / "a")
    assert five(log)[-1] < .8 <= min(five(log)[:-1]) and "ntk_alignment" in log[-1] and log[-1]["ended"] == "stop-loss"
    tiny_run(tiny, tmp_path / "a", stop_loss=.6, **more)
    tiny_run(tiny, tmp_path / "b", stop_loss=.6, **more)
    assert five(records(tmp_path / "a"))[-1] < .6
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    tiny_run(tiny, tmp_path / "a", stop_loss=.9, **more)  # a higher one changes nothing
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_finished_runs_are_only_drawn_again(tiny, tmp_path, capsys):
    first = tiny_run(tiny, tmp_path)
    before = (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes()
    (tmp_path / "noisy.png").unlink()
    capsys.readouterr()
    assert tiny_run(tiny, tmp_path) == first
    assert (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes() == before and (tmp_path / "noisy.png").exists()
    assert "iteration" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "alpha=100_seed=0")
    there = noisy.main(out=str(tmp_path), draw_only=True)["readings"]  # whatever is there, without any data
    assert {row["alpha"] for row in there} == {1}


def interrupted(tiny, out, when, number, **more):
    """Start noisy.py, send it a signal once its log has `when` lines, and wait for it."""
    process = start("noisy.py", dataset=str(tiny), out=str(out),
                    **{**TINY, "alpha": [1], "checkpoint_seconds": 0, **more})
    log = pathlib.Path(out) / "alpha=1_seed=0" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= when):
        time.sleep(.002)
    process.send_signal(number)
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_continues_after_a_signal(tiny, tmp_path, number):
    code, err = interrupted(tiny, tmp_path / "a", 3, number, **LONG)
    if number == signal.SIGINT:
        assert code == 130 and len(err.strip().splitlines()) == 1 and "goes on" in err
    else:  # there are no signal handlers: whatever ends the process, the checkpoint is there
        assert code == -number
    assert len(records(tmp_path / "a")) < 12
    tiny_run(tiny, tmp_path / "a", alpha=[1], **LONG)
    tiny_run(tiny, tmp_path / "b", alpha=[1], **LONG)
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_fewer_epochs_than_an_interrupted_run_has_done_end_it(tiny, tmp_path):
    interrupted(tiny, tmp_path, 22, signal.SIGKILL, **LONG)
    tiny_run(tiny, tmp_path, alpha=[1], **{**LONG, "epochs": 2})
    assert records(tmp_path)[-1]["ended"] == "epochs" and records(tmp_path)[-1]["iteration"] >= 12


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
@pytest.mark.parametrize("script", ["noisy", "cscore", "spurious"])
def test_killed_at_a_random_moment(tmp_path, script, moment):
    """SIGKILL at a seeded random moment, with a checkpoint after every step, so that many hit one being written; then
    the same command once more: every probe is there, bit-equal to a run that was never interrupted."""
    options = dict(dataset=tiny_for_all(tmp_path), **{**TINY, **LONG})
    process = start(f"{script}.py", **options, out=str(tmp_path / "a"), checkpoint_seconds=0)
    while not list((tmp_path / "a").glob("*/log.jsonl")) and process.poll() is None:
        time.sleep(.01)
    time.sleep(np.random.default_rng(moment).uniform(0, 3))
    process.kill()
    process.communicate()
    module = __import__(script)
    assert module.main(**options, out=str(tmp_path / "a")) == module.main(**options, out=str(tmp_path / "b"))
    for run in ("alpha=1_seed=0", "alpha=100_seed=0"):
        assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)


def test_full_disk_is_one_line_and_earlier_records_stay(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    before = records(tmp_path)
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
              "sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[1:]; import common, noisy; "
              "common.command_line(noisy.main)")
    more = {**TINY, "alpha": [1], "epochs": 12, "checkpoint_seconds": 0, "jobs": 1}
    argv = words(dict(dataset=str(tiny), out=str(tmp_path), **more))
    process = subprocess.run([sys.executable, "-c", script, str(ROOT), *argv], capture_output=True, text=True)
    assert process.returncode == 2 and "could not be written" in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert records(tmp_path)[:len(before) - 1] == before[:-1] and not list(tmp_path.rglob("*.part"))
    tiny_run(tiny, tmp_path, alpha=[1], epochs=12)
    tiny_run(tiny, tmp_path / "b", alpha=[1], epochs=12)
    assert without_times(tmp_path) == without_times(tmp_path / "b")


# --- refusals ---


@pytest.mark.parametrize("option, value", [
    ("lr", .03), ("momentum", 0.0), ("batch_size", 12), ("noise", .2), ("width", 3), ("dtype", "float64"), ("subset", 40),
    ("probe_examples", 5), ("data_crc32", None), ("loss", None), ("network", None), ("script", None)])
def test_another_run_in_the_same_folder_is_refused(tiny, tmp_path, monkeypatch, option, value):
    """Before anything trains, naming the folder and the first difference; another path of the same data is not one."""
    import cscore
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    before = (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes()
    more, main = {"alpha": [.5, 1], "epochs": 3}, noisy.main
    if option == "data_crc32":
        np.savez(tmp_path / "other.npz", **tiny_arrays(), mean=[.1] * 3, std=[.4] * 3)
        more["dataset"] = str(tmp_path / "other.npz")
    elif option == "loss":
        monkeypatch.setattr(noisy, "loss_of", torch.nn.MultiMarginLoss())
    elif option == "network":
        monkeypatch.setattr(common, "resnet18", lambda classes, **sizes: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, classes)))
    elif option == "script":
        main = cscore.main
    else:
        more[option] = value
    with pytest.raises(ValueError, match=f"alpha=1_seed=0 holds a run with {option} = "):
        main(**{"dataset": str(tiny), "out": str(tmp_path), **TINY, **more})
    assert (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes() == before
    assert not (tmp_path / "alpha=0.5_seed=0").exists()
    shutil.copy(tiny, tmp_path / "copy.npz")
    if option not in ("loss", "network"):
        tiny_run(tmp_path / "copy.npz", tmp_path, alpha=[1], epochs=1)


def test_what_cannot_be_read_is_one_line_that_names_it(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    folder = tmp_path / "alpha=1_seed=0"
    for name, text in (("args.json", ""), ("args.json", "[1]"), ("log.jsonl", "no json\n"), ("log.jsonl", "{}\n"),
                       ("log.jsonl", (folder / "log.jsonl").read_text() * 2)):  # two writers: does not ascend
        whole = (folder / name).read_text()
        (folder / name).write_text(text)
        for call in (lambda: tiny_run(tiny, tmp_path, alpha=[1], epochs=2), lambda: noisy.main(out=tmp_path, draw_only=True)):
            with pytest.raises(ValueError, match="alpha=1_seed=0.*damaged.*delete"):
                call()
        (folder / name).write_text(whole)
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(checkpoint[:-100])
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read"):
        tiny_run(tiny, tmp_path, alpha=[1], epochs=3)
    before = (folder / "log.jsonl").read_bytes()
    (folder / "checkpoint.pt").unlink()
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)  # nothing is left to train: only drawn
    with pytest.raises(ValueError, match="not its checkpoint"):
        tiny_run(tiny, tmp_path, alpha=[.5, 1], epochs=3)
    assert not (tmp_path / "alpha=0.5_seed=0").exists() and (folder / "log.jsonl").read_bytes() == before


def test_two_writers_leave_whole_records(tiny, tmp_path):
    """The same command in two terminals: what is there afterwards is one run's, bit for bit."""
    options = dict(dataset=str(tiny), out=str(tmp_path / "a"), **{**TINY, "alpha": [1], "checkpoint_seconds": 0})
    both = [start("noisy.py", **options) for _ in range(2)]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    tiny_run(tiny, tmp_path / "b", alpha=[1])
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


# --- options ---


def parsed(*given_words, **given):
    parser = common.image_parser(noisy.__file__, noisy.__doc__)
    return common.parse(parser, noisy.QUICK, given_words, given)


def test_keywords_and_command_line_mean_the_same():
    a = parsed("--alpha", "1", "--alpha", "inf", "--lr", "0.25", "--quick", "--out", "~/here")
    b = parsed(alpha=[1, math.inf], lr=np.float32(.25), quick=True, out=pathlib.Path.home() / "here")
    assert vars(a) == vars(b)
    assert a.dataset == "synthetic" and a.lr == .25  # explicit options win over --quick
    assert parsed(quick=True).out == "runs/noisy_quick" and parsed().out == "runs/noisy"
    o = parsed(epochs=np.int64(3), alpha=np.array([1, 10]), seeds=range(3), momentum=0, subset=None, quick=False)
    assert (o.epochs, o.alpha, o.seeds, o.momentum, o.subset, o.quick) == (3, [1, 10], [0, 1, 2], 0, None, False)


@pytest.mark.parametrize("option, value, says", [
    ("alpha", [0], "above 0"), ("alpha", ["nan"], "above 0"), ("alpha", ["1,100"], "separate several by spaces"),
    ("alpha", [1.23456789], "six digits"), ("noise", 1.5, "below 1"), ("batch_size", 61, "larger than"),
    ("batch_size", 1.5, "whole number"), ("epochs", 0, "at least 1"), ("lr", "inf", "above 0"), ("lr", -1, "above 0"),
    ("lr", [1, 2], "unrecognized"), ("momentum", 1, "below 1"), ("momentum", False, "unrecognized"), ("epochs", True, "one"),
    ("seeds", [-1], "at least 0"), ("seeds", [], "at least one"), ("device", "abacus", "cpu"), ("dtype", "float16", "choose"),
    ("subset", 5, "larger than"), ("stop_loss", "nan", "at least 0"), ("no_such_option", 1, "unrecognized"),
    ("dataset", "mnist", "cifar10, synthetic or a file")])
def test_bad_options_are_one_line(tiny, tmp_path, option, value, says):
    with pytest.raises(ValueError, match=says) as error:
        noisy.main(**{"dataset": str(tiny), "out": str(tmp_path / "run"), **TINY, option: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert not (tmp_path / "run" / "alpha=1_seed=0" / "log.jsonl").exists()


def test_bad_input_on_the_command_line_is_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for options, expected in ((dict(alpha=[0]), "alpha"), (dict(dataset=str(tmp_path / "none.npz")), "none.npz"),
                              (dict(quick=True, out=str(tmp_path / "file")), "file"),
                              (dict(draw_only=True, out=str(tmp_path / "empty")), "no records")):
        process = start("noisy.py", **options)
        out, err = process.communicate()
        assert process.returncode == 2 and expected in err and len(err.splitlines()) == 1, err
        assert err.startswith("noisy.py: error: ") and "Traceback" not in err
    assert not (tmp_path / "empty").exists()


def test_help_shows_defaults_and_what_quick_sets(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.01)" in out and "The claim" in out and "--quick: dataset synthetic" in out and "lr 0.0008" in out


def test_a_copied_script_works_under_its_own_name_on_a_plain_terminal(tiny, tmp_path):
    """cp noisy.py mine.py: the folder runs/mine; and a stdout that cannot print é ends no run."""
    for name in ("noisy.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path / name.replace("noisy", "mine"))
    shutil.copy(tiny, tmp_path / "é.npz")
    options = words(dict(dataset="é.npz", **{**TINY, "alpha": [1, 1e4], "epochs": 1}))
    process = subprocess.run([sys.executable, "mine.py", *options], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and process.stdout.count("warning: above alpha = 1000") == 1, process.stderr
    assert (tmp_path / "runs" / "mine" / "summary.json").exists()
    process = subprocess.run([sys.executable, "mine.py", "--lr", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("mine.py: error: ")


# --- other networks and losses ---


NETWORKS = {"transformer": """
class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(inputs, 2, 16, dropout=0., batch_first=True)
        self.head = nn.Linear(inputs, classes)
    def forward(self, x):
        return self.head(input=self.layer(x.flatten(2)[:, :, :8]).mean(1))
""", "lstm": """
class Net(nn.LSTM):
    def __init__(self, inputs, classes):
        super().__init__(inputs, 6, batch_first=True)
        self.head = nn.Linear(6, classes)
    def forward(self, x):
        return self.head(super().forward(x.flatten(2)[:, :, :8])[0][:, -1])
""", "cnn": """
class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, classes)
    def forward(self, x):
        return self.head(F.gelu(F.relu(self.conv(x))).mean((2, 3)))
"""}


def swapped(tmp_path, name, old, new, more=""):
    """noisy.py with exactly one line replaced, as a module."""
    source = (ROOT / "noisy.py").read_text()
    assert source.count(old) == 1
    (tmp_path / f"{name}.py").write_text(source.replace(old, new).replace("\n\ndef load", f"\n{more}\n\ndef load", 1))
    sys.path.insert(0, str(tmp_path))
    try:
        sys.modules.pop(name, None)
        return __import__(name)
    finally:
        sys.path.pop(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_is_one_line(tiny, tmp_path, capsys, name):
    module = swapped(tmp_path, name, "common.resnet18(classes, in_channels=x.shape[1], width=o.width)", "Net(8, classes)",
                     NETWORKS[name])
    module.main(dataset=str(tiny), out=str(tmp_path / "run"), **{**TINY, "alpha": [1, 100, "inf"], "epochs": 1})
    for alpha in (1, 100, "inf"):
        last = records(tmp_path / "run", f"alpha={alpha}_seed=0")[-1]
        assert {"ntk_alignment", "repr_alignment", "linearisation_error"} <= set(last) and "sign_similarity" not in last
        assert last["mean_train_loss"] < math.log(3) + .1
    assert capsys.readouterr().out.count("calls no nn.ReLU") == 3  # once a run


def test_another_loss_is_one_line(tiny, tmp_path):
    line, = [line for line in (ROOT / "noisy.py").read_text().splitlines() if line.startswith("loss_of = ")]
    squared = swapped(tmp_path, "squared", line, "def loss_of(f, y):\n    return F.mse_loss(f, F.one_hot(y, f.shape[1]).to(f.dtype))")
    summary = squared.main(dataset=str(tiny), out=str(tmp_path / "run"), **{**TINY, "epochs": 30, "lr": .02})
    assert records(tmp_path / "run")[0]["mean_train_loss"] == pytest.approx(1 / 3)  # f = 0 against one-hot labels
    levels = {row["level"] for row in summary["readings"]}
    assert len(levels) > 3 and max(levels) == .316 and "loss_of" in summary["conclusion"]


# --- machines ---


@pytest.mark.parametrize("alpha", [1, 100, math.inf])
@pytest.mark.parametrize("script", ["noisy", "cscore", "spurious"])
def test_the_step_never_leaves_the_device(tmp_path, script, alpha, monkeypatch):
    """On torch's meta device, where reading a value, or a tensor left on the CPU, raises: what a CUDA graph needs."""
    steps = []

    class OnMeta:
        def __init__(self, o, *rest):
            self.o, self.folder = o, tmp_path

        def minibatches(self, probe):
            for _ in range(3):
                steps.append(1)
                yield torch.arange(10, device="meta")

    parse, loaded = common.parse, []

    def on_meta(o, load, run, conclude, draw):
        images, o.device = load(o), torch.device("meta")
        run(alpha, 0, images, o)

    monkeypatch.setattr(common, "Run", OnMeta)
    monkeypatch.setattr(common, "Linearity", lambda *rest: None)
    monkeypatch.setattr(common, "sweep", on_meta)
    __import__(script).main(dataset=tiny_for_all(tmp_path), **TINY)
    assert len(steps) == 3


def test_jobs_make_the_same_records_and_end_together(tiny, tmp_path):
    options = {**TINY, "seeds": [0, 1], "epochs": 3}
    one = tiny_run(tiny, tmp_path / "one", **options)
    two = tiny_run(tiny, tmp_path / "two", jobs=2, **options)
    assert one["readings"] == two["readings"]
    for run in ("alpha=1_seed=0", "alpha=100_seed=1"):
        assert without_times(tmp_path / "one", run) == without_times(tmp_path / "two", run)
    (tmp_path / "two" / "alpha=100_seed=1" / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):  # an error in a child is the parent's one line
        tiny_run(tiny, tmp_path / "two", jobs=2, **{**options, "epochs": 4})
    assert not multiprocessing.active_children()


def test_children_of_a_killed_parent_end(tiny, tmp_path):
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path), **{**TINY, "epochs": 4000, "jobs": 2})
    while len(list(tmp_path.glob("*/log.jsonl"))) < 2:
        assert process.poll() is None
        time.sleep(.05)
    pids = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(.1)
    assert len(pids) >= 2 and not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


def test_torchrun_shares_the_runs(tiny, tmp_path, monkeypatch):
    """As its processes would, one after the other: each trains its share, the last concludes."""
    options = {**TINY, "seeds": [0, 1], "epochs": 2}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert tiny_run(tiny, tmp_path / "two", **options) == {}
    assert len(list((tmp_path / "two").glob("*/log.jsonl"))) == 2
    monkeypatch.setenv("RANK", "1")
    two = tiny_run(tiny, tmp_path / "two", **options)
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    assert two["readings"] == tiny_run(tiny, tmp_path / "one", **options)["readings"]


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
    start_loss = math.log(2 if name == "spurious" else 10)
    for seed in (0, 1, 2):
        summary = __import__(name).main(quick=True, seeds=[seed], out=str(tmp_path / str(seed)), device="cpu")
        gaps = [row["mean"] for row in summary["differences"] if row["quantity"] == "gap"
                and row["on"] == "mean_train_loss" and row["level"] < .8 * start_loss]
        assert sum(gap > .02 * start_loss for gap in gaps) >= 3, (seed, gaps)
