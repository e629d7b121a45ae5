"""Runs: records, probes on a schedule, resuming and refusals, through noisy.py on tiny data."""
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

import common
import noisy
from conftest import ROOT, TINY, records_of, tiny_arrays


def records(out, run="alpha=1_seed=0"):
    return records_of(pathlib.Path(out) / run)


def without_times(out, run="alpha=1_seed=0"):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records(out, run)]


def tiny_run(tiny, out, **more):
    return noisy.main(dataset=str(tiny), out=str(out), **{**TINY, **more})


def words(options):
    """The same options as a command line."""
    result = []
    for key, value in options.items():
        result += ["--" + key.replace("_", "-")] + [f"{v}" for v in (value if isinstance(value, list) else [value]) if v is not True]
    return result


def start(script, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / script), *words(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def test_files_keys_and_summary(tiny, tmp_path):
    """As a subprocess: every file and key that the design names."""
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path / "run"), **{**TINY, "seeds": [0, 1]})
    out, err = process.communicate()
    assert process.returncode == 0, err
    for name in ("noisy.png", "noisy.pdf", "noisy_curves.png", "summary.json"):
        assert (tmp_path / "run" / name).stat().st_size > 500
    for run in ("alpha=1_seed=0", "alpha=100_seed=1"):
        assert {p.name for p in (tmp_path / "run" / run).iterdir()} == {"args.json", "log.jsonl", "checkpoint.pt"}
        log = records(tmp_path / "run", run)
        assert {"iteration", "epoch", "seconds", "mean_train_loss", "mean_train_acc", "test_loss",
                "test_acc", "clean_loss", "clean_acc", "noisy_loss", "noisy_acc", "noisy_true_acc"} <= set(log[1])
        for r in (log[0], log[-1]):
            assert {"ntk_alignment", "sign_similarity", "repr_alignment", "repr_alignment_gram", "linearisation_error",
                    "target_alignment", "update_noise"} <= set(r)
        assert log[0]["iteration"] == 0 and log[-1]["iteration"] == 36 and log[-1]["ended"] == "epochs"
        assert log[0]["mean_train_loss"] == pytest.approx(math.log(3))
        assert log[0]["linearisation_error"] is None  # 0 / 0
        for r in log:
            assert r["mean_train_loss"] == pytest.approx(.85 * r["clean_loss"] + .15 * r["noisy_loss"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["alphas"]) == {"1", "100"} and "1 - 100" in summary["paired"] and "options" in summary
    assert "wrote " in out and out.rstrip().splitlines()[-1] == summary["conclusion"]


def test_probes_come_on_a_schedule_that_no_loss_can_influence(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=40, seeds=[0, 1], stop_loss=0)
    log, other = records(tmp_path), records(tmp_path, "alpha=1_seed=1")
    expected = list(range(21)) + [22, 24, 26, 28, 30, 33, 36, 39, 42, 46, 50, 55, 60]  # a tenth further ...
    expected += list(range(66, 240, 6)) + [240]  # ... at most an epoch of 6 steps; and the end
    assert [r["iteration"] for r in log] == [r["iteration"] for r in other] == expected
    assert [("ntk_alignment" in r) for r in log[:-1]] == [i % 5 == 0 for i in range(len(log) - 1)]
    assert [r["epoch"] for r in log] == [i / 6 for i in expected]
    assert set(np.diff(sorted(common.schedule(320, 9000)))[-10:-1]) == {320}


def test_same_seed_same_records_and_probes_change_nothing(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "a", alpha=[1])
    tiny_run(tiny, tmp_path / "b", alpha=[1])
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    tiny_run(tiny, tmp_path / "c", alpha=[1], seeds=[1])
    assert without_times(tmp_path / "a") != without_times(tmp_path / "c", "alpha=1_seed=1")
    # other examples in the linearity measures: another measurement of the same trajectory
    tiny_run(tiny, tmp_path / "d", alpha=[1], probe_examples=3)
    load = lambda d: torch.load(tmp_path / d / "alpha=1_seed=0" / "checkpoint.pt", weights_only=True)["tensors"]
    assert all(torch.equal(p, q) for p, q in zip(load("a"), load("d")))


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
    names = [n for n, _ in model.named_parameters()]
    call = lambda: torch.func.functional_call(model, dict(zip(names, theta)), (x[batch],))
    for epoch in range(2):
        order = torch.randperm(60, generator=common.generator(f"order {epoch}", 0))
        for k in range(6):
            batch = order[10 * k:10 * k + 10]
            loss = torch.nn.functional.cross_entropy(10 * (call() - model(x[batch]).detach()), y[batch])
            for p, v, g in zip(theta, velocity, torch.autograd.grad(loss, theta)):
                v.mul_(.9).add_(g)
                p.data.sub_(TINY["lr"] / 10**2 * v)
    saved = torch.load(tmp_path / "alpha=10_seed=0" / "checkpoint.pt", weights_only=True)["tensors"]
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip([*theta, *velocity], saved, strict=True))


