"""The tokenizer of a folder against the encoding of the data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.huggingface.tokenizer import write_tokenizer
from gpt.huggingface.tokenizer_check import check_tokenizer

Json = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged encoding as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(load_encoding("outlast-4k"), 32, folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy for one test to change."""
    return shutil.copytree(written, tmp_path / "model")


def change(folder: Path, edit: Callable[[Json], object]) -> None:
    """Apply `edit` to the content of tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        check_tokenizer(folder, load_encoding("outlast-4k"))
    return str(error.value)


def swap(vocab: dict[str, int], one: str, other: str) -> None:
    vocab[one], vocab[other] = vocab[other], vocab[one]


def added(content: str, id: int, *, special: bool) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": special, **flags}


def test_tokenizer_of_the_encoding_is_accepted(folder: Path) -> None:
    check_tokenizer(folder, load_encoding("outlast-4k"))
    # special tokens that the data do not have never occur in them
    change(folder, lambda t: t["added_tokens"].append(added("<|pad|>", 4096, special=True)))
    # what cuts and fills batches of texts does not change the ids of one text
    change(
        folder,
        lambda t: t.update(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        ),
    )
    check_tokenizer(folder, load_encoding("outlast-4k"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
            "it is [] there and [72, 576,",
        ),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "it is"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "its normalizer (NFC) changes the text first"),
        (
            lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": "—"}, "content": "-"}),
            "its normalizer (Replace) changes the text first",
        ),
        (
            lambda t: t["added_tokens"].append(added("wherefore", 4096, special=False)),
            "in 'awhereforeb wherefore c' it is",
        ),
        (lambda t: swap(t["model"]["vocab"], "Ġthe", "Ġand"), "2 of 4,095 tokens differ, for example"),
        (
            lambda t: t["model"]["vocab"].update({"zzzz": 4096}),
            "1 of 4,096 tokens differ, for example 'zzzz'",
        ),
        (
            lambda t: (t["model"].update(ignore_merges=False), t["model"]["merges"].reverse()),
            "its merges are",
        ),
        (lambda t: t["model"].update(dropout=0.1), "its model has dropout = 0.1"),
    ],
)
def test_tokenizer_with_other_ids_is_refused(
    edit: Callable[[Json], object], message: str, folder: Path
) -> None:
    change(folder, edit)
    found = refused(folder)
    assert "gives other ids than the data's encoding 'outlast-4k'" in found
    assert message in found


@pytest.mark.parametrize("content", ["{bad", "[]", "{}", "\ud800"])
def test_file_that_is_no_tokenizer_is_refused(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "tokenizer.json is not a tokenizer that can be read" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json. transformers' AutoTokenizer writes one" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_of_text_of_the_folder_must_be_that_of_the_data(name: str, folder: Path) -> None:
    (folder / name).write_text('{"eos_token_id": 4095}')
    check_tokenizer(folder, load_encoding("outlast-4k"))
    (folder / name).write_text('{"eos_token_id": [7, 4095]}')
    check_tokenizer(folder, load_encoding("outlast-4k"))
    (folder / name).write_text('{"eos_token_id": 0}')
    found = refused(folder)
    assert "the data end every document with the id 4095 (<|endoftext|>), but in " in found
    assert f"{name} has eos_token_id = 0." in found
    # the other file does not decide which of the two is meant
    other = {"config.json": "generation_config.json", "generation_config.json": "config.json"}[name]
    (folder / other).write_text('{"eos_token_id": 4095}')
    assert f"{name} has eos_token_id = 0." in refused(folder)


def test_end_of_text_with_another_id_in_the_tokenizer_is_refused(folder: Path) -> None:
    def move(content: Json) -> None:
        [token] = content["added_tokens"]
        token["id"] = content["model"]["vocab"][token["content"]] = 4096
        content["model"]["vocab"]["zzzz"] = 4095

    change(folder, move)
    found = refused(folder)
    assert "<|endoftext|> = 4095, but it is 4096 in " in found
    assert "the id 4095 (<|endoftext|>), which is the ordinary token 'zzzz' in" in found
