"""The training loop, its records and its refusals, through noisy.py on tiny data."""
import json
import math
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
from conftest import ROOT, TINY, tiny_arrays


def records(out, run="alpha=1_seed=0"):
    return [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
            for line in (pathlib.Path(out) / run / "log.jsonl").read_text().splitlines()]


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
        assert {p.name for p in (tmp_path / "run" / run).iterdir()} == {"args.json", "log.jsonl", "checkpoint.pt", ".lock"}
        log = records(tmp_path / "run", run)
        assert {"iteration", "epoch", "seconds", "train_loss", "train_acc", "mean_train_loss", "mean_train_acc", "test_loss",
                "test_acc", "clean_loss", "clean_acc", "noisy_loss", "noisy_acc", "noisy_true_acc"} <= set(log[1])
        for r in (log[0], log[-1]):
            assert {"ntk_alignment", "sign_similarity", "repr_alignment", "repr_alignment_gram", "linearisation_error",
                    "forward_noise", "update_noise"} <= set(r)
        assert log[0]["iteration"] == 0 and log[-1]["iteration"] == 36
        assert log[0]["train_loss"] == pytest.approx(math.log(3), rel=1e-6) and log[0]["mean_train_loss"] == pytest.approx(math.log(3))
        assert log[0]["linearisation_error"] is None  # 0 / 0
        for r in log:
            assert r["mean_train_loss"] == pytest.approx(.85 * r["clean_loss"] + .15 * r["noisy_loss"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["alphas"]) == {"1", "100"} and "1 - 100" in summary["paired"] and "options" in summary
    state = torch.load(tmp_path / "run" / "alpha=1_seed=0" / "checkpoint.pt", weights_only=True)
    assert state["ended"] == "epochs"
    assert out.rstrip().splitlines()[-1].startswith("wrote ")


def test_probes_come_at_every_four_percent(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=40, lr=.01)
    log = records(tmp_path)
    threshold = math.log(3)
    for r in log[1:-1]:
        assert r["train_loss"] < .96 * threshold
        while r["train_loss"] < .96 * threshold:
            threshold *= .96
    assert [("ntk_alignment" in r) for r in log[:-1]] == [i % 5 == 0 for i in range(len(log) - 1)]
    assert len(log) > 8


def test_same_seed_same_records_and_probes_change_nothing(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "a", alpha=[1])
    tiny_run(tiny, tmp_path / "b", alpha=[1])
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    tiny_run(tiny, tmp_path / "c", alpha=[1], seeds=[1])
    assert without_times(tmp_path / "a") != without_times(tmp_path / "c", "alpha=1_seed=1")
    # other examples in the linearity measures: another measurement of the same trajectory
    tiny_run(tiny, tmp_path / "d", alpha=[1], probe_examples=3)
    load = lambda d: torch.load(tmp_path / d / "alpha=1_seed=0" / "checkpoint.pt", weights_only=True)["parameters"]
    assert all(torch.equal(p, q) for p, q in zip(load("a"), load("d")))


def test_training_equals_a_loop_written_out(tiny, tmp_path):
    """The recorded trajectory against a plain loop: own forward passes, own gradient step, same data and order."""
    tiny_run(tiny, tmp_path, alpha=[10], epochs=2, dtype="float64", momentum=.9)
    images = common.load_images(str(tiny))
    o = noisy.common.parse(noisy.make_parser(), {}, [], dict(dataset=str(tiny), **{**TINY, "alpha": [10], "dtype": "float64"}))
    with common.seeded("init", 0):
        model = common.resnet18(3, width=TINY["width"]).double()
    theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in theta]
    y = torch.as_tensor(common.flip_labels(images["y_train"], .15, 3, 0))
    x = common.Examples(images["x_train"], images["y_train"], images["mean"], images["std"], o).pixels(torch.arange(60))
    names = [n for n, _ in model.named_parameters()]
    call = lambda: torch.func.functional_call(model, dict(zip(names, theta)), (x[batch],))
    shuffle = common.generator("order", 0)
    for epoch in range(2):
        order = torch.randperm(60, generator=shuffle)
        for k in range(6):
            batch = order[10 * k:10 * k + 10]
            loss = torch.nn.functional.cross_entropy(10 * (call() - model(x[batch]).detach()), y[batch])
            for p, v, g in zip(theta, velocity, torch.autograd.grad(loss, theta)):
                v.mul_(.9).add_(g)
                p.data.sub_(TINY["lr"] / 10**2 * v)
    saved = torch.load(tmp_path / "alpha=10_seed=0" / "checkpoint.pt", weights_only=True)["parameters"]
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(theta, saved))


