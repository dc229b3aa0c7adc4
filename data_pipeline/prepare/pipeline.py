"""Raw text → a data directory: plan, encode in chunks, name the shards, and the manifest last.

Run again after any kind of end it continues, and the result is the same bytes. Work in progress lives in
`out/.prepare`, under names that no reader looks at; a final name appears only when everything is whole.
Refused: to write into a folder that holds another data set, and to leave out broken documents unasked.
"""

import fcntl
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.dataset.manifest import (
    ENCODING_FILE,
    FILE_NAME,
    Manifest,
)
from data_pipeline.dataset.megatron_index import dtype_for
from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare import dedup
from data_pipeline.prepare.chunk import MOST_LISTED, Chunk, ChunkRecord, read_chunk_record
from data_pipeline.prepare.config import DataPrepConfig
from data_pipeline.prepare.encode import EncodeSettings
from data_pipeline.prepare.finalize import finalize, undo_renames
from data_pipeline.prepare.progress import Advance, Progress, Tally
from data_pipeline.prepare.resume_check import require_identical, require_same_settings
from data_pipeline.prepare.split import split_into_chunks
from data_pipeline.prepare.worker_pool import EncodeAll, encode_all, start_ahead
from data_pipeline.sources.files import SourceFile, find_files
from data_pipeline.sources.hub import RowSource, open_dataset
from data_pipeline.sources.spans import locate_line
from data_pipeline.tokenizer.encoding import Encoding, load_encoding

# Raised when the same settings and sources would give other bytes than before.
_PIPELINE = 1
_SHARD_FILE = re.compile(r"(train|val)-\d{5,}\.(bin|idx|sum)")


def prepare(
    config: DataPrepConfig,
    progress: Callable[[Progress], None] | None = None,
    encode: EncodeAll = encode_all,
) -> Manifest:
    """Make the data directory `config.out`, or continue to, and return its manifest.

    `encode` does the work; by default it is done on this machine.

    A complete and identical one is returned at once (sources are compared by name and size). Raises
    ConfigError for wrong settings or a folder that holds something else, DataError for broken documents, a
    worker that dies, or a disk that is full; what is finished then stays.
    """
    if encode is encode_all and config.processes > 1 and not (config.out / FILE_NAME).exists():
        start_ahead()
    encoding, sources, ignored = _inputs(config)
    tell = Tally(progress, sum(source.size_bytes for source in sources))
    if ignored:
        tell.message(f"{ignored} files in the folders are of other kinds and are ignored")
    out, work = config.out, config.out / ".prepare"
    if (out / FILE_NAME).exists() and not work.exists():
        return require_identical(out, encoding, _preparation(config), sources)
    if out.exists() and not work.exists():
        _require_free(out)
    try:
        with _locked(work):
            if (out / FILE_NAME).exists():  # ended between the manifest and the tidying
                manifest = require_identical(out, encoding, _preparation(config), sources)
            else:
                manifest = _build(config, encoding, sources, tell, encode)
        # After the lock's file is closed, or NFS keeps it; whoever takes the lock now finds the manifest.
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"preparation of {out} stopped: {error}. What is finished stays; run again to continue"
        ) from error
    return manifest


def _inputs(config: DataPrepConfig) -> tuple[Encoding, list[SourceFile | RowSource], int]:
    """The encoding, the sources and the number of ignored files, or every problem with any of it at once."""
    problems: list[str] = []
    encoding: Encoding | None = None
    sources: list[SourceFile | RowSource] = []
    ignored = 0
    try:
        encoding = load_encoding(config.tokenizer, config.tokenizer_pattern)
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
        problems.append(f"out = {config.out} is a file; a folder to make is needed")
    if problems or encoding is None:
        raise ConfigError(problems)
    return encoding, sources, ignored


