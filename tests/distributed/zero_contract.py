"""Run by torchrun from test_zero_contract.py: every private attribute that gpt/distributed/zero uses."""

import json
import sys
from importlib.metadata import version as package_version

import torch

from gpt.config.run import RunConfig
from gpt.distributed.world import join, total
from gpt.distributed.zero.build import build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import Documents

run = RunConfig.model_validate(json.loads(sys.argv[1]))
world = join(60)
model = build_model(run, world)
# The constructor compares `_hp_mapping` of each parameter with the layout in closed form.
engine = Engine(model, run, world)
import deepspeed  # noqa: E402 - after the Engine has set it up

version = f"deepspeed {package_version('deepspeed')}"
tokens = torch.randint(0, run.model.vocabulary, (run.batch.micro_batch, run.model.context + 1))
ends = range(run.model.context, tokens[:, 1:].numel() + 1, run.model.context)
documents = Documents.from_ends(torch.tensor(list(ends), dtype=torch.int32).numpy())


def take_step(scale: float) -> None:
    count = run.micro_batches(world.size)
    for number in range(count):
        inputs = (tokens[:, :-1], tokens[:, 1:], documents)
        engine.forward_backward(scale, *inputs, is_last=number == count - 1)
        engine.step(1e-2)


def weights() -> list[torch.Tensor]:
    """Every parameter whole, gathered where stage 3 has cut it."""
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=run.zero.stage == 3):
        return [p.detach().clone() for p in model.parameters()]


if run.precision == "fp16":
    found = []
    for window in (1000, 1):
        with engine.undone():
            engine.load_scalars({"loss_scaler.cur_iter": 5.0})
            engine._zero.loss_scaler.scale_window = window
            take_step(1e-3)
            moments = [part.tensor.clone() for part in engine.state() if part.state == "exp_avg"]
            found.append((engine.scalars["loss_scaler.cur_scale"], engine.grad_norm, moments))
    engine._zero.loss_scaler.scale_window = 1000
    (scale, norm, moments), (scale_after, norm_after, moments_after) = found
    assert (scale, scale_after) == (2.0**16, 2.0**17), version
    assert norm == norm_after, f"{version}: the scale of the next step divides the norm of this one"
    assert all(map(torch.equal, moments, moments_after)), f"{version}: …, and its gradients"

before = weights()
assert engine.optimizer_steps == 0, version
take_step(1e-3)
after = weights()
assert engine.optimizer_steps == 1 and not engine.was_skipped, version
assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), version

take_step(float("nan") if world.rank else 1e-3)  # on one rank only
assert engine.was_skipped, f"{version}: `overflow` does not tell that a step was left out"
assert all(torch.equal(a, b) for a, b in zip(after, weights(), strict=True)), (
    f"{version}: a gradient that is not finite reached a weight"
)
assert engine.optimizer_steps == 1, version

if run.precision == "fp16":
    scale = {
        name.removeprefix("loss_scaler."): value for name, value in engine.scalars.items() if "scaler" in name
    }
    # One step was taken and one left out, which used up the patience but not yet half the scale.
    expected = {"cur_scale": 2.0**16, "cur_iter": 2, "last_overflow_iter": 1, "cur_hysteresis": 1}
    assert scale == expected, f"{version}: {scale}"
    engine.load_scalars({**engine.scalars, "loss_scaler.cur_scale": 512.0})
    assert engine.scalars["loss_scaler.cur_scale"] == 512.0, version

take_step(1e-3)
assert engine.optimizer_steps == 2 and not engine.was_skipped, (
    f"{version}: what was left out of one step spoils the next"
)

owned = 0
for part in engine.state():
    is_rounded = run.optimizer.moments == "bf16" and part.state != "master"
    assert part.tensor.dtype == (torch.bfloat16 if is_rounded else torch.float32), version
    assert part.tensor.numel() == part.end - part.start, version
    if part.state == "master":
        owned += part.tensor.numel()
        part.tensor.fill_(0.25)
assert total(world, owned) == (sum(group.numel for group in engine.groups),), version
engine.prepare_load(optimizer_steps=41)
engine.finish_load()  # update_lp_params
assert all(torch.all(p == 0.25) for p in weights()), f"{version}: masters do not reach the weights"
assert engine.optimizer_steps == 41, version
print("the contract holds", flush=True)
