"""events.jsonl: what happened to a run, one JSON object a line. `Event` owns every name.

Goodput, `outlast status` and the retry limits read these names back, so a new event is a new member here.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from gpt.run import record
from gpt.run.line_reader import Line
from gpt.run.record import is_count, is_number, is_time


class Event(StrEnum):
    """The value of `event` in a line of events.jsonl."""

    # The launcher and the node tasks
    SUBMITTED = "submitted"
    JOB_RUN_STARTED = "turn_started"
    REQUEUED = "requeued"
    INTERRUPTED = "interrupted"
    HANG = "hang"
    WORKERS_CRASHED = "workers_crashed"
    CONFIG_CHANGED = "config_changed"
    FORKED = "branched"
    IMPORTED = "imported"
    # The life of an attempt
    ATTEMPT_STARTED = "attempt_started"
    PHASE = "phase"
    NODES_CHECKED = "nodes_checked"
    NETWORK_BUILT = "network_built"
    WARMUP_CHOSEN = "warmup_chosen"
    UPDATE_SKIPPED = "update_skipped"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    # Checkpoints and the record
    RESUMED = "resumed"
    CONTINUED = "continued"
    RECORD_DAMAGED = "record_damaged"
    CHECKPOINT_SAVED = "checkpoint_saved"
    CHECKPOINT_SKIPPED = "checkpoint_skipped"
    CHECKPOINT_FAILED = "checkpoint_failed"
    CHECKPOINT_NOT_FINITE = "checkpoint_not_finite"
    CHECKPOINT_GIVEN_UP = "checkpoint_given_up"
    CHECKPOINT_REJECTED = "checkpoint_rejected"
    SAVING_SYNCHRONOUSLY = "saving_synchronously"
    PRUNE_FAILED = "prune_failed"
    TAKEN_FROM_MIRROR = "taken_from_mirror"
    MIRRORED = "mirrored"
    MIRROR_FAILED = "mirror_failed"
    # The sidecars
    TRACKING_FAILED = "tracking_failed"
    TRACKING_CHANGED = "tracking_changed"
    SIDECAR_RESTARTED = "sidecar_restarted"


def record_event(path: Path, event: Event, /, **fields: Any) -> None:
    """Append an event to the events.jsonl at `path`; when that fails, report it on standard error."""
    try:
        record.append(path, event=event.value, **fields)
    except OSError as error:
        with suppress(OSError):  # standard error may be on the same full disk
            print(f"event {event} {fields} is not in {path}: {error}", file=sys.stderr, flush=True)


def read_events(path: Path, *wanted: Event) -> Iterator[Line]:
    """The events at `path`, oldest first: all of them, or only the `wanted` ones; see `checked_event`."""
    for content in record.read(path):
        event = checked_event(content)
        if event is not None and (not wanted or event["event"] in wanted):
            yield event


def checked_event(line: Line) -> Line | None:
    """An event with its name in `event` and a `time`; None when the line is no event.

    Fields that this module knows are of the right kind: others are left out, and so is an event without the
    fields that it needs. The time is 0 when it is missing.
    """
    name = line.get("event")
    if not isinstance(name, str):
        return None
    event = {key: value for key, value in line.items() if key not in _KINDS or _KINDS[key](value)}
    if any(key not in event for key in _NEEDED.get(name, ())):
        return None
    return event if is_time(event.get("time")) else {**event, "time": 0.0}


def earlier_config_fingerprints(path: Path) -> set[str]:
    """The fingerprints of the configs that the run had before each change that a user allowed."""
    changes = read_events(path, Event.CONFIG_CHANGED)
    return {line["config_fingerprint"] for line in changes if line.get("config_fingerprint")}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# What a field holds in every event that has it.
_KINDS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("step", "attempt", "world_size", "bytes", "exit_code"), is_count),
    **dict.fromkeys(("seconds", "stall_s", "lost_steps", "lost_s", "repeated_s"), is_number),
    **dict.fromkeys(
        ("reason", "cause", "path", "name", "attention", "culprit", "job", "config_fingerprint", "run"),
        _is_text,
    ),
}
# Without these fields an event says nothing.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    Event.ATTEMPT_STARTED: ("attempt", "world_size"),
    Event.WORKERS_CRASHED: ("cause",),
    Event.HANG: ("culprit",),
    Event.PHASE: ("name",),
    Event.RESUMED: ("step",),
    Event.CHECKPOINT_SAVED: ("step",),
    Event.CHECKPOINT_FAILED: ("step", "reason"),
    Event.CHECKPOINT_SKIPPED: ("step", "reason"),
    Event.CHECKPOINT_REJECTED: ("path", "reason"),
    Event.SAVING_SYNCHRONOUSLY: ("reason",),
    Event.UPDATE_SKIPPED: ("step", "reason"),
    Event.MIRROR_FAILED: ("reason",),
    Event.CHECKPOINT_NOT_FINITE: ("step", "reason"),
    Event.TRACKING_FAILED: ("reason",),
    Event.TRACKING_CHANGED: ("reason",),
}
