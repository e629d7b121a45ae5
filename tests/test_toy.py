"""toy.py: the batched run against plain ones, its records, resuming and refusals."""
import json
import math
import os
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
from conftest import ROOT, records_of

TINY = dict(alpha=[1, 20], runs=5, chunk=2, width=8, lr=.5, iterations=300, probe_examples=8,
            dtype="float64", device="cpu")


def options(**more):
    return common.options("toy", toy.OPTIONS, toy.QUICK, {**TINY, **more}, toy.__file__)


def plain_run(run, alpha, o):
    """One network on its own, and its training data: what the batch must reproduce."""
    x = toy.points(run, o)[0]
    y = toy.label(x)[0][:, None]
    f = common.center(toy.network(run, o), alpha)
    return f, common.scaled_sgd(f, o.lr), x, y


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished folder of the TINY options; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    toy.main(**TINY, out=str(out))
    return out


# The step


@pytest.mark.parametrize("alpha", [.5, 1.0, 100.0, math.inf])
def test_batched_training_equals_plain_loops(alpha):
    """Three runs at once against each alone: nn.Sequential, common.center, common.scaled_sgd. The rich ones
    reach the last level at different times, so that the batch shrinks under those that stay."""
    o, levels, found, ends = options(width=12, iterations=300), [.69, .68, .65, .62, .4], {}, {}
    for batch, place, record in toy.train([0, 1, 2], alpha, o, levels, {run: [] for run in range(3)}):
        if record["level"] is None:
            ends[record["run"]] = record
        else:
            theta = [p[place].detach().clone() for p in batch.theta]
            found[record["run"], record["level"]] = record["iteration"], record["train_loss"], theta
    assert len(found) >= 9 and len({end["iteration"] for end in ends.values()}) == (3 if alpha < 5 else 1)
    for run in range(3):
        f, optimizer, x, y = plain_run(run, alpha, o)
        crossed = []
        for iteration in range(ends[run]["iteration"] + 1):
            loss = F.binary_cross_entropy_with_logits(f(x), (y > 0).double())
            for level in levels:
                if loss.item() <= level and level not in crossed:
                    crossed.append(level)
                    at, value, theta = found[run, level]
                    assert at == iteration and value == pytest.approx(loss.item(), rel=1e-9)
                    for batched, plain in zip(theta, optimizer.param_groups[0]["params"], strict=True):
                        torch.testing.assert_close(batched.view_as(plain), plain, rtol=1e-9, atol=1e-12)
            if iteration < ends[run]["iteration"]:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert loss.item() == pytest.approx(ends[run]["train_loss"], rel=1e-9)
        assert crossed == [level for level in levels if (run, level) in found]


@pytest.mark.parametrize("alpha", [1.0, 30.0, math.inf])
def test_step_descends_the_gradient(alpha):
    """Against central differences of the loss, in directions drawn at random, away from theta0."""
    o = options(width=6)
    batch = toy.Batch([0, 3], alpha, o)
    for _ in range(5):
        batch.step(batch.loss())
    before = [p.detach().clone() for p in batch.theta]
    batch.step(batch.loss())
    lr = o.lr if alpha == math.inf else o.lr / alpha**2
    gradient = [(old - p.detach()) / lr for old, p in zip(before, batch.theta)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in before]
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, old, d in zip(batch.theta, before, direction):
                    p.copy_(old + sign * 1e-6 * d)
            losses.append(batch.loss().detach())
        slope = sum((g * d).flatten(1).sum(1) for g, d in zip(gradient, direction))  # (R,)
        torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-5, atol=1e-7)


def test_linear_limit_is_kernel_gradient_descent():
    """Independent of the tangent's code: in function space f <- f - lr K dL/df with the NTK at theta0."""
    o, curves = options(width=12, iterations=120), {0: [], 1: []}
    for _ in toy.train([0, 1], math.inf, o, [.1], curves):
        pass
    for run in (0, 1):
        x = toy.points(run, o)[0]
        y = toy.label(x)[0][:, None]
        K = common.empirical_ntk(toy.network(run, o), x)[:, 0, :, 0].detach()
        f, losses = torch.zeros_like(y), []
        for _ in range(o.iterations + 1):
            losses.append(toy.loss_of(f, y).mean().item())
            f = f - o.lr * K @ (-y * torch.sigmoid(-y * f) / len(y))
        np.testing.assert_allclose(curves[run], np.array(losses)[toy.curve_marks(o.iterations)], rtol=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 100.0, math.inf])
