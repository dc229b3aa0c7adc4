"""Text from a checkpoint, on any machine: without DeepSpeed and without a process group.

`python -m gpt.sample RUN_DIR --prompt TEXT`
"""

import argparse
import sys
from pathlib import Path

import torch

from data_pipeline.errors import CheckpointError, ConfigError, OutlastError
from data_pipeline.tokenizer import load_encoding
from gpt.checkpoint.format import Corrupt, committed
from gpt.checkpoint.reader import CheckpointReader
from gpt.config import RunConfig
from gpt.generate import Choice, generate, stream
from gpt.model import GPT
from gpt.run_dir import RunDir


def load_model(run_dir: RunDir, run: RunConfig, step: int | None = None) -> tuple[GPT, int]:
    """The network with the fp32 weights of checkpoint `step`, or of the newest intact one, and its step."""
    candidates = [(s, folder) for s, folder in committed(run_dir.checkpoints) if step in (None, s)]
    if not candidates:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ConfigError(f"{run_dir.path} has no {which} yet")
    for found, folder in reversed(candidates):
        try:
            return _read_model(folder, run), found
        except Corrupt as error:
            print(f"{folder.name} is passed over: {error}", file=sys.stderr)
    raise CheckpointError(f"{run_dir.path} has no intact checkpoint")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="outlast sample")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int)
    arguments = parser.parse_args()
    run_dir = RunDir(arguments.run_dir)
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    encoding = load_encoding(run.data.sources[0].path)
    model, _ = load_model(run_dir, run, arguments.step)
    sampled = generate(
        model,
        [encoding.end_of_text, *encoding.encode(arguments.prompt).tolist()],
        max_tokens=arguments.max_tokens,
        choice=Choice(arguments.temperature, arguments.top_k, arguments.top_p),
        seed=arguments.seed,
        end=encoding.end_of_text,
    )
    sys.stdout.write(arguments.prompt)
    for text in stream(sampled, encoding):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _read_model(folder: Path, run: RunConfig) -> GPT:
    reader = CheckpointReader(folder)
    model = GPT(run.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(reader.parameter(name)))
    return model.place(torch.device("cpu"), torch.float32).eval()


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
