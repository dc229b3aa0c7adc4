"""Prepares a data directory from raw text: split, encode chunk by chunk, name the shards, write the manifest.

A preparation that stopped for any reason continues when it is run again, and the result has the same bytes.
Unfinished work is in `out/.prepare`, where no reader looks; a file gets its final name only when everything
is complete. `prepare` refuses to write into a folder that contains another data set, and to leave out broken
documents unless the user asked for it.
"""

import fcntl
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.dataset.manifest import ENCODING_FILE, FILE_NAME, Manifest
from data_pipeline.dataset.megatron_index import dtype_for
from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.chunk import MOST_LISTED, Chunk, ChunkRecord, read_chunk_record
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.dedup import HASH_FOLDER, is_hashed, mark_copies
from data_pipeline.prepare.encode import EncodeSettings
from data_pipeline.prepare.finalize import finalize, undo_renames
from data_pipeline.prepare.progress import Advance, Progress, ProgressReporter
from data_pipeline.prepare.resume_check import require_identical, require_same_settings
from data_pipeline.prepare.split import split_into_chunks
from data_pipeline.prepare.worker_pool import EncodeAll, encode_all, start_fork_server
from data_pipeline.sources.files import SourceFile, describe_ignored, find_files
from data_pipeline.sources.hub import RowSource, open_dataset
from data_pipeline.sources.spans import locate_line
from data_pipeline.tokenizer.encoding import Encoding, load_encoding

# Increased when the same settings and sources would give other bytes than before.
_PIPELINE = 1
_SHARD_FILE = re.compile(r"(train|val)-\d{5,}\.(bin|idx|sum)")


def prepare(
    config: DataPrepConfig,
    report: Callable[[Progress], None] | None = None,
    encode: EncodeAll = encode_all,
) -> Manifest:
    """Create the data directory `config.out`, or continue an unfinished one, and return its manifest.

    `encode` encodes the chunks; the default does it on this machine. If `config.out` is complete and was
    made with the same settings and sources, it is returned unchanged.

    Raises ConfigError for wrong settings or a folder that contains something else. Raises DataError for
    broken documents, a worker that dies, or a full disk; finished work is then kept.
    """
    if encode is encode_all and config.processes > 1 and not (config.out / FILE_NAME).exists():
        start_fork_server()
    encoding, sources, ignored = _open_inputs(config)
    reporter = ProgressReporter(report, sum(source.size_bytes for source in sources))
    if ignored:
        reporter.message(describe_ignored(ignored))
    out, work = config.out, config.out / ".prepare"
    if (out / FILE_NAME).exists() and not work.exists():
        return _complete(config, encoding, sources, reporter)
    if out.exists() and not work.exists():
        _require_no_shards(out)
    try:
        with _locked(work):
            if (out / FILE_NAME).exists():  # the last run ended after the manifest, before the cleanup
                manifest = _complete(config, encoding, sources, reporter)
            else:
                manifest = _build(config, encoding, sources, reporter, encode)
        # The lock's file must be closed first, or NFS keeps it. A process that takes the lock from now on
        # finds the manifest.
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"preparation of {out} stopped: {error}. Finished work is kept; run again to continue"
        ) from error
    return manifest


def _open_inputs(config: DataPrepConfig) -> tuple[Encoding, list[SourceFile | RowSource], list[str]]:
    """The encoding, the sources and the ignored files; raises ConfigError with every problem."""
    problems: list[str] = []
    encoding: Encoding | None = None
    sources: list[SourceFile | RowSource] = []
    ignored: list[str] = []
    try:
        encoding = load_encoding(config.tokenizer, config.tokenizer_pattern, config.end_of_text)
        encoding.require_lossless()
    except (ConfigError, DataError) as error:
        problems.append(str(error))
    try:
        files, ignored = find_files(config.sources)
        sources += files
    except ConfigError as error:
        problems += error.problems
    for dataset in config.datasets:
        try:
            sources.append(open_dataset(dataset, config.text_field))
        except ConfigError as error:
            problems += error.problems
    if config.out.exists() and not config.out.is_dir():
        problems.append(f"out = {config.out} is a file; name a folder")
    if problems or encoding is None:
        raise ConfigError(problems)
    return encoding, sources, ignored


def _complete(
    config: DataPrepConfig,
    encoding: Encoding,
    sources: Sequence[SourceFile | RowSource],
    reporter: ProgressReporter,
) -> Manifest:
    """The manifest of the complete data set, which must be the one that the user asks for."""
    manifest = require_identical(config.out, encoding, _preparation(config), sources, reporter.message)
    reporter.message(f"{config.out} is complete already, with the same settings and sources: nothing is done")
    return manifest