def test_step_never_reads_a_value(alpha):
    """On the meta device, where reading a value or a tensor left on the CPU raises: no step waits."""
    o = options(dtype="float32")
    o.device = torch.device("meta")
    batch = toy.Batch([0, 1, 2], alpha, o)
    batch.step(batch.loss())
    batch.keep([0, 2])
    batch.step(batch.loss())
    assert batch.loss().shape == (2,) and batch.loss().is_meta


def test_the_batch_starts_at_the_plain_networks():
    o = options()
    for alpha in (1.0, math.inf):
        batch = toy.Batch([4, 2], alpha, o)
        f, _, x, y = plain_run(2, alpha, o)
        torch.testing.assert_close(batch.f0[1, 0], f.model0(x)[:, 0], rtol=1e-12, atol=1e-12)
        assert torch.equal(batch.y[1, 0], y[:, 0]) and torch.equal(batch.x[1].mT, x)
        assert batch.loss().tolist() == [pytest.approx(math.log(2))] * 2


# The data


def test_labels_and_grid():
    x = torch.tensor([[-.5, .5], [.5, -.5], [-.5, -.5], [.5, .5], [0, -.9], [-.5, .79], [-.5, .81]])
    y, hard = toy.label(x)
    assert y.tolist() == [-1, 1, -1, 1, -1, -1, 1] and hard.int().tolist() == [1, 1, 0, 0, 0, 1, 0]
    o = options()
    (x, _, grid), (x1, _, grid1) = toy.points(0, o), toy.points(1, o)
    assert x.shape == (100, 7) and grid.shape == (3600, 7) and not torch.equal(x, x1)
    assert torch.equal(grid[:, :2], grid1[:, :2]) and not (grid[:, 2:] == grid1[:, 2:]).any()
    plane = grid.view(60, 60, 7)
    assert (plane[0, :, 1] == -1).all() and (plane[-1, :, 1] == 1).all() and (plane[:, 0, 0] == -1).all()
    assert len(grid[:, 2:].unique()) == 5 * 3600 and abs(grid[:, 2:].mean()) < .02


# Files, tables, conclusion


