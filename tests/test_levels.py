"""Equal training loss: the reading rule against simulated runs whose truth is known, statistics, the verdict."""
import argparse
import math

import numpy as np
import pytest

import common


def straight(loss):
    return 4 - loss


def simulated(rng, fall, relation, count=4000, jitter=.08):
    """A run whose loss falls by `fall` a probe on average, 25 iterations a probe. Loss and quantity are seen with a
    jitter of their own at every iteration; the true relation is that of the true loss."""
    true = 2.3 * (1 - fall)**(np.arange(count) / 25)
    return true * np.exp(jitter * rng.normal(size=count)), relation(true) * np.exp(jitter * rng.normal(size=count))


def errors(fall, relation, runs=100):
    """Mean error of the readings at many levels, and the share of levels that are present."""
    rng, found, wanted = np.random.default_rng(0), [], 0
    for _ in range(runs):
        loss, quantity = simulated(rng, fall, relation, int(25 * math.log(2.3 / .5) / fall))
        smooth_loss, smooth_quantity = common.smooth(loss[::25]), common.smooth(quantity[::25])
        for level in (1.5, 1.3, 1.15, 1.0, .85, .7):
            value = common.value_at(level, smooth_loss, smooth_quantity)
            wanted += 1
            if value is not None:
                found.append(value - relation(level))
    return np.mean(found), len(found) / wanted


@pytest.mark.parametrize("fall", [.04, .07])
def test_the_reading_does_not_lean(fall):
    mean, present = errors(fall, straight)
    assert abs(mean) < .02 and present == 1


def test_smooth_by_hand():
    assert common.smooth([1, 2, 6, 4, 5, 6]).tolist() == [1, 3, 3.6, 4.6]  # windows 1, 3, 5, 5; the last two not read
    assert len(common.smooth([1, 2])) == 0


def test_a_reading_does_not_change_when_the_run_goes_on():
    rng = np.random.default_rng(0)
    records = [{"mean_train_loss": l, "iteration": k, "epoch": k / 5, "q": l**2} for k, l in
               enumerate(2.3 * .96**np.arange(40) * np.exp(.05 * rng.normal(size=40)))]
    whole = common.curve(records)
    for n in range(3, 40):
        part = common.curve(records[:n - 1] + [{**records[n - 1], "ended": "epochs"}])
        for key in ("mean_train_loss", "q", "iteration"):
            assert np.array_equal(part[key], whole[key][:len(part[key])])


def test_value_at_is_a_line_at_the_first_passage():
    loss, quantity = np.array([2.0, 1.2, .8, 1.5, .5]), np.array([0.0, 1.0, 3.0, 7.0, 9.0])
    assert common.value_at(1.0, loss, quantity) == pytest.approx(2)
    assert common.value_at(.8, loss, quantity) == pytest.approx(3) and common.value_at(.4, loss, quantity) is None
    assert common.value_at(2.5, loss, quantity) is None and common.value_at(1.0, loss[:0], quantity[:0]) is None
    accuracy, quantity = np.array([.6, .5, .7, .65, .9]), np.array([9.0, 0.0, 2.0, 3.0, 4.0])
    rising = lambda level: common.value_at(level, accuracy, quantity, rising=True)
    assert rising(.6) == pytest.approx(1)  # the first passage after the lowest value
    assert rising(.8) == pytest.approx(3 + .15 / .25) and rising(.95) is None and rising(.5) is None


def test_what_is_measured_at_every_fifth_probe_lies_on_a_line_between_its_neighbours():
    records = [{"mean_train_loss": 2 * .9**k, "iteration": k} for k in range(14)]
    for k, value in ((0, 1.0), (5, 2.0), (10, 4.0)):
        records[k]["rare"] = value
    columns = common.curve(records)
    assert columns["rare"][:11] == pytest.approx([1, 1.2, 1.4, 1.6, 1.8, 2, 2.4, 2.8, 3.2, 3.6, 4])
    assert math.isnan(columns["rare"][11])  # nothing is extrapolated
    records[5]["rare"] = None
    assert common.curve(records)["rare"][5] == pytest.approx(2.5)


@pytest.mark.parametrize("freedom, t", [
    (1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (20, 2.08596), (21, 2.07961), (30, 2.04227), (60, 2.00030),
    (99, 1.98422)])
def test_student_t(freedom, t):
    assert common.student_t(freedom) == pytest.approx(t, abs=1.4e-3)  # printed tables


def test_interval():
    mean, low, high = common.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.30265 / 3**.5, 2 + 4.30265 / 3**.5), abs=1e-3)
    assert common.interval([1.0, 2.0]) == (1.5, None, None)


def run(gap, start=2.3, count=60):
    return [{"mean_train_loss": l, "gap": gap + math.log(l), "iteration": k}
            for k, l in enumerate(start * .97**np.arange(count))]