def _build(
    config: DataPrepConfig,
    encoding: Encoding,
    sources: Sequence[SourceFile | RowSource],
    reporter: ProgressReporter,
    encode: EncodeAll,
) -> Manifest:
    out, work = config.out, config.out / ".prepare"
    undo_renames(out, work)
    _require_no_shards(out)
    require_same_settings(out, encoding, _preparation(config))
    write_durably(work / ENCODING_FILE, encoding.to_json())
    chunks = split_into_chunks(sources, config.shard_tokens)
    records = _encode(config, encoding, chunks, work, reporter, encode)
    bad = sum((Counter(record.bad) for record in records.values()), Counter())
    if bad and config.on_bad == "fail":
        raise DataError(_describe_broken(chunks, records, bad))
    if not any(record.train for record in records.values()):
        held_out = sum(record.documents for record in records.values())
        raise DataError(f"the sources contain no document for training ({held_out} were held out)")
    if config.val_fraction and not any(record.val for record in records.values()):
        reporter.message(
            f"val_fraction = {config.val_fraction:g} held out no document: there is no validation split"
        )
    return finalize(out, work, encoding, _preparation(config), sources, chunks, records)


def _encode(
    config: DataPrepConfig,
    encoding: Encoding,
    chunks: Sequence[Chunk],
    work: Path,
    reporter: ProgressReporter,
    encode: EncodeAll,
) -> dict[Chunk, ChunkRecord]:
    """The record of every chunk. With on_bad = "fail" it stops at MOST_LISTED broken documents."""
    settings = EncodeSettings(
        encoding=work / ENCODING_FILE,
        encoder=config.encoder,
        dtype=dtype_for(encoding.vocab_size),
        text_field=config.text_field,
        val_fraction=config.val_fraction,
        seed=config.seed,
        shard_tokens=config.shard_tokens,
        deduplicate=config.deduplicate,
        document_separator=config.document_separator,
    )
    notes = {}
    if config.deduplicate:
        notes = _find_copies(work, chunks, settings, config.processes, reporter, encode)
    records = {
        chunk: record
        for chunk in chunks
        if (record := read_chunk_record(work, chunk)) and record.copies_note == notes.get(chunk, "")
    }
    _remove_stale(work, {HASH_FOLDER, *(chunk.name for chunk in records)})
    for chunk, record in records.items():
        reporter.advance(Advance(chunk.size_bytes, record.documents, record.tokens))
    if records:
        reporter.message(f"continuing: {len(records)} of {len(chunks)} chunks are already done")
    missing = [chunk for chunk in chunks if chunk not in records]
    with closing(encode(work, missing, settings, config.processes)) as encoded:
        for done in encoded:
            if isinstance(done, Advance):
                reporter.advance(done)
                continue
            record = read_chunk_record(work, done)
            assert record is not None
            records[done] = record
            if config.on_bad == "fail" and sum(len(r.listed) for r in records.values()) >= MOST_LISTED:
                break
    return records


def _find_copies(
    work: Path,
    chunks: Sequence[Chunk],
    settings: EncodeSettings,
    workers: int,
    reporter: ProgressReporter,
    encode: EncodeAll,
) -> dict[Chunk, str]:
    """Hash the documents of all chunks and mark the copies; returns the checksums of the notes."""
    (work / HASH_FOLDER).mkdir(exist_ok=True)
    missing = [chunk for chunk in chunks if not is_hashed(work, chunk)]
    if missing:
        reporter.message("looking for duplicates in a first pass over the sources")
    with closing(encode(work, missing, settings, workers, task="hash")) as hashed:
        for done in hashed:
            if isinstance(done, Advance) and done.message is not None:
                reporter.message(done.message)
    return mark_copies(work, chunks)


def _remove_stale(work: Path, keep: set[str]) -> None:
    """Remove the folders of incomplete chunks, and of chunks that the sources no longer give."""
    for entry in work.iterdir():
        if entry.is_dir() and entry.name not in keep:
            shutil.rmtree(entry)


def _require_no_shards(out: Path) -> None:
    foreign = sorted(path.name for path in out.iterdir() if _SHARD_FILE.fullmatch(path.name))
    if foreign:
        raise ConfigError(
            f"{out} contains {foreign[0]} but no {FILE_NAME}, and no unfinished preparation that made it; "
            f"choose another `out`, or remove the file"
        )


def _preparation(config: DataPrepConfig) -> dict[str, Any]:
    """The settings that determine the ids, under the names that the manifest uses."""
    # Data sets that were made before the setting existed have no such key.
    separator = config.document_separator
    return {
        **({} if separator is None else {"document_separator": separator}),
        "pipeline": _PIPELINE,
        "text_field": config.text_field,
        "val_fraction": config.val_fraction,
        "seed": config.seed,
        "shard_tokens": config.shard_tokens,
        "deduplicate": config.deduplicate,
        "on_bad": config.on_bad,
    }


def _describe_broken(chunks: Sequence[Chunk], records: Mapping[Chunk, ChunkRecord], bad: Counter[str]) -> str:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in bad.most_common())
    lines: list[str] = []
    more = bad.total()
    for chunk in chunks:
        for listed in records[chunk].listed if chunk in records else ():
            if len(lines) < MOST_LISTED:
                place = locate_line(chunk.spans[listed.span], listed.line)
                column = "" if listed.column is None else f":{listed.column}"
                lines.append(f"{place}{column}: {listed.reason}")
                more -= listed.lost
    return "\n".join(
        [
            f"broken documents: {reasons}",
            *lines,
            *([f"… and {more} more"] if more else []),
            'Repair them and run again, or leave them out with on_bad = "skip"',
        ]
    )


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases however the process ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{work.parent}: another preparation is writing here; wait until it ends"
            ) from None
        yield
