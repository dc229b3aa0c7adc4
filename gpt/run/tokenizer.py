"""The tokenizer of a run. The run directory has a copy, so a moved data directory does not end its use."""

from pathlib import Path

from data_pipeline.dataset.manifest import ENCODING_FILE
from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from gpt.run.run_dir import RunDir


def copy_encoding(run: RunDir, data: Path) -> None:
    """Copy the encoding of the data directory `data` into the run directory."""
    write_durably(run.encoding, (data / ENCODING_FILE).read_bytes())


def run_encoding(run: RunDir, data: Path) -> Encoding:
    """The encoding of a run that trains on the data directory `data`.

    Raises ConfigError when neither the run directory nor the data directory has it.
    """
    if run.encoding.exists():
        return load_encoding(run.encoding)
    if not (data / ENCODING_FILE).exists():
        raise ConfigError(
            f"the tokenizer of {run.path} is not found: data.path = {data} has no {ENCODING_FILE}, and the "
            f"run directory has no copy of it. If the data was moved, `outlast resume {run.path} --set "
            "data.path=DIR` stores where it is now."
        )
    return load_encoding(data)
