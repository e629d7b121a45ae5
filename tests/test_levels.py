"""Equal training loss: the reading rule on simulated runs whose truth is known, statistics, the verdict, pictures."""
import types
from math import inf, isnan, log, nan

import numpy as np
import pytest
from matplotlib.figure import Figure

import experiment


def simulated(rng, fall, jitter=.08):
    """A loss that falls by `fall` a probe, and 4 minus this, each seen with a jitter of its own at every probe."""
    true = 2.3 * (1 - fall)**np.arange(log(2.3 / .5) / fall)
    seen = np.stack([true, 4 - true], 1) * np.exp(jitter * rng.normal(size=(len(true), 2)))
    return [{"mean_train_loss": loss, "quantity": quantity} for loss, quantity in seen.tolist()]


def run(gap, start=2.3, count=60):
    return [{"mean_train_loss": loss, "gap": gap + log(loss)} for loss in start * .97**np.arange(count)]


def readings(*of_alphas):
    return experiment.at_levels(dict(zip((1.0, 10.0, inf), of_alphas)), dict, "mean_train_loss")


def test_the_reading_does_not_lean():
    for fall in (.04, .07):
        read = readings({seed: simulated(np.random.default_rng(seed), fall) for seed in range(300)})
        levels = np.array(read.levels)
        error = (read.values["quantity"][0] - (4 - levels))[:, (.7 < levels) & (levels < 1.5)]  # (300, L)
        assert error.size >= 2100 and abs(error.mean()) < .02


def test_smoothing_and_first_passage_by_hand():
    smooth = experiment.curve([{"mean_train_loss": loss, "seconds": 1} for loss in (1, 2, 6, 4, 5, 6)])
    assert {key: column.tolist() for key, column in smooth.items()} == {"mean_train_loss": [1, 3, 3.6, 4.6]}
    assert experiment.curve([{"mean_train_loss": 1}, {"mean_train_loss": 2}]) == {}  # the last two are not read
    records = [{"mean_train_loss": 2 * .9**k} for k in range(14)]
    for k, value in ((0, 1.0), (5, 2.0), (10, 4.0)):
        records[k]["rare"] = value  # measured at every fifth probe: a line between its neighbours
    rare = experiment.curve(records)["rare"]
    assert rare == pytest.approx([1, 1.2, 1.4, 1.6, 1.8, 2, 2.4, 2.8, 3.2, 3.6, 4, nan], nan_ok=True)
    records[5]["rare"] = None
    assert experiment.curve(records)["rare"][5] == pytest.approx(2.5)
    passage, loss = experiment.first_passage, np.array([2.0, 1.2, .8, 1.5, .5])
    assert (passage(loss, 1.0), passage(loss, .8)) == pytest.approx((1.5, 2))
    assert all(map(isnan, (passage(loss, .4), passage(loss, 2.5), passage(loss[:0], 1))))  # no start above: no passage
    rising = [{"mean_train_loss": 1, "acc": .5 + .01 * abs(k - 40), "iteration": k} for k in range(81)]
    read = experiment.at_levels({1: {0: rising}}, dict, "acc")  # levels .8, .85, .9, .95; the lowest value is at 40
    assert read.values["iteration"][0, 0] == pytest.approx([70, 75, nan, nan], nan_ok=True)


def test_a_reading_does_not_change_when_the_run_goes_on():
    records = simulated(np.random.default_rng(0), .04)
    whole = experiment.curve(records)
    for n in range(3, len(records)):
        for end in ({"ended": "epochs"}, {"ended": "diverged"}, {"mean_train_loss": None}):  # such a record is not read
            part = experiment.curve([*records[:n], records[n] | end])
            assert len(part) == 2 and all(np.array_equal(part[key], whole[key][:n - 2]) for key in part)


@pytest.mark.parametrize("freedom, t", [(2, 4.30265), (3, 3.18245), (9, 2.26216), (20, 2.08596), (21, 2.07961),
                                        (30, 2.04227), (60, 2.00030), (99, 1.98422)])
def test_the_interval_is_students(freedom, t):
    """Against printed tables; below three values there is none, and what is missing does not count."""
    values = np.arange(freedom + 1.0)
    found = experiment.interval(np.stack([values, np.r_[values[:2], [nan] * (freedom - 1)], nan * values])[..., None])
    half = t * values.std(ddof=1) / len(values)**.5
    assert found.mean[:, 0] == pytest.approx([freedom / 2, .5, nan], nan_ok=True)
    for ends in (found.high - found.mean, found.mean - found.low):
        assert ends[:, 0] == pytest.approx([half, nan, nan], rel=7e-4, nan_ok=True)
    assert found._fields == ("mean", "low", "high", "n") and found.n[:, 0].tolist() == [freedom + 1, 2, 0]


def test_levels_follow_from_the_first_record_of_the_smallest_alpha():
    levels = experiment.loss_levels({1.0: {0: run(0, log(10))}, 10.0: {0: run(0, 9)}})
    assert len(levels) == 21 and levels == sorted(levels, reverse=True) and {1.0, .5, 2.18, .115} <= set(levels)
    assert experiment.loss_levels({1.0: {0: run(0, .5)}})[:2] == [.475, .45]  # a squared loss
    assert experiment.loss_levels({1.0: {0: [{"mean_train_loss": None}]}}) == []