@pytest.mark.parametrize("alpha", [1, "inf"])
def test_more_epochs_equal_as_many_at_once(tiny, tmp_path, alpha):
    tiny_run(tiny, tmp_path / "a", alpha=[alpha], epochs=2)
    tiny_run(tiny, tmp_path / "a", alpha=[alpha], epochs=5)
    tiny_run(tiny, tmp_path / "b", alpha=[alpha], epochs=5)
    run = f"alpha={alpha}_seed=0"
    assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)
    assert records(tmp_path / "a", run)[-1]["iteration"] == 30


def test_into_a_pipe_goes_one_aligned_line_a_probe(tiny, tmp_path, capsys, monkeypatch):
    """However slow the steps between two probes are."""
    clock = itertools.count(step=60.)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tiny_run(tiny, tmp_path, alpha=[1], epochs=40)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alpha=1_seed=0 ")]
    assert [int(line.split()[2]) for line in lines] == [r["iteration"] for r in records(tmp_path)]
    assert len({line.index("test_acc") for line in lines}) == 1


def test_finished_runs_are_only_drawn_again(tiny, tmp_path, capsys):
    first = tiny_run(tiny, tmp_path)
    before = (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes()
    (tmp_path / "noisy.png").unlink()
    capsys.readouterr()
    assert tiny_run(tiny, tmp_path)["alphas"] == first["alphas"]
    assert (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes() == before and (tmp_path / "noisy.png").exists()
    assert "iteration" not in capsys.readouterr().out
    (tmp_path / "noisy.png").unlink()
    shutil.rmtree(tmp_path / "alpha=100_seed=0")
    assert set(noisy.main(out=str(tmp_path), draw_only=True)["alphas"]) == {"1"}  # whatever is there, without any data
    assert (tmp_path / "noisy.png").exists()


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
    before = without_times(tmp_path / "a")
    tiny_run(tiny, tmp_path / "a", stop_loss=.9, **more)  # a higher one changes nothing
    assert without_times(tmp_path / "a") == before


def test_sequences_of_extensions_equal_the_whole_at_once(tiny, tmp_path):
    """Epochs, stop-loss, seeds and alphas in several steps, some of them going back: the same records."""
    for changed in (dict(epochs=2), dict(epochs=1), dict(epochs=9, stop_loss=.9, seeds=[1]), dict(epochs=4, alpha=[10]),
                    dict(epochs=9, seeds=[0, 1], alpha=[1, 10])):
        tiny_run(tiny, tmp_path / "a", **{"alpha": [1], **changed})
    tiny_run(tiny, tmp_path / "b", epochs=9, seeds=[0, 1], alpha=[1, 10])
    for run in ("alpha=1_seed=0", "alpha=1_seed=1", "alpha=10_seed=0", "alpha=10_seed=1"):
        assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)


def test_a_sweep_concludes_from_everything_in_its_folder(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1, 100], epochs=2)
    summary = tiny_run(tiny, tmp_path, alpha=[10], epochs=2)
    assert list(summary["alphas"]) == ["1", "10", "100"] and set(summary["paired"]) == {"1 - 10", "1 - 100", "10 - 100"}


@pytest.mark.parametrize("option, value", [("lr", .03), ("momentum", 0.0), ("batch_size", 12), ("noise", .2), ("width", 3),
                                           ("dtype", "float64"), ("subset", 40), ("probe_examples", 5)])
