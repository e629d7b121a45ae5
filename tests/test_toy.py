"""toy.py: runs trained as one against plain ones, its files, resuming and refusals."""
import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import toy

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
    one, other = toy.read(one), toy.read(other)
    for alpha in one | other:
        for name, array in one[alpha].items():
            np.testing.assert_allclose(array, other[alpha][name], rtol=1e-6, atol=.04 * (name == "maps"), err_msg=name)


@pytest.mark.parametrize("alpha", [.5, 1.0, 100.0, math.inf])
def test_training_as_one_equals_plain_loops(alpha):
    """Three runs at once against each alone, by common.center and common.scaled_sgd. A run ends at its last level."""
    o, levels, found, curves = options(), [.69, .68, .65, .62, .4], {}, {run: [] for run in range(3)}
    for run, level, iteration, theta, _ in toy.train([0, 1, 2], alpha, o, levels, curves):
        found[run, level] = iteration, [p.clone() for p in theta]
    assert len(found) >= 9 and (alpha > 5 or len({len(curve) for curve in curves.values()}) == 3)
    for run in range(3):
        f, optimizer, x, y = plain_run(run, alpha, o)
        losses, to_come = [], list(levels)
        for iteration in range(o.iterations + 1):
            loss = F.binary_cross_entropy_with_logits(f(x), (y > 0).double())
            losses.append(loss.item())
            while to_come and loss.item() <= to_come[0]:
                at, theta = found.pop((run, to_come.pop(0)))
                assert at == iteration
                for own, plain in zip(theta, optimizer.param_groups[0]["params"], strict=True):
                    torch.testing.assert_close(own.view_as(plain), plain, rtol=1e-9, atol=1e-12)
            if not to_come:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        marks = [mark for mark in toy.curve_marks(o.iterations) if mark < len(losses)]
        np.testing.assert_allclose(curves[run], [losses[mark] for mark in marks], rtol=1e-9)
    assert not found  # alone, each passes the same levels


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
    f, optimizer, x, y = plain_run(3, 5, options(lr=1.0))
    grid = toy.points(3, options())[1]
    wanted, inside = toy.label(grid)
    levels, kept, row = [.6, .5, .4, .3, .2, .1], toy.read(whole)[5.0], 3
    for iteration in range(301):
        loss = F.softplus(-y * f(x)).mean()
        while levels and loss <= levels[0]:
            column = toy.LEVELS.index(levels.pop(0))
            f_grid = f(grid)[:, 0].detach()
            test = F.softplus(-wanted * f_grid)
            accuracy = ((f_grid > 0) == (wanted > 0)).double().mean()
            for name, value in (("iteration", iteration), ("test_loss", test.mean()), ("test_acc", accuracy),
                                ("inside_loss", test[inside].mean()), ("outside_loss", test[~inside].mean())):
                assert kept[name][row, column] == pytest.approx(float(value))
            if toy.LEVELS[column] in toy.MAPS:
                kept_map = kept["maps"][row, toy.MAPS.index(toy.LEVELS[column])]
                np.testing.assert_allclose(kept_map, test.view(60, 60), atol=1 / 64 + 1e-6)  # steps of 1/32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(levels) < 6 and np.isnan(kept["iteration"][row, 6 - len(levels):]).all()  # not reached: absent
    summary = json.loads((whole / "summary.json").read_text())
    rows = common.where(summary["readings"], seed=3, alpha=5, on="train_loss")
    assert len(rows) == 6 - len(levels) and (whole / "toy.png").stat().st_size > 10000 and (whole / "toy.pdf").exists()
    assert rows[0]["gap"] == pytest.approx(rows[0]["inside_loss"] - rows[0]["outside_loss"], abs=1e-5)


def test_maps_are_means_over_the_runs_that_reached_both(whole):
    found, column = toy.read(whole), toy.LEVELS.index(.3)
    mean, runs = toy.mean_difference(found, .3, 1.0, 5.0)
    both = np.isfinite(found[1.0]["iteration"][:, column]) & np.isfinite(found[5.0]["iteration"][:, column])
    np.testing.assert_allclose(mean, (found[1.0]["maps"][both, 2].astype(float) - found[5.0]["maps"][both, 2]).mean(0))
    assert 0 < runs == both.sum() < 5


