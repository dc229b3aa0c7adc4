"""Generates text from a checkpoint or an export, on any machine, without DeepSpeed or a process group.

`python -m gpt.sample RUN_DIR|EXPORT --prompt TEXT`
"""

import argparse
import sys
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
    sys.stdout.write(arguments.prompt)
    for text in stream(sampled, loaded.tokenizer.decode):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        sys.stderr.close()  # otherwise the interpreter reports the error again when it flushes
        sys.exit(1)