def test_another_run_in_the_same_folder_is_refused(tiny, tmp_path, option, value):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    before = (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"with {option} = "):
        tiny_run(tiny, tmp_path, alpha=[1], epochs=1, **{option: value})
    assert (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes() == before


def test_other_data_is_refused_but_another_path_is_not(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "run", alpha=[1], epochs=1)
    shutil.copy(tiny, tmp_path / "copy.npz")
    tiny_run(tmp_path / "copy.npz", tmp_path / "run", alpha=[1], epochs=1)
    arrays = dict(np.load(tiny))
    arrays["x_train"][0, 0, 0, 0] ^= 1
    np.savez(tiny, **arrays)
    with pytest.raises(ValueError, match="data_crc32"):
        tiny_run(tiny, tmp_path / "run", alpha=[1], epochs=1)


def test_divergence_is_one_clear_line_and_the_others_go_on(tiny, tmp_path):
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path), **{**TINY, "lr": 1e6, "alpha": [1, 1e10], "dtype": "float64"})
    out, err = process.communicate()
    assert process.returncode == 1, err
    line, = [l for l in out.splitlines() if "diverged at" in l]
    assert "alpha=1_seed=0" in line and "smaller --lr" in line
    assert records(tmp_path)[-1]["mean_train_loss"] is None and records(tmp_path)[-1]["ended"] == "diverged"
    assert "alpha = 1: smallest test loss -" in out  # a run that diverged has none
    assert records(tmp_path, "alpha=1e+10_seed=0")[-1]["mean_train_loss"] is not None
    assert json.loads((tmp_path / "summary.json").read_text())["diverged"] == ["alpha=1_seed=0"]


def test_rounding_warning(tiny, tmp_path, capsys):
    """Silent at alpha = 100, a warning at 1e4 in float32; none in float64."""
    def warned(alpha, dtype):
        tiny_run(tiny, tmp_path / f"{alpha}{dtype}", alpha=[alpha], epochs=1, dtype=dtype, width=8)
        return capsys.readouterr().out.count("update_noise")
    assert [warned(100, "float32"), warned(10000, "float32"), warned(10000, "float64")] == [0, 1, 0]


def test_update_noise_against_a_step_that_is_really_taken():
    torch.manual_seed(0)
    f = common.center(common.mlp([20, 50, 3]), 1e5)
    optimizer = common.scaled_sgd(f, .1, .9)
    x, y = torch.randn(16, 20), torch.randint(3, (16,))

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(f(x), y).backward()
        optimizer.step()

    for p in f.model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for _ in range(3):
        before = [p.detach().clone() for p in f.model.parameters()]
        noise = common.update_noise(optimizer, step)
        assert all(torch.equal(p, b) for p, b in zip(f.model.parameters(), before))  # a measurement changes nothing
        step()
        intended = [-.1 / 1e10 * optimizer.state[p]["momentum_buffer"].double() for p in f.model.parameters()]
        applied = [p.detach().double() - b.double() for p, b in zip(f.model.parameters(), before)]
        lost = math.sqrt(sum((a - i).square().sum().item() for a, i in zip(applied, intended)))
        assert noise == pytest.approx(lost / math.sqrt(sum(i.square().sum().item() for i in intended)), rel=1e-2)
    assert noise > .05


def test_infinite_alpha(tiny, tmp_path):
    summary = tiny_run(tiny, tmp_path, alpha=[1, 100, "inf"])
    assert set(summary["alphas"]) == {"1", "100", "inf"} and "100 - inf" in summary["paired"]
    last = records(tmp_path, "alpha=inf_seed=0")[-1]
    assert last["linearisation_error"] == 0 and last["ntk_alignment"] == pytest.approx(1) and last["clean_loss"] < 1.05
    lazy = records(tmp_path, "alpha=100_seed=0")[-1]
    assert last["clean_loss"] == pytest.approx(lazy["clean_loss"], rel=.05) and 0 < lazy["linearisation_error"] < .3


@pytest.mark.parametrize("option, value", [
    ("alpha", [0]), ("alpha", [-1]), ("alpha", ["nan"]), ("alpha", ["abc"]), ("alpha", [1.23456789]), ("noise", 1.5), ("noise", 0),
    ("batch_size", 61), ("batch_size", 0), ("batch_size", 1.5), ("epochs", 0), ("lr", 0), ("lr", "nan"), ("lr", -1),
    ("momentum", 1), ("seeds", [-1]), ("width", 0), ("device", "abacus"), ("dtype", "float16"), ("probe_examples", 0),
    ("subset", 5), ("stop_loss", "inf"), ("levels", [0]), ("checkpoint_seconds", -1), ("no_such_option", 1)])
def test_bad_options_raise_value_error_with_one_line(tiny, tmp_path, option, value):
    with pytest.raises(ValueError) as e:
        tiny_run(tiny, tmp_path / "run", **{option: value})
    assert "\n" not in str(e.value) and len(str(e.value)) < 250
    assert not (tmp_path / "run" / "alpha=1_seed=0" / "log.jsonl").exists()


