"""The commands for data sets, tokenizers and config files: prepare, inspect, train, verify, schema."""

from pathlib import Path
from typing import Any

import click

from launcher.cli.options import UserPath, example


@click.command(
    short_help="Turn raw text into token shards.",
    epilog=example("outlast prepare texts/*.jsonl.gz --tokenizer outlast-4k --out data/mine"),
)
@click.argument("sources", nargs=-1, required=True, metavar="DATA.toml | SOURCE…")
@click.option(
    "--tokenizer",
    metavar="NAME",
    help="A tiktoken encoding, a tokenizer file, or outlast-4k, which is packaged.",
)
@click.option(
    "--end-of-text",
    metavar="TOKEN=ID",
    help="The token that ends documents, if the tokenizer is a .tiktoken file of ranks.",
)
@click.option("--document-separator", metavar="TEXT", help="The text between the documents of a .txt file.")
@click.option("--out", metavar="DIR", help="The data directory to create.")
@click.option("--workers", type=int, metavar="N", help="The number of processes that tokenize.")
@click.option(
    "--val-fraction",
    type=float,
    metavar="F",
    help="The fraction of the documents that is held out for validation.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A=C",
    help="Set a field of the data config. Can be repeated.",
)
@click.option(
    "--cluster", metavar="C", help="Prepare on a cluster: a TOML file, or a name in cluster_configs."
)
@click.option(
    "--tasks",
    type=click.IntRange(min=1),
    metavar="N",
    help="The number of tasks on the cluster. Default: one for each node.",
)
@click.option(
    "--adopt",
    "is_adoption",
    is_flag=True,
    help="Use existing Megatron .bin/.idx files, given by their prefixes, without copying them.",
)
@click.option(
    "--adopt-val", "val", multiple=True, metavar="PREFIX", help="With --adopt: files to use for validation."
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
    """Turn raw text into token shards. After an interruption, the same command continues."""
    from launcher.commands.data import adopt, prepare

    given = {key: value for key, value in options.items() if value is not None}
    if tasks is not None and cluster is None:
        raise click.UsageError("--tasks needs --cluster.")
    if is_adoption:
        return adopt(sources, val, {**given, **({"set": overrides} if overrides else {})})
    if val:
        raise click.UsageError("--adopt-val needs --adopt.")
    return prepare(sources, given, overrides, cluster, tasks)


@click.group()
def data() -> None:
    """Inspect data sets."""


@data.command(
    "inspect",
    short_help="Show the content of a data set.",
    epilog=example("outlast data inspect data/mine", "outlast data inspect data/mine --documents 0"),
)
@click.argument("folder", metavar="DATA_DIR", type=UserPath())
@click.option(
    "--documents",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="The number of documents to decode.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Selects the documents to decode.")
def inspect(folder: Path, documents: int, seed: int) -> int:
    """Show a data set's token counts, document lengths, and some decoded documents."""
    from launcher.commands.data import inspect

    return inspect(folder, documents, seed)


@click.group()
def tokenizer() -> None:
    """Train a tokenizer."""


@tokenizer.command(
    "train",
    short_help="Train a byte-level BPE tokenizer.",
    epilog=example("outlast tokenizer train texts/ --vocab-size 8192 --out mine.json"),
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=257),
    required=True,
    metavar="N",
    help="The size of the vocabulary.",
)
@click.option("--out", type=UserPath(), required=True, metavar="FILE", help="The file to write.")
def train(sources: tuple[str, ...], vocab_size: int, out: Path) -> int:
    """Train a byte-level BPE tokenizer on texts and save it as a tiktoken encoding."""
    from launcher.commands.data import train_encoding

    return train_encoding(sources, vocab_size, out)


@click.command(
    short_help="Verify every byte of a data set or of a run's checkpoints.",
    epilog=example("outlast verify runs/demo-0001", "outlast verify data/mine"),
)
@click.argument("folder", metavar="RUN_DIR | DATA_DIR", type=UserPath())
def verify(folder: Path) -> int:
    """Verify every byte of a data set, or of all checkpoints of a run.

    Prints one line for each corrupt file and exits with 1 if there is one.
    """
    from launcher.commands.data import verify

    return verify(folder)


@click.command(
    short_help="Print the JSON Schema of a config file.",
    epilog=example("outlast schema run > run.schema.json"),
)
@click.argument("kind", type=click.Choice(["run", "cluster", "data"]))
def schema(kind: str) -> int:
    """Print the JSON Schema of a run, cluster or data config, for validation and completion in editors."""
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
