"""toy.py: runs trained as one against plain ones, its files, pictures, resuming and refusals."""
import argparse
import shutil

import numpy as np
import pytest
import torch
from matplotlib.animation import PillowWriter

import common
import experiment
import toy
from conftest import refused

TINY = dict(alpha=[1, 5], runs=5, chunk=2, width=12, lr=1.0, iterations=300, dtype="float64", device="cpu")
O = argparse.Namespace(**{**TINY, "extra_dims": 5, "dtype": torch.float64, "device": torch.device("cpu")})


def plain(run, alpha, levels, losses, iterations=300):
    """One network by common.center and scaled_sgd: (level, iteration, f^alpha, optimizer) where it comes to a level."""
    x, to_come = toy.points(run, O)[0], list(levels)
    y, f = toy.label(x)[0][:, None], common.center(toy.network(run, O), alpha)
    optimizer = common.scaled_sgd(f, O.lr)
    while to_come and len(losses) <= iterations:
        loss = torch.log(1 + torch.exp(-y * f(x))).mean()
        losses.append(loss.item())
        while to_come and loss <= to_come[0]:
            yield to_come.pop(0), len(losses) - 1, f, optimizer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished folder of the TINY options, to which alpha = 1 and two runs were added. Not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    toy.main(**{**TINY, "alpha": [5], "runs": 3}, out=out)
    toy.main(**TINY, out=out)
    return out


@pytest.mark.parametrize("alpha", [.5, 1.0, 100.0, np.inf])
def test_training_three_runs_as_one_equals_plain_loops(alpha):
    found, curves, levels = {}, {0: [], 1: [], 2: []}, [.69, .68, .65, .62, .4]
    for run, level, iteration, theta, _ in toy.train([0, 1, 2], alpha, O, levels, curves):
        found[run, level] = iteration, torch.nn.utils.parameters_to_vector(theta)
    assert len(found) >= 9 and (alpha > 5 or len({len(curve) for curve in curves.values()}) == 3)
    for run in curves:
        losses = []
        for level, iteration, _, optimizer in plain(run, alpha, levels, losses):
            at, theta = found.pop((run, level))
            alone = torch.nn.utils.parameters_to_vector(optimizer.param_groups[0]["params"])
            assert at == iteration and torch.allclose(theta, alone, 1e-9, 1e-12)
        np.testing.assert_allclose(curves[run], [losses[k] for k in toy.curve_marks(300) if k < len(losses)], 1e-9)
    assert not found  # alone, each passes the same levels


def test_labels_and_what_is_kept_of_the_crossing_network(whole):
    """Labels by hand; of run 3 at alpha = 5 every number, from a plain loop. No two runs have a point in common."""
    y, hard = toy.label(torch.tensor([[-.5, .5], [.5, -.5], [-.5, -.5], [.5, .5], [0, -.9], [-.5, .79], [-.5, .81]]))
    assert y.tolist() == [-1, 1, -1, 1, -1, -1, 1] and hard.int().tolist() == [1, 1, 0, 0, 0, 1, 0]
    (x, grid), axis, found, gaps = toy.points(3, O), np.linspace(-1, 1, 60), toy.read(whole), []
    np.testing.assert_allclose(grid.view(60, 60, 7)[..., :2], np.stack(np.meshgrid(axis, axis), -1))
    assert not (torch.cat([x, grid]) == torch.cat(toy.points(2, O)))[:, 2:].any()
    y, inside = toy.label(grid)
    for level, iteration, f, _ in plain(3, 5, toy.LEVELS, []):
        margin = (y * f(grid)[:, 0]).detach()
        loss = torch.log(1 + torch.exp(-margin))
        values = [iteration, loss.mean(), (margin > 0).double().mean(), loss[inside].mean(), loss[~inside].mean()]
        np.testing.assert_allclose([found[5][name][3, len(gaps)] for name in toy.MEASURED], values)
        if level in toy.MAPS:  # kept in steps of 1/32
            assert abs(found[5]["maps"][3, toy.MAPS.index(level)] - loss.view(60, 60).numpy()).max() < 1 / 64 + 1e-6
        gaps.append(values[3] - values[4])
    assert 0 < len(gaps) < 6 and (whole / "toy.png").stat().st_size > 10000
    np.testing.assert_allclose(toy.readings(found).values["gap"][1, 3], gaps + [np.nan] * (6 - len(gaps)))