def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for options, expected in ((dict(alpha=[0]), "alpha"), (dict(dataset=str(tmp_path / "none.npz")), "no such file"),
                              (dict(quick=True, out=str(tmp_path / "file")), "file"),
                              (dict(draw_only=True, out=str(tmp_path / "empty")), "no records")):
        process = start("noisy.py", **options)
        out, err = process.communicate()
        assert process.returncode == 2 and expected in err and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert not (tmp_path / "empty").exists()


def parsed(words, **given):
    """What the command line's words, or keywords, mean as options."""
    if words is not None:
        given = common.parse_words("noisy", noisy.OPTIONS, noisy.QUICK, noisy.__doc__, words)
    return common.options("noisy", noisy.OPTIONS, noisy.QUICK, given, noisy.__file__)


def test_keywords_and_command_line_mean_the_same():
    a = parsed(["--alpha", "1", "inf", "--lr", "0.25", "--quick"])
    b = parsed(None, alpha=[1, math.inf], lr=.25, quick=True)
    assert vars(a) == vars(b)
    assert a.dataset == "synthetic" and a.lr == .25  # explicit options win over --quick
    assert a.out == "runs/noisy_quick" and parsed([]).out == "runs/noisy"  # the real command can follow a quick one


@pytest.mark.parametrize("words, says", [
    (["--seed", "1"], "did you mean --seeds?"), (["--dataset", "cifar"], "did you mean cifar10?"),
    (["--device", "gpu"], "here there are auto, cpu"), (["--alpha", "1,100"], "separate several by spaces"),
    (["--dataset", "mnist"], "cifar10, synthetic or a file FILE.npz"), (["--lr"], "expected one argument"),
    (["100"], "100"), (["--momentum", "False"], "must be a number")])
def test_near_misses(words, says):
    with pytest.raises(ValueError) as e:
        common.load_images(parsed(words).dataset)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("given", [dict(momentum=False), dict(epochs=True), dict(epochs=2.5), dict(quick=1), dict(lr=[1, 2])])
def test_python_values_of_another_kind_are_refused(given):
    with pytest.raises(ValueError):
        parsed(None, **given)


def test_python_values_of_a_like_kind():
    o = parsed(None, epochs=np.int64(3), lr=np.float32(.5), alpha=np.array([1, 10]), seeds=range(3), momentum=0, subset=None)
    assert (o.epochs, o.lr, o.alpha, o.seeds, o.momentum, o.subset) == (3, .5, [1, 10], [0, 1, 2], 0, None)


def test_help_comes_in_groups_with_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed(["--help"])
    out = capsys.readouterr().out
    assert out.index("training:") < out.index("The claim") and "(0.01; --quick: 0.0008)" in " ".join(out.split())


def test_fuzzed_options():
    """A few hundred seeded command lines: every outcome is a namespace or one clear line."""
    rng, good = np.random.default_rng(0), 0
    flags = ["--" + name.replace("_", "-") for name in common.merged(noisy.OPTIONS)]
    values = ["0", "1", "-1", "1e400", "nan", "inf", "-inf", "", "abc", "1.5", "--", "é", "1_0", "0x10", "1e-300", "9" * 400, "[1]"]
    for _ in range(400):
        argv = []
        for _ in range(rng.integers(1, 4)):
            argv += [str(rng.choice(flags))] + [str(v) for v in rng.choice(values, rng.integers(0, 3))]
        try:
            parsed(argv)
            good += 1
        except ValueError as e:
            assert str(e) and "\n" not in str(e)
    assert 0 < good < 300


# --- long runs survive ---


def interrupted(tiny, out, when, number, **more):
    """Start noisy.py, send it a signal once its log has `when` lines, and wait for it."""
    process = start("noisy.py", dataset=str(tiny), out=str(out), **{**TINY, "alpha": [1], "checkpoint_seconds": 0, **more})
    log = pathlib.Path(out) / "alpha=1_seed=0" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= when):
        time.sleep(.002)
    process.send_signal(number)
    _, err = process.communicate()
    return process.returncode, err


