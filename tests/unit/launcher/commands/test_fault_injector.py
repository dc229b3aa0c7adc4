"""Killing a run once, on purpose."""

from gpt.run.events import Event
from launcher.commands.fault_injector import FaultInjector
from launcher.commands.record_follower import Update


def steps(*numbers: int) -> Update:
    return Update([{"step": number} for number in numbers], [])


def event(name: Event, step: int) -> Update:
    return Update([], [{"event": name.value, "step": step}])


def test_a_run_is_killed_once_some_steps_after_its_first_checkpoint() -> None:
    kills: list[int] = []
    notes: list[str] = []
    fault = FaultInjector(lambda: f"worker {kills.append(1) or 1}", steps_after_save=5)
    fault.observe(event(Event.RESUMED, 0), notes.append)
    for update in (steps(9, 10), event(Event.CHECKPOINT_SAVED, 10), steps(11, 12, 13, 14)):
        fault.observe(update, notes.append)
        assert kills == []
    fault.observe(steps(15), notes.append)
    assert (fault.saved_step, fault.killed_step, fault.resumed_step, fault.is_down) == (10, 15, None, True)
    assert notes == [">>> killed worker 1 after step 15; the last checkpoint is that of step 10"]
    fault.observe(event(Event.RESUMED, 10), notes.append)
    fault.observe(event(Event.CHECKPOINT_SAVED, 20), notes.append)
    fault.observe(steps(25, 30), notes.append)
    assert (fault.resumed_step, fault.is_down, len(kills)) == (10, False, 1)
