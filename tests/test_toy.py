"""toy.py: the batched run against plain ones, its records, resuming and refusals."""
import json
import math
import os
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

TINY = dict(alpha=[1, 20], runs=5, chunk=2, width=8, lr=.5, iterations=300, probe_examples=8, dtype="float64", device="cpu")


def options(**more):
    return common.parse(toy.make_parser(), toy.QUICK, [], {**TINY, **more})


def quiet():
    return common.Progress("test", 1, 0)


def records(folder):
    return [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
            for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("alpha", [1.0, .5, 30.0, math.inf])
def test_batched_run_equals_plain_runs(alpha):
    """Three runs at once against each alone: nn.Sequential, autograd, common.center, common.scaled_sgd. The rich ones
    reach the last level at different times, so that the batch shrinks under those that stay."""
    o, levels, found = options(width=12, iterations=400), [.69, .68, .65, .62, .4], {}

    def crossing(batch, i, level, iteration, loss):
        found[batch.runs[i], level] = iteration, loss, [t[i].clone() for t in (*batch.W, *batch.b)]

    _, ends = toy.train([0, 1, 2], alpha, o, levels, crossing, quiet())
    assert len(found) >= 9 and len({end["iteration"] for end in ends.values()}) == (3 if alpha < 5 else 1)
    for run in range(3):
        x, _, _ = toy.points(run, o)
        y = (toy.label(o.task, x)[0] > 0).double()[:, None]
        centered = common.center(toy.network(run, o), alpha)
        optimizer = common.scaled_sgd(centered, o.lr)
        crossed = {}
        for iteration in range(ends[run]["iteration"] + 1):
            loss = F.binary_cross_entropy_with_logits(centered(x), y)
            for level in levels:
                if loss.item() <= level and level not in crossed:
                    crossed[level] = iteration, loss.item()
                    if (run, level) in found:
                        theta = [p for p in centered.parameters() if p.requires_grad]
                        plain = [p.detach() for p in theta[::2]] + [p.detach()[:, None] for p in theta[1::2]]
                        for a, b in zip(found[run, level][2], plain):
                            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            if iteration < ends[run]["iteration"]:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert loss.item() == pytest.approx(ends[run]["train_loss"], rel=1e-9)
        assert list(crossed) == [level for level in levels if (run, level) in found]
        for level, (iteration, value) in crossed.items():
            assert iteration == found[run, level][0] and value == pytest.approx(found[run, level][1], rel=1e-9)


def test_linear_limit_is_kernel_gradient_descent():
    """Independent of the tangent's code: in function space f <- f - lr K dL/df with the NTK at theta0."""
    o = options(width=12, iterations=120)
    curves, _ = toy.train([0, 1], math.inf, o, [.1], lambda *a: None, quiet())
    for run in (0, 1):
        x, _, _ = toy.points(run, o)
        y = toy.label(o.task, x)[0].double()[:, None]
        K = common.empirical_ntk(toy.network(run, o), x, trace=True).detach()
        f, losses = torch.zeros_like(y), []
        for _ in range(o.iterations + 1):
            losses.append(F.softplus(-y * f).mean().item())
            f = f - o.lr * K @ (-y * torch.sigmoid(-y * f) / len(y))
        np.testing.assert_allclose(curves[run], np.float32(losses)[toy.curve_marks(o.iterations)], rtol=1e-6)


def test_labels_and_grid():
    x = torch.tensor([[-.5, .5], [.5, -.5], [-.5, -.5], [.5, .5], [0, -.9]])
    for task, signs, inside in (("yinyang", [-1, 1, -1, 1, -1], [1, 1, 0, 0, 0]),
                                ("yinyang2", [-1, -1, 1, 1, -1], [1, 0, 1, 0, 0]),
                                ("disk", [1, 1, 1, 1, -1], [1, 1, 1, 1, 0]),
                                ("disk_flip", [-1, 1, 1, -1, -1], [1, 1, 1, 1, 0])):
        y, hard = toy.label(task, x)
        assert y.tolist() == signs and hard.int().tolist() == inside, task
    o = options()
    (x, _, grid), (x1, _, grid1) = toy.points(0, o), toy.points(1, o)
    assert x.shape == (100, 7) and grid.shape == (3600, 7) and not torch.equal(x, x1)
    assert torch.equal(grid[:, :2], grid1[:, :2]) and not (grid[:, 2:] == grid1[:, 2:]).any()
    plane = grid.view(60, 60, 7)
    assert (plane[0, :, 1] == -1).all() and (plane[-1, :, 1] == 1).all() and (plane[:, 0, 0] == -1).all()
    assert len(grid[:, 2:].unique()) == 5 * 3600 and abs(grid[:, 2:].mean()) < .02


def test_files_keys_and_summary(tmp_path):
    out = tmp_path / "run"
    summary = toy.main(**{**TINY, "alpha": [.5, 1, math.inf], "animate": True}, out=str(out))
    for name in ("toy.png", "toy.pdf", "toy.gif"):
        assert (out / name).stat().st_size > 5000
    for name in ("alpha=0.5", "alpha=1", "alpha=inf"):
        assert {p.name for p in (out / name).iterdir()} == {"args.json", "log.jsonl", "maps.npz", ".lock"}
    log = records(out / "alpha=1")
    crossings, ends = [r for r in log if r["level"]], [r for r in log if r["level"] is None]
    assert [r["run"] for r in ends] == [0, 1, 2, 3, 4] and {r["ended"] for r in ends} <= {"loss", "iterations"}
    for r in crossings:
        assert set(r) == {"run", "level", "iteration", "train_loss", "forward_noise", "update_noise", *toy.LOSSES,
                          *toy.LINEARITY}
        assert r["train_loss"] <= r["level"] and 0 < r["ntk_alignment"] <= 1 + 1e-9 and r["iteration"] > 0
    maps = common.read_npz(out / "alpha=1" / "maps.npz")
    assert maps["maps"].shape == (5, 3, 60, 60) and maps["curves"].shape == (5, len(toy.curve_marks(300)))
    for r in crossings:
        if r["level"] in toy.MAPS:  # the map is the record's test loss, point by point
            m = maps["maps"][r["run"], toy.MAPS.index(r["level"])].astype(float)
            assert m.mean() == pytest.approx(r["test_loss"], rel=1e-3)
    for r in records(out / "alpha=inf"):
        assert r["level"] is None or (r["linearisation_error"], r["ntk_alignment"]) == (0, 1)
    assert summary == json.loads((out / "summary.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(summary["alphas"]) == {"0.5", "1", "inf"} and set(summary["paired"]) == {"0.5 - 1", "0.5 - inf", "1 - inf"}
    part = summary["alphas"]["1"]["levels"]["0.6"]
    at = [r for r in crossings if r["level"] == .6]
    assert part["reached"] == len(at) and part["of"] == 5 and part["inside_loss"]["n"] == len(at)
    assert part["median_iteration"] == np.median([r["iteration"] for r in at])
    other = {r["run"]: r for r in records(out / "alpha=inf") if r["level"] == .6}
    differences = [r["inside_loss"] - other[r["run"]]["inside_loss"] for r in at if r["run"] in other]
    cell = summary["paired"]["1 - inf"]["levels"]["0.6"]["inside_loss"]
    assert cell["n"] == len(differences) and cell["mean"] == pytest.approx(np.mean(differences))
    before = (out / "toy.png").read_bytes()
    (out / "toy.png").unlink()
    toy.main(alpha=[.5, 1, math.inf], out=str(out), draw_only=True)
    assert (out / "toy.png").read_bytes() == before


def test_chunks_do_not_matter(tmp_path):
    for chunk in (2, 5):
        toy.main(**{**TINY, "chunk": chunk}, out=str(tmp_path / str(chunk)))
    for name in ("alpha=1", "alpha=20"):
        for a, b in zip(*(records(tmp_path / chunk / name) for chunk in "25"), strict=True):
            assert {k: v for k, v in a.items() if not isinstance(v, float)} == \
                   {k: v for k, v in b.items() if not isinstance(v, float)}
            assert [v for v in a.values() if isinstance(v, float)] == \
                   pytest.approx([v for v in b.values() if isinstance(v, float)], rel=1e-9, abs=1e-12)


def same(a, b):
    for name in ("alpha=1/log.jsonl", "alpha=20/log.jsonl", "alpha=1/maps.npz", "alpha=20/maps.npz", "toy.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    left, right = (json.loads((p / "summary.json").read_text()) for p in (a, b))
    assert {**left, "options": 0} == {**right, "options": 0}


@pytest.mark.parametrize("file, time", [("maps.npz", 2), ("log.jsonl", 2), ("log.jsonl", 4), ("maps.npz", 6)])
def test_interrupted_run_continues(tmp_path, monkeypatch, file, time):
    """Stopped before, between and after the two files of a chunk; then the same command again."""
    toy.main(**TINY, out=str(tmp_path / "whole"))
    write, count = common.write_atomically, [0]

    def stops(path, *rest):
        count[0] += path.name == file
        if path.name == file and count[0] == time:
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as m:
        m.setattr(common, "write_atomically", stops)
        with pytest.raises(KeyboardInterrupt):
            toy.main(**TINY, out=str(tmp_path / "cut"))
    toy.main(**TINY, out=str(tmp_path / "cut"))
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_killed_run_continues(tmp_path):
    flags = [w for k, v in TINY.items() for w in ["--" + k.replace("_", "-"), *map(str, v if isinstance(v, list) else [v])]]
    rng = np.random.default_rng(0)

    def run(out, kill=None):
        process = subprocess.Popen([sys.executable, str(ROOT / "toy.py"), *flags, "--out", str(out)],
                                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if kill:
            time.sleep(kill)
            process.send_signal(signal.SIGKILL)
        return process.wait()

    begin = time.monotonic()
    assert run(tmp_path / "whole") == 0
    whole = time.monotonic() - begin
    for k in range(10):
        run(tmp_path / f"cut{k}", kill=rng.uniform(.2, 1) * whole)
        assert run(tmp_path / f"cut{k}") == 0
        same(tmp_path / "whole", tmp_path / f"cut{k}")


def test_more_runs_extend(tmp_path, capsys):
    toy.main(**{**TINY, "runs": 3}, out=str(tmp_path))
    before = records(tmp_path / "alpha=1")
    toy.main(**TINY, out=str(tmp_path))
    after = records(tmp_path / "alpha=1")
    assert after[:len(before)] == before and {r["run"] for r in after} == {0, 1, 2, 3, 4}
    capsys.readouterr()
    toy.main(**TINY, out=str(tmp_path))
    assert capsys.readouterr().out.count("already finished") == 2 and records(tmp_path / "alpha=1") == after


def test_rounding_is_warned_about(tmp_path, capsys):
    for alpha, dtype, warns in ((100, "float32", False), (1e4, "float32", True), (1e4, "float64", False)):
        toy.main(**{**TINY, "alpha": [alpha], "dtype": dtype, "runs": 2}, out=str(tmp_path / f"{alpha:g} {dtype}"))
        assert ("rounding matters" in capsys.readouterr().out) == warns


@pytest.mark.parametrize("bad, words", [
    (dict(alpha=[0]), "alpha"), (dict(alpha=[math.nan]), "alpha"), (dict(runs=0), "runs"), (dict(task="moons"), "task"),
    (dict(extra_dims=-1), "extra-dims"), (dict(iterations=0), "iterations"), (dict(width=0), "width"),
    (dict(chunk=0), "chunk"), (dict(lr=-1), "lr"), (dict(dtype="bfloat16"), "dtype"), (dict(momentum=.9), "momentum"),
    (dict(draw_only=True), "no records"), (dict(draw_only=True, animate=True), "animate")])
def test_bad_input_is_refused(tmp_path, bad, words):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=words):
        toy.main(**{**TINY, **bad}, out=str(tmp_path / "out"))
    assert not list(tmp_path.rglob("log.jsonl"))


def test_other_or_damaged_records_are_refused(tmp_path):
    tiny = {**TINY, "alpha": [1], "runs": 2, "iterations": 60}
    toy.main(**tiny, out=str(tmp_path))
    for more, words in ((dict(task="disk"), "task"), (dict(lr=.1), "lr"), (dict(iterations=50), "iterations")):
        with pytest.raises(ValueError, match=words):
            toy.main(**{**tiny, **more}, out=str(tmp_path))
    with pytest.raises(ValueError, match="differ"):  # a folder of its own, but no figure of both
        toy.main(**{**tiny, "alpha": [20], "task": "disk"}, out=str(tmp_path))
        toy.main(draw_only=True, alpha=[1, 20], out=str(tmp_path))
    path = tmp_path / "alpha=1" / "maps.npz"
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damage in (data[:len(data) // 2], bytes(flipped), b""):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="maps.npz"):
            toy.main(**tiny, out=str(tmp_path))
    toy.main(**tiny, fresh=True, out=str(tmp_path))
    assert path.read_bytes() == data and (tmp_path / "alpha=1.old-1").is_dir()


def test_divergence_ends_a_run_and_is_reported(tmp_path):
    summary = toy.main(**{**TINY, "alpha": [1], "runs": 2, "lr": 1e30, "dtype": "float32"}, out=str(tmp_path))
    assert len(summary["diverged"]) >= 1
    ends = [r for r in records(tmp_path / "alpha=1") if r["level"] is None]
    assert {r["run"] for r in ends} == {0, 1} and {r["ended"] for r in ends if r["train_loss"] is None} == {"diverged"}


def test_quick_has_the_right_sign(tmp_path):
    summary = toy.main(quick=True, out=str(tmp_path), device="cpu")
    levels = summary["paired"]["1 - 100"]["levels"]
    for level in ("0.4", "0.3"):
        assert levels[level]["inside_loss"]["interval"][0] > 0 > levels[level]["outside_loss"]["interval"][1]
