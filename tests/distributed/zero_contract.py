"""Run by torchrun from test_zero_contract.py: checks the private attributes that Outlast uses."""

import json
import sys
from importlib.metadata import version as package_version

import torch

from gpt.config.run import RunConfig
from gpt.config.zero_sizes import sums_whole_gradients
from gpt.distributed.world import join, total
from gpt.distributed.zero.build import build_model
from gpt.distributed.zero.engine import Engine
from gpt.model.attention import Documents

run = RunConfig.model_validate(json.loads(sys.argv[1]))
world = join(60)
model = build_model(run, world)
# The constructor compares `_hp_mapping` of each parameter with the layout in closed form.
engine = Engine(model, run, world)
import deepspeed  # noqa: E402 - the Engine must configure it first

version = f"deepspeed {package_version('deepspeed')}"
tokens = torch.randint(0, run.model.vocabulary, (run.batch.micro_batch, run.model.context + 1))
ends = range(run.model.context, tokens[:, 1:].numel() + 1, run.model.context)
documents = Documents.from_ends(torch.tensor(list(ends), dtype=torch.int32).numpy())


def take_step(scale: float) -> dict[str, torch.Tensor]:
    """The numbers that the engine returned at the end of the step."""
    count = run.micro_batches(world.size)
    for number in range(count):
        inputs = (tokens[:, :-1], tokens[:, 1:], documents)
        engine.forward_backward(scale, *inputs, is_last=number == count - 1)
        numbers = engine.step(1e-2)
    return numbers


def weights() -> list[torch.Tensor]:
    """Every parameter whole; stage 3 gathers it from the ranks."""
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=run.zero.stage == 3):
        return [p.detach().clone() for p in model.parameters()]


if run.precision == "fp16":
    found = []
    for window in (1000, 1):
        with engine.restored_afterwards():
            engine.load_scalars({"loss_scaler.cur_iter": 5.0})
            engine._zero.loss_scaler.scale_window = window
            norm = take_step(1e-3)["train/grad_norm"]
            moments = [part.tensor.clone() for part in engine.state() if part.state == "exp_avg"]
            found.append((engine.scalars["loss_scaler.cur_scale"], norm, moments))
    engine._zero.loss_scaler.scale_window = 1000
    (scale, norm, moments), (scale_after, norm_after, moments_after) = found
    assert (scale, scale_after) == (2.0**16, 2.0**17), version
    assert norm == norm_after, f"{version}: the scale of the next step divides the norm of this one"
    assert all(map(torch.equal, moments, moments_after)), (
        f"{version}: the scale of the next step divides the gradients of this one"
    )

if sums_whole_gradients(run, world.size):
    # Adding each gradient at once to the sum in fp32 gives the bits of adding them after the backward pass.
    final = []
    for is_immediate in (True, False):
        if not is_immediate:
            assert engine._zero._grad_acc_hooks, version
            for hook in engine._zero._grad_acc_hooks:
                hook.remove()
            engine._zero.immediate_grad_update = False
        with engine.restored_afterwards():
            for _ in range(3):
                engine.forward_backward(1e-3, tokens[:, :-1], tokens[:, 1:], documents, is_last=False)
                kept = sum(p.grad is not None for p in model.parameters())
                assert kept == (0 if is_immediate else len(list(model.parameters()))), version
                engine.step(1e-2)
                engine.forward_backward(1e-3, tokens[:, 1:], tokens[:, :-1], documents, is_last=True)
                engine.step(1e-2)
            final.append([part.tensor.clone() for part in engine.state()])
    engine._zero.immediate_grad_update = True
    engine._zero.create_grad_acc_hooks()
    assert all(map(torch.equal, *final)), f"{version}: immediate_grad_update changes the numbers"

before = weights()
assert engine.optimizer_steps == 0, version
masters = [part.tensor.clone() for part in engine.state() if part.state == "master"]
is_unchanged: list[bool] = []


def compare() -> None:
    now = [part.tensor for part in engine.state() if part.state == "master"]
    is_unchanged.append(all(map(torch.equal, masters, now)))


engine.before_next_update(compare)
take_step(1e-3)
after = weights()
assert engine.optimizer_steps == 1 and not engine.was_skipped, version
assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), version

take_step(float("nan") if world.rank else 1e-3)  # on one rank only
assert engine.was_skipped, f"{version}: `overflow` does not report a skipped update"
assert all(torch.equal(a, b) for a, b in zip(after, weights(), strict=True)), (
    f"{version}: a non-finite gradient reached a weight"
)
assert engine.optimizer_steps == 1, version

if run.precision == "fp16":
    scale = {
        name.removeprefix("loss_scaler."): value for name, value in engine.scalars.items() if "scaler" in name
    }
    # After one update and one skipped update, the hysteresis is used up and the scale is still whole.
    expected = {"cur_scale": 2.0**16, "cur_iter": 2, "last_overflow_iter": 1, "cur_hysteresis": 1}
    assert scale == expected, f"{version}: {scale}"
    engine.load_scalars({**engine.scalars, "loss_scaler.cur_scale": 512.0})
    assert engine.scalars["loss_scaler.cur_scale"] == 512.0, version

take_step(1e-3)
assert is_unchanged == [True], "before_next_update comes once, before the state changes"
assert engine.optimizer_steps == 2 and not engine.was_skipped, (
    f"{version}: a skipped update also spoils the next step"
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
assert all(torch.all(p == 0.25) for p in weights()), f"{version}: the masters do not reach the weights"
assert engine.optimizer_steps == 41, version
print("the contract holds", flush=True)
