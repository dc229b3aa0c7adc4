"""Exports as transformers reads them, offline; the checkpoint is read as any other."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.errors import CheckpointError, ConfigError
from data_pipeline.tokenizer.encoding import END_OF_TEXT, Encoding, load_encoding
from gpt import sample
from gpt.config.run import RunConfig
from gpt.export import export
from gpt.huggingface.importer import write_first_checkpoint
from gpt.huggingface.load_model import from_folder, from_run
from gpt.huggingface.tokenizer import SAMPLES, FolderTokenizer, write_tokenizer
from gpt.model.gpt import GPT
from gpt.run.json_file import write_json
from gpt.run.run_dir import RunDir
from tests.unit.data_pipeline.support import packaged_texts, prepared
from tests.unit.gpt.model.support import GPT2, MUP, build, random_tokens, rows

TEXTS = [*SAMPLES, *packaged_texts()[:3]]
# The split patterns of tiktoken's gpt2, cl100k_base and o200k_base (tiktoken_ext/openai_public.py).
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    prepared(folder, packaged_texts()[:2])
    return folder


def make_run(folder: Path, data: Path, **model: Any) -> tuple[RunDir, GPT]:
    """A run directory with one checkpoint, of step 0, and its network."""
    gpt = build(vocab_size=4096, **model)
    run = RunConfig.model_validate(
        {
            "name": "t",
            "data": {"path": data},
            "schedule": {"total_steps": 1},
            "model": gpt.model.model_dump(),
        }
    )
    run_dir = RunDir(folder)
    run_dir.checkpoints.mkdir(parents=True)
    write_json(run_dir.config, run.model_dump(mode="json", exclude_none=True))
    weights = {name: p.detach().numpy() for name, p in gpt.named_parameters()}
    write_first_checkpoint(run_dir, run, lambda name, _: weights[name], "d")
    return run_dir, gpt.eval()


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({"n_kv_heads": 2}, "LlamaForCausalLM"),
        ({"tie_embeddings": True, "bias": True, "d_head": 20}, "LlamaForCausalLM"),
        ({"rope_scaling": {"kind": "llama3", "factor": 4.0}}, "LlamaForCausalLM"),
        ({"window": 6}, "MistralForCausalLM"),
        ({"n_heads": 5, "d_head": 8}, "MistralForCausalLM"),  # Llama's class wants 48 to be a multiple of 5
        ({"n_heads": 5, "d_head": 8, "qk_norm": True}, "Qwen3ForCausalLM"),
        ({"qk_norm": True, "n_kv_heads": 1}, "Qwen3ForCausalLM"),
        (GPT2, "GPT2LMHeadModel"),
        ({**MUP, "bias": True, "mup_base_head_width": 3}, "LlamaForCausalLM"),
        ({**MUP, "tie_embeddings": True, "qk_norm": True, "mup_base_head_width": 3}, "Qwen3ForCausalLM"),
        ({**GPT2, **MUP}, "GPT2LMHeadModel"),
    ],
)
def test_transformers_loads_the_export_and_gives_the_same_logits(
    fields: dict[str, object], architecture: str, data: Path, tmp_path: Path
) -> None:
    run_dir, gpt = make_run(tmp_path / "run", data, **fields)
    done = export(run_dir, tmp_path / "out", dtype="fp32")
    assert (done.step, done.architecture) == (0, architecture)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        assert (gpt.logits(tokens, rows(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4
    assert not list(tmp_path.glob(".*"))


def test_several_shards_hold_every_tensor_once_and_load(data: Path, tmp_path: Path) -> None:
    run_dir, gpt = make_run(tmp_path / "run", data)
    done = export(run_dir, tmp_path / "out", dtype="bf16", shard_bytes=500_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert done.files == len(files) > 1
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes, found = 0, {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 500_000 or len(tensors) == 1
        sizes += size
        found |= dict.fromkeys(tensors, path.name)
    assert index == {"metadata": {"total_size": sizes}, "weight_map": found}
    assert sizes == 2 * sum(p.numel() for p in gpt.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, gpt.head.weight.bfloat16())


def test_exported_tokenizer_gives_the_same_ids_without_a_network(data: Path, tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    export(run_dir, tmp_path / "out")
    program = (
        "import json, sys; from transformers import AutoTokenizer; "
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); texts = json.load(sys.stdin); "
        "print(json.dumps([[t(x)['input_ids'] for x in texts], [t.decode(t(x)['input_ids']) for x in texts], "
        "t.eos_token_id]))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        input=json.dumps(TEXTS),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids, texts, end = json.loads(done.stdout)
    encoding = load_encoding(data)
    assert ids == [encoding.encode(text).tolist() for text in TEXTS]
    assert texts == TEXTS
    assert end == encoding.end_of_text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_tiktoken_split_text_the_same_way(pattern: str, tmp_path: Path) -> None:
    ranks = load_encoding("outlast-4k").ranks
    encoding = Encoding("t", PATTERNS[pattern], ranks, {END_OF_TEXT: 4095, "<|fim|>": 4100})
    write_tokenizer(encoding, 64, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == encoding.encode(text).tolist()
    assert theirs.convert_tokens_to_ids("<|fim|>") == 4100


def test_pattern_that_a_tokenizer_json_cannot_express_is_refused(tmp_path: Path) -> None:
    # possessive: `It` gives no letter back and is cut in two; Oniguruma reads the same as greedy
    ranks = load_encoding("outlast-4k").ranks
    encoding = Encoding("t", r"\p{L}{1,3}+\p{L}|\s+|\S", ranks, {END_OF_TEXT: 4095})
    with pytest.raises(
        ConfigError, match=r"tokenizer 't' cannot be written as a tokenizer.json: .Hello, world!"
    ):
        write_tokenizer(encoding, 64, tmp_path)
    assert not list(tmp_path.iterdir())


def test_model_without_a_transformers_architecture_is_exported_with_our_names(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, gpt = make_run(tmp_path / "run", data, logit_softcap=5.0)
    assert export(run_dir, tmp_path / "out", dtype="fp32").architecture == "outlast"
    assert (
        "transformers has no architecture for soft-caps. The export holds plain safetensors"
        in capsys.readouterr().err
    )
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        for name, parameter in gpt.named_parameters():
            assert torch.equal(file.get_tensor(name), parameter)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model"]["logit_softcap"] == 5.0


def test_export_is_readable_by_others_and_generates_without_warnings(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    before = os.umask(0o027)
    try:
        export(run_dir, tmp_path / "out", dtype="fp32")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == load_encoding(data).end_of_text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = tokenizer(["And God said", "And"], return_tensors="pt", padding=True, padding_side="left")
    caplog.clear()
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error")
        propagated = logging.getLogger("transformers")
        propagated.addHandler(caplog.handler)
        try:
            theirs.generate(**batch, max_new_tokens=3, do_sample=False)
        finally:
            propagated.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "holds NaN or infinity, so the model is lost"), (7e4, "holds 70000, which is too large for")],
)
def test_weight_that_is_not_finite_is_never_exported(
    value: float, message: str, data: Path, tmp_path: Path
) -> None:
    run_dir, gpt = make_run(tmp_path / "run", data)
    with torch.no_grad():
        gpt.final_norm.weight[5] = value
    run = RunConfig.model_validate_json(run_dir.config.read_text())
    shutil.rmtree(run_dir.checkpoints)
    weights = {name: p.detach().numpy() for name, p in gpt.named_parameters()}
    write_first_checkpoint(run_dir, run, lambda name, _: weights[name], "d")
    with pytest.raises(ConfigError, match=f"final_norm.weight {message}"):
        export(run_dir, tmp_path / "out", dtype="fp16")
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}
    if np.isnan(value):
        with pytest.raises(ConfigError, match=r"final_norm\.weight holds 1 values that are NaN or infinite"):
            from_run(run_dir)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed=18446744073709551616", "expected a number from -2^63 to 2^64 - 1"),
        ("--temperature=nan", "--temperature nan: expected a finite number"),
        ("--temperature=inf", "--temperature inf: expected a finite number"),
        ("--top-p=nan", "--top-p nan: expected a number above 0"),
        ("--prompt=\udcff", "--prompt is not UTF-8 at character 0"),
    ],
)
def test_option_of_sample_that_means_nothing_is_refused(
    option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", str(tmp_path), option])
    with pytest.raises(ConfigError) as error:
        sample.main()
    assert message in str(error.value)


def test_non_empty_folder_and_missing_step_are_refused(data: Path, tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 9\. Available steps: \d"):
        export(run_dir, tmp_path / "out", step=9)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConfigError, match="out exists and is not an empty folder"):
        export(run_dir, tmp_path / "out")


def test_corrupt_byte_is_never_exported(data: Path, tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    path = run_dir.checkpoints / "step-00000000/rank-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        export(run_dir, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"run"}


# Runs each of its arguments as a command line of its own, where DeepSpeed is not installed.
BARE = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch.distributed

def refuse(*_, **__):
    raise AssertionError("a process group")

torch.distributed.init_process_group = refuse
for line in sys.argv[1:]:
    module, *sys.argv[1:] = line.split("|")
    importlib.import_module(module).main()
"""


