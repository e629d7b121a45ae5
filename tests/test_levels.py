"""Equal training loss: the reading rule against simulated runs whose truth is known, statistics, the summary's shape."""
import math
import types

import numpy as np
import pytest

import common
import noisy


# --- the reading rule on runs whose true relation between loss and quantity is known ---


def straight(loss):
    return 4 - loss


def curved(loss):
    return 3.19 - 3 * (loss - 1.15)**2


def simulated(rng, fall, relation, count=4000, jitter=.08):
    """A run whose loss falls by `fall` a probe on average, 25 iterations a probe. Loss and quantity are seen with a
    jitter of their own at every iteration; the true relation is that of the true loss."""
    true = 2.3 * (1 - fall)**(np.arange(count) / 25)
    return true * np.exp(jitter * rng.normal(size=count)), relation(true) * np.exp(jitter * rng.normal(size=count))


def on_schedule(loss, quantity):
    return np.arange(0, len(loss), 25)


def at_falling_loss(loss, quantity):
    """The rule of before: a probe each time the exponentially averaged loss has fallen by 4 %."""
    average, threshold, chosen = loss[0], loss[0], []
    for k, value in enumerate(loss):
        average = .9 * average + .1 * value
        if k == 0 or average < .96 * threshold:
            threshold = average
            chosen.append(k)
    return np.array(chosen)


def errors(fall, relation, probes=on_schedule, runs=100):
    """(mean, root mean square) error of the readings at many levels, and the share of levels that are present."""
    rng, found, wanted = np.random.default_rng(0), [], 0
    for _ in range(runs):
        loss, quantity = simulated(rng, fall, relation, int(25 * math.log(2.3 / .5) / fall))
        chosen = probes(loss, quantity)
        smooth_loss, smooth_quantity = common.smooth(loss[chosen]), common.smooth(quantity[chosen])
        for level in (1.5, 1.3, 1.15, 1.0, .85, .7):
            value = common.value_at(level, smooth_loss, smooth_quantity)
            wanted += 1
            if value is not None:
                found.append(value - relation(level))
    return np.mean(found), np.sqrt(np.mean(np.square(found))), len(found) / wanted


@pytest.mark.parametrize("fall", [.04, .07])
def test_the_reading_does_not_lean(fall):
    mean, _, present = errors(fall, straight)
    assert abs(mean) < .02 and present == 1


@pytest.mark.parametrize("fall, allowed", [(.04, .04), (.07, .09)])
def test_an_average_flattens_a_curve_a_little(fall, allowed):
    mean, _, present = errors(fall, curved)
    assert abs(mean) < allowed and present == 1


@pytest.mark.parametrize("relation", [straight, curved])
def test_probes_that_wait_for_the_loss_to_fall_are_at_least_twice_as_wrong(relation):
    """They catch a jittering run in its lucky moments; the same trajectories, the same smoothing and reading. (Measured:
    mean errors of -.110 and -.063 against .013 and -.005, root mean squares of .15 and .26 against .11 and .12.)"""
    mean, scheduled, _ = errors(.04, relation)
    lean, waiting, _ = errors(.04, relation, at_falling_loss)
    assert abs(lean) > 2 * abs(mean) and abs(lean) > .05 and waiting > 1.3 * scheduled


# --- by hand ---


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


def test_value_at_is_a_line_in_log_loss_at_the_first_passage():
    loss, quantity = np.array([2.0, 1.2, .8, 1.5, .5]), np.array([0.0, 1.0, 3.0, 7.0, 9.0])
    expected = 1 + 2 * math.log(1.2 / 1) / math.log(1.2 / .8)
    assert common.value_at(1.0, loss, quantity) == pytest.approx(expected)
    assert common.value_at(.4, loss, quantity) is None and common.value_at(2.5, loss, quantity) is None  # no extrapolation
    assert common.value_at(.8, loss, quantity) == pytest.approx(3) and common.value_at(1.0, loss[:0], quantity[:0]) is None
    straight_line = 3 - 2 * np.log(loss)
    assert common.value_at(1.1, loss, straight_line) == pytest.approx(3 - 2 * math.log(1.1))


def test_what_is_measured_at_every_fifth_probe_lies_on_a_line_between_its_neighbours():
    loss = 2.0 * .9**np.arange(11)
    quantity = np.full(11, math.nan)
    quantity[[0, 5, 10]] = 1.0, 2.0, 4.0
    level = 2.0 * .9**6.5
    assert common.value_at(level, loss, quantity) == pytest.approx(2 + 2 * .3)
    quantity[10] = math.nan
    assert common.value_at(level, loss, quantity) is None


def test_value_at_accuracy_by_hand():
    accuracy, quantity = np.array([.6, .5, .7, .65, .9]), np.array([9.0, 0.0, 2.0, 3.0, 4.0])
    assert common.value_at_accuracy(.6, accuracy, quantity) == pytest.approx(1)  # the first passage after the lowest value
    assert common.value_at_accuracy(.8, accuracy, quantity) == pytest.approx(3 + .15 / .25)
    assert common.value_at_accuracy(.95, accuracy, quantity) is None and common.value_at_accuracy(.5, accuracy, quantity) is None


def test_student_t():
    for freedom, t in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (20, 2.08596), (30, 2.04227), (99, 1.98422)):
        assert common.student_t(freedom) == pytest.approx(t, abs=3e-3)  # printed tables


