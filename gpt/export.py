"""Exports a checkpoint as a folder that transformers loads, without DeepSpeed or a process group.

`python -m gpt.export RUN_DIR OUT [--step N] [--dtype fp32]`

It reads one parameter at a time and holds at most one shard (5 GB) in memory. The folder gets its name when
it is complete. A model for which transformers has no architecture is written as plain safetensors with the
parameter names of Outlast.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data_pipeline.errors import CheckpointError, ConfigError, OutlastError
from gpt.checkpoint.format import Corrupt
from gpt.checkpoint.reader import CheckpointReader, intact_candidates
from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_count, parameter_table
from gpt.config.run import RunConfig
from gpt.huggingface.architectures import TensorPlace, tensor_places, twin_config, twin_obstacle
from gpt.huggingface.tokenizer import write_tokenizer
from gpt.run.exit_codes import exit_code_of
from gpt.run.run_dir import RunDir
from gpt.run.tokenizer import run_encoding

SHARD_BYTES = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """A summary of what an export wrote."""

    step: int
    architecture: str
    parameters: int
    files: int


def export(
    run_dir: RunDir,
    out: Path,
    *,
    step: int | None = None,
    dtype: str = "bf16",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the checkpoint of `step`, or the newest intact one, to the new folder `out`.

    Raises ConfigError when `out` is not empty, when there is no such checkpoint, and when a weight is not
    finite in `dtype`; CheckpointError when no checkpoint is intact.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder. Name another one.")
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    encoding = run_encoding(run_dir, run.data.sources[0].path)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        for found, reader in intact_candidates(run_dir, step):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_tokenizer(encoding, run.model.context, temporary)
            try:
                files = _write_weights(reader, run.model, temporary, DTYPES[dtype], shard_bytes)
            except Corrupt as error:
                print(f"the checkpoint of step {found} is corrupt and skipped: {error}", file=sys.stderr)
                continue
            architecture = _write_config(run.model, temporary, dtype, encoding.end_of_text)
            for path in temporary.iterdir():  # safetensors makes its files readable by their owner alone
                path.chmod(0o666 & ~_umask())
            if out.exists():
                out.rmdir()
            temporary.rename(out)
            return Exported(found, architecture, parameter_count(run.model), files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    raise CheckpointError(f"{run_dir.path} has no intact checkpoint" + (f" of step {step}" if step else ""))


def _write_weights(
    reader: CheckpointReader, model: ModelConfig, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> int:
    """Write the safetensors files, with an index if there are several; the number of files."""
    places = list(tensor_places(model))
    shapes = dict(parameter_table(model))
    sizes = [_rows(place, shapes) * prod(shapes[place.ours][1:]) * dtype.itemsize for place in places]
    shards: list[list[TensorPlace]] = [[]]
    filled = 0
    for place, size in zip(places, sizes, strict=True):
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(place)
        filled += size
    parameter = lru_cache(maxsize=1)(
        reader.parameter
    )  # q, k and v are read one after the other from one parameter
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        tensors = {place.theirs: _tensor(parameter(place.ours), place, dtype) for place in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(shards)


def _rows(place: TensorPlace, shapes: dict[str, tuple[int, ...]]) -> int:
    rows = shapes[place.ours][0]
    return (rows if place.end is None else place.end) - (place.start or 0)


def _tensor(parameter: np.ndarray, place: TensorPlace, dtype: torch.dtype) -> torch.Tensor:
    part = torch.from_numpy(parameter[place.start : place.end])
    part = part if place.factor == 1.0 else part * place.factor
    # always a copy: save_file does not accept views of shared memory
    tensor = (part.t() if place.is_transposed else part).to(dtype, copy=True).contiguous()
    if not tensor.isfinite().all():
        if part.isfinite().all():
            largest = float(part.abs().max())
            raise ConfigError(
                f"{place.ours} holds {largest:g}, which is too large for {dtype}. Export with --dtype bf16 "
                "or fp32."
            )
        raise ConfigError(
            f"{place.ours} holds NaN or infinity, so the model is lost at this step. Export an earlier "
            "checkpoint with --step."
        )
    return tensor


def _umask() -> int:
    """The umask of this process, which can be read only by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _write_config(model: ModelConfig, folder: Path, dtype: str, end_of_text: int) -> str:
    """Write config.json and generation_config.json; the name of the architecture."""
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    # without max_length: transformers would warn at each generate(max_new_tokens=…)
    _write_json(folder / "generation_config.json", ids)
    obstacle = twin_obstacle(model)
    if obstacle is not None:
        fields = model.model_dump(mode="json", exclude_none=True)
        _write_json(folder / "config.json", {"model_type": "outlast", "model": fields})
        print(
            f"transformers has no architecture for {obstacle}. The export holds plain safetensors with the "
            "parameter names of Outlast, which AutoModelForCausalLM cannot load.",
            file=sys.stderr,
        )
        return "outlast"
    content = twin_config(model, str(DTYPES[dtype]).removeprefix("torch."), end_of_text)
    _write_json(folder / "config.json", content)
    architecture: str = content["architectures"][0]
    return architecture


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="outlast export")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    done = export(RunDir(arguments.run_dir), arguments.out, step=arguments.step, dtype=arguments.dtype)
    print(
        f"{arguments.out}: {done.architecture} of step {done.step}, {done.parameters:,} parameters in "
        f"{arguments.dtype}, {done.files} file{'s' if done.files > 1 else ''}"
    )


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
