"""toy.py: runs trained as one against plain ones, its files, resuming and refusals."""
import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import toy
from conftest import ROOT

TINY = dict(alpha=[1, 5], runs=5, chunk=2, width=12, lr=1.0, iterations=300, dtype="float64", device="cpu")


def options(**more):
    return argparse.Namespace(**{"width": 12, "lr": .5, "iterations": 300, "extra_dims": 5, "dtype": torch.float64,
                                 "device": torch.device("cpu"), **more})


def plain_run(run, alpha, o):
    """One network on its own, and its training data: what training as one must reproduce."""
    x = toy.points(run, o)[0]
    f = common.center(toy.network(run, o), alpha)
    return f, common.scaled_sgd(f, o.lr), x, toy.label(x)[0][:, None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished folder of the TINY options; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    toy.main(**TINY, out=str(out))
    return out


def assert_same(one, other):
    """Two folders hold the same, up to rounding; a map may be a step of 1/32 off."""
    one, other = toy.read(one), toy.read(other)
    assert one.keys() == other.keys()
    for alpha in one:
        for name, array in one[alpha].items():
            np.testing.assert_allclose(array, other[alpha][name], rtol=1e-6, atol=.04 * (name == "maps"), err_msg=name)


@pytest.mark.parametrize("alpha", [.5, 1.0, 100.0, math.inf])
def test_training_as_one_equals_plain_loops(alpha):
    """Three runs at once against each alone: nn.Sequential, common.center, common.scaled_sgd. Losses, the first
    iteration at or below each level, and the outputs there."""
    o, levels, found, losses_at = options(), [.69, .68, .65, .62, .4], {}, {}
    for iteration, losses, passed, outputs in toy.train([0, 1, 2], alpha, o, levels, o.iterations):
        losses_at[iteration] = losses
        for run, level in passed:
            found[run, level] = iteration, outputs(run, toy.points(run, o)[1])
    assert len(found) >= 9 and losses_at.keys() >= {mark for mark in toy.curve_marks(300) if mark <= iteration}
    for run in range(3):
        f, optimizer, x, y = plain_run(run, alpha, o)
        to_come = list(levels)
        for iteration in range(max(losses_at) + 1):
            loss = F.binary_cross_entropy_with_logits(f(x), (y > 0).double())
            if iteration in losses_at:
                assert losses_at[iteration][run] == pytest.approx(loss.item(), rel=1e-9)
            while to_come and loss.item() <= to_come[0]:
                at, outputs = found.pop((run, to_come.pop(0)))
                assert at == iteration
                torch.testing.assert_close(outputs, f(toy.points(run, o)[1])[:, 0], rtol=1e-9, atol=1e-12)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not found  # no run passed a level that it does not pass alone


def test_linear_limit_is_kernel_gradient_descent():
    """Independent of the tangent's code: in function space f <- f - lr K dL/df with the NTK at theta0."""
    o, found = options(), {}
    for iteration, losses, passed, _ in toy.train([0, 1], math.inf, o, [.1], 120):
        found[iteration] = losses
    assert not passed and max(found) == 120
    for run in (0, 1):
        _, _, x, y = plain_run(run, 1, o)
        K = common.empirical_ntk(toy.network(run, o), x)[:, 0, :, 0].detach()
        f = torch.zeros_like(y)
        for iteration in range(121):
            if iteration in found:
                assert found[iteration][run] == pytest.approx(F.softplus(-y * f).mean().item(), rel=1e-9)
            f = f - o.lr * K @ (-y * torch.sigmoid(-y * f) / len(y))


def test_labels_and_grid():
    x = torch.tensor([[-.5, .5], [.5, -.5], [-.5, -.5], [.5, .5], [0, -.9], [-.5, .79], [-.5, .81]])
    y, hard = toy.label(x)
    assert y.tolist() == [-1, 1, -1, 1, -1, -1, 1] and hard.int().tolist() == [1, 1, 0, 0, 0, 1, 0]
    (x, grid), (x1, grid1) = toy.points(0, options()), toy.points(1, options())
    assert x.shape == (100, 7) and grid.shape == (3600, 7) and not torch.equal(x, x1)
    assert torch.equal(grid[:, :2], grid1[:, :2]) and not (grid[:, 2:] == grid1[:, 2:]).any()
    plane = grid.view(60, 60, 7)
    assert (plane[0, :, 1] == -1).all() and (plane[-1, :, 1] == 1).all() and (plane[:, 0, 0] == -1).all()
    assert len(grid[:, 2:].unique()) == 5 * 3600 and abs(grid[:, 2:].mean()) < .02


def test_what_is_kept_is_of_the_crossing_network(whole):
    """Every number of run 3 at alpha = 5, from a plain loop; and the summary's rows and picture."""
    o = options(lr=1.0)
    f, optimizer, x, y = plain_run(3, 5, o)
    grid = toy.points(3, o)[1]
    wanted, inside = toy.label(grid)
    levels, kept, row = [.6, .5, .4, .3, .2, .1], toy.read(whole)[5.0], 3
    for iteration in range(301):
        loss = F.softplus(-y * f(x)).mean()
        while levels and loss <= levels[0]:
            column, predicted = toy.LEVELS.index(levels.pop(0)), f(grid)[:, 0].detach()
            test, correct = F.softplus(-wanted * predicted), ((predicted > 0) == (wanted > 0)).double()
            values = {"iteration": iteration, "test_loss": test.mean(), "test_acc": correct.mean(),
                      "inside_loss": test[inside].mean(), "outside_loss": test[~inside].mean()}
            for name, value in values.items():
                assert kept[name][row, column] == pytest.approx(value)
            if toy.LEVELS[column] in toy.MAPS:
                kept_map = kept["maps"][row, toy.MAPS.index(toy.LEVELS[column])]
                np.testing.assert_allclose(kept_map, test.view(60, 60), atol=1 / 64 + 1e-6)  # steps of 1/32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(levels) < 6 and np.isnan(kept["iteration"][row, 6 - len(levels):]).all()  # not reached: absent
    summary = json.loads((whole / "summary.json").read_text())
    rows = [r for r in summary["readings"] if r["seed"] == 3 and r["alpha"] == 5]
    assert len(rows) == 6 - len(levels) and rows[0]["on"] == "train_loss"
    assert rows[0]["gap"] == pytest.approx(rows[0]["inside_loss"] - rows[0]["outside_loss"], abs=1e-5)
    assert (whole / "toy.png").stat().st_size > 10000 and (whole / "toy.pdf").exists()
    assert [summary["options"][key] for key in ("script", "network", "loss")] == ["toy", "MLP", "softplus"]


def test_maps_are_means_over_the_runs_that_reached_both(whole):
    found = toy.read(whole)
    mean, runs = toy.mean_difference(found, .5, 1.0, 5.0)
    column = toy.LEVELS.index(.5)
    both = np.isfinite(found[1.0]["iteration"][:, column]) & np.isfinite(found[5.0]["iteration"][:, column])
    expected = (found[1.0]["maps"][both, 0].astype(float) - found[5.0]["maps"][both, 0]).mean(0)
    assert runs == both.sum() > 0
    np.testing.assert_allclose(mean, expected)


def test_a_run_that_diverges_is_reported(tmp_path):
    summary = toy.main(**{**TINY, "alpha": [1], "lr": 1e30, "runs": 2}, out=str(tmp_path))
    assert summary["diverged"] == ["alpha=1 run 0", "alpha=1 run 1"] and summary["readings"] == []


def test_many_alphas_draw_the_effect_against_alpha(tmp_path, capsys):
    toy.main(**{**TINY, "alpha": [.5, 1, 5, "inf"], "runs": 3, "width": 20, "lr": .8}, out=str(tmp_path))
    printed, iterations = capsys.readouterr().out, toy.read(tmp_path)[1.0]["iteration"]
    assert (tmp_path / "toy_alphas.png").exists() and "At train_loss 0.5" in printed
    assert f"{np.median(iterations[:, 0]):.0f} (3/3)" in printed.split("Median")[1]
    toy.main(out=str(tmp_path), draw_only=True)  # as the runs that are there were


@pytest.mark.slow
def test_quick_shows_the_effect_and_the_animation(tmp_path):
    summary = toy.main(quick=True, animate=True, out=str(tmp_path), device="cpu")
    assert "holds in these runs" in summary["conclusion"]
    assert (tmp_path / "toy.gif").stat().st_size > 50000 and not list(tmp_path.glob("*.part*"))


# Resuming and refusals


def test_chunks_jobs_and_the_order_of_runs_do_not_matter(whole, tmp_path):
    toy.main(**{**TINY, "chunk": 5, "jobs": 2}, out=str(tmp_path / "one"))
    assert_same(whole, tmp_path / "one")
    toy.main(**{**TINY, "alpha": [5], "runs": 3}, out=str(tmp_path / "two"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("runs=*.npz")}
    toy.main(**TINY, out=str(tmp_path / "two"))  # more alphas and runs extend it; what is there is not trained again
    assert_same(whole, tmp_path / "two")
    assert len(before) == 2 and all(path.stat().st_mtime_ns == time_before for path, time_before in before.items())


def test_killed_run_continues(whole, tmp_path):
    words = [word for key, value in {**TINY, "out": tmp_path, "jobs": 1}.items() for word in
             [f"--{key}", *map(str, value if isinstance(value, list) else [value])]]
    process = subprocess.Popen([sys.executable, str(ROOT / "toy.py"), *words], stdout=subprocess.DEVNULL)
    while not list(tmp_path.rglob("runs=2-3.npz")) and process.poll() is None:
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    toy.main(**TINY, out=str(tmp_path))
    assert_same(whole, tmp_path)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("option, value", [("lr", .4), ("width", 9), ("iterations", 200), ("dtype", "float32")])
def test_other_options_are_refused(whole, option, value):
    with pytest.raises(ValueError, match=f"holds a run with {option} = "):
        toy.main(**{**TINY, option: value}, out=str(whole))


@pytest.mark.parametrize("bad, says", [
    (dict(runs=0), "at least 1"), (dict(extra_dims=-1), "at least 0"), (dict(seeds=[1]), "unrecognized"),
    (dict(draw_only=True, animate=True), "choose one"), (dict(draw_only=True), "no records")])
def test_bad_input_is_refused_in_a_line(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says) as error:
        toy.main(**{**TINY, **bad}, out=str(tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out" / "alpha=1" / "runs=0-1.npz"
    shutil.copy(path, path.with_name("runs=0-2.npz"))
    assert_same(whole, tmp_path / "out")  # two terminals wrote the same runs: each counts once
    np.savez(path, runs=[0, 1])
    with pytest.raises(ValueError, match="alpha=1/runs=0-1.npz holds no runs"):
        toy.main(**TINY, out=str(tmp_path / "out"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="alpha=1/runs=0-1.npz: not a readable"):
        toy.main(draw_only=True, out=str(tmp_path / "out"))
