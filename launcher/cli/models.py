"""The commands that use checkpoints as models, and models as runs: sample, export, import."""

from pathlib import Path

import click

from launcher.cli.options import UserPath, cluster_option, example, set_option


@click.command(
    short_help="Generate text from a checkpoint or an export.",
    epilog=example('outlast sample runs/demo-0001 --prompt "In the beginning"'),
)
@click.argument("folder", metavar="RUN_DIR|EXPORT")
@click.option("--prompt", default="", metavar="TEXT", help="The text to continue.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="The largest number of tokens to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.8,
    show_default=True,
    help="Divides the logits; 0 always takes the most likely token.",
)
@click.option(
    "--top-k", type=click.IntRange(min=1), metavar="N", help="Sample from the N most likely tokens only."
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    metavar="P",
    help="Sample from the most likely tokens that together have probability P.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=-(2**63), max=2**64 - 1),
    default=0,
    show_default=True,
    help="Seeds the sampling.",
)
@click.option(
    "--step",
    type=click.IntRange(min=0),
    metavar="N",
    help="The checkpoint to use. Default: the newest intact one.",
)
def sample(folder: str, prompt: str, **options: float | None) -> int:
    """Generate text from a checkpoint or an export, and print it token by token."""
    from launcher.commands.model_tools import sample

    return sample(folder, prompt, **options)


@click.command(
    short_help="Export a checkpoint for transformers.",
    epilog=example("outlast export runs/demo-0001 exported", "outlast export runs/demo-0001 out --step 60"),
)
@click.argument("run_dir")
@click.argument("out", type=UserPath())
@click.option(
    "--step",
    type=click.IntRange(min=0),
    metavar="N",
    help="The checkpoint to use. Default: the newest intact one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="The data type of the weights.",
)
def export(run_dir: str, out: Path, step: int | None, dtype: str) -> int:
    """Export a checkpoint to the folder OUT, which transformers can load: weights, config and tokenizer."""
    from launcher.commands.model_tools import export

    return export(run_dir, out, step, dtype)


@click.command(
    "import",
    short_help="Create a run from a transformers model.",
    epilog=example(
        "outlast import gpt2/ runs/mine --data data/mine "
        "--set schedule.total_steps=100 --set batch.global_batch_tokens=32768",
        "outlast resume runs/mine",
    ),
)
@click.argument("hf_dir", type=UserPath(exists=True, file_okay=False))
@click.argument("run_dir", type=UserPath())
@click.option(
    "--data",
    required=True,
    metavar="DIR",
    help="A data directory that was prepared with the model's tokenizer.",
)
@cluster_option
@set_option
def import_(hf_dir: Path, run_dir: Path, data: str, cluster: str, overrides: tuple[str, ...]) -> int:
    """Create a run that continues pretraining from a GPT-2, Llama, Mistral or Qwen3 folder."""
    from launcher.commands.import_model import import_run

    return import_run(hf_dir, run_dir, data, cluster, overrides)