def _build(
    config: DataPrepConfig,
    encoding: Encoding,
    sources: Sequence[SourceFile | RowSource],
    tell: Tally,
    encode: EncodeAll,
) -> Manifest:
    out, work = config.out, config.out / ".prepare"
    undo_renames(out, work)
    _require_free(out)
    require_same_settings(out, encoding, _preparation(config))
    write_durably(work / ENCODING_FILE, encoding.to_json())
    chunks = split_into_chunks(sources, config.shard_tokens)
    records = _encode(config, encoding, chunks, work, tell, encode)
    bad = sum((Counter(record.bad) for record in records.values()), Counter())
    if bad and config.on_bad == "fail":
        raise DataError(_broken(chunks, records, bad))
    if not any(record.train for record in records.values()):
        held_out = sum(record.documents for record in records.values())
        raise DataError(f"the sources hold no document for training ({held_out} were held out)")
    if config.val_fraction and not any(record.val for record in records.values()):
        tell.message(
            f"val_fraction = {config.val_fraction:g} held out no document: there is no validation split"
        )
    return finalize(out, work, encoding, _preparation(config), sources, chunks, records)


def _encode(
    config: DataPrepConfig,
    encoding: Encoding,
    chunks: Sequence[Chunk],
    work: Path,
    tell: Tally,
    encode: EncodeAll,
) -> dict[Chunk, ChunkRecord]:
    """Every chunk's record; with on_bad = "fail" only those up to the hundredth broken document."""
    settings = EncodeSettings(
        encoding=work / ENCODING_FILE,
        encoder=config.encoder,
        dtype=dtype_for(encoding.vocab_size),
        text_field=config.text_field,
        val_fraction=config.val_fraction,
        seed=config.seed,
        shard_tokens=config.shard_tokens,
        deduplicate=config.deduplicate,
    )
    notes = _find_copies(work, chunks, settings, config.processes, tell, encode) if config.deduplicate else {}
    records = {
        chunk: record
        for chunk in chunks
        if (record := read_chunk_record(work, chunk)) and record.copies_note == notes.get(chunk, "")
    }
    _remove_stale(work, {dedup.FOLDER, *(chunk.name for chunk in records)})
    for chunk, record in records.items():
        tell.advance(Advance(chunk.size_bytes, record.documents, record.tokens))
    if records:
        tell.message(f"continuing: {len(records)} of {len(chunks)} chunks were finished before")
    missing = [chunk for chunk in chunks if chunk not in records]
    with closing(encode(work, missing, settings, config.processes)) as encoded:
        for done in encoded:
            if isinstance(done, Advance):
                tell.advance(done)
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
    tell: Tally,
    encode: EncodeAll,
) -> dict[Chunk, str]:
    """Which documents are copies of earlier ones, as `mark_copies` notes it."""
    (work / dedup.FOLDER).mkdir(exist_ok=True)
    missing = [chunk for chunk in chunks if not dedup.is_hashed(work, chunk)]
    if missing:
        tell.message("looking for duplicates: one pass over the sources comes before tokenizing")
    with closing(encode(work, missing, settings, workers, task="hash")) as hashed:
        for done in hashed:
            if isinstance(done, Advance) and done.message is not None:
                tell.message(done.message)
    return dedup.mark_copies(work, chunks)


def _remove_stale(work: Path, keep: set[str]) -> None:
    """Remove chunks that were torn or that the sources no longer give."""
    for entry in work.iterdir():
        if entry.is_dir() and entry.name not in keep:
            shutil.rmtree(entry)


def _require_free(out: Path) -> None:
    foreign = sorted(path.name for path in out.iterdir() if _SHARD_FILE.fullmatch(path.name))
    if foreign:
        raise ConfigError(
            f"{out} holds {foreign[0]} but no {FILE_NAME}, and no unfinished preparation that made it; "
            f"choose another `out`, or remove what is there"
        )


def _preparation(config: DataPrepConfig) -> dict[str, Any]:
    """The settings that decide the ids, in the manifest's words."""
    return {
        "pipeline": _PIPELINE,
        "text_field": config.text_field,
        "val_fraction": config.val_fraction,
        "seed": config.seed,
        "shard_tokens": config.shard_tokens,
        "deduplicate": config.deduplicate,
        "on_bad": config.on_bad,
    }


def _broken(chunks: Sequence[Chunk], records: Mapping[Chunk, ChunkRecord], bad: Counter[str]) -> str:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in bad.most_common())
    lines: list[str] = []
    for chunk in chunks:
        for listed in records[chunk].listed if chunk in records else ():
            if len(lines) < MOST_LISTED:
                lines.append(f"{locate_line(chunk.spans[listed.span], listed.line)}: {listed.reason}")
    more = bad.total() - len(lines)
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
    """The only preparation in this folder; the lock ends with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{work.parent}: another preparation is writing here; wait for it") from None
        yield
