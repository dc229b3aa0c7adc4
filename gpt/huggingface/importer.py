"""Writes the first checkpoint of a run that starts from the weights of a transformers folder.

`python -m gpt.huggingface.importer HF_DIR RUN_DIR`

`outlast import` has checked config, tensors and tokenizer of the folder. The moments are zero and the step is
0, so the run's schedule applies from its start, as for new weights.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import OutlastError
from gpt.checkpoint.format import CheckpointIndex, GroupEntry
from gpt.checkpoint.writer import commit, temporary_folder, write_rank_file
from gpt.config.resume_rules import config_fingerprint
from gpt.config.run import RunConfig
from gpt.huggingface.pretrained_folder import PretrainedFolder
from gpt.optimizer.parameter_groups import hyperparameters, parameter_entries, sizes_by_group, states
from gpt.run.exit_codes import exit_code_of
from gpt.run.run_dir import RunDir


def write_first_checkpoint(
    run_dir: RunDir,
    run: RunConfig,
    parameter: Callable[[str, tuple[int, ...]], NDArray[np.float32]],
    data: str,
) -> Path:
    """Commit a checkpoint of step 0 with these weights and zero moments, written by one rank; its folder.

    `data` is the fingerprint of the data set. It needs memory for one fp32 copy of the model.
    """
    entries = parameter_entries(run.model, run.optimizer)
    sizes = sizes_by_group(entries)
    flats = {group: np.empty(sum(numels), dtype=np.float32) for group, numels in sizes.items()}
    for entry in entries:
        whole = parameter(entry.name, entry.shape).reshape(-1)
        flats[entry.group][entry.offset : entry.offset + entry.numel] = whole
    groups = tuple(
        GroupEntry(
            name=name,
            numel=len(flat),
            partition_numel=len(flat),
            states=states(name, run.optimizer),
            hyperparameters=hyperparameters(name, run.optimizer, run.model),
        )
        for name, flat in flats.items()
    )
    temporary = temporary_folder(run_dir.checkpoints, 0, 0)
    temporary.mkdir(parents=True)

    tensors = {f"{group.name}.{state}": group.numel for group in groups for state in group.states}
    parts = (
        flats[group.name] if state == "master" else np.zeros(group.numel, np.float32)
        for group in groups
        for state in group.states
    )
    file = write_rank_file(temporary, 0, tensors, parts)
    index = CheckpointIndex(
        step=0,
        attempt=0,
        world_size=1,
        stage=run.zero.stage,
        optimizer_steps=0,
        parameters=entries,
        groups=groups,
        data_fingerprint=data,
        config_fingerprint=config_fingerprint(run),
        versions={"torch": version("torch")},
        files=(file,),
    )
    return commit(run_dir.checkpoints, temporary, index)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="outlast import")
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("run_dir", type=Path)
    arguments = parser.parse_args()
    run_dir = RunDir(arguments.run_dir)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    folder = PretrainedFolder(arguments.hf_dir, run.model)
    fingerprint = joint_fingerprint([read_manifest(source.path) for source in run.data.sources])
    write_first_checkpoint(run_dir, run, folder.parameter, fingerprint)


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
