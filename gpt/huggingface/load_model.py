"""Loads a trained model with its tokenizer from a run or from a folder that transformers loads.

It works on any machine, without DeepSpeed or a process group. Weights are converted to fp32.
"""

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.config_file import validate
from data_pipeline.errors import CheckpointError, ConfigError
from gpt.checkpoint.format import Corrupt
from gpt.checkpoint.reader import intact_candidates
from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_table
from gpt.config.run import RunConfig
from gpt.huggingface.config_json import end_ids, model_fields, read_config
from gpt.huggingface.pretrained_folder import PretrainedFolder
from gpt.huggingface.tokenizer import FolderTokenizer
from gpt.model.gpt import GPT
from gpt.run.run_dir import RunDir
from gpt.run.tokenizer import run_encoding


class Tokenizer(Protocol):
    """Converts text to ids and back."""

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, the ids that end a text, and the step of its checkpoint, if it has one."""

    gpt: GPT
    tokenizer: Tokenizer
    ends: Collection[int]
    step: int | None


def from_run(run_dir: RunDir, step: int | None = None) -> LoadedModel:
    """The model in the checkpoint of `step`, or in the newest intact checkpoint.

    Raises ConfigError when there is no such checkpoint, CheckpointError when none is intact.
    """
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    encoding = run_encoding(run_dir, run.data.sources[0].path)
    for found, reader in intact_candidates(run_dir, step):
        try:
            gpt = _filled(run.model, reader.parameter)
        except Corrupt as error:
            print(f"the checkpoint of step {found} is corrupt and skipped: {error}", file=sys.stderr)
            continue
        return LoadedModel(gpt, encoding, {encoding.end_of_text}, found)
    raise CheckpointError(f"{run_dir.path} has no intact checkpoint" + (f" of step {step}" if step else ""))


def from_folder(folder: Path) -> LoadedModel:
    """The model in a folder of `outlast export`, or in one of GPT-2, Llama, Mistral or Qwen3.

    Raises ConfigError when the folder holds none of these, or lacks a file such as tokenizer.json.
    """
    model = validate(ModelConfig, model_fields(read_config(folder)), "config.json")
    tokenizer, ends = FolderTokenizer(folder), end_ids(folder)
    weights, shapes = PretrainedFolder(folder, model), dict(parameter_table(model))
    gpt = _filled(model, lambda name: weights.parameter(name, shapes[name]))
    return LoadedModel(gpt, tokenizer, set(next(iter(ends.values()), ())), None)


def _filled(model: ModelConfig, parameter: Callable[[str], NDArray[np.float32]]) -> GPT:
    gpt = GPT(model)
    with torch.no_grad():
        for name, target in gpt.named_parameters():
            weight = parameter(name)
            if not np.isfinite(weight).all():
                raise ConfigError(
                    f"the weights are not finite: {name} holds {np.count_nonzero(~np.isfinite(weight)):,} "
                    "values that are NaN or infinite. Choose an earlier checkpoint with --step."
                )
            target.copy_(torch.from_numpy(weight))
    return gpt.place(torch.device("cpu"), torch.float32).eval()
