"""Helpers of the tests of encodings."""

import base64
from collections.abc import Mapping
from pathlib import Path


def write_rank_file(path: Path, ranks: Mapping[bytes, int]) -> Path:
    """A `.tiktoken` file of `ranks`."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path
