"""events.jsonl: what happened to a run, one JSON object a line. `Event` owns every name.

Goodput, `outlast status` and the retry limits read these names back, so a new event is a new member here.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from gpt.run import record


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


def record_event(path: Path, event: Event, /, **fields: Any) -> None:
    """Append an event to the events.jsonl at `path`; when that fails, report it on standard error."""
    try:
        record.append(path, event=event.value, **fields)
    except OSError as error:
        with suppress(OSError):  # standard error may be on the same full disk
            print(f"event {event} {fields} is not in {path}: {error}", file=sys.stderr, flush=True)


def read_events(path: Path, *wanted: Event) -> Iterator[dict[str, Any]]:
    """The events at `path`, oldest first: all of them, or only the `wanted` ones."""
    for line in record.read(path):
        if "event" in line and (not wanted or line["event"] in wanted):
            yield line


def earlier_config_fingerprints(path: Path) -> set[str]:
    """The fingerprints of the configs that the run had before each change that a user allowed."""
    changes = read_events(path, Event.CONFIG_CHANGED)
    return {line["config_fingerprint"] for line in changes if line.get("config_fingerprint")}
