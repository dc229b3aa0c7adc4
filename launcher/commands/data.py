"""The commands for data: prepare, inspect, tokenizer train, verify. `data_pipeline` does the work."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from data_pipeline.config_file import read_toml, validate, with_overrides
from data_pipeline.dataset import manifest as data_manifest
from data_pipeline.dataset.integrity import verify as verify_data
from data_pipeline.dataset.manifest import FILE_NAME, Manifest
from data_pipeline.errors import ConfigError, LaunchError
from data_pipeline.places import shown
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.pipeline import prepare as prepare_data
from data_pipeline.prepare.progress import Progress
from data_pipeline.prepare.worker_pool import EncodeAll, encode_all
from data_pipeline.sources.compression import REST_LOST
from gpt.checkpoint import format as checkpoint_format
from gpt.run.run_dir import RunDir
from launcher.cluster_file import load_cluster
from launcher.paths import absolute, unwritable_problem
from launcher.units import counted

_PLAIN_LINE_S = 10.0
_SHOWN_SOURCES = 5
_SHOWN_CHARACTERS = 600  # of each decoded document


def prepare(
    sources: Sequence[str],
    options: dict[str, Any],
    overrides: Sequence[str],
    cluster: str | None = None,
    tasks: int | None = None,
) -> int:
    """Prepare a data directory from DATA.toml or from sources; the exit code. Prints its folder last."""
    if len(sources) == 1 and sources[0].endswith(".toml"):
        path = Path(sources[0])
        tables, name = {**read_toml(path), **options}, path.name
    else:
        missing = [f"--{key}" for key in ("tokenizer", "out") if key not in options]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} must be given. Alternatively, give a DATA.toml instead of sources."
            )
        tables, name = {"sources": list(sources), **options}, "command line"
    config = validate(DataPrepConfig, with_overrides(tables, overrides), name)
    _require_creatable(config.out, "--out")
    encode: EncodeAll = encode_all
    if cluster is not None:
        from launcher.commands.prepare_on_cluster import ClusterEncoder

        where = load_cluster(cluster)
        encode = ClusterEncoder(where, tasks or where.nodes, config.workers)
    made = prepare_with_progress(config, encode)
    _print_counts(made)
    for reason, count in made.skipped.items():
        click.echo(_describe_skipped(reason, count), err=True)
    click.echo(config.out.absolute())
    return 0


def _describe_sources(made: Manifest) -> str:
    size_bytes = sum(source["size_bytes"] for source in made.sources)
    names = ", ".join(str(source["name"]) for source in made.sources[:_SHOWN_SOURCES])
    more = len(made.sources) - _SHOWN_SOURCES
    return f"{len(made.sources):,} sources of {size_bytes:,} bytes: {names}" + (
        f" and {more:,} more (see {FILE_NAME})" if more > 0 else ""
    )


def _describe_skipped(reason: str, count: int) -> str:
    if reason.endswith(REST_LOST):  # nobody knows how many documents it had
        return f"{count:,} files were read in part or not at all: {reason}"
    return f"{count:,} documents were left out: {reason}"


def _print_counts(made: Manifest) -> None:
    click.echo(
        f"{made.train_tokens:,} training tokens and {made.val_tokens:,} validation tokens from "
        f"{made.documents:,} documents, tokenizer {made.encoding.name}, end-of-text "
        f"{made.encoding.end_of_text}",
        err=True,
    )


def adopt(prefixes: Sequence[str], val: Sequence[str], options: dict[str, Any]) -> int:
    """Make existing Megatron files a data set without copying them; the exit code. Prints its folder last."""
    from data_pipeline.prepare.adopt import adopt

    options = dict(options)
    settings = with_overrides({}, options.pop("set", ()))
    foreign = [f"--{name.replace('_', '-')}" for name in options if name not in ("tokenizer", "end_of_text")]
    foreign += [f"--set {name}" for name in settings if name not in ("tokenizer_pattern", "end_of_text")]
    if foreign:
        raise ConfigError(
            f"--adopt uses existing files as they are and cannot be combined with {', '.join(foreign)}."
        )
    if "tokenizer" not in options:
        raise ConfigError("--tokenizer must be given: the files do not record which tokenizer encoded them.")
    settings |= {key: options[key] for key in ("tokenizer", "end_of_text") if key in options}
    folder, made = adopt(prefixes, val, **settings, warn=lambda text: click.echo(text, err=True))
    _print_counts(made)
    click.echo(folder)
    return 0


def inspect(folder: Path, documents: int, seed: int) -> int:
    """Print a data set's token counts, document lengths, and some decoded documents."""
    from rich.table import Table

    from data_pipeline.inspect import length_histogram, sample_documents
    from data_pipeline.tokenizer.encoding import load_encoding

    made = data_manifest.read_manifest(folder)
    encoding = load_encoding(folder)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    splits: list[data_manifest.Split] = ["train", "val"]
    found = {split: length_histogram(folder, made, split) for split in splits}
    counts = Table("split", "tokens", "documents", "longest document", "shards", "bytes")
    for split in splits:
        shards = made.shards(split)
        row = [
            sum(shard.tokens for shard in shards),
            sum(shard.documents for shard in shards),
            found[split].longest,
            len(shards),
            sum(shard.bin.size_bytes for shard in shards),
        ]
        counts.add_row(split, *(f"{value:,}" for value in row))
    console.print(counts)
    console.print(
        f"tokenizer {made.encoding.name} with {made.encoding.vocab_size:,} ids, stored as {made.dtype}"
    )
    for reason, count in made.skipped.items():
        console.print(_describe_skipped(reason, count), markup=False)
    if made.sources:
        console.print(_describe_sources(made), markup=False, soft_wrap=True)
    histogram = Table("tokens per document", "train", "val", "")
    most = max((*found["train"].counts, *found["val"].counts), default=0)
    for power in range(max(len(found["train"].counts), len(found["val"].counts))):
        train, val = (sum(found[split].counts[power : power + 1]) for split in splits)
        bar = "█" * round(40 * train / max(1, most))
        histogram.add_row(f"{2**power:,} – {2 ** (power + 1) - 1:,}", f"{train:,}", f"{val:,}", bar)
    console.print(histogram)
    for name, tokens, text in sample_documents(folder, made, "train", encoding, documents, seed):
        console.print(f"── {name}, {tokens:,} tokens", style="bold", markup=False)
        console.print(text[:_SHOWN_CHARACTERS] + ("…" if len(text) > _SHOWN_CHARACTERS else ""), markup=False)
    return 0


