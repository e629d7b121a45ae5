"""Equal training loss, statistics over seeds and the shape of the summary, against hand-made curves and known values."""
import math

import numpy as np
import pytest

import common


def test_value_at_recovers_a_line_in_log_loss():
    loss = [2.3 * .96**k for k in range(60)]
    quantity = [3 - 2 * math.log(l) for l in loss]
    for level in (2.0, 1.0, .5):
        assert common.value_at(level, loss, quantity) == pytest.approx(3 - 2 * math.log(level))


def test_value_at_against_a_least_squares_fit_done_by_hand():
    rng = np.random.default_rng(0)
    loss, quantity = np.exp(rng.uniform(-.3, .3, 80)), rng.normal(size=80)
    near = np.abs(loss - 1) <= .08
    slope, at_zero = np.polyfit(np.log(loss[near]), quantity[near], 1)
    assert common.value_at(1.0, loss, quantity) == pytest.approx(at_zero)


@pytest.mark.parametrize("loss", [[], [1.0], [.99, 1.01], [1.01, 1.02, 1.05], [.93, .95, .99], [.9, .91, 1.2, 1.3], [1.0, 1.0, 1.0]])
def test_nothing_is_extrapolated(loss):
    """Fewer than three probes within 8 %, or all on one side, or all at one loss: no value."""
    assert common.value_at(1.0, loss, [1.0] * len(loss)) is None


def test_entries_without_numbers_are_left_out():
    loss, quantity = [1.05, 1.02, None, .97, .95], [1.0, None, 9.0, 1.0, 1.0]
    assert common.value_at(1.0, loss, quantity) == pytest.approx(1.0)
    assert common.value_at(1.0, loss[:4], quantity[:4]) is None


def test_student_t():
    for n, t in ((2, 12.7062), (3, 4.30265), (4, 3.18245), (10, 2.26216), (31, 2.04227), (101, 1.98397)):
        assert common.student_t(n) == pytest.approx(t, abs=1e-4)  # printed tables, n - 1 degrees of freedom


def test_spread():
    assert common.spread([None]) is None
    assert common.spread([2.0, None]) == {"mean": 2.0, "std": None, "n": 1}
    s = common.spread([1.0, 2.0, 3.0], interval=True)
    assert s["mean"] == 2 and s["std"] == 1 and s["n"] == 3
    assert s["interval"] == pytest.approx([2 - 4.30265 / 3**.5, 2 + 4.30265 / 3**.5], abs=1e-4)
    assert "interval" not in common.spread([1.0, 2.0], interval=True)


def test_levels():
    levels = common.loss_levels(10, 1.6)
    assert levels == sorted(levels, reverse=True) and {1.6, 1.0, .5, 2.07, .23} <= set(levels)
    assert max(common.loss_levels(2)) < math.log(2) and 1.0 not in common.loss_levels(2)


def test_summarise_pairs_by_seed():
    def run(gap):
        return [{"mean_train_loss": l, "gap": gap + math.log(l)} for l in (2.3 * .97**k for k in range(40))]
    runs = {1.0: {0: run(3), 1: run(5), 2: run(4)}, 100.0: {0: run(1), 1: run(2), 3: run(9)}}
    summary = common.summarise(runs, {"gap": lambda r: r["gap"]}, [2.0, 1.0, .1])
    at = summary["alphas"]["1"]["levels"]
    assert at["1"]["gap"]["n"] == 3 and at["1"]["gap"]["mean"] == pytest.approx(4) and "0.1" not in at
    pair = summary["paired"]["1 - 100"]["levels"]["2"]["gap"]
    assert pair["n"] == 2 and pair["mean"] == pytest.approx((2 + 3) / 2)  # seeds 0 and 1; 2 and 3 have no partner


def test_a_column_that_is_never_there():
    records = [{"mean_train_loss": l, "x": None} for l in (1.05, 1.0, .95)]
    assert common.summarise({1.0: {0: records}}, {"x": lambda r: r["x"]}, [1.0])["alphas"]["1"]["levels"] == {}


def test_damaged_log(tmp_path):
    path = tmp_path / "log.jsonl"
    assert common.read_log(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3')
    assert [r["a"] for r in common.read_log(path)] == [1, 2]
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        common.read_log(path)
