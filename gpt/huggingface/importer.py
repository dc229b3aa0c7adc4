"""Writes the first checkpoint of a run that starts from the weights of a transformers folder.

`python -m gpt.huggingface.importer HF_DIR RUN_DIR`

It reads safetensors only. The moments are zero and the step is 0, so the run's schedule applies from its
start, as for new weights.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from data_pipeline.dataset.manifest import joint_fingerprint, read_manifest
from data_pipeline.errors import ConfigError, OutlastError
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from gpt.checkpoint.format import CheckpointIndex, GroupEntry
from gpt.checkpoint.writer import commit, temporary_folder, write_rank_file
from gpt.config.model import ModelConfig
from gpt.config.resume_rules import config_fingerprint
from gpt.config.run import RunConfig
from gpt.huggingface.architectures import TensorPlace, tensor_places
from gpt.huggingface.tokenizer import SAMPLES
from gpt.optimizer.parameter_groups import hyperparameters, parameter_entries, sizes_by_group, states
from gpt.run.exit_codes import exit_code_of
from gpt.run.run_dir import RunDir


class PretrainedFolder:
    """The tensors of a folder that transformers wrote, as parameters of Outlast."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Open the files. Raises ConfigError when one is missing, unreadable or belongs to another model."""
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif single.exists():
            names = [single.name]
        else:
            raise ConfigError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json. Other formats, "
                "such as pickle, are not read. transformers' save_pretrained writes safetensors."
            )
        self._files: dict[str, Path] = {}
        for name in names:
            try:
                with safe_open(folder / name, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), folder / name)
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{folder / name} cannot be read: {error}") from None
        self._places: dict[str, list[TensorPlace]] = {}
        for place in tensor_places(model):
            self._places.setdefault(place.ours, []).append(place)
        missing = [place.theirs for place in tensor_places(model) if self._stored(place.theirs) is None]
        if missing:
            raise ConfigError(
                f"{folder} lacks {len(missing)} tensors of its config.json, first {missing[0]}."
            )

    def parameter(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A parameter in fp32. Raises ConfigError when its shape is not `shape`."""
        parts = []
        for place in self._places[name]:
            stored = self._stored(place.theirs)
            assert stored is not None
            with safe_open(self._files[stored], framework="pt") as file:
                part = file.get_tensor(stored).to(torch.float32)
            parts.append((part.t() if place.is_transposed else part) / place.factor)
        whole = torch.cat(parts)
        if tuple(whole.shape) != shape:
            theirs = ", ".join(place.theirs for place in self._places[name])
            raise ConfigError(f"{theirs}: shape {list(whole.shape)}, config.json says {list(shape)}.")
        result: NDArray[np.float32] = whole.numpy()
        return result

    def _stored(self, name: str) -> str | None:
        # The published files of GPT-2 leave out the prefix of the language model.
        without = name.removeprefix("transformer.").removeprefix("model.")
        return next((candidate for candidate in (name, without) if candidate in self._files), None)


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


def check_tokenizer(folder: Path, encoding: Encoding) -> None:
    """Raise ConfigError when the folder's tokenizer.json gives other ids than the encoding of the data."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no tokenizer.json to compare with the encoding of the data.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = (
        True  # as in the data: text that looks like a special token is ordinary text
    )
    for sample in SAMPLES:
        ours, theirs = (
            encoding.encode(sample).tolist(),
            tokenizer.encode(sample, add_special_tokens=False).ids,
        )
        if ours != theirs:
            raise ConfigError(
                f"{path} gives other ids than the data's encoding {encoding.name!r}: {sample[:20]!r} is "
                f"{theirs[:6]}… there and {ours[:6]}… here. Prepare the data with the model's own tokenizer."
            )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="outlast import")
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("run_dir", type=Path)
    arguments = parser.parse_args()
    run_dir = RunDir(arguments.run_dir)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    folder = PretrainedFolder(arguments.hf_dir, run.model)
    check_tokenizer(arguments.hf_dir, load_encoding(run.data.sources[0].path))
    fingerprint = joint_fingerprint([read_manifest(source.path) for source in run.data.sources])
    write_first_checkpoint(run_dir, run, folder.parameter, fingerprint)


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