def test_spread():
    assert common.spread([None]) is None
    assert common.spread([2.0, None]) == {"mean": 2.0, "std": None, "n": 1}
    s = common.spread([1.0, 2.0, 3.0], interval=True)
    assert s["mean"] == 2 and s["std"] == 1 and s["n"] == 3
    assert s["interval"] == pytest.approx([2 - 4.30265 / 3**.5, 2 + 4.30265 / 3**.5], abs=1e-3)
    assert "interval" not in common.spread([1.0, 2.0], interval=True)


def run(gap, start=2.3, count=60):
    return [{"mean_train_loss": l, "gap": gap + math.log(l), "iteration": k, "epoch": k / 5}
            for k, l in enumerate(start * .97**np.arange(count))]


def test_levels_follow_from_the_first_record_of_the_smallest_alpha():
    levels = common.loss_levels({1.0: {0: run(0, math.log(10))}}, [1.6, 9.0])
    assert levels == sorted(levels, reverse=True) and {1.6, 1.0, .5, 2.07, .23} <= set(levels) and max(levels) == 2.07
    assert max(common.loss_levels({1.0: {0: run(0, math.log(2))}})) == .624
    assert common.loss_levels({1.0: {0: run(0, .1)}}) == [.09, .08, .07, .06, .05, .04, .03, .02, .01]


def gap(curve):
    return {"gap": curve["gap"]}


def test_summarise_pairs_by_seed():
    runs = {1.0: {0: run(3), 1: run(5), 2: run(4)}, 100.0: {0: run(1), 1: run(2), 3: run(9)}}
    summary = common.summarise(runs, gap, [2.0, 1.0, .1])
    at = summary["alphas"]["1"]["levels"]
    assert at["1"]["gap"]["n"] == 3 and at["1"]["gap"]["mean"] == pytest.approx(4, abs=.01) and "0.1" not in at
    pair = summary["paired"]["1 - 100"]["levels"]["2"]["gap"]
    assert pair["n"] == 2 and pair["mean"] == pytest.approx((2 + 3) / 2)  # seeds 0 and 1; 2 and 3 have no partner


def concluded(rich, lazy, seeds=3):
    runs = {1.0: {s: run(rich + .1 * s) for s in range(seeds)}, 100.0: {s: run(lazy - .1 * s * (-1)**s) for s in range(seeds)}}
    summary = common.summarise(runs, gap, [2.0, 1.5, .1])
    return common.sentence(runs, summary, "gap", "At {level} it is", "the rich is above", "the lazy is above")


def test_the_conclusion_follows_the_paired_interval():
    """At the lowest level that every run has; a run without an effect claims nothing."""
    assert "At 1.5 it is" in concluded(9, 5) and concluded(9, 5).endswith("] (3): the rich is above.")
    assert concluded(5, 9).endswith("the lazy is above.")
    assert concluded(5, 5).endswith("these runs do not show a difference.")
    assert "takes three seeds" in concluded(9, 5, seeds=2)
    few = {1.0: {0: run(1)}, 100.0: {0: run(1, count=4)}}
    assert "No loss level" in common.sentence(few, common.summarise(few, gap, [1.0]), "gap", "", "", "")
    one = {1.0: {0: run(1)}}
    assert "One alpha" in common.sentence(one, common.summarise(one, gap, [1.0]), "gap", "", "", "")


def test_noisy_shows_the_papers_lowest_clean_loss_and_does_not_conclude_there(capsys):
    """At clean loss .1 both have learnt the wrong labels: a row of the table, as in the paper, but no verdict."""
    def records(ahead):
        rows = []
        for k in range(60):
            clean = 2.3 * .93**k
            noisy_loss = clean + ahead * max(clean - .15, 0)
            rows.append({"iteration": k, "epoch": k / 2, "mean_train_loss": .85 * clean + .15 * noisy_loss,
                         "clean_loss": clean, "noisy_loss": noisy_loss, "test_loss": 1.0, "test_acc": .5,
                         "noisy_true_acc": .3})
        return rows

    runs = {1.0: {s: records(2 + .01 * s) for s in range(3)}, 100.0: {s: records(1) for s in range(3)}}
    summary = noisy.conclude(types.SimpleNamespace(levels=[]), runs)
    difference = summary["at_clean_loss"]["paired"]["1 - 100"]["levels"]
    assert difference["0.1"]["noisy_loss"]["mean"] == pytest.approx(0, abs=1e-9)
    assert difference["1"]["noisy_loss"]["mean"] == pytest.approx(1.01 * .85, rel=.01)
    assert "as in the paper" in summary["conclusion"] and "clean loss 0.1 " not in summary["conclusion"]
    table = capsys.readouterr().out.split("Loss of the noisy examples")[1].split("Test loss")[0]
    assert "\n     0.1 " in table


def test_a_run_that_diverged_is_read_up_to_there():
    records = run(1)[:20] + [{"mean_train_loss": None, "gap": None, "iteration": 20, "epoch": 4.0, "ended": "diverged"}]
    assert len(common.curve(records)["gap"]) == 18


def test_damaged_log(tmp_path):
    path, read = tmp_path / "log.jsonl", lambda: common.read_log(tmp_path, needed=["a"])
    assert read() == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3')
    assert [r["a"] for r in read()] == [1, 2]
    for line in (b'{"a"', b'{"a": 1, "epoch": null}', b"[]", b"3", b'{"b": 1}', b'{"a": "x"}', b'{"a": [1]}'):
        path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
        with pytest.raises(ValueError, match="damaged"):
            read()


def test_a_colour_belongs_to_an_alpha():
    alphas = [1e-3, .01, .1, .3, .5, 1, 3, 10, 30, 100, 1000, 3000, 1e4, 1e5, math.inf]
    assert len({str(common.colour(alpha)) for alpha in alphas}) == len(alphas)
