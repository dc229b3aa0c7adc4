"""Generates text from a checkpoint or an export, on any machine, without DeepSpeed or a process group.

`python -m gpt.sample RUN_DIR|EXPORT --prompt TEXT`
"""

import argparse
import sys
from io import TextIOWrapper
from math import isfinite
from pathlib import Path

from data_pipeline.errors import ConfigError, OutlastError
from gpt.huggingface.load_model import from_folder, from_run
from gpt.model.generate import Sampler, generate, stream
from gpt.run.exit_codes import exit_code_of
from gpt.run.run_dir import RunDir, is_exported


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="outlast sample")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int)
    arguments = parser.parse_args()
    _check(arguments)
    if is_exported(arguments.folder):
        if arguments.step is not None:
            raise ConfigError(
                f"--step {arguments.step}: {arguments.folder} is an export, which holds a single step. Leave "
                "--step out."
            )
        loaded = from_folder(arguments.folder)
    else:
        loaded = from_run(RunDir(arguments.folder), arguments.step)
    # Documents carry no beginning-of-text token, so prompts get none either. An empty prompt becomes an
    # end-of-text token, which is what comes before a document in the training data.
    prompt = loaded.tokenizer.encode(arguments.prompt).tolist() or sorted(loaded.ends)[:1]
    sampled = generate(
        loaded.gpt,
        prompt,
        max_tokens=arguments.max_tokens,
        sampler=Sampler(arguments.temperature, arguments.top_k, arguments.top_p),
        seed=arguments.seed,
        ends=loaded.ends,
    )
    if isinstance(sys.stdout, TextIOWrapper):  # a locale without these characters must not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(arguments.prompt)
    for text in stream(sampled, loaded.tokenizer.decode):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options that the command line of `outlast sample` cannot check by their range."""
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--prompt is not UTF-8 at character {error.start}. Convert the text, or set a UTF-8 locale."
        ) from None
    if not (isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise ConfigError(f"--temperature {arguments.temperature}: expected a finite number of at least 0.")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p {arguments.top_p}: expected a number above 0 and at most 1.")
    if not -(1 << 63) <= arguments.seed < 1 << 64:  # what torch takes
        raise ConfigError(f"--seed {arguments.seed}: expected a number from -2^63 to 2^64 - 1.")


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        sys.stderr.close()  # otherwise the interpreter reports the error again when it flushes
        sys.exit(1)
