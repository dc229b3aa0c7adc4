"""The network of a run with its initial weights, built one parameter at a time."""

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
    """The network of `run` with its initial weights, of which the host holds one parameter at a time in fp32.

    At stage 3 no rank ever holds all of it. At stages 1 and 2 only rank 0 draws the weights: DeepSpeed sends
    them to the other ranks. With `is_resumed` the weights stay uninitialized, because a checkpoint replaces
    them. Raises ConfigError when the attention kernel that the config names cannot run here.
    """
    with torch.device("meta"):
        model = GPT(run.model)
    model.place(world.device, DTYPES[run.precision], world.sequence)
    if run.zero.stage < 3:
        is_drawn = world.is_first and not is_resumed
        parameters = _place_one_by_one(model, run, world, is_drawn=is_drawn)
    else:
        is_drawn = not is_resumed
        parameters = _shard_one_by_one(model, run, world)
    if is_drawn:
        initialize(parameters, run.model, run.seed)
    else:
        for _ in parameters:
            pass
    return model


def _place_one_by_one(
    model: GPT, run: RunConfig, world: World, *, is_drawn: bool
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter in fp32 on the host, for the caller to fill, and then move it to the device.

    Unless `is_drawn`, it is on the device at once.
    """
    device, dtype = world.device, DTYPES[run.precision]
    for name, planned in list(model.named_parameters()):
        empty = (
            torch.empty(planned.shape) if is_drawn else torch.empty(planned.shape, device=device, dtype=dtype)
        )
        parameter = torch.nn.Parameter(empty)
        yield name, parameter
        parameter.data = parameter.data.to(device=device, dtype=dtype)
        _replace(model, name, planned, parameter)


def _shard_one_by_one(model: GPT, run: RunConfig, world: World) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every parameter whole, for the caller to fill, and then shard it over the ranks."""
    deepspeed = import_deepspeed(world.device)
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    config = deepspeed_config(run, world.size, has_gpu=not is_cpu(world.device))
    for name, planned in list(model.named_parameters()):
        parameter = torch.nn.Parameter(torch.empty(planned.shape))
        yield name, parameter
        parameter.data = parameter.data.to(device=world.device, dtype=DTYPES[run.precision])
        _replace(model, name, planned, parameter)
        deepspeed.zero.Init(
            torch.nn.ParameterList([parameter]),
            config_dict_or_path=config,
            dtype=DTYPES[run.precision],
            # None before the first parameter, with which DeepSpeed makes the groups of zero.secondary_shards.
            zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
        )


def _replace(model: GPT, name: str, planned: torch.nn.Parameter, parameter: torch.nn.Parameter) -> None:
    """Put `parameter` where the network has `planned`."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
    if planned is model.head.weight:  # tied to the embedding
        model.head.weight = parameter
