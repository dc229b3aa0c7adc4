"""Compares the tokenizer of a folder that transformers loads with the encoding of the data.

Both must give the same ids for every text, because the weights were trained on those of the folder. What
decides the ids is compared part by part, and then the ids of texts in which tokenizers differ. Torch-free.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import ConfigError
from data_pipeline.tokenizer.encoding import Encoding
from data_pipeline.tokenizer.hard_cases import HARD_CASES
from gpt.huggingface.config_json import end_ids
from gpt.huggingface.tokenizer import SAMPLES, byte_letters, read_tokenizer, spelled

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOKENS_A_TEXT = 512


def check_tokenizer(folder: Path, encoding: Encoding) -> None:
    """Raise ConfigError when the folder's tokenizer.json gives other ids than the encoding of the data.

    The end-of-text of the data must also end a text in each file of the folder that names such ids.
    """
    tokenizer = read_tokenizer(folder)
    content: Mapping[str, Any] = json.loads(tokenizer.to_str())
    problems = list(_structural_differences(content, encoding))
    if not problems:
        problems += _different_ids(tokenizer, _texts(content, encoding), encoding)
    problems = [
        f"{folder / 'tokenizer.json'} gives other ids than the data's encoding {encoding.name!r}: {problem}"
        for problem in problems
    ]
    problems += _end_of_text_differences(folder, tokenizer, content, encoding)
    if problems:
        raise ConfigError(problems)


def _structural_differences(content: Mapping[str, Any], encoding: Encoding) -> Iterator[str]:
    normalizer, model = content["normalizer"], content["model"]
    if normalizer is not None and normalizer.get("normalizers") != []:
        yield (
            f"its normalizer ({normalizer['type']}) changes the text first, and the data were encoded "
            "without one. If your texts are in that form already, set normalizer = null there."
        )
    if model["type"] != "BPE":
        yield f"its model is {model['type']}, not a byte-level BPE. Such a model cannot be imported."
        return
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"its model has {key} = {model[key]!r}, which the data's encoding does not have."
    added = {token["content"] for token in content["added_tokens"]}
    letters = byte_letters()
    ours = {spelled(token, letters): id for token, id in encoding.ranks.items()}
    theirs = {token: id for token, id in model["vocab"].items() if token not in added}
    others = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if others:
        token = others[0]
        yield (
            f"{len(others):,} of {len(theirs):,} tokens differ, for example {token!r}: "
            f"{_id(theirs.get(token))} there, {_id(ours.get(token))} here. Prepare the data with the model's "
            "own tokenizer."
        )
        return
    ranks = [theirs.get("".join(merge)) for merge in map(_pair, model["merges"])]
    known = [rank for rank in ranks if rank is not None]
    if any(later < earlier for earlier, later in pairwise(known)):
        yield "its merges are not in the order of the ids, in which the data's encoding merges."


def _id(id: int | None) -> str:
    return "no token" if id is None else f"id {id}"


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _texts(content: Mapping[str, Any], encoding: Encoding) -> Iterator[str]:
    """Texts in which tokenizers with one vocabulary differ."""
    yield from SAMPLES
    yield from HARD_CASES
    # An added token that is not special is one token wherever it occurs in a text.
    for token in content["added_tokens"]:
        if not token["special"]:
            yield f"a{token['content']}b {token['content']} c"
    ids = [id for _, id in encoding.by_rank]
    for first in range(0, len(ids), _TOKENS_A_TEXT):
        yield encoding.decode(ids[first : first + _TOKENS_A_TEXT])


def _different_ids(tokenizer: "Tokenizer", texts: Iterator[str], encoding: Encoding) -> Iterator[str]:
    """The first text of which the ids differ."""
    for text in texts:
        ours, theirs = encoding.encode(text).tolist(), tokenizer.encode(text, add_special_tokens=False).ids
        if ours == theirs:
            continue
        pairs = zip(ours, theirs, strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
        before = encoding.decode(ours[:at])
        yield (
            f"in {text[max(0, len(before) - 10) :][:30]!r} it is {theirs[at : at + 6]} there and "
            f"{ours[at : at + 6]} here. Prepare the data with the model's own tokenizer."
        )
        return


def _end_of_text_differences(
    folder: Path, tokenizer: "Tokenizer", content: Mapping[str, Any], encoding: Encoding
) -> Iterator[str]:
    token, id = encoding.end_of_text_token, encoding.end_of_text
    others = {name: ids for name, ids in end_ids(folder).items() if id not in ids}
    if others:
        named = " and ".join(f"{name} has eos_token_id = {_ids(ids)}" for name, ids in others.items())
        yield (
            f"the data end every document with the id {id} ({token}), but in {folder} {named}. Prepare the "
            "data with the end-of-text of the model (end_of_text names it for a rank file), or correct the "
            "id in the folder."
        )
    known = tokenizer.token_to_id(token)
    if known is not None and known != id:
        yield (
            f"the data end every document with {token} = {id}, but it is {known} in "
            f"{folder / 'tokenizer.json'}. Prepare the data with the model's own tokenizer."
        )
    there = tokenizer.id_to_token(id)
    if there not in (None, token, *(added["content"] for added in content["added_tokens"])):
        yield (
            f"the data end every document with the id {id} ({token}), which is the ordinary token {there!r} "
            f"in {folder / 'tokenizer.json'}. Prepare the data with the model's own tokenizer."
        )


def _ids(ids: Sequence[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else str(list(ids))
