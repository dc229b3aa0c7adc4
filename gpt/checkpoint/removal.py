"""Checkpoints that stop counting: rejected, deleted, or pruned by retention.

Each is renamed first, and the rename is made durable, before anything else happens to it. A kill at any point
therefore leaves a whole committed checkpoint or a folder that does not count, never half of a checkpoint.
"""

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

from data_pipeline.durable import rename_durably
from gpt.checkpoint.failpoints import reach
from gpt.checkpoint.format import committed
from gpt.run.run_dir import CORRUPT_PREFIX, REWOUND_PREFIX, UNCOMMITTED_PREFIX


def reject(folder: Path) -> Path:
    """Rename a corrupt checkpoint so that it no longer counts; its new path. Only the user deletes it."""
    rejected = folder.with_name(f"{CORRUPT_PREFIX}{folder.name}-{time.time_ns()}")
    rename_durably(folder, rejected)
    return rejected


def rejected_or_rewound(checkpoints: Path) -> list[Path]:
    """The folders in `checkpoints` that were rejected or rewound and that nobody has deleted yet."""
    found = (checkpoints.glob(f"{prefix}*step-*") for prefix in (CORRUPT_PREFIX, REWOUND_PREFIX))
    return sorted(folder for folders in found for folder in folders)


def delete(folder: Path) -> None:
    """Delete a checkpoint."""
    trash = folder.with_name(f"{UNCOMMITTED_PREFIX}pruned-{folder.name}")
    rename_durably(folder, trash)
    reach("prune_renamed")
    shutil.rmtree(trash)
    reach("pruned")


def prune(checkpoints: Path, keep: Collection[int], check: Callable[[], None] = lambda: None) -> list[int]:
    """Delete the committed checkpoints whose step is not in `keep`; the steps that were deleted.

    `check` is called before each deletion; it raises when the caller may no longer delete.
    """
    doomed = [(step, folder) for step, folder in committed(checkpoints) if step not in keep]
    for _, folder in doomed:
        check()
        delete(folder)
    return [step for step, _ in doomed]