LONG = dict(epochs=40, lr=.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_continues_after_a_signal(tiny, tmp_path, number):
    code, err = interrupted(tiny, tmp_path / "a", 3, number, **LONG)
    if number == signal.SIGINT:
        assert code == 130 and len(err.strip().splitlines()) == 1 and "goes on" in err
    else:  # there are no signal handlers: whatever ends the process, the checkpoint is there
        assert code == -number
    assert len(records(tmp_path / "a")) < 12
    # what a half-written last line would leave behind
    with open(tmp_path / "a" / "alpha=1_seed=0" / "log.jsonl", "ab") as log:
        log.write(b'{"iteration": 12, "ep')
    tiny_run(tiny, tmp_path / "a", alpha=[1], **LONG)
    tiny_run(tiny, tmp_path / "b", alpha=[1], **LONG)
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_damaged_checkpoint_is_refused_and_nothing_lost(tiny, tmp_path):
    interrupted(tiny, tmp_path, 4, signal.SIGKILL, **LONG)
    path = tmp_path / "alpha=1_seed=0" / "checkpoint.pt"
    before = records(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a damaged one.*delete that folder"):
        tiny_run(tiny, tmp_path, alpha=[.5, 1], **LONG)
    assert records(tmp_path) == before and not (tmp_path / "alpha=0.5_seed=0").exists()  # before anything is trained


def test_killed_in_its_first_second_starts_again(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "a", alpha=[1], epochs=1)
    for name in ("checkpoint.pt", "log.jsonl"):
        (tmp_path / "a" / "alpha=1_seed=0" / name).unlink()
    tiny_run(tiny, tmp_path / "a", alpha=[1], epochs=1)
    tiny_run(tiny, tmp_path / "b", alpha=[1], epochs=1)
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_full_disk_is_one_line_and_earlier_records_stay(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    before = records(tmp_path)
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.path.insert(0, sys.argv[1]); "
              "sys.argv = sys.argv[1:]; import common, noisy; "
              "common.command_line('noisy', noisy.main, noisy.OPTIONS, noisy.QUICK, '')")
    argv = words(dict(dataset=str(tiny), out=str(tmp_path), **{**TINY, "alpha": [1], "epochs": 12, "checkpoint_seconds": 0, "jobs": 1}))
    process = subprocess.run([sys.executable, "-c", script, str(ROOT), *argv], capture_output=True, text=True)
    assert process.returncode == 2 and "could not be written" in process.stderr and len(process.stderr.splitlines()) == 1
    assert records(tmp_path)[:len(before) - 1] == before[:-1]
    assert not list(tmp_path.rglob("*.part"))
    tiny_run(tiny, tmp_path, alpha=[1], epochs=12)
    tiny_run(tiny, tmp_path / "b", alpha=[1], epochs=12)
    assert without_times(tmp_path) == without_times(tmp_path / "b")


def test_torchrun_shares_the_runs(tiny, tmp_path):
    options = dict(dataset=str(tiny), **{**TINY, "seeds": [0, 1], "epochs": 2})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "noisy.py"),
                    *words({**options, "out": str(tmp_path / "two")})], check=True, capture_output=True, env=environment)
    one = noisy.main(out=str(tmp_path / "one"), **options)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert one["alphas"] == two["alphas"] and one["paired"] == two["paired"]
    assert without_times(tmp_path / "one", "alpha=100_seed=1") == without_times(tmp_path / "two", "alpha=100_seed=1")


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
@pytest.mark.parametrize("script", ["noisy", "cscore", "spurious"])
def test_killed_at_a_random_moment(tmp_path, script, moment):
    """SIGKILL at a seeded random moment, with a checkpoint after every step, so that many hit one being written; then
    the same command once more: every probe is there, bit-equal to a run that was never interrupted."""
    arrays = tiny_arrays(classes=2)
    arrays.update({f"attribute_{s}": np.arange(len(arrays[f"y_{s}"])) % 5 // 2 % 2 for s in ("train", "test")})
    np.savez(tmp_path / "tiny.npz", **arrays)
    options = dict(dataset=str(tmp_path / "tiny.npz"), **{**TINY, **LONG})
    process = start(f"{script}.py", **options, out=str(tmp_path / "a"), checkpoint_seconds=0)
    while not list((tmp_path / "a").glob("*/log.jsonl")) and process.poll() is None:
        time.sleep(.01)
    time.sleep(np.random.default_rng(moment).uniform(0, 3))
    process.kill()
    process.communicate()
    module = __import__(script)
    a = module.main(**options, out=str(tmp_path / "a"))
    b = module.main(**options, out=str(tmp_path / "b"))
    assert a == b
    for run in ("alpha=1_seed=0", "alpha=100_seed=0"):
        assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_one_line(tiny, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path / "run"), **TINY)
    out, err = process.communicate()
    assert process.returncode == 2 and len(err.splitlines()) == 1 and "Permission" in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the CUDA graph path")
def test_cuda_graph_equals_the_plain_step(tiny, tmp_path, monkeypatch):
    tiny_run(tiny, tmp_path / "graph", device="cuda", dtype="float64")
    def plain(step, training):
        training.step = step
        return step
    monkeypatch.setattr(common, "graphed", plain)
    tiny_run(tiny, tmp_path / "plain", device="cuda", dtype="float64")
    for run in ("alpha=1_seed=0", "alpha=100_seed=0"):
        a, b = records(tmp_path / "graph", run), records(tmp_path / "plain", run)
        assert len(a) == len(b)
        assert all(r["mean_train_loss"] == pytest.approx(q["mean_train_loss"], rel=1e-7) for r, q in zip(a, b))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu_up_to_rounding(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "gpu", device="cuda", dtype="float64", epochs=2)
    tiny_run(tiny, tmp_path / "cpu", dtype="float64", epochs=2)
    a, b = records(tmp_path / "gpu")[-1], records(tmp_path / "cpu")[-1]
    assert a["mean_train_loss"] == pytest.approx(b["mean_train_loss"], rel=1e-6)


def test_a_run_of_another_script_is_refused(tiny, tmp_path):
    import cscore
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    with pytest.raises(ValueError, match="script = noisy, not cscore"):
        cscore.main(dataset=str(tiny), out=str(tmp_path), **{**TINY, "alpha": [1], "epochs": 1})
    with pytest.raises(ValueError, match="script = noisy, not cscore"):
        cscore.main(out=str(tmp_path), draw_only=True)


def test_unfinished_records_without_their_checkpoint_are_refused(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    folder = tmp_path / "alpha=1_seed=0"
    before = (folder / "log.jsonl").read_bytes()
    (folder / "checkpoint.pt").unlink()
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)  # nothing is left to train: only drawn
    with pytest.raises(ValueError, match="not its checkpoint"):
        tiny_run(tiny, tmp_path, alpha=[.5, 1], epochs=3)
    assert not (tmp_path / "alpha=0.5_seed=0").exists()  # refused before anything is trained
    assert (folder / "log.jsonl").read_bytes() == before
    given = {**TINY, "alpha": [1], "epochs": 3, "dataset": str(tiny), "out": str(tmp_path)}
    o = common.options("noisy", noisy.OPTIONS, noisy.QUICK, given, noisy.__file__)
    with pytest.raises(ValueError, match="not its checkpoint"):
        noisy.run(1.0, 0, noisy.load(o), o)  # without the sweep around it
    assert (folder / "log.jsonl").read_bytes() == before


def test_what_would_be_drawn_is_read_before_anything_is_trained(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[10], epochs=1)
    log = tmp_path / "alpha=10_seed=0" / "log.jsonl"
    log.write_text("no json\n" + log.read_text())
    with pytest.raises(ValueError, match="alpha=10_seed=0.*damaged"):
        tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    assert not (tmp_path / "alpha=1_seed=0").exists()


def test_a_seed_begins_at_one_theta0_under_every_alpha(tiny, tmp_path, monkeypatch):
    """Otherwise its differences would not be paired; at alpha = inf what trains, delta, begins at 0 for every seed."""
    tiny_run(tiny, tmp_path, alpha=[1, "inf"], seeds=[0, 1], epochs=1)
    start = lambda run: json.loads((tmp_path / run / "args.json").read_text())["run"]["theta0_crc32"]
    assert start("alpha=1_seed=0") == start("alpha=inf_seed=0") != start("alpha=inf_seed=1") == start("alpha=1_seed=1")
    network = common.resnet18

    def another(*sizes, **more):
        made = network(*sizes, **more)
        made.fc.weight.data *= 2
        return made

    monkeypatch.setattr(common, "resnet18", another)
    with pytest.raises(ValueError, match="theta0_crc32"):
        tiny_run(tiny, tmp_path, alpha=[100], epochs=1)
    assert not (tmp_path / "alpha=100_seed=0").exists()
    path = tmp_path / "alpha=inf_seed=1" / "args.json"
    path.write_text(path.read_text().replace(str(start("alpha=inf_seed=1")), "7"))
    with pytest.raises(ValueError, match="alpha=inf_seed=1.*theta0_crc32 = 7"):
        common.read_runs(tmp_path)


def test_fewer_epochs_than_an_interrupted_run_has_done_end_it(tiny, tmp_path):
    interrupted(tiny, tmp_path, 22, signal.SIGKILL, **LONG)
    tiny_run(tiny, tmp_path, alpha=[1], **{**LONG, "epochs": 2})
    assert records(tmp_path)[-1]["ended"] == "epochs" and records(tmp_path)[-1]["iteration"] >= 12


def test_a_lost_log_is_written_again_from_the_checkpoint(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    log = tmp_path / "alpha=1_seed=0" / "log.jsonl"
    before = log.read_bytes()
    log.unlink()
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    assert log.read_bytes() == before


def test_a_copied_folder_is_not_another_run(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    shutil.copytree(tmp_path / "alpha=1_seed=0", tmp_path / "alpha=100_seed=7")
    with pytest.raises(ValueError, match="damaged"):
        tiny_run(tiny, tmp_path, alpha=[100], seeds=[7], epochs=1)


def test_other_constants_are_another_run(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "run", alpha=[1], epochs=1)
    np.savez(tiny, **tiny_arrays(), mean=[.1] * 3, std=[.9] * 3)
    with pytest.raises(ValueError, match="data_crc32"):
        tiny_run(tiny, tmp_path / "run", alpha=[1], epochs=2)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"run": 3}'])
def test_missing_or_damaged_args_are_refused(tiny, tmp_path, text):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    (tmp_path / "alpha=1_seed=0" / "args.json").write_text(text)
    with pytest.raises(ValueError, match="missing or damaged"):
        tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    with pytest.raises(ValueError, match="missing or damaged"):
        noisy.main(out=str(tmp_path), draw_only=True)


def test_edited_records_are_one_line(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    log = tmp_path / "alpha=1_seed=0" / "log.jsonl"
    whole, parsed = log.read_text(), '{"iteration": 1, "epoch": 1, "mean_train_loss": 1}\n'  # parsed, but lacks a group
    first = ["{}", "[]", '{"ended": "epochs"}', '{"iteration": 1, "epoch": null, "mean_train_loss": 1}',
             '{"iteration": [1]}', '{"mean_train_loss": "low"}', '{"iteration": 0}']
    for text in [f"{record}\n{whole}" for record in first] + [whole + parsed]:
        log.write_text(text)
        with pytest.raises(ValueError) as e:
            noisy.main(out=str(tmp_path), draw_only=True)
        assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def swapped(tmp_path, old, new):
    """noisy.py with exactly one line replaced, as a module."""
    source = (ROOT / "noisy.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "swap").mkdir(exist_ok=True)
    (tmp_path / "swap" / "noisy_swapped.py").write_text(source.replace(old, new))
    sys.path.insert(0, str(tmp_path / "swap"))
    try:
        sys.modules.pop("noisy_swapped", None)
        return __import__("noisy_swapped")
    finally:
        sys.path.pop(0)


def test_swapping_the_network_is_one_line(tiny, tmp_path, capsys):
    mlp = swapped(tmp_path, "        network = common.resnet18(classes, in_channels=x.shape[1], width=o.width)\n",
                  "        network = nn.Sequential(nn.Flatten(), common.mlp([x[0].numel(), 50, classes]))\n")
    options = dict(dataset=str(tiny), out=str(tmp_path / "run"), **{**TINY, "epochs": 20})
    summary = mlp.main(**options)
    assert len(summary["at_clean_loss"]["alphas"]["1"]["levels"]) > 3
    tiny_run(tiny, tmp_path / "plain", alpha=[1], epochs=1)
    with pytest.raises(ValueError, match="theta0_crc32"):  # the same seed with another network
        mlp.main(**{**options, "out": str(tmp_path / "plain"), "alpha": [1]})
    assert "another text of noisy.py" in capsys.readouterr().out


def test_swapping_the_loss_is_one_line(tiny, tmp_path, capsys):
    line, = [line for line in (ROOT / "noisy.py").read_text().splitlines() if line.startswith("loss_of = ")]
    squared = swapped(tmp_path, line, "loss_of = lambda f, y: F.mse_loss(f, F.one_hot(y, f.shape[1]).to(f.dtype))")
    options = dict(dataset=str(tiny), **{**TINY, "epochs": 30, "lr": .02})
    summary = squared.main(out=str(tmp_path / "run"), **options)
    assert records(tmp_path / "run")[0]["mean_train_loss"] == pytest.approx(1 / 3)  # f = 0 against one-hot labels
    levels = [float(level) for level in summary["alphas"]["1"]["levels"]]
    assert len(levels) > 3 and max(levels) == .3 and records(tmp_path / "run")[-1]["mean_train_loss"] < .25
    tiny_run(tiny, tmp_path / "plain", alpha=[1], epochs=1)
    capsys.readouterr()
    squared.main(out=str(tmp_path / "plain"), **{**options, "alpha": [10], "epochs": 1, "lr": TINY["lr"]})
    assert "another text of noisy.py" in capsys.readouterr().out


@pytest.mark.parametrize("alpha", [1, 100, math.inf])
@pytest.mark.parametrize("script", ["noisy", "cscore", "spurious"])
def test_the_step_never_leaves_the_device(tmp_path, script, alpha, monkeypatch):
    """On torch's meta device, where reading a value, or a tensor left on the CPU, raises: what a CUDA graph needs."""
    steps = []

    class OnMeta:
        def __init__(self, o, *rest):
            self.o, self.step = o, None

        def minibatches(self, probe):
            for _ in range(3):
                steps.append(1)
                yield torch.arange(10, device="meta")

    arrays = tiny_arrays(classes=2)
    arrays.update({f"attribute_{s}": np.arange(len(arrays[f"y_{s}"])) % 5 // 2 % 2 for s in ("train", "test")})
    np.savez(tmp_path / "tiny.npz", **arrays)
    monkeypatch.setattr(common, "Run", OnMeta)
    monkeypatch.setattr(common, "Linearity", lambda *rest: None)
    module = __import__(script)
    given = dict(dataset=str(tmp_path / "tiny.npz"), **TINY)
    o = common.options(script, module.OPTIONS, module.QUICK, {**given, "lr": .01}, module.__file__)
    images, o.device = module.load(o), torch.device("meta")
    module.run(alpha, 0, images, o)
    assert len(steps) == 3


def test_jobs_make_the_same_records_and_end_together(tiny, tmp_path, capfd):
    options = {**TINY, "seeds": [0, 1], "epochs": 3}
    one = tiny_run(tiny, tmp_path / "one", **options)
    two = tiny_run(tiny, tmp_path / "two", jobs=2, **options)
    assert one["alphas"] == two["alphas"]
    for run in ("alpha=1_seed=0", "alpha=100_seed=1"):
        assert without_times(tmp_path / "one", run) == without_times(tmp_path / "two", run)
    bad = tmp_path / "two" / "alpha=100_seed=1" / "checkpoint.pt"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("not torch's", "")
    with pytest.raises(ValueError, match="cannot be read.*delete the folder"):  # an error in a child is the parent's one line
        tiny_run(tiny, tmp_path / "two", jobs=2, **{**options, "epochs": 4})
    import multiprocessing
    assert not multiprocessing.active_children()


def test_children_of_a_killed_parent_end(tiny, tmp_path):
    options = {**TINY, "epochs": 4000, "jobs": 2, "checkpoint_seconds": 0}
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path), **options)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(list(tmp_path.glob("*/log.jsonl"))) < 2:
        assert process.poll() is None
        time.sleep(.05)
    pids = children.read_text().split()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(.1)
    assert len(pids) >= 2 and not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)


def test_torchs_modes_and_defaults_do_not_matter(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "plain", alpha=[1, "inf"], epochs=1)
    with torch.no_grad():
        tiny_run(tiny, tmp_path / "no_grad", alpha=[1, "inf"], epochs=1)
    with torch.inference_mode():
        tiny_run(tiny, tmp_path / "inference", alpha=[1, "inf"], epochs=1)
    torch.set_default_dtype(torch.float64)
    try:
        tiny_run(tiny, tmp_path / "default", alpha=[1, "inf"], epochs=1)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in ("no_grad", "inference", "default"):
        for run in ("alpha=1_seed=0", "alpha=inf_seed=0"):
            assert without_times(tmp_path / "plain", run) == without_times(tmp_path / other, run), other


def test_a_rank_without_work_says_so(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5"), monkeypatch.setenv("WORLD_SIZE", "8")
    assert tiny_run(tiny, tmp_path, epochs=1) == {}
    assert "rank 5 of 8: there is no run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noisy", "cscore", "spurious"])
def test_quick_shows_the_effect(name, tmp_path):
    """For each seed the gap of alpha = 1 is larger at three levels or more, by more than .02 ln C."""
    script = __import__(name)
    for seed in (0, 1, 2):
        summary = script.main(quick=True, seeds=[seed], out=str(tmp_path), device="cpu")
        start = math.log(2 if name == "spurious" else 10)
        gaps = {level: row["gap"]["mean"] for level, row in summary["paired"]["1 - 100"]["levels"].items()
                if "gap" in row and float(level) < .8 * start}
        assert sum(gap > .02 * start for gap in gaps.values()) >= 3, (seed, gaps)
