"""DATA.toml: which text becomes which data set."""

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config_file import Section
from data_pipeline.sources.hub import HubDataset
from data_pipeline.tokenizer.fast_encoder import EncoderChoice


class DataPrepConfig(Section):
    """DATA.toml: the text, the tokenizer and the settings of a data set."""

    sources: tuple[str, ...] = Field(
        default=(),
        description="Files, folders and globs, local or at s3://, gs:// or hf://. Supported kinds: .jsonl, "
        ".ndjson, .json (one object a line, or an array), .txt, .csv and .tsv (with a header), each also "
        "with .gz, .zst, .xz or .bz2; .parquet and .arrow.",
    )
    datasets: tuple[HubDataset, ...] = Field(
        default=(), description="Hugging Face data sets, named on the hub or in a local folder."
    )
    tokenizer: str = Field(
        description="A packaged encoding (outlast-4k), a tiktoken name (gpt2, cl100k_base, o200k_base), an "
        "encoding.json, a data directory that contains one, or a .tiktoken file of ranks."
    )
    tokenizer_pattern: str | None = Field(
        default=None,
        description="How the encoding of a .tiktoken file splits text: a tiktoken name or a regular "
        "expression. Required unless tiktoken publishes a file of that name.",
    )
    end_of_text: str | None = Field(
        default=None,
        min_length=1,
        description="The end-of-text of a .tiktoken file as TOKEN=ID, for example <|end_of_text|>=128001 for "
        "Llama 3. Default: <|endoftext|> with the next free id; refused if that is another token of a known "
        "tokenizer.",
    )
    encoder: EncoderChoice = Field(
        default="auto",
        description="auto encodes with gigatoken or fastokens if installed, and checks their ids against "
        "tiktoken's; tiktoken encodes with tiktoken only.",
    )
    out: Path = Field(description="The data directory to create.")
    text_field: str = Field(
        default="text",
        min_length=1,
        description="Field of a JSON object, or column of a table, that contains the text. A path such as "
        "meta.text names a nested one.",
    )
    document_separator: str | None = Field(
        default=None,
        min_length=1,
        description="Text between the documents of a .txt file, for example <|endoftext|>. A separator on a "
        "line of its own takes that line with it. Default: a .txt file is one document.",
    )
    val_fraction: float = Field(
        default=0.005,
        ge=0,
        lt=1,
        description="Fraction of the documents held out for validation. A hash of each document decides.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**64, description="Seeds the choice of the documents held out for validation."
    )
    on_bad: Literal["fail", "skip"] = Field(
        default="fail",
        description="What to do about broken documents: fail stops the preparation, skip counts them and "
        "leaves them out.",
    )
    deduplicate: bool = Field(
        default=False,
        description="Leave out documents that are exact copies of an earlier one. Reads the sources twice.",
    )
    shard_tokens: int = Field(
        default=100_000_000,
        ge=1,
        description="Tokens at which a shard is closed and the next one begun. Most shards are smaller.",
    )
    workers: int | None = Field(
        default=None, ge=1, description="Number of encoding processes. Default: one for each usable core."
    )

    @property
    def processes(self) -> int:
        """The number of encoding processes, with the default applied."""
        return self.workers or len(os.sched_getaffinity(0))

    @model_validator(mode="before")
    @classmethod
    def _is_no_mixture(cls, fields: Any) -> Any:
        sources = fields.get("sources") if isinstance(fields, dict) else None
        is_weighted = isinstance(sources, list) and any(isinstance(source, dict) for source in sources)
        if is_weighted or (isinstance(fields, dict) and {"mixture", "weight", "weights"} & fields.keys()):
            raise ValueError(
                "sources is a list of texts, without weights. Prepare each part of a mixture as a data "
                'directory of its own; the run config mixes them: data.mixture = [{path = "data/web", '
                "weight = 0.9}, …]."
            )
        return fields

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not self.sources and not self.datasets:
            raise ValueError("nothing to prepare: give sources (files, folders, globs) or [[datasets]].")
        return self