def prepare_with_progress(config: DataPrepConfig, encode: EncodeAll = encode_all) -> Manifest:
    """Prepare `config.out` with a bar on a terminal and plain lines elsewhere; returns its manifest."""
    console = Console(stderr=True, highlight=False)
    bar = Bar(
        TextColumn("tokenizing"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=None, tokens=0)
    next_line = time.monotonic() + _PLAIN_LINE_S

    def show(progress: Progress) -> None:
        nonlocal next_line
        if progress.message is not None:
            console.print(progress.message, markup=False, soft_wrap=True)
        bar.update(task, completed=progress.bytes_done, total=progress.bytes_total, tokens=progress.tokens)
        if not console.is_terminal and time.monotonic() >= next_line:
            next_line = time.monotonic() + _PLAIN_LINE_S
            share = progress.bytes_done / max(1, progress.bytes_total)
            console.print(f"tokenized {share:.0%} of the text, {progress.tokens:,} tokens")

    with bar:
        return prepare_data(config, show, encode)


def train_encoding(sources: Sequence[str], vocab_size: int, out: Path) -> int:
    """Train a byte-level BPE with `vocab_size` ids on `sources`; the exit code. Prints its file last."""
    from data_pipeline.tokenizer.train import train_tokenizer

    if not out.exists():
        _require_creatable(out, "--out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.absolute().parent} does not exist. Create it first.")
    encoding = train_tokenizer(sources, vocab_size, out, message=lambda text: click.echo(text, err=True))
    click.echo(f"{encoding.vocab_size:,} ids, fingerprint {encoding.fingerprint[:12]}", err=True)
    click.echo(out.absolute())
    return 0


def _require_creatable(out: Path, option: str) -> None:
    """Raises ConfigError if nothing can be created at `out`; a data set that is complete is only read."""
    problem = unwritable_problem(absolute(out, option))
    if problem is not None and not (out / FILE_NAME).exists():
        raise ConfigError(f"{option} {shown(out)}: {problem} Name another place.")


def verify(folder: Path) -> int:
    """Print `path: byte offset: reason` for each corrupt file of a data set or run; 1 when there is one."""
    if RunDir(folder).config.exists():
        checkpoints = checkpoint_format.committed(RunDir(folder).checkpoints)
        bad = (found for _, path in checkpoints for found in checkpoint_format.verify(path))
        checked = counted(len(checkpoints), "checkpoint")
    elif (folder / FILE_NAME).exists():
        bad = (checkpoint_format.BadBytes(*found) for found in verify_data(folder))
        checked = "data set"
    elif not folder.exists():
        raise LaunchError(
            f"{folder} does not exist. Name a run directory (`outlast status` lists runs) or the folder of a "
            "data set."
        )
    else:
        raise LaunchError(
            f"{folder} is neither a run directory (with {RunDir(folder).config.name}) nor a data set (with "
            f"{FILE_NAME}). `outlast status` lists runs; `outlast prepare` makes a data set."
        )
    named: set[Path] = set()
    for found in bad:
        if found.path not in named:  # one line per file: the first corrupt place
            named.add(found.path)
            click.echo(f"{found.path}: byte {found.offset}: {found.reason}")
    result = counted(len(named), "corrupt file") if named else "every byte is intact"
    click.echo(f"{checked}: {result}", err=True)
    return 1 if named else 0
