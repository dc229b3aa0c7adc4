"""The commands that turn checkpoints into models and models into runs: sample, export, import."""

from pathlib import Path

import click

from launcher.cli.options import cluster_option, example, set_option


@click.command(
    short_help="Let a checkpoint or an export write.",
    epilog=example('outlast sample runs/demo-0001 --prompt "In the beginning"'),
)
@click.argument("folder", metavar="RUN_DIR|EXPORT")
@click.option("--prompt", default="", metavar="TEXT", help="What the text begins with.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0.0), default=0.8, show_default=True, help="0: the likeliest."
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Only the N likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    metavar="P",
    help="Only the likeliest tokens that make up P of the probability.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Default: the newest intact one.")
def sample(folder: str, prompt: str, **options: float | None) -> int:
    """Let a run's checkpoint, or an exported folder, write until it ends its text; printed as it is drawn."""
    from launcher.commands.model_tools import sample

    return sample(folder, prompt, **options)


@click.command(
    short_help="Write a checkpoint for transformers.",
    epilog=example("outlast export runs/demo-0001 exported", "outlast export runs/demo-0001 out --step 60"),
)
@click.argument("run_dir")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Default: the newest intact one.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
def export(run_dir: str, out: Path, step: int | None, dtype: str) -> int:
    """Write a checkpoint as a folder that transformers loads: weights, config and tokenizer."""
    from launcher.commands.model_tools import export

    return export(run_dir, out, step, dtype)


@click.command(
    "import",
    short_help="Make a run from a transformers model.",
    epilog=example(
        "outlast import gpt2/ runs/mine --data data/mine --set schedule.total_steps=1000",
        "outlast resume runs/mine",
    ),
)
@click.argument("hf_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DIR", help="A data directory, prepared with its tokenizer.")
@cluster_option
@set_option
def import_(hf_dir: Path, run_dir: Path, data: str, cluster: str, overrides: tuple[str, ...]) -> int:
    """Make a run that continues the pretraining of a GPT-2, Llama, Mistral or Qwen3 folder."""
    from launcher.commands.import_model import import_run

    return import_run(hf_dir, run_dir, data, cluster, overrides)
