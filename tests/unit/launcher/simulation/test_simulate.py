"""The simulation agrees with closed forms where they exist, and with published runs."""

from dataclasses import replace
from math import exp

import numpy as np
import pytest

from launcher.simulation.scenario import DAY_S, Scenario, best_interval_s
from launcher.simulation.simulate import CATEGORIES, simulate

# Every save blocks the training until it is committed, so that Daly's closed form holds.
SIMPLE = Scenario(
    nodes=10,
    work_s=200 * 900.0,
    node_failure_rate=1 / (10 * 7200.0),
    needs_other_node=0.0,
    hangs=0.0,
    detect_s=60.0,
    start_s=120.0,
    load_s=0.0,
    interval_s=1000.0,
    stall_s=100.0,
    save_s=100.0,
)


def test_time_without_failures_is_work_saves_and_one_start() -> None:
    quiet = replace(SIMPLE, node_failure_rate=0.0)
    outcome = simulate(quiet, replicas=3)
    # The last of the 200 intervals ends with the last save.
    assert outcome.wall_s == pytest.approx([120 + 200 * 1000.0] * 3)
    assert outcome.interruptions.tolist() == [0, 0, 0]


def test_mean_time_is_that_of_the_closed_form() -> None:
    """Daly 2006, equation 13: each interval with its save must go by without a failure."""
    rate = SIMPLE.failure_rate
    expected = (1 / rate + SIMPLE.detect_s) * exp(rate * SIMPLE.start_s) * (exp(rate * 1000.0) - 1) * 200
    found = simulate(SIMPLE, replicas=2000).wall_s
    assert found.mean() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hangs": 0.5, "hang_s": 900.0, "needs_other_node": 0.5, "queue_s": 600.0},
        {"preemption_rate": 1 / 5000.0, "save_s": 250.0, "stall_s": 20.0},
        {"spare_nodes": 2, "needs_other_node": 1.0, "repair_s": 3600.0},
    ],
)
def test_categories_add_up_to_the_time(changes: dict[str, float]) -> None:
    outcome = simulate(replace(SIMPLE, **changes), replicas=50)  # type: ignore[arg-type]
    assert outcome.has_ended
    assert sum(outcome.seconds.values()) == pytest.approx(outcome.wall_s)
    assert outcome.seconds["productive"] == pytest.approx([SIMPLE.work_s] * 50)
    assert sum(outcome.share(name) for name in CATEGORIES) == pytest.approx(1.0)


def test_failures_arrive_at_the_given_rate() -> None:
    outcome = simulate(SIMPLE, replicas=1000)
    exposed = outcome.wall_s.mean() - outcome.seconds["detecting"].mean()
    assert outcome.interruptions.mean() == pytest.approx(exposed * SIMPLE.failure_rate, rel=0.02)


def test_preemption_loses_no_step() -> None:
    preempted = replace(SIMPLE, node_failure_rate=0.0, preemption_rate=1 / 3600.0)
    outcome = simulate(preempted, replicas=50)
    assert outcome.seconds["repeated"].sum() == 0.0
    assert outcome.share("queueing") > 0.1


def test_no_interval_is_better_than_the_best_one() -> None:
    best = simulate(replace(SIMPLE, interval_s=None), replicas=2000).goodput.mean()
    interval_s = best_interval_s(100.0, 7200.0, SIMPLE.recovery_s)
    for factor in (0.4, 0.6, 1.6, 2.5):
        other = simulate(replace(SIMPLE, interval_s=factor * interval_s), replicas=2000)
        assert other.goodput.mean() < best


def test_background_save_is_lost_with_the_node_until_it_is_committed() -> None:
    slow, quick = (simulate(replace(SIMPLE, stall_s=1.0, save_s=s), replicas=500) for s in (900.0, 10.0))
    repeated = [outcome.seconds["repeated"].sum() / outcome.interruptions.sum() for outcome in (slow, quick)]
    assert repeated[0] - repeated[1] == pytest.approx(890.0, rel=0.15)


def test_spare_nodes_replace_the_wait_for_a_new_job() -> None:
    waiting = replace(SIMPLE, needs_other_node=1.0, queue_s=3600.0)
    without = simulate(waiting, replicas=200)
    with_spares = simulate(replace(waiting, spare_nodes=8, repair_s=7200.0), replicas=200)
    assert without.share("queueing") > 0.2
    assert with_spares.share("queueing") < 0.02


def test_run_that_fails_faster_than_it_starts_never_ends() -> None:
    outcome = simulate(replace(SIMPLE, node_failure_rate=0.1, start_s=100.0), replicas=5)
    assert not outcome.has_ended
    assert np.isinf(outcome.wall_s).all()


def test_llama_3_is_more_than_90_percent_effective() -> None:
    """16,384 GPUs had 419 unexpected interruptions in 54 days (arXiv:2407.21783, section 3.3.4)."""
    nodes, days = 2048, 54
    llama = Scenario(
        nodes=nodes,
        work_s=0.92 * days * DAY_S,
        node_failure_rate=419 / (days * DAY_S) / nodes,
        spare_nodes=32,  # they kept spares in the cluster, and automation needed people three times only
        start_s=300.0,
        load_s=60.0,
        stall_s=5.0,
        save_s=120.0,
    )
    outcome = simulate(llama, replicas=100)
    assert outcome.interruptions.mean() == pytest.approx(419, rel=0.06)
    assert outcome.goodput.mean() > 0.9
