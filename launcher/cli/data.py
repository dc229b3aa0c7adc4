"""The commands of data sets, tokenizers and config files: prepare, inspect, train, verify, schema."""

from pathlib import Path
from typing import Any

import click

from launcher.cli.options import example


@click.command(
    short_help="Turn raw text into token shards.",
    epilog=example("outlast prepare texts/*.jsonl.gz --tokenizer outlast-4k --out data/mine"),
)
@click.argument("sources", nargs=-1, required=True, metavar="DATA.toml | SOURCE…")
@click.option("--tokenizer", metavar="NAME", help="A tiktoken encoding, a file, or outlast-4k.")
@click.option("--out", metavar="DIR", help="The data directory to make.")
@click.option("--workers", type=int, metavar="N", help="Processes that tokenize.")
@click.option("--val-fraction", type=float, metavar="F", help="Share of the documents that is held out.")
@click.option("--set", "overrides", multiple=True, metavar="A=C", help="Set a field of the data config.")
@click.option("--cluster", metavar="C", help="Prepare in tasks on this cluster: a file or a known name.")
@click.option("--tasks", type=click.IntRange(min=1), metavar="N", help="Tasks; default: the cluster's nodes.")
@click.option(
    "--adopt",
    "is_adoption",
    is_flag=True,
    help="The sources are prefixes of Megatron's .bin/.idx files: make them a data set where they lie.",
)
@click.option(
    "--adopt-val", "val", multiple=True, metavar="PREFIX", help="With --adopt: files to validate on."
)
def prepare(
    sources: tuple[str, ...],
    overrides: tuple[str, ...],
    is_adoption: bool,
    val: tuple[str, ...],
    cluster: str | None,
    tasks: int | None,
    **options: Any,
) -> int:
    """Turn raw text into token shards. Run again after an interruption, it continues."""
    from launcher.commands.data import adopt, prepare

    given = {key: value for key, value in options.items() if value is not None}
    if tasks is not None and cluster is None:
        raise click.UsageError("--tasks goes with --cluster")
    if is_adoption:
        return adopt(sources, val, {**given, **({"set": overrides} if overrides else {})})
    if val:
        raise click.UsageError("--adopt-val goes with --adopt")
    return prepare(sources, given, overrides, cluster, tasks)


@click.group()
def data() -> None:
    """Look into data sets."""


@data.command(
    "inspect",
    epilog=example("outlast data inspect data/mine", "outlast data inspect data/mine --documents 0"),
)
@click.argument("folder", metavar="DATA_DIR", type=click.Path(path_type=Path))
@click.option(
    "--documents", type=click.IntRange(min=0), default=3, show_default=True, help="How many to decode."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed shows other documents.")
def inspect(folder: Path, documents: int, seed: int) -> int:
    """Show what a data set holds: counts, how long its documents are, and some of them decoded."""
    from launcher.commands.data import inspect

    return inspect(folder, documents, seed)


@click.group()
def tokenizer() -> None:
    """Train a tokenizer."""


@tokenizer.command(
    "train", epilog=example("outlast tokenizer train texts/ --vocab-size 8192 --out mine.json")
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@click.option("--vocab-size", type=click.IntRange(min=257), required=True, metavar="N", help="Ids in all.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE")
def train(sources: tuple[str, ...], vocab_size: int, out: Path) -> int:
    """Learn a byte-level BPE from texts and save it as a tiktoken encoding."""
    from launcher.commands.data import train_encoding

    return train_encoding(sources, vocab_size, out)


@click.command(
    short_help="Check every byte of data or checkpoints.",
    epilog=example("outlast verify runs/demo-0001", "outlast verify data/mine"),
)
@click.argument("folder", metavar="RUN_DIR | DATA_DIR", type=click.Path(path_type=Path))
def verify(folder: Path) -> int:
    """Check every byte of a data set, or of all checkpoints of a run; one line for each bad file."""
    from launcher.commands.data import verify

    return verify(folder)


@click.command(
    short_help="Print a config file's JSON Schema.", epilog=example("outlast schema run > run.schema.json")
)
@click.argument("kind", type=click.Choice(["run", "cluster", "data"]))
def schema(kind: str) -> int:
    """Print the JSON Schema of a config file, for editors."""
    import json

    from data_pipeline.config_file import Section

    model: type[Section]
    if kind == "run":
        from gpt.config.run import RunConfig as model
    elif kind == "cluster":
        from launcher.cluster import ClusterConfig as model
    else:
        from data_pipeline.prepare.config import DataPrepConfig as model
    click.echo(json.dumps(model.model_json_schema(), indent=2))
    return 0