def test_files_keys_and_summary(tmp_path, capsys):
    out = tmp_path / "run"
    summary = toy.main(**{**TINY, "alpha": [.5, 1, math.inf], "animate": True}, out=str(out))
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(summary["conclusion"]) and "alpha = 0.5 minus 1," not in printed
    for name in ("toy.png", "toy.pdf", "toy.gif"):
        assert (out / name).stat().st_size > 5000
    assert (out / "toy.gif").stat().st_size < 1e6
    for name in ("alpha=0.5", "alpha=1", "alpha=inf"):
        assert {p.name for p in (out / name).iterdir()} == {"args.json", "log.jsonl", "maps.npz"}
    log = records_of(out / "alpha=1")
    crossings, ends = [r for r in log if r["level"]], [r for r in log if r["level"] is None]
    assert [r["run"] for r in ends] == [0, 1, 2, 3, 4]
    assert {r["ended"] for r in ends} <= {"loss", "iterations"}
    for r in crossings:
        assert set(r) == {"run", "level", "iteration", "train_loss", *toy.MEASURED}
        assert r["train_loss"] <= r["level"] and 0 < r["ntk_alignment"] <= 1 + 1e-9 and r["iteration"] > 0
        assert r["update_noise"] < 1e-9  # float64
    maps = common.read_npz(out / "alpha=1" / "maps.npz")
    assert maps["maps"].shape == (5, 3, 60, 60) and maps["curves"].shape == (5, len(toy.curve_marks(300)))
    for r in crossings:
        if r["level"] in toy.MAPS:  # the map is the record's test loss, point by point
            m = maps["maps"][r["run"], toy.MAPS.index(r["level"])].astype(float)
            assert m.mean() == pytest.approx(r["test_loss"], rel=1e-3)
    for r in records_of(out / "alpha=inf"):
        assert r["level"] is None or (r["linearisation_error"], r["ntk_alignment"]) == (0, pytest.approx(1))
    assert summary == json.loads((out / "summary.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(summary["alphas"]) == {"0.5", "1", "inf"}
    assert set(summary["paired"]) == {"0.5 - inf", "1 - inf"}
    part = summary["alphas"]["1"]["levels"]["0.6"]
    at = [r for r in crossings if r["level"] == .6]
    assert part["reached"] == len(at) and part["of"] == 5 and part["inside_loss"]["n"] == len(at)
    assert part["median_iteration"] == np.median([r["iteration"] for r in at])
    other = {r["run"]: r for r in records_of(out / "alpha=inf") if r["level"] == .6}
    differences = [r["inside_loss"] - other[r["run"]]["inside_loss"] for r in at if r["run"] in other]
    cell = summary["paired"]["1 - inf"]["levels"]["0.6"]["inside_loss"]
    assert cell["n"] == len(differences) and cell["mean"] == pytest.approx(np.mean(differences))
    before = (out / "toy.png").read_bytes()
    (out / "toy.png").unlink()
    assert toy.main(out=str(out), draw_only=True) == summary  # with the options that the folder names
    assert (out / "toy.png").read_bytes() == before


def test_a_record_is_of_the_crossing_network(tmp_path):
    """Trained again, alone and by hand: test loss in the discs and outside, and rounding in float32."""
    toy.main(**{**TINY, "alpha": [20], "dtype": "float32", "runs": 2}, out=str(tmp_path))
    o = options(dtype="float32")
    record = [r for r in records_of(tmp_path / "alpha=20") if r["run"] == 1 and r["level"] == .6][0]
    f, optimizer, x, y = plain_run(1, 20.0, options())
    for _ in range(record["iteration"]):
        optimizer.zero_grad()
        toy.loss_of(f(x), y).mean().backward()
        optimizer.step()
    grid = toy.points(1, o)[2]
    y, inside = toy.label(grid.float())
    loss = F.softplus(-y * f(grid)[:, 0])
    assert record["inside_loss"] == pytest.approx(loss[inside].mean().item(), rel=1e-3)
    assert record["outside_loss"] == pytest.approx(loss[~inside].mean().item(), rel=1e-3)
    assert 1e-8 < record["update_noise"] < .02


def test_a_sweep_concludes_from_its_whole_folder(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    summary = toy.main(**{**TINY, "alpha": [5]}, out=str(tmp_path))
    assert set(summary["alphas"]) == {"1", "5", "20"} and set(summary["paired"]) == {"1 - 20", "5 - 20"}
    assert "already" not in capsys.readouterr().out


def synthetic(inside, outside, levels, runs=5):
    """Results as read_runs gives them, of runs with these differences of test loss."""
    found, draw = {}, np.random.default_rng(0)
    for alpha, shift in ((1.0, 1), (100.0, 0)):
        at = {level: {} for level in toy.LEVELS}
        for level in levels:
            for run in range(levels[level]):
                noise = .01 * draw.normal()
                at[level][run] = {**dict.fromkeys(toy.MEASURED, .5), "iteration": 9, "run": run,
                                  "gap": .5 + shift * (inside - outside), "inside_loss": 1 + shift * inside + noise,
                                  "outside_loss": .5 + shift * outside + noise}
        maps = {run: np.zeros((3, 60, 60)) for run in range(runs)}
        ends = {run: {"ended": "iterations"} for run in range(runs)}
        found[alpha] = toy.types.SimpleNamespace(at=at, maps=maps, ends=ends)
    return found


def test_the_conclusion_follows_from_the_intervals():
    def verdict(*given):
        found = synthetic(*given)
        return toy.verdict(found, toy.summarise(found))

    assert "loss 0.5 " in verdict(.2, -.1, {.5: 5, .4: 4}) and "5 runs" in verdict(.2, -.1, {.5: 5, .4: 4})
    assert "as in the paper" in verdict(.2, -.1, {.5: 5, .4: 5})
    lower = float(verdict(.2, -.1, {.5: 5, .4: 5}).split("higher in the discs and")[1].split()[0])
    assert lower == pytest.approx(.1, abs=.03)
    for inside, outside in ((-.2, -.1), (.2, .1), (0, -.1), (.2, 0)):
        assert "do not show" in verdict(inside, outside, {.5: 5})
    assert "takes three" in verdict(.2, -.1, {.5: 2})
    assert "No run reached" in verdict(.2, -.1, {})


def test_rounding_is_warned_about(tmp_path, capsys):
    for alpha, dtype, warns in ((100, "float32", False), (1e4, "float32", True), (1e4, "float64", False)):
        out = str(tmp_path / f"{alpha:g} {dtype}")
        toy.main(**{**TINY, "alpha": [alpha], "dtype": dtype, "runs": 2}, out=out)
        printed = capsys.readouterr().out
        assert printed.count("--dtype float64, or --alpha inf") == warns
        assert "One alpha is no comparison" in printed


def test_divergence_ends_a_run_and_is_reported(tmp_path):
    wild = {**TINY, "alpha": [1], "runs": 2, "lr": 1e30, "dtype": "float32"}
    summary = toy.main(**wild, out=str(tmp_path))
    assert len(summary["diverged"]) >= 1
    ends = [r for r in records_of(tmp_path / "alpha=1") if r["level"] is None]
    assert {r["run"] for r in ends} == {0, 1}
    assert {r["ended"] for r in ends if r["train_loss"] is None} == {"diverged"}


def test_quick_shows_the_effect(tmp_path):
    summary = toy.main(quick=True, out=str(tmp_path), device="cpu")
    levels = summary["paired"]["1 - 100"]["levels"]
    for level in ("0.4", "0.3"):
        assert levels[level]["inside_loss"]["interval"][0] > 0 > levels[level]["outside_loss"]["interval"][1]
    assert "as in the paper" in summary["conclusion"]


# Resuming


def same(a, b):
    for name in ("alpha=1/log.jsonl", "alpha=20/log.jsonl", "alpha=1/maps.npz", "alpha=20/maps.npz",
                 "toy.png", "summary.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_chunks_do_not_matter(whole, tmp_path):
    toy.main(**{**TINY, "chunk": 5}, out=str(tmp_path))
    for name in ("alpha=1", "alpha=20"):
        for a, b in zip(records_of(whole / name), records_of(tmp_path / name), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if isinstance(b[key], float):
                    b[key] = pytest.approx(b[key], rel=1e-9, abs=1e-12)
                assert a[key] == b[key]


def test_jobs_do_not_matter(whole, tmp_path):
    toy.main(**TINY, out=str(tmp_path), jobs=2)
    same(whole, tmp_path)


@pytest.mark.parametrize("file, time", [("maps.npz", 2), ("log.jsonl", 2), ("log.jsonl", 6)])
def test_interrupted_run_continues(whole, tmp_path, monkeypatch, file, time):
    """Stopped before, between and after the two files of a chunk; then the same command again."""
    write, count = common.write_atomically, [0]

    def stops(path, *rest):
        count[0] += path.name == file
        if path.name == file and count[0] == time:
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as m:
        m.setattr(common, "write_atomically", stops)
        with pytest.raises(KeyboardInterrupt):
            toy.main(**TINY, out=str(tmp_path))
    toy.main(**TINY, out=str(tmp_path))
    same(whole, tmp_path)


@pytest.mark.slow
def test_killed_run_continues(tmp_path):
    flags = []
    for key, value in TINY.items():
        flags += ["--" + key.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    rng = np.random.default_rng(0)

    def run(out, kill=None):
        process = subprocess.Popen([sys.executable, str(ROOT / "toy.py"), *flags, "--out", str(out)],
                                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                                   "PYTHONPATH": os.pathsep.join(sys.path)})
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


def test_more_runs_extend(whole, tmp_path, capsys):
    toy.main(**{**TINY, "runs": 2}, out=str(tmp_path))
    assert {r["run"] for r in records_of(tmp_path / "alpha=1")} == {0, 1}
    for already_finished in (0, 2):
        capsys.readouterr()
        toy.main(**TINY, out=str(tmp_path))
        assert capsys.readouterr().out.count("already finished") == already_finished
        same(whole, tmp_path)


# Refusals, in one line each


@pytest.mark.parametrize("bad, words", [
    (dict(alpha=[0]), "alpha"), (dict(alpha=[math.nan]), "alpha"), (dict(runs=0), "runs"),
    (dict(extra_dims=-1), "extra-dims"), (dict(iterations=0), "iterations"), (dict(width=0), "width"),
    (dict(chunk=0), "chunk"), (dict(lr=-1), "lr"), (dict(dtype="bfloat16"), "dtype"),
    (dict(momentum=.9), "momentum"),
    (dict(draw_only=True), "no records"), (dict(draw_only=True, animate=True), "animate")])
def test_bad_input_is_refused(tmp_path, bad, words):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=words):
        toy.main(**{**TINY, **bad}, out=str(tmp_path / "out"))
    assert not list(tmp_path.rglob("log.jsonl"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished folder of one alpha and two runs, and its options; to be copied before it is damaged."""
    out = tmp_path_factory.mktemp("small") / "out"
    given = {**TINY, "alpha": [1], "runs": 2, "iterations": 60}
    toy.main(**given, out=str(out))
    return out, given


def test_other_options_are_refused(small, tmp_path):
    out, given = small
    for more, words in ((dict(extra_dims=2), "extra_dims"), (dict(lr=.1), "lr"),
                        (dict(iterations=50), "iterations"),
                        (dict(alpha=[20], extra_dims=2), "extra_dims")):  # no figure of both, either
        with pytest.raises(ValueError, match=words):
            toy.main(**{**given, **more}, out=str(out))
    assert not (out / "alpha=20").exists()


def edit_log(change):
    """A damage to log.jsonl: change(list of records) in place."""
    def damage(folder):
        records = records_of(folder)
        change(records)
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return damage


def edit_maps(change):
    """A damage to maps.npz: change(dict of arrays) in place."""
    def damage(folder):
        arrays = common.read_npz(folder / "maps.npz")
        change(arrays)
        np.savez(folder / "maps.npz", **arrays)
    return damage


def edit_args(key, value):
    def damage(folder):
        args = json.loads((folder / "args.json").read_text())
        args["run"][key] = value
        (folder / "args.json").write_text(json.dumps(args))
    return damage


def cut(name, share):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * share)])
    return damage


def flip(name):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    return damage


DAMAGE = {
    "half maps": cut("maps.npz", .5),
    "empty maps": cut("maps.npz", 0),
    "flipped maps": flip("maps.npz"),
    "half args": cut("args.json", .5),
    "no args": lambda folder: (folder / "args.json").unlink(),
    "no maps": lambda folder: (folder / "maps.npz").unlink(),
    "words for iterations": edit_args("iterations", "many"),
    "list for iterations": edit_args("iterations", [60]),
    "no width": edit_args("width", None),
    "a key is missing": edit_log(lambda r: r[0].pop("test_loss")),
    "a key too much": edit_log(lambda r: r[0].update(a=1)),
    "a list": edit_log(lambda r: r[0].update(inside_loss=[1, 2])),
    "text": edit_log(lambda r: r[0].update(run="0")),
    "NaN in words": edit_log(lambda r: r[0].update(iteration="NaN")),
    "no run": edit_log(lambda r: r[-1].update(run=None)),
    "other level": edit_log(lambda r: r[0].update(level=.55)),
    "no iteration": edit_log(lambda r: r[0].update(iteration=None)),
    "another run": edit_log(lambda r: r[-1].update(run=7)),
    "run 1.5": edit_log(lambda r: r[-1].update(run=1.5)),
    "ended twice": edit_log(lambda r: r.append(r[-1])),
    "not a record": edit_log(lambda r: r.insert(0, [1, 2])),
    "runs too short": edit_maps(lambda a: a.update(runs=a["runs"][:1])),
    "no runs": edit_maps(lambda a: a.pop("runs")),
    "runs of text": edit_maps(lambda a: a.update(runs=np.array(["0", "1"]))),
    "runs twice": edit_maps(lambda a: a.update(runs=np.array([1, 1]))),
    "0-d runs": edit_maps(lambda a: a.update(runs=np.array(0))),
    "flat maps": edit_maps(lambda a: a.update(maps=a["maps"][0])),
    "short curves": edit_maps(lambda a: a.update(curves=a["curves"][:, :3])),
    "another array": edit_maps(lambda a: a.update(more=np.zeros(2)))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_in_a_line(small, tmp_path, damage):
    out, given = small
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    DAMAGE[damage](copy / "alpha=1")
    before = {p.name: p.read_bytes() for p in (copy / "alpha=1").iterdir()}
    for more in (given, dict(draw_only=True)):
        with pytest.raises((ValueError, OSError)) as e:
            toy.main(**more, out=str(copy))
        assert "\n" not in str(e.value)
    assert {p.name: p.read_bytes() for p in (copy / "alpha=1").iterdir()} == before


def test_a_cut_last_line_costs_its_run_alone(small, tmp_path):
    out, given = small
    shutil.copytree(out, tmp_path / "copy")
    cut("log.jsonl", .99)(tmp_path / "copy" / "alpha=1")
    toy.main(**given, out=str(tmp_path / "copy"))
    assert records_of(tmp_path / "copy" / "alpha=1") == records_of(out / "alpha=1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_maps_that_are_not_finite_are_drawn(whole, tmp_path, value):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    edit_maps(lambda a: a["maps"].fill(value))(tmp_path / "alpha=1")
    toy.main(draw_only=True, out=str(tmp_path))
