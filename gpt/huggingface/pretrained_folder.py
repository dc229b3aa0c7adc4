"""Reads the weights of a folder that transformers wrote, as parameters of Outlast."""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.huggingface.stored_tensors import StoredTensor, list_tensors, match_tensors, weight_files


class PretrainedFolder:
    """The tensors of a folder that transformers wrote, as parameters of Outlast."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Read the headers of the files. Raises ConfigError unless they hold the tensors of `model`."""
        files = weight_files(folder)
        if files.passed_over is not None:
            read, passed_over = files.files[0].name, files.passed_over.name
            print(
                f"warning: {folder} has both {read} and {passed_over}. Only {read} is read, as transformers "
                "does.",
                file=sys.stderr,
            )
        self._stored = match_tensors(list_tensors(files), model)

    def parameter(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A parameter in fp32. Raises ConfigError for numbers that are not finite in fp32."""
        parts = []
        for place, stored in self._stored.parameters[name]:
            part = _read(stored)
            if name == "embedding.weight" and self._stored.tied is not None:
                _require_equal(part, stored, self._stored.tied)
            parts.append((part.t() if place.is_transposed else part) / place.factor)
        whole = torch.cat(parts)
        assert tuple(whole.shape) == shape
        result: NDArray[np.float32] = whole.numpy()
        return result


def _read(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor in fp32."""
    try:
        with safe_open(stored.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored.name).to(torch.float32)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{stored.file} cannot be read: {error}") from None
    bad = ~tensor.isfinite()
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ConfigError(
            f"{stored.name} in {stored.file} holds {int(bad.sum())} numbers that are not finite in fp32, the "
            f"first is {tensor[tuple(first)].item()} at {first}. With them every output is useless. Use "
            "weights from before the numbers were lost."
        )
    return tensor


def _require_equal(embedding: torch.Tensor, stored: StoredTensor, tied: StoredTensor) -> None:
    if not torch.equal(embedding, _read(tied)):
        raise ConfigError(
            f"{tied.name} in {tied.file.name} differs from {stored.name}, but config.json ties them "
            "(tie_word_embeddings = true), so it is not known which model is meant. If the output head is a "
            "matrix of its own, set tie_word_embeddings = false in config.json."
        )
