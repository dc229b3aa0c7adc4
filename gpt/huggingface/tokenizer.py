"""Writes an encoding as a tokenizer.json, so that transformers gives the same ids without a network.

tiktoken's encoding is a byte-level BPE in which the ranks imply the merges; tokenizer.json lists the merges.
Both tokenizers encode a sample of texts before the file is kept.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError
from data_pipeline.git_lfs import is_pointer
from data_pipeline.tokenizer.encoding import END_OF_TEXT, Encoding
from data_pipeline.tokenizer.hard_cases import HARD_CASES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Digits, contractions, scripts, spaces, control characters, an emoji of several code points, and a text that
# looks like a special token: these are the cases in which two byte-level BPEs differ.
SAMPLES = (
    "Hello, world! It's 1234567890 o'clock; we'LL see.",
    "  leading,   inner    and trailing spaces   \n\n\n\t\tand\r\ntabs  ",
    "Größe, naïveté, Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語テキスト, 한국어",
    "def f(x):\n    return x**2 + 3.14159e-10  # ≈ −1½",
    "👩‍👩‍👧‍👦 and \u0000\u0007\u200b\ufeff",
    f"text that says {END_OF_TEXT} in the middle",
    "aaaaaaaaaaaaaaaaaaaaaaa         ------------------======",
)


def write_tokenizer(encoding: Encoding, context: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    Raises ConfigError, and writes neither file, when a sample is not encoded as tiktoken encodes it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    vocabulary = {spelled(token, letters): id for token, id in encoding.ranks.items()}
    bpe = models.BPE(
        vocab=vocabulary | dict(encoding.special_tokens),
        merges=_merges(encoding, letters),
        ignore_merges=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(oniguruma(encoding.pattern)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in encoding.special_tokens]
    )
    tokenizer.encode_special_tokens = True  # text that looks like a special token is ordinary text
    for sample in (*SAMPLES, *HARD_CASES):
        ours, theirs = encoding.encode(sample).tolist(), tokenizer.encode(sample).ids
        if ours != theirs:
            raise ConfigError(
                f"tokenizer {encoding.name!r} cannot be written as a tokenizer.json: {sample!r} is {ours} in "
                f"tiktoken and {theirs} there. Its pattern is {encoding.pattern!r}."
            )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": encoding.end_of_text_token,
        "eos_token": encoding.end_of_text_token,
        "pad_token": encoding.end_of_text_token,
        "model_max_length": context,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer.json of `folder`, without truncation and padding.

    Text that looks like a special token is ordinary text, as in the data. Raises ConfigError when there is no
    tokenizer.json or when it is not one.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(
            f"{folder} has no tokenizer.json. transformers' AutoTokenizer writes one with save_pretrained."
        )
    if not path.is_file():
        raise ConfigError(f"{path} is not a regular file.")
    try:
        if is_pointer(path):
            raise ConfigError(f"{path} is a git-lfs pointer. Fetch the file with `git lfs pull`.")
        tokenizer = Tokenizer.from_file(str(path))
    except ConfigError:
        raise
    except Exception as error:  # the library has no class of its own for a bad file
        raise ConfigError(f"{path} is not a tokenizer that can be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


class FolderTokenizer:
    """The tokenizer.json of a folder; its post-processor adds special tokens."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when the folder has no tokenizer.json."""
        self._tokenizer = read_tokenizer(folder)

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of `text`; text that looks like a special token is ordinary text, as in the data."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def oniguruma(pattern: str) -> str:
    """A tiktoken pattern for Oniguruma, which reads `{1,3}+` as a repeated group instead of a possessive one.

    Without `+` the group may backtrack. That changes no match, because in tiktoken's patterns nothing follows
    such a group in its alternative.
    """
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)


def byte_letters() -> list[str]:
    """The letter for each byte in a byte-level BPE, from GPT-2's published encoder."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def spelled(token: bytes, letters: list[str]) -> str:
    """A token as a byte-level BPE writes it; `letters` are those of `byte_letters`."""
    return "".join(letters[byte] for byte in token)


def _merges(encoding: Encoding, letters: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that tiktoken would merge into a third one, ordered by the rank of that one."""
    ranks = encoding.ranks
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(left, letters), spelled(right, letters)) for left, right in pairs]
    return merges
