"""The network of a run with its initial weights, built in the shards that ZeRO stage 3 trains."""

from collections.abc import Iterator

import torch

from gpt.config.run import RunConfig
from gpt.distributed.world import World
from gpt.distributed.zero.deepspeed_config import deepspeed_config
from gpt.distributed.zero.patches import import_deepspeed
from gpt.model.gpt import GPT
from gpt.model.hardware import is_cpu
from gpt.model.initialization import initialize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_model(run: RunConfig, world: World, *, is_resumed: bool = False) -> GPT:
    """The network of `run` with its initial weights. At stage 3 no rank ever holds all of it.

    With `is_resumed` the weights stay uninitialized, because a checkpoint replaces them. Raises ConfigError
    when the attention kernel that the config names cannot run here.
    """
    dtype = DTYPES[run.precision]
    if run.zero.stage < 3:
        model = GPT(run.model)
        if not is_resumed:
            model.initialize(run.seed)
        return model.place(world.device, dtype, world.sequence)
    with torch.device("meta"):
        model = GPT(run.model)
    model.place(world.device, dtype, world.sequence)
    parameters = _shard_one_by_one(model, run, world)
    if is_resumed:
        for _ in parameters:
            pass
    else:
        initialize(parameters, run.model, run.seed)
    return model


def _shard_one_by_one(model: GPT, run: RunConfig, world: World) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter whole, for the caller to fill, and then shard it over the ranks."""
    deepspeed = import_deepspeed(world.device)
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    config = deepspeed_config(run, world.size, has_gpu=not is_cpu(world.device))
    for name, planned in list(model.named_parameters()):
        parameter = torch.nn.Parameter(torch.empty(planned.shape))
        yield name, parameter
        parameter.data = parameter.data.to(device=world.device, dtype=DTYPES[run.precision])
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
        if planned is model.head.weight:  # tied to the embedding
            model.head.weight = parameter
        deepspeed.zero.Init(
            torch.nn.ParameterList([parameter]),
            config_dict_or_path=config,
            dtype=DTYPES[run.precision],
            # None before the first parameter, with which DeepSpeed makes the groups of zero.secondary_shards.
            zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
        )
