"""Sizes of the network that no one means are refused by name."""

import pytest

from data_pipeline.config_file import validate
from data_pipeline.errors import ConfigError
from gpt.config.model import ModelConfig
from gpt.config.parameter_table import parameter_count


@pytest.mark.parametrize(
    "field",
    ["n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "context", "vocab_size", "vocab_multiple"],
)
def test_enormous_size_is_refused_at_once(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = 10000000000: input should be less than or equal to"):
        validate(ModelConfig, {field: 10**10}, "config")


def test_largest_published_shapes_are_within_the_bounds() -> None:
    # Llama 3.1 405B (arXiv:2407.21783, table 3), and the 1,000 layers of DeepNet (arXiv:2203.00555)
    shape = {"n_layers": 126, "d_model": 16_384, "n_heads": 128, "n_kv_heads": 8, "d_ff": 53_248}
    model = ModelConfig.model_validate({**shape, "context": 131_072, "vocab_size": 128_256})
    assert parameter_count(model) == pytest.approx(405e9, rel=0.01)
    ModelConfig.model_validate({"n_layers": 1_000, "d_model": 512, "n_heads": 8})
