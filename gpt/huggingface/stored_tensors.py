"""Lists the tensors in the safetensors files of a folder, and matches them with the parameters of a model.

Only the headers are read. Every stored tensor must be a parameter of the model, and every parameter must be
stored, once, in its shape, as floating-point numbers. This module does not import torch or transformers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from data_pipeline.git_lfs import is_pointer
from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_table
from gpt.huggingface.architectures import TensorPlace, tensor_places
from gpt.huggingface.config_json import read_object
from gpt.huggingface.config_keys import JsonKeys

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that older versions of transformers saved. It passes over them too: the causal mask of GPT-2, and
# the rotary frequencies, which follow from the config.
_BUFFERS = re.compile(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
_NAMED = 5  # so many tensors are named in one message


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights; `passed_over` is an index that transformers does not read either."""

    files: tuple[Path, ...]
    passed_over: Path | None
    weight_map: Mapping[str, str]


class _Index(JsonKeys):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors files of `folder`, as transformers chooses them: model.safetensors before the index.

    Raises ConfigError when there is neither, and for an index that is not one, or that names other folders.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return WeightFiles((single,), index if index.exists() else None, {})
    content = read_object(index)
    if content is None:
        raise ConfigError(
            f"{folder} has neither {SINGLE} nor {INDEX}. Other formats, such as pickle, are not read. "
            "transformers' save_pretrained writes safetensors."
        )
    weight_map = validate(_Index, content, str(index)).weight_map
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if name in ("", ".", "..") or "/" in name]
    if outside:
        raise ConfigError(
            f"{index}: weight_map names {outside[0]!r}. Only files in the folder itself are read; copy it "
            "there and write its name alone."
        )
    return WeightFiles(tuple(folder / name for name in names), None, weight_map)


def list_tensors(files: WeightFiles) -> dict[str, StoredTensor]:
    """Every tensor in `files`, by name.

    Raises ConfigError when a file is missing, cut short or not safetensors, when two files hold one tensor,
    and when a tensor is not where the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for path in files.files:
        try:
            found = _headers(path)
        except ConfigError as error:
            problems += error.problems
            continue
        problems += [
            f"{name} is stored twice: in {tensors[name].file.name} and in {path.name}. Remove one."
            for name in sorted(found.keys() & tensors.keys())[:_NAMED]
        ]
        tensors |= found
    if problems:
        raise ConfigError(problems)
    misplaced = [
        name
        for name, file in files.weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if misplaced:
        raise ConfigError(
            f"{INDEX}: {len(misplaced)} tensors are not in the files that weight_map names: "
            f"{_names(misplaced)}. The index belongs to other files; fetch the folder again."
        )
    return tensors


def _headers(path: Path) -> dict[str, StoredTensor]:
    if not path.exists():
        raise ConfigError(f"{path} is missing, but {INDEX} names it. Copy it there.")
    if not path.is_file():
        raise ConfigError(f"{path} is not a regular file.")
    try:
        if is_pointer(path):
            raise ConfigError(f"{path} is a git-lfs pointer. Fetch the weights with `git lfs pull`.")
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {
                name: StoredTensor(name, path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. It has {path.stat().st_size:,} bytes. If it was not copied "
            "completely, fetch it again."
        ) from None


@dataclass(frozen=True)
class StoredModel:
    """Where the parameters of a model are stored: for each of ours, the places and their tensors in order.

    `tied` is an output head that is stored beside the embedding with which the model ties it.
    """

    parameters: Mapping[str, Sequence[tuple[TensorPlace, StoredTensor]]]
    tied: StoredTensor | None


def match_tensors(tensors: Mapping[str, StoredTensor], model: ModelConfig) -> StoredModel:
    """The tensors of `model` among `tensors`.

    Raises ConfigError when one is missing, has another shape or is not stored as floating-point numbers, and
    when `tensors` holds others.
    """
    shapes = dict(parameter_table(model))
    parameters: dict[str, list[tuple[TensorPlace, StoredTensor]]] = {}
    missing, problems, used = [], [], set()
    for place in tensor_places(model):
        stored = next((tensors[name] for name in _names_of(place, model) if name in tensors), None)
        if stored is None:
            missing.append(place.theirs)
            continue
        used.add(stored.name)
        parameters.setdefault(place.ours, []).append((place, stored))
        problems += _problems(stored, _stored_shape(place, shapes[place.ours]))
    embedding = parameters.get("embedding.weight")
    tied = tensors.get("lm_head.weight") if model.tie_embeddings and embedding else None
    if tied is not None and embedding is not None and tied.name not in used:
        problems += _problems(tied, embedding[0][1].shape)
        used.add(tied.name)
    else:
        tied = None
    unknown = sorted(name for name in tensors.keys() - used if not _BUFFERS.search(name))
    if unknown:
        problems.insert(
            0,
            f"The folder has tensors that the model does not have: {_names(unknown)}. Without them it "
            "computes something else. Check that config.json belongs to these weights.",
        )
    if missing:
        problems.insert(0, f"The folder lacks tensors of the model: {_names(missing)}.")
    if len(problems) > _NAMED:
        problems[_NAMED:] = [f"{len(problems) - _NAMED} more problems like these."]
    if problems:
        raise ConfigError(problems)
    return StoredModel(parameters, tied)


def _names_of(place: TensorPlace, model: ModelConfig) -> Iterator[str]:
    """The names under which a tensor may be stored."""
    yield place.theirs
    # Models without the output head, such as the published files of GPT-2, leave out the prefix.
    yield place.theirs.removeprefix("transformer.").removeprefix("model.")
    if place.ours == "embedding.weight" and model.tie_embeddings:
        yield "lm_head.weight"


def _stored_shape(place: TensorPlace, shape: tuple[int, ...]) -> tuple[int, ...]:
    rows = (shape[0] if place.end is None else place.end) - (place.start or 0)
    ours = (rows, *shape[1:])
    return ours[::-1] if place.is_transposed else ours


def _problems(stored: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    where = f"{stored.name} in {stored.file.name}"
    problems = []
    if stored.shape != shape:
        problems.append(f"{where} has the shape {list(stored.shape)}; the model needs {list(shape)}.")
    if stored.dtype not in DTYPES:
        problems.append(
            f"{where} is stored as {stored.dtype}. Only {', '.join(DTYPES)} are read; other numbers need a "
            "scale. Save the model in bf16, fp16 or fp32."
        )
    return problems


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
