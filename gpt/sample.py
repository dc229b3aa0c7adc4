"""Text from a checkpoint or an export, on any machine: without DeepSpeed and without a process group.

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
    """The command line."""
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
                f"--step {arguments.step}: {arguments.folder} is an export, which has one step."
            )
        trained = from_folder(arguments.folder)
    else:
        trained = from_run(RunDir(arguments.folder), arguments.step)
    # Documents begin without a mark, so that a prompt does; without one the end of another goes before.
    prompt = trained.tokenizer.encode(arguments.prompt).tolist() or sorted(trained.ends)[:1]
    sampled = generate(
        trained.gpt,
        prompt,
        max_tokens=arguments.max_tokens,
        sampler=Sampler(arguments.temperature, arguments.top_k, arguments.top_p),
        seed=arguments.seed,
        ends=trained.ends,
    )
    sys.stdout.write(arguments.prompt)
    for text in stream(sampled, trained.tokenizer.decode):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    try:
        main()
    except OutlastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    except BrokenPipeError:  # whoever read has read enough
        sys.stderr.close()  # or the interpreter complains while it flushes
        sys.exit(1)
