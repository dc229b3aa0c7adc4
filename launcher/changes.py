"""What may change when a run goes on: each field of a run config is free, worth a warning, or must match.

A field that must match can still be changed by who names it (`--allow-change FIELD`): the numbers of the
run are then no longer those of one config, which its events say.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import CheckpointIndex
from gpt.config import RunConfig

# None of these decides a step's numbers. Where the data lies is free: what it is must match (DATA).
FREE = (
    "checkpoint.",
    "evaluation.",
    "tracking.",
    "launch.",
    "zero.stage",
    "batch.micro_batch",
    "data.path",
    "data.verify",
    "data.changed_from",
)
# These do, from the step on at which they change.
WARNED = ("schedule.total_steps", "schedule.total_tokens", "data.max_epochs", "data.skip")
DATA = "data"  # the data itself, by its fingerprint


def data_change(index: CheckpointIndex | None, config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """The data as a changed field, where a checkpoint was trained on other data than `config` accepts."""
    if index is None or index.data_fingerprint in (fingerprint, *config.data.changed_from):
        return {}
    return {DATA: [index.data_fingerprint, fingerprint]}


def judge(changes: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Warn of `changes` (name → old, new) that matter; raise ConfigError for those that are not `allowed`.

    `allowed` holds fields, or tables of which every field may change.
    """
    problems = [
        f"--allow-change {name}: that does not change; what changes: {', '.join(changes) or 'nothing'}."
        for name in allowed
        if not any(_covers(name, field) for field in changes)
    ]
    for field, (old, new) in changes.items():
        if field != DATA and field.startswith(FREE):
            continue
        if field in WARNED or any(_covers(name, field) for name in allowed):
            click.echo(
                f"warning: {field} changes from {old} to {new}; the run follows it from here", err=True
            )
        else:
            problems.append(
                f"{field} cannot change in the middle of a run: {old} → {new}. "
                f"A run with another value is another run: launch it, or insist with --allow-change {field}."
            )
    if problems:
        raise ConfigError(problems)


def _covers(name: str, field: str) -> bool:
    return field == name or (name != DATA and field.startswith(f"{name}."))