def test_levels_follow_from_the_first_record_of_the_smallest_alpha():
    levels = common.loss_levels({1.0: {0: run(0, math.log(10))}, 10.0: {0: run(0, 9)}})
    assert len(levels) == 21 and levels == sorted(levels, reverse=True)
    assert {1.0, .5, 2.18, .115} <= set(levels) and max(levels) == 2.18
    assert common.loss_levels({1.0: {0: run(0, .5)}})[:3] == [.475, .45, .425]  # a squared loss
    assert common.loss_levels({1.0: {0: [{"mean_train_loss": None}]}}) == []


def test_differences_are_paired_by_seed():
    runs = {1.0: {0: run(3), 1: run(5), 2: run(4)}, 100.0: {0: run(1), 1: run(2), 3: run(9)}}
    rows = common.readings(runs)
    assert {row["n"] for row in common.differences(rows, ["gap"])} == {2}  # seeds 2 and 3 have no partner
    one, = common.where(common.differences(rows, ["gap"]), level=2.07)
    assert (one["alpha"], one["minus"], one["on"], one["quantity"]) == (1, 100, "mean_train_loss", "gap")
    assert one["mean"] == pytest.approx((2 + 3) / 2) and one["low"] is None
    value, = [row["gap"] for row in common.where(rows, alpha=1.0, seed=1, level=1.0)]
    assert value == pytest.approx(5, abs=.01)
    assert not common.where(rows, level=.115)  # no run passes it: no row


def concluded(rich, lazy, seeds=3, late=None):
    """The verdict on runs with these gaps; from mean loss `late` down the rich one's is the lazy one's."""
    runs = {1.0: {}, 100.0: {}}
    for seed in range(seeds):
        runs[1.0][seed], runs[100.0][seed] = run(rich + .1 * seed), run(lazy - .1 * seed * (-1)**seed)
        for record in runs[1.0][seed]:
            if late and record["mean_train_loss"] < late:
                record["gap"] += lazy - rich
    rows = common.readings(runs)
    pairs = common.differences(rows, ["gap"])
    return common.verdict(runs, rows, pairs, "mean_train_loss", "gap", "it rains", "Net, loss")


def test_the_verdict_needs_both_of_the_two_lowest_levels():
    """That every run has; a run without an effect claims nothing."""
    text = concluded(9, 5)
    assert text.startswith("The claim that it rains holds in these runs: gap at alpha = 1 minus that at alpha = 100")
    assert " at mean_train_loss 0.5 and +4." in text and text.endswith(" at mean_train_loss 0.46 (n = 3; Net, loss).")
    assert "is contradicted by these runs" in concluded(5, 9)
    assert "is not shown by these runs" in concluded(5, 5)
    assert "is not shown by these runs" in concluded(9, 5, late=.6)  # not any more at the lower of the two
    assert "takes three seeds" in concluded(9, 5, seeds=2)
    short = {1.0: {0: run(1)}, 100.0: {0: run(1, count=4)}}
    rows = common.readings(short)
    text = common.verdict(short, rows, common.differences(rows, ["gap"]), "mean_train_loss", "gap", "", "")
    assert "Nothing is concluded" in text and "more epochs" in text and "smaller --lr" in text
    assert "One alpha" in common.verdict({1.0: {0: run(1)}}, rows, [], "mean_train_loss", "gap", "", "")


def test_every_cell_of_a_table_names_n(capsys):
    runs = {1.0: {0: run(3), 1: run(5)}, 100.0: {0: run(1), 1: run(2, count=20)}}
    rows = common.readings(runs)
    common.print_table("Title", rows, common.differences(rows, ["gap"]), "mean_train_loss", "gap")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["mean_train_loss", "alpha", "=", "1", "alpha", "=", "100", "1", "-", "100"]
    last, = [line for line in lines if line.startswith(" " * 14 + "0.46")]
    assert last.split()[2::2] == ["(2)", "(1)", "(1)"] and "+2.000" in last


def test_four_alphas_make_a_picture_of_the_effect_against_alpha(tmp_path):
    runs = {}
    for alpha, gap in ((1.0, 3), (3.0, 2), (10.0, 1), (math.inf, 1)):
        runs[alpha] = {seed: run(gap + .01 * seed) for seed in range(4)}
    options = argparse.Namespace(out=tmp_path, script="noisy")
    rows, picture = common.readings(runs), tmp_path / "noisy_alphas.png"
    common.draw_alphas(options, [row for row in rows if row["alpha"] < math.inf], "mean_train_loss", "gap")
    assert not picture.exists()  # three alphas are too few
    for part in (rows, common.where(rows, seed=0)):  # with intervals, and without
        common.draw_alphas(options, part, "mean_train_loss", "gap")
        assert picture.stat().st_size > 5000
        picture.unlink()
