"""Changes of a run that goes on: those that must not be are refused, unless they are asked for by name.

A field that must match can still be changed by who names it (`--allow-change FIELD`): the numbers of the
run are then no longer those of one config, which its events say.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import click

from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import CheckpointIndex
from gpt.config.resume_rules import RULES, Change, rule_of
from gpt.config.run import RunConfig

DATA = "data"  # the data itself, by its fingerprint
CONFIG = "config"  # a config that is not the one of config.json's history, by its fingerprint


def fingerprint_changes(
    index: CheckpointIndex | None, config: RunConfig, data: str, configs: Collection[str]
) -> dict[str, Any]:
    """What no field tells: a checkpoint of other data than `config` accepts, or not of the run's `configs`.

    `data` is the fingerprint of the data, `configs` are those of the run's config now and before changes
    that were allowed; None where there is no checkpoint.
    """
    changes = {}
    if index is not None and index.data_fingerprint not in (data, *config.data.changed_from):
        changes[DATA] = [index.data_fingerprint, data]
    if index is not None and index.config_fingerprint not in configs:
        changes[CONFIG] = [index.config_fingerprint, " or ".join(sorted(configs))]
    return changes


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
        change = Change.MUST_MATCH if field in (DATA, CONFIG) else RULES[rule_of(field)]
        if change is Change.FREE:
            continue
        if change is Change.WARNED or any(_covers(name, field) for name in allowed):
            click.echo(
                f"warning: {field} changes from {old} to {new}; the run follows it from here", err=True
            )
        else:
            problems.append(_refusal(field, old, new))
    if problems:
        raise ConfigError(problems)


def _refusal(field: str, old: object, new: object) -> str:
    if field == CONFIG:
        return (
            f"the checkpoint was saved under another config ({old}) than the run's own ({new}): config.json "
            "was edited, or the checkpoint put there by hand. Restore it, launch another run --from this "
            f"one, or insist with --allow-change {CONFIG}."
        )
    return (
        f"{field} cannot change in the middle of a run: {old} → {new}. "
        f"A run with another value is another run: launch it, or insist with --allow-change {field}."
    )


def _covers(name: str, field: str) -> bool:
    return field == name or (name != DATA and field.startswith(f"{name}."))