def test_maps_are_means_over_runs_that_reached_both_and_four_alphas_are_drawn(whole, tmp_path, monkeypatch):
    figures, out = {}, shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(experiment, "save_figure", lambda figure, o, name: figures.update({name: figure}))
    toy.main(**{**TINY, "alpha": [2, 3]}, out=out)
    maps, lines = [ax for ax in figures["toy"].axes if ax.images][1:], figures["toy_alphas"].axes[0].containers
    for k, (ax, container, level) in enumerate(zip(maps, lines, [.5, .4, .3], strict=True)):
        found = toy.read(out)
        gap = toy.readings(found).values["gap"][..., toy.LEVELS.index(level)]  # (4, 5), of alphas 1, 2, 3, 5
        both = np.isfinite(gap[0] - gap[3])
        mean = (found[1]["maps"][both, k].astype(float) - found[5]["maps"][both, k]).mean(0)
        assert np.allclose(ax.images[0].get_array(), mean) and ax.get_xlabel() == f"mean of {both.sum()} runs"
        np.testing.assert_allclose(container.lines[0].get_xydata().T, [[1, 2, 3], np.nanmean(gap[:3] - gap[3], 1)])
    assert 0 < both.sum() < 5


def test_a_run_that_diverges_is_reported_and_leaves_the_others_alone(whole, tmp_path, monkeypatch):
    points, others = toy.points, [0, 2, 3, 4]
    monkeypatch.setattr(toy, "points", lambda run, o: [x * (1e300 if run == 1 else 1) for x in points(run, o)])
    summary = toy.main(**{**TINY, "alpha": [5]}, out=tmp_path)
    assert summary["diverged"] == ["alpha=5 run 1"] and {row["seed"] for row in summary["readings"]} == set(others)
    np.testing.assert_allclose(*(toy.read(out)[5]["test_loss"][others] for out in (tmp_path, whole)), rtol=1e-6)


def test_chunks_torchrun_and_the_order_of_runs_do_not_matter(whole, tmp_path, monkeypatch):
    assert {path.stem for path in (whole / "alpha=5").glob("runs*")} == {"runs=0-1", "runs=2-2", "runs=3-3", "runs=4-4"}
    monkeypatch.setenv("WORLD_SIZE", "2")  # two processes of torchrun, the first after the end of the second
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert toy.main(**{**TINY, "chunk": 3}, out=tmp_path) == {}
    shutil.copy(tmp_path / "alpha=1" / "runs=0-2.npz", tmp_path / "alpha=1" / "runs=0-1.npz")  # each run counts once
    for alpha, arrays in toy.read(whole).items():
        for name, array in arrays.items():
            np.testing.assert_allclose(array, toy.read(tmp_path)[alpha][name], 1e-6, .04 * (name == "maps"))


def test_what_cannot_be_run_or_drawn_is_refused(whole, tmp_path):
    for bad, says in (({"runs": 0}, "above 0"), ({"seeds": [1]}, "unrecog"), ({"draw_only": True}, "no records")):
        refused(says, toy.main, **{**TINY, **bad}, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    out = shutil.copytree(whole, tmp_path / "out")
    args, file = out / "alpha=5" / "args.json", out / "alpha=1" / "runs=0-1.npz"
    args.write_text(args.read_text().replace('"lr": 1.0', '"lr": 3.0'))  # no figure of runs of different options
    for given in (dict(draw_only=True), TINY):
        refused("alpha=5 is a run with lr = 3.0, not 1.0", toy.main, **given, out=out)
    file.write_bytes(file.read_bytes()[:-40])
    refused("runs=0-1.npz is missing, or not a readable", toy.main, out=out, draw_only=True)


def test_counts_under_a_panel_of_the_animation_equal_independent_ones(tmp_path, monkeypatch):
    texts, grab, counts = [], PillowWriter.grab_frame, {.66: [], .6: [], .5: []}
    monkeypatch.setattr(toy, "FRAMES", list(counts))
    monkeypatch.setattr(PillowWriter, "grab_frame", lambda w: grab(w) or texts.append(w.fig.axes[1].get_xlabel()))
    toy.main(**{**TINY, "runs": 2}, animate=True, out=tmp_path)
    for run in (0, 1):
        y, hard = toy.label(x := toy.points(run, O)[0])
        for level, _, f, _ in plain(run, 5, toy.FRAMES, [], 3000):
            right = (f(x)[:, 0] > 0) == (y > 0)
            counts[level].append([some.sum().item() for some in (right & hard, hard, right & ~hard, ~hard)])
    assert (tmp_path / "toy.gif").stat().st_size > 9999
    for level, text in zip([.66, .6] + 9 * [.5], texts, strict=True):  # it rests on the last
        numbers = [float(word.strip(",")) for word in text.split() if word[0].isdigit()]
        assert numbers == pytest.approx([2, *np.mean(counts[level], 0)], abs=.051)
