"""Safetensors files of a folder: which are read, and which tensors make the model."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.huggingface.pretrained_folder import PretrainedFolder
from gpt.huggingface.stored_tensors import INDEX, SINGLE, list_tensors, match_tensors, weight_files

SHAPE = {"n_layers": 1, "d_model": 4, "n_heads": 2, "d_ff": 6, "context": 8, "vocab_size": 5}
MODEL = ModelConfig.model_validate(SHAPE)
TIED = ModelConfig.model_validate({**SHAPE, "tie_embeddings": True})
GPT2 = ModelConfig.model_validate(
    {**SHAPE, "ffn": "gelu", "norm": "layernorm", "position": "learned", "bias": True, "tie_embeddings": True}
)
Tensors = dict[str, NDArray[Any]]


def llama() -> Tensors:
    """The tensors of MODEL, as transformers names them."""
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (5, 4),
        **{f"{layer}.self_attn.{name}_proj.weight": (4, 4) for name in "qkvo"},
        f"{layer}.mlp.gate_proj.weight": (6, 4),
        f"{layer}.mlp.up_proj.weight": (6, 4),
        f"{layer}.mlp.down_proj.weight": (4, 6),
        f"{layer}.input_layernorm.weight": (4,),
        f"{layer}.post_attention_layernorm.weight": (4,),
        "model.norm.weight": (4,),
        "lm_head.weight": (5, 4),
    }
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def read(folder: Path, model: ModelConfig = MODEL) -> PretrainedFolder:
    return PretrainedFolder(folder, model)


def refused(folder: Path, model: ModelConfig = MODEL) -> str:
    with pytest.raises(ConfigError) as error:
        match_tensors(list_tensors(weight_files(folder)), model)
    return str(error.value)


def save_in_two(folder: Path, tensors: Tensors) -> dict[str, str]:
    """Two files with an index; the map from tensor to file."""
    names = sorted(tensors)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_one_file_and_several_files_give_the_same_parameters(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save_file(llama(), tmp_path / "one" / SINGLE)
    save_in_two(tmp_path / "two", llama())
    one, two = (read(tmp_path / name).parameter("embedding.weight", (5, 4)) for name in ("one", "two"))
    assert np.array_equal(one, llama()["model.embed_tokens.weight"])
    assert np.array_equal(one, two)


def test_the_single_file_is_read_where_an_index_lies_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_in_two(tmp_path, {name: tensor + 1 for name, tensor in llama().items()})
    save_file(llama(), tmp_path / SINGLE)
    found = read(tmp_path).parameter("final_norm.weight", (4,))
    assert np.array_equal(found, llama()["model.norm.weight"])  # as transformers' from_pretrained chooses
    assert f"has both {SINGLE} and {INDEX}. Only {SINGLE} is read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("model.layers.0.self_attn.q_proj.bias", MODEL),  # attention_bias = false in config.json
        ("model.layers.1.input_layernorm.weight", MODEL),  # a layer beyond num_hidden_layers
        ("model.layers.0.self_attn.q_proj.weight_scale", MODEL),  # fp8
        ("model.layers.0.self_attn.q_norm.weight", MODEL),
        ("embed_tokens.weight", MODEL),  # a second embedding, under the name without its prefix
    ],
)
def test_tensor_that_the_model_does_not_have_is_named(name: str, model: ModelConfig, tmp_path: Path) -> None:
    save_file({**llama(), name: np.ones(4, np.float32)}, tmp_path / SINGLE)
    assert f"has tensors that the model does not have: {name}." in refused(tmp_path, model)


def test_buffers_that_transformers_passes_over_are_passed_over(tmp_path: Path) -> None:
    mask = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    save_file({**llama(), **mask}, tmp_path / SINGLE)
    read(tmp_path)


def test_missing_tensor_wrong_shape_and_wrong_dtype_are_reported_together(tmp_path: Path) -> None:
    tensors = without(llama(), "model.norm.weight")
    tensors["lm_head.weight"] = np.ones((5, 3), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((6, 4), np.int64)
    save_file(tensors, tmp_path / SINGLE)
    assert refused(tmp_path).splitlines() == [
        "The folder lacks tensors of the model: model.norm.weight.",
        f"model.layers.0.mlp.up_proj.weight in {SINGLE} is stored as I64. Only F64, F32, F16, BF16 are read; "
        "other numbers need a scale. Save the model in bf16, fp16 or fp32.",
        f"lm_head.weight in {SINGLE} has the shape [5, 3]; the model needs [5, 4].",
    ]


def test_transposed_weight_of_gpt2_is_refused(tmp_path: Path) -> None:
    # transformers' Conv1D stores [in, out]; here is [out, in] as in nn.Linear
    save_file({"h.0.mlp.c_fc.weight": np.ones((6, 4), np.float32)}, tmp_path / SINGLE)
    message = "h.0.mlp.c_fc.weight in model.safetensors has the shape [6, 4]; the model needs [4, 6]."
    assert message in refused(tmp_path, GPT2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.bool])
def test_numbers_that_need_a_scale_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(tensor) for name, tensor in llama().items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_torch(tensors, tmp_path / SINGLE)
    assert "model.norm.weight in model.safetensors is stored as" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floating_point_numbers_are_converted_to_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(tensor).to(dtype) for name, tensor in llama().items()}
    save_torch(tensors, tmp_path / SINGLE)
    found = torch.from_numpy(read(tmp_path).parameter("final_norm.weight", (4,)))
    assert torch.equal(found, tensors["model.norm.weight"].float())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_number_that_is_not_finite_in_fp32_is_named(value: float, tmp_path: Path) -> None:
    tensors = {**llama(), "model.norm.weight": np.array([1, 1, value, 1], np.float64)}
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight in .*safetensors holds 1 numbers .* at \[2\]"
    ):
        read(tmp_path).parameter("final_norm.weight", (4,))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_weights_are_read_from_either_name(kept: str, tmp_path: Path) -> None:
    matrix = llama()["model.embed_tokens.weight"]
    rest = without(llama(), "model.embed_tokens.weight", "lm_head.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"] if kept == "both" else [kept]
    save_file({**rest, **dict.fromkeys(names, matrix)}, tmp_path / SINGLE)
    assert np.array_equal(read(tmp_path, TIED).parameter("embedding.weight", (5, 4)), matrix)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    save_file(llama(), tmp_path / SINGLE)
    with pytest.raises(ConfigError, match=r"lm_head\.weight in model\.safetensors differs from model\.embed"):
        read(tmp_path, TIED).parameter("embedding.weight", (5, 4))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"model.norm.weight": "a.safe', "is not readable as JSON"),
        ("[1, 2]", "holds list, not an object"),
        ("{}", "weight_map is missing and has no default"),
        ('{"weight_map": ["a.safetensors"]}', "weight_map = ['a.safetensors']: input should be a valid dict"),
        ('{"weight_map": {"x": 3}}', "weight_map.x = 3: input should be a valid string"),
        ('{"weight_map": {"x": "../elsewhere.safetensors"}}', "weight_map names '../elsewhere.safetensors'"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "weight_map names '/etc/passwd'. Only files in the folder"),
        ('{"weight_map": {"x": ".."}}', "weight_map names '..'"),
        (
            '{"weight_map": {"x": "c.safetensors"}}',
            "c.safetensors is missing, but model.safetensors.index.js",
        ),
        ('{"weight_map": ' + "[" * 100_000, "is n"),
    ],
)
def test_index_that_is_none_is_refused(index: str, message: str, tmp_path: Path) -> None:
    save_in_two(tmp_path, llama())
    (tmp_path / INDEX).write_text(index)
    assert message in refused(tmp_path)


def test_index_that_belongs_to_other_files_is_refused(tmp_path: Path) -> None:
    weight_map = save_in_two(tmp_path, llama())
    weight_map["model.norm.weight"] = "a.safetensors"  # it is in b
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "1 tensors are not in the files that weight_map names: model.norm.weight" in refused(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_in_two(tmp_path, llama())
    save_file(llama(), tmp_path / "b.safetensors")
    assert "lm_head.weight is stored twice: in a.safetensors and in b.safetensors" in refused(tmp_path)


def test_file_that_is_cut_short_or_no_file_is_refused(tmp_path: Path) -> None:
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path)
    save_file(llama(), tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for cut in (0, 5, 100, len(whole) - 4):
        (tmp_path / SINGLE).write_bytes(whole[:cut])
        assert f"It has {cut:,} bytes. If it was not copied completely" in refused(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "is a git-lfs pointer. Fetch the weights with `git lfs pull`" in refused(tmp_path)
    (tmp_path / SINGLE).unlink()
    os.mkfifo(tmp_path / SINGLE)
    assert "model.safetensors is not a regular file" in refused(tmp_path)


def test_links_into_a_cache_are_read(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(llama(), tmp_path / "blobs/0123abcd")
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/0123abcd")
    read(tmp_path / "snapshot")