def test_differences_are_paired_by_seed():
    read = readings({0: run(3), 1: run(5), 2: run(4)}, {0: run(1), 1: run(2), 3: run(9)})
    assert (read.alphas, read.seeds, read.runs, read.on) == ([1, 10], [0, 1, 2, 3], [3, 3], "mean_train_loss")
    assert read.values["gap"][0, :, read.levels.index(1)] == pytest.approx([3, 5, 4, nan], abs=.01, nan_ok=True)
    assert np.isnan(read.values["gap"][..., -1]).all()  # no run passes .115
    found = experiment.difference(read, "gap")
    assert set(found.n[0].tolist()) == {0, 2}  # seeds 2 and 3 have no partner
    assert found.mean[:, 1] == pytest.approx([(2 + 3) / 2, 0]) and np.isnan(found.low[0]).all()


def concluded(rich, lazy, seeds=3, late=0):
    """The verdict on runs with these gaps; from mean loss `late` down the rich one's is far on the other side."""
    of_rich = {seed: run(rich + .1 * seed, count=60 + 20 * seed) for seed in range(seeds)}
    for record in sum(of_rich.values(), []):
        record["gap"] += 3 * (lazy - rich) * (record["mean_train_loss"] < late)
    read = readings(of_rich, {seed: run(lazy - .1 * seed * (-1)**seed, count=80) for seed in range(seeds)})
    return experiment.verdict(read, "gap", "it rains", "the street is wet", "Net, loss")


def test_the_verdict_needs_both_of_the_two_lowest_levels(capsys):
    text = concluded(9, 5)
    assert text.startswith("The claim that it rains holds in these runs: gap at alpha = 1 minus that at alpha = 10 is ")
    assert " at mean_train_loss 0.5 and +4." in text and text.endswith(" at mean_train_loss 0.46 (n = 3; Net, loss).")
    assert capsys.readouterr().out == f"\n{text}\nIn words: the street is wet.\n"
    for claim, words, given in (("is contradicted by these runs", "it is not so that ", dict(rich=5, lazy=9)),
                                ("is not shown by these runs", "perhaps ", dict(rich=5, lazy=5)),
                                ("is not shown by", "perhaps ", dict(rich=9, lazy=5, late=.47)),  # but at the higher
                                ("is not shown by", "perhaps ", dict(rich=5, lazy=9, late=.47)),  # but at the lower
                                ("is not judged (an interval takes three", "perhaps ", dict(rich=9, lazy=5, seeds=2))):
        assert f"it rains {claim}" in concluded(**given)
        assert f"In words: {words}the street is wet." in capsys.readouterr().out
    for read in (readings({0: run(1)}, {0: run(1, count=4)}), readings({0: run(1)})):  # one alpha has no other
        text = experiment.verdict(read, "gap", "", "", "")
        assert text.startswith("Nothing is concluded: ") and "Train longer" in text and "smaller --lr" in text
        assert text in capsys.readouterr().out


def test_what_stands_beside_a_difference_is_of_the_same_seeds(capsys):
    experiment.print_table("Title", readings({0: run(3), 1: run(5)}, {0: run(1.000123), 1: run(2, count=20)}), "gap")
    _, title, head, *lines = capsys.readouterr().out.splitlines()
    assert (title, head.split()) == ("Title", "mean_train_loss alpha = 1 - 10 (runs)".split())
    assert lines[2].split() == "1.95 4.67 - 2.17 = +2.50 (2)".split()  # 4 + log 1.95
    assert lines[-1].split() == "0.46 2.22 - 0.223 = +2.00 (1)".split() and len({len(line) for line in lines}) == 1
    experiment.print_table("Title", readings(*[{s: run(g + s * g) for s in range(3)} for g in (1e-5, 2e-5)]), "gap")
    assert "= -2.00e-05 [-4.48e-05, 4.84e-06] (3)" in capsys.readouterr().out


def test_pictures(tmp_path):
    """A line an alpha at levels that all its runs pass, differences with intervals, and only what was measured."""
    read = readings(*[{seed: run(gap + seed, count=60 - 20 * seed) for seed in range(3)} for gap in (3, 2, 1)])
    read.values["linearisation_error"] = read.values["repr_alignment"] = read.values["gap"]
    a, b, c, d = (figure := Figure()).subplots(2, 2).ravel()
    experiment.draw(a, read, "gap", "--", "of hard examples")
    experiment.draw(a, read, "linearisation_error")
    assert [t.get_text() for t in a.get_legend().texts] == ["of hard examples", "α = 1", "α = 10", "α = ∞"]
    assert len(a.lines) == 8 and a.xaxis_inverted()
    assert (np.isfinite(a.lines[0].get_ydata()) == np.isfinite(read.values["gap"][0]).all(0)).all()
    experiment.draw_differences(b, read, "gap")
    assert len(b.containers) == 2 and b.xaxis_inverted()  # no interval below three runs
    assert len(b.containers[0].lines[2][0].get_segments()) == len(read.levels)
    experiment.draw_linearity(c, d, read)
    assert [t.get_text() for t in c.get_legend().texts] == ["repr alignment"] and len(d.lines) == 4
    experiment.save_figure(figure, types.SimpleNamespace(out=tmp_path), "picture")
    assert min((tmp_path / f"picture.{kind}").stat().st_size for kind in ("png", "pdf")) > 5000
