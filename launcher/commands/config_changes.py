"""Changes of a run's config on resume: which are allowed, and which need `--allow-change FIELD`.

Once a field that must match has changed, a single config no longer explains the run's numbers. Each such
change is therefore recorded as an event.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import click

from data_pipeline.errors import ConfigError
from gpt.checkpoint.format import CheckpointIndex
from gpt.config.resume_rules import RULES, Change, rule_of
from gpt.config.run import RunConfig

DATA = "data"  # the data itself, compared by its fingerprint
_SHAPES = ("model.", "optimizer.")  # the tables that decide which tensors a checkpoint has
CONFIG = "config"  # the config under which the checkpoint was saved, compared by its fingerprint


def fingerprint_changes(
    index: CheckpointIndex | None, config: RunConfig, data: str, configs: Collection[str]
) -> dict[str, Any]:
    """Changes that no field shows: the checkpoint was trained on other data, or saved under a foreign config.

    `data` is the fingerprint of the data now. `configs` are the fingerprints of the run's config now and
    before each change that a user allowed. `index` is None when the run has no checkpoint.
    """
    changes = {}
    if index is not None and index.data_fingerprint not in (data, *config.data.changed_from):
        changes[DATA] = [index.data_fingerprint, data]
    if index is not None and index.config_fingerprint not in configs:
        changes[CONFIG] = [index.config_fingerprint, " or ".join(sorted(configs))]
    return changes


def check_changes(changes: Mapping[str, Any], allowed: Sequence[str], misfits: Sequence[str] = ()) -> None:
    """Print a warning for each of the `changes` (name → old, new) that affects the run's numbers.

    Raises ConfigError for changes of fields that must match, unless they are in `allowed`, which holds names
    of fields and of tables. `misfits` says why the checkpoint's state does not fit the changed config.
    """
    problems = [
        f"--allow-change {name}: this field does not change. Changed fields: {', '.join(changes) or 'none'}."
        for name in allowed
        if not any(_covers(name, field) for field in changes)
    ]
    for field, (old, new) in changes.items():
        change = Change.MUST_MATCH if field in (DATA, CONFIG) else RULES[rule_of(field)]
        if change is Change.FREE:
            continue
        if change is Change.WARNED or any(_covers(name, field) for name in allowed):
            click.echo(
                f"warning: {field} changes from {old} to {new}. The new value takes effect from the resumed "
                "step onwards.",
                err=True,
            )
        else:
            is_shape = bool(misfits) and field.startswith(_SHAPES)
            problems.append(_refusal(field, old, new, misfits[0] if is_shape else None))
    if problems:
        raise ConfigError(problems)


def _refusal(field: str, old: object, new: object, misfit: str | None) -> str:
    if field == CONFIG:
        return (
            f"the checkpoint was saved under another config ({old}) than the run's own ({new}): config.json "
            "was edited, or the checkpoint was copied from another run. Restore the file, launch a new run "
            f"with --from this one, or allow the change with --allow-change {CONFIG}."
        )
    change = f"{field} cannot change in the middle of a run: {old} → {new}."
    if misfit is not None:
        return f"{change} The checkpoint does not fit it ({misfit}). Launch a new run with this value."
    return f"{change} Launch a new run with this value, or allow the change with --allow-change {field}."


def _covers(name: str, field: str) -> bool:
    return field == name or (name != DATA and field.startswith(f"{name}."))