def test_a_run_that_diverges_is_reported_and_leaves_the_others_alone(whole, tmp_path, monkeypatch):
    def wild(run, o):
        made = network(run, o)
        made[0].weight.data.mul_(1e300 if run == 1 else 1)
        return made

    network, others = toy.network, [0, 2, 3, 4]
    monkeypatch.setattr(toy, "network", wild)
    monkeypatch.setattr(toy, "curve_marks", lambda iterations: [iterations])  # seen where another run passes a level
    summary = toy.main(**{**TINY, "alpha": [5]}, out=str(tmp_path))
    assert summary["diverged"] == ["alpha=5 run 1"] and {row["seed"] for row in summary["readings"]} <= set(others)
    kept, healthy = toy.read(tmp_path)[5.0]["test_loss"], toy.read(whole)[5.0]["test_loss"]
    np.testing.assert_allclose(kept[others], healthy[others], rtol=1e-6)


@pytest.mark.slow
def test_quick_shows_the_effect_and_the_animation(tmp_path):
    summary = toy.main(quick=True, animate=True, out=str(tmp_path), device="cpu")
    assert "holds in these runs" in summary["conclusion"]
    assert (tmp_path / "toy.gif").stat().st_size > 50000 and not list(tmp_path.glob("*.part*"))


def test_chunks_jobs_and_the_order_of_runs_do_not_matter(whole, tmp_path, monkeypatch):
    toy.main(**{**TINY, "chunk": 5, "jobs": 2}, out=str(tmp_path / "one"))
    assert_same(whole, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")  # two processes of torchrun, the second after the end of the first
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        toy.main(**TINY, out=str(tmp_path / "three"))
    assert_same(whole, tmp_path / "three")
    monkeypatch.undo()
    toy.main(**{**TINY, "alpha": [5], "runs": 3}, out=str(tmp_path / "two"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("runs=*.npz")}
    toy.main(**TINY, out=str(tmp_path / "two"))  # more alphas and runs extend it; what is there is not trained again
    assert_same(whole, tmp_path / "two")
    names = sorted(path.stem for path in (tmp_path / "two" / "alpha=5").glob("*.npz"))
    assert len(before) == 2 and names == ["runs=0-1", "runs=2-2", "runs=3-3", "runs=4-4"]  # chunks by the runs' numbers
    assert all(path.stat().st_mtime_ns == time_before for path, time_before in before.items())


@pytest.mark.parametrize("bad, says", [
    (dict(runs=0), "at least 1"), (dict(extra_dims=-1), "at least 0"), (dict(seeds=[1]), "unrecognized"),
    (dict(draw_only=True, animate=True), "choose one"), (dict(draw_only=True), "no records")])
def test_bad_input_is_refused_in_a_line(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says) as error:
        toy.main(**{**TINY, **bad}, out=str(tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_drawn_is_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    args, file = tmp_path / "alpha=5" / "args.json", tmp_path / "alpha=1" / "runs=0-1.npz"
    args.write_text(args.read_text().replace('"lr": 1.0', '"lr": 3.0'))  # no figure of runs of different options
    for given in (dict(draw_only=True), TINY):
        with pytest.raises(ValueError, match="alpha=5 holds a run with lr = 3.0"):
            toy.main(**given, out=str(tmp_path))
    shutil.copy(file, file.with_name("runs=0-0.npz"))  # two terminals wrote the same runs: each counts once
    assert_same(whole, tmp_path)
    np.savez(file, runs=[0, 1])
    with pytest.raises(ValueError, match="runs=0-1.npz does not hold what"):
        toy.main(out=str(tmp_path), draw_only=True)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="runs=0-1.npz: not a readable"):
        toy.main(out=str(tmp_path), draw_only=True)
