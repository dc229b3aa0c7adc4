"""DATA.toml: which text becomes which token shards."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config_file import Section
from data_pipeline.sources.hub import HubDataset
from data_pipeline.tokenizer.fast_encoder import EncoderChoice


class DataPrepConfig(Section):
    """What DATA.toml holds: which text becomes which token shards."""

    sources: tuple[str, ...] = Field(
        default=(),
        description="Files, folders and globs, here or at s3://, gs://, hf://: .jsonl, .txt, each also .gz "
        "and .zst, and .parquet.",
    )
    datasets: tuple[HubDataset, ...] = Field(
        default=(), description="Hugging Face data sets, by name on the hub or from a local folder."
    )
    tokenizer: str = Field(
        description="A packaged encoding (outlast-4k), a tiktoken name (gpt2, cl100k_base, o200k_base), an "
        "encoding.json, a data directory that has one, or a .tiktoken file of ranks."
    )
    tokenizer_pattern: str | None = Field(
        default=None,
        description="How a .tiktoken file's encoding splits text: a tiktoken name or a regular expression. "
        "Needed where the file is not one of tiktoken's own by name.",
    )
    encoder: EncoderChoice = Field(
        default="auto",
        description="auto uses gigatoken or fastokens, where installed, as long as it gives tiktoken's ids; "
        "tiktoken forces that.",
    )
    out: Path = Field(description="The data directory to make.")
    text_field: str = Field(
        default="text", min_length=1, description="Field of a JSON line, or column of a table, with the text."
    )
    val_fraction: float = Field(
        default=0.005,
        ge=0,
        lt=1,
        description="Share of the documents that is held out for validation, chosen by each one's own hash.",
    )
    seed: int = Field(default=0, ge=0, lt=2**64, description="Of the choice of the held-out documents.")
    on_bad: Literal["fail", "skip"] = Field(
        default="fail",
        description="Whether broken documents end the preparation or are counted and left out.",
    )
    deduplicate: bool = Field(
        default=False,
        description="Leave out documents whose text is exactly an earlier one's. Reads the sources twice.",
    )
    shard_tokens: int = Field(
        default=100_000_000, ge=1, description="A shard is closed at this many tokens; most are smaller."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Processes that encode. Default: one for each usable core."
    )

    @property
    def processes(self) -> int:
        """`workers` after its default."""
        return self.workers or len(os.sched_getaffinity(0))

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not self.sources and not self.datasets:
            raise ValueError("nothing to prepare: give sources (files, folders, globs) or [[datasets]].")
        return self