def test_export_and_sample_need_neither_deepspeed_nor_a_process_group(data: Path, tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    asked = "--prompt=And God said|--max-tokens=5|--temperature=0"
    lines = [
        f"gpt.export|{run_dir.path}|{tmp_path / 'out'}|--dtype=fp32",
        f"gpt.sample|{run_dir.path}|{asked}",
        f"gpt.sample|{tmp_path / 'out'}|{asked}",
    ]
    done = subprocess.run([sys.executable, "-c", BARE, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported, from_run, from_export = done.stdout.split("And God said")
    assert "LlamaForCausalLM of step 0, " in exported
    assert from_run == from_export != "\n"


def test_sample_into_a_closed_pipe_ends_silently(data: Path, tmp_path: Path) -> None:
    """As in `outlast sample … | head -1`."""
    run_dir, _ = make_run(tmp_path / "run", data)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gpt.sample", str(run_dir.path), "--prompt=And", "--max-tokens=5"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode != 0
    assert done.stderr == ""


@pytest.mark.parametrize("fields", [{"n_kv_heads": 2}, GPT2])
def test_run_and_export_generate_the_same_text_as_transformers(
    fields: dict[str, object],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, _ = make_run(tmp_path / "run", data, context=40, **fields)
    export(run_dir, tmp_path / "out", dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = tokenizer("And God said", return_tensors="pt")
    [drawn] = theirs.generate(**asked, max_new_tokens=25, do_sample=False)
    expected = tokenizer.decode(drawn)
    for folder in (run_dir.path, tmp_path / "out"):
        arguments = ["--prompt=And God said", "--max-tokens=25", "--temperature=0"]
        monkeypatch.setattr(sys, "argv", ["sample", str(folder), *arguments])
        sample.main()
        assert capsys.readouterr().out == expected + "\n"


def test_export_without_a_transformers_architecture_generates_the_same_text_as_its_run(
    data: Path, tmp_path: Path
) -> None:
    run_dir, gpt = make_run(tmp_path / "run", data, position="sinusoidal", logit_softcap=5.0)
    export(run_dir, tmp_path / "out", dtype="fp32")
    trained = from_folder(tmp_path / "out")
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        assert torch.equal(trained.gpt.logits(tokens, rows(tokens)), gpt.logits(tokens, rows(tokens)))
    encoding = load_encoding(data)
    assert trained.ends == {encoding.end_of_text}
    for text in TEXTS:
        assert trained.tokenizer.encode(text).tolist() == encoding.encode(text).tolist()


def test_padding_rows_of_the_vocabulary_decode_to_nothing(data: Path, tmp_path: Path) -> None:
    ids = [*load_encoding(data).encode("And God").tolist(), 4096, 4100, 4095]
    write_tokenizer(load_encoding(data), 24, tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path).decode(ids)
    assert load_encoding(data).decode(ids) == FolderTokenizer(tmp_path).decode(ids) == expected


def test_text_that_the_terminal_cannot_show_is_escaped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["sample", str(run_dir.path), "--prompt=é", "--max-tokens=1"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    sample.main()
    sys.stdout.flush()
    assert shown.getvalue().startswith(rb"\xe9")


def test_step_of_an_export_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, _ = make_run(tmp_path / "run", data)
    export(run_dir, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["sample", str(tmp_path / "out"), "--step=3"])
    with pytest.raises(ConfigError, match=r"--step 3: .*/out is an export, which holds a single step"):
        sample.main()