@pytest.mark.parametrize("alpha", [1, "inf"])
def test_more_epochs_equal_as_many_at_once(tiny, tmp_path, alpha):
    tiny_run(tiny, tmp_path / "a", alpha=[alpha], epochs=2)
    tiny_run(tiny, tmp_path / "a", alpha=[alpha], epochs=5)
    tiny_run(tiny, tmp_path / "b", alpha=[alpha], epochs=5)
    run = f"alpha={alpha}_seed=0"
    assert without_times(tmp_path / "a", run) == without_times(tmp_path / "b", run)
    assert records(tmp_path / "a", run)[-1]["iteration"] == 30


def test_finished_runs_are_only_drawn_again(tiny, tmp_path, capsys):
    first = tiny_run(tiny, tmp_path)
    before = (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes()
    (tmp_path / "noisy.png").unlink()
    assert tiny_run(tiny, tmp_path)["alphas"] == first["alphas"]
    assert (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes() == before and (tmp_path / "noisy.png").exists()
    assert "already finished" in capsys.readouterr().out
    (tmp_path / "noisy.png").unlink()
    shutil.rmtree(tmp_path / "alpha=100_seed=0")
    assert set(noisy.main(out=str(tmp_path), draw_only=True)["alphas"]) == {"1"}  # whatever is there, without any data
    assert (tmp_path / "noisy.png").exists()


def test_stop_loss_ends_the_run_and_a_lower_one_continues_it(tiny, tmp_path, capsys):
    more = dict(alpha=[1], epochs=60, lr=.01)
    tiny_run(tiny, tmp_path, stop_loss=.8, **more)
    log = records(tmp_path)
    assert log[-1]["mean_train_loss"] < .8 <= min(r["mean_train_loss"] for r in log[:-1]) and "ntk_alignment" in log[-1]
    state = torch.load(tmp_path / "alpha=1_seed=0" / "checkpoint.pt", weights_only=True)
    assert state["ended"] == "stop-loss" and state["momentum"] == []  # a finished run keeps its parameters alone
    tiny_run(tiny, tmp_path, stop_loss=.6, **more)
    longer = records(tmp_path)
    assert longer[:len(log)] == log and longer[-1]["mean_train_loss"] < .6
    assert "momentum was not kept" in capsys.readouterr().out


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


def test_fresh_moves_the_old_run_aside(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    before = (tmp_path / "alpha=1_seed=0" / "log.jsonl").read_bytes()
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1, lr=.03, fresh=True)
    assert (tmp_path / "alpha=1_seed=0.old-1" / "log.jsonl").read_bytes() == before
    assert records(tmp_path)[-1] != json.loads(before.splitlines()[-1])


def test_second_process_on_the_same_run_is_refused(tiny, tmp_path):
    with common.lock(tmp_path / "alpha=1_seed=0"):
        process = start("noisy.py", dataset=str(tiny), out=str(tmp_path), **{**TINY, "alpha": [1]})
        out, err = process.communicate()
    assert process.returncode == 2 and "another process" in err and len(err.splitlines()) == 1


def test_divergence_is_one_clear_line_and_the_others_go_on(tiny, tmp_path):
    process = start("noisy.py", dataset=str(tiny), out=str(tmp_path), **{**TINY, "lr": 1e6, "alpha": [1, 1e10], "dtype": "float64"})
    out, err = process.communicate()
    assert process.returncode == 1, err
    line, = [l for l in out.splitlines() if "diverged at" in l]
    assert "alpha=1_seed=0" in line and "smaller --lr" in line
    assert records(tmp_path)[-1]["mean_train_loss"] is None
    assert records(tmp_path, "alpha=1e+10_seed=0")[-1]["mean_train_loss"] is not None
    assert json.loads((tmp_path / "summary.json").read_text())["diverged"] == ["alpha=1_seed=0"]


def test_stuck_run_is_warned_about_once(tiny, tmp_path, capsys):
    tiny_run(tiny, tmp_path, alpha=[1], lr=1e-9, epochs=8)
    assert capsys.readouterr().out.count("still 1.09") == 1


def test_rounding_warnings(tiny, tmp_path, capsys):
    """Silent at alpha = 100, update warning at 1e4, both at 1e6 (float32); none of them in float64."""
    def warned(alpha, dtype):
        tiny_run(tiny, tmp_path / f"{alpha}{dtype}", alpha=[alpha], epochs=1, dtype=dtype, width=8)
        out = capsys.readouterr().out
        return "forward_noise" in out, "update_noise" in out
    assert warned(100, "float32") == (False, False)
    assert warned(10000, "float32") == (False, True)
    assert warned(1000000, "float32") == (True, True)
    assert warned(1000000, "float64") == (False, False)


def test_update_noise_against_a_step_that_is_really_taken():
    torch.manual_seed(0)
    f = common.center(common.mlp([20, 50, 3]), 1e5)
    optimizer = common.scaled_sgd(f, .1, .9)
    x, y = torch.randn(16, 20), torch.randint(3, (16,))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(f(x), y).backward()
        before = [p.detach().clone() for p in f.model.parameters()]
        noise = common.update_noise(optimizer, [p.grad for p in f.model.parameters()])
        optimizer.step()
        intended = [-.1 / 1e10 * optimizer.state[p]["momentum_buffer"].double() for p in f.model.parameters()]
        applied = [p.detach().double() - b.double() for p, b in zip(f.model.parameters(), before)]
        lost = math.sqrt(sum((a - i).square().sum().item() for a, i in zip(applied, intended)))
        assert noise == pytest.approx(lost / math.sqrt(sum(i.square().sum().item() for i in intended)), rel=1e-2)
    assert noise > .05


def test_infinite_alpha(tiny, tmp_path):
    summary = tiny_run(tiny, tmp_path, alpha=[1, 100, "inf"])
    assert set(summary["alphas"]) == {"1", "100", "inf"} and "100 - inf" in summary["paired"]
    last = records(tmp_path, "alpha=inf_seed=0")[-1]
    assert last["linearisation_error"] == 0 and last["ntk_alignment"] == 1 and last["train_loss"] < 1.05
    lazy = records(tmp_path, "alpha=100_seed=0")[-1]
    assert last["train_loss"] == pytest.approx(lazy["train_loss"], rel=.05) and 0 < lazy["linearisation_error"] < .3


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
                              (dict(draw_only=True, out=str(tmp_path / "empty")), "there is no folder")):
        process = start("noisy.py", **options)
        out, err = process.communicate()
        assert process.returncode == 2 and expected in err and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert not (tmp_path / "empty").exists()


def test_keywords_and_command_line_mean_the_same():
    p = noisy.make_parser()
    a = common.parse(p, noisy.QUICK, ["--alpha", "1", "inf", "--lr", "0.25", "--quick"], {})
    b = common.parse(noisy.make_parser(), noisy.QUICK, None, dict(alpha=[1, math.inf], lr=.25, quick=True))
    assert vars(a) == vars(b)
    assert a.dataset == "synthetic" and a.lr == .25  # explicit options win over --quick


def test_fuzzed_options():
    """A few hundred seeded command lines: every outcome is a namespace or one clear line."""
    rng, good = np.random.default_rng(0), 0
    flags = [a.option_strings[0] for a in noisy.make_parser()._actions if a.dest not in ("help", "device", "draw_only")]
    values = ["0", "1", "-1", "1e400", "nan", "inf", "-inf", "", "abc", "1.5", "--", "é", "1_0", "0x10", "1e-300", "9" * 400, "[1]"]
    for _ in range(400):
        argv = []
        for _ in range(rng.integers(1, 4)):
            argv += [str(rng.choice(flags))] + [str(v) for v in rng.choice(values, rng.integers(0, 3))]
        try:
            common.parse(noisy.make_parser(), noisy.QUICK, argv, {})
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
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130 and len(err.strip().splitlines()) == 1 and "goes on" in err
    assert len(records(tmp_path / "a")) < 12
    # what a half-written last line would leave behind
    with open(tmp_path / "a" / "alpha=1_seed=0" / "log.jsonl", "ab") as log:
        log.write(b'{"iteration": 12, "ep')
    tiny_run(tiny, tmp_path / "a", alpha=[1], **LONG)
    tiny_run(tiny, tmp_path / "b", alpha=[1], **LONG)
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_damaged_checkpoint_falls_back_to_the_one_before(tiny, tmp_path, capsys):
    interrupted(tiny, tmp_path / "a", 4, signal.SIGKILL, **LONG)
    folder = tmp_path / "a" / "alpha=1_seed=0"
    assert (folder / "checkpoint.previous.pt").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    data = bytearray((folder / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1  # one bit: the archive's own checksum tells
    (folder / "checkpoint.pt").write_bytes(data)
    tiny_run(tiny, tmp_path / "a", alpha=[1], **LONG)
    assert "checkpoint.pt: unusable" in capsys.readouterr().out
    tiny_run(tiny, tmp_path / "b", alpha=[1], **LONG)
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = tmp_path / "c" / "alpha=1_seed=0" / name
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no checkpoint is usable"):
        tiny_run(tiny, tmp_path / "c", alpha=[1], **LONG)
    assert len(records(tmp_path / "c")) >= 4  # nothing recorded is lost


def test_full_disk_is_one_line_and_earlier_records_stay(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    before = records(tmp_path)
    script = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.path.insert(0, sys.argv[1]); "
              "sys.argv = sys.argv[1:]; import common, noisy; common.command_line(noisy.main)")
    argv = words(dict(dataset=str(tiny), out=str(tmp_path), **{**TINY, "alpha": [1], "epochs": 12, "checkpoint_seconds": 0}))
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
@pytest.mark.parametrize("moment", range(10))
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
    monkeypatch.setattr(common, "graphed", lambda step, *rest: step)
    tiny_run(tiny, tmp_path / "plain", device="cuda", dtype="float64")
    for run in ("alpha=1_seed=0", "alpha=100_seed=0"):
        a, b = records(tmp_path / "graph", run), records(tmp_path / "plain", run)
        assert len(a) == len(b)
        assert all(r["train_loss"] == pytest.approx(q["train_loss"], rel=1e-7) for r, q in zip(a, b))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu_up_to_rounding(tiny, tmp_path):
    tiny_run(tiny, tmp_path / "gpu", device="cuda", dtype="float64", epochs=2)
    tiny_run(tiny, tmp_path / "cpu", dtype="float64", epochs=2)
    a, b = records(tmp_path / "gpu")[-1], records(tmp_path / "cpu")[-1]
    assert a["mean_train_loss"] == pytest.approx(b["mean_train_loss"], rel=1e-6)


def test_a_run_of_another_script_is_refused(tiny, tmp_path):
    import cscore
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    with pytest.raises(ValueError, match="script = noisy.py"):
        cscore.main(dataset=str(tiny), out=str(tmp_path), **{**TINY, "alpha": [1], "epochs": 1})
    with pytest.raises(ValueError, match="run of noisy.py"):
        cscore.main(out=str(tmp_path), draw_only=True)


def test_records_without_a_checkpoint_are_kept(tiny, tmp_path, capsys):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=2)
    folder = tmp_path / "alpha=1_seed=0"
    before = (folder / "log.jsonl").read_bytes()
    (folder / "checkpoint.pt").unlink()
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    assert (folder / "log.jsonl.old-1").read_bytes() == before and "no checkpoint" in capsys.readouterr().out


def test_missing_args_are_refused(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1)
    (tmp_path / "alpha=1_seed=0" / "args.json").unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        tiny_run(tiny, tmp_path, alpha=[1], epochs=1, noise=.3)
    tiny_run(tiny, tmp_path, alpha=[1], epochs=1, noise=.3, fresh=True)
    assert (tmp_path / "alpha=1_seed=0.old-1" / "log.jsonl").exists()


def test_summary_says_what_its_runs_are(tiny, tmp_path):
    tiny_run(tiny, tmp_path, alpha=[100], epochs=1)
    assert tiny_run(tiny, tmp_path, alpha=[1], epochs=1, noise=.3, levels=[1.05])["options"]["noise"] == .3
    with pytest.raises(ValueError, match="differ in noise"):
        noisy.main(out=str(tmp_path), draw_only=True)
    again = noisy.main(["--draw-only", "--alpha=1", "--out", str(tmp_path)])
    assert again["options"]["alpha"] == ["1"] and again["options"]["levels"] == [1.05]
