"""DeepSpeed's config, generated from the run's.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): stage 1 shards the optimizer's state over the ranks, stage 2
the gradients too, stage 3 the weights too.
"""

from typing import Any

from gpt.config.run import RunConfig
from gpt.config.zero_sizes import sums_whole_gradients, zero_sizes


def deepspeed_config(run: RunConfig, world_size: int, *, has_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config for `run`. Users never write it, because DeepSpeed ignores misspelt keys."""
    accumulation = run.micro_batches(world_size)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.batch.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.grad_clip,
        "zero_optimization": _zero_optimization(run, has_gpu=has_gpu),
        # With offload, torch's AdamW updates on the host: unlike DeepSpeedCPUAdam it needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        # It would wait for the device twice in every micro-batch, to measure what metrics.jsonl says anyway.
        "timers": {"throughput": {"enabled": False}},
    }
    if not run.zero.quantized_gradients:  # whose kernels read 16-bit gradients and send 4 bits
        config["communication_data_type"] = run.zero.reduce_dtype
    if run.precision == "bf16":
        # Skip the update when a gradient is not finite; DeepSpeed does not check this in bf16 by default.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if sums_whole_gradients(run, world_size):
            # The same bits, without a whole copy of the gradients in bf16 (2 bytes a parameter).
            config["bf16"]["immediate_grad_update"] = True
    if run.precision == "fp16":
        # Mixed Precision Training (arXiv:1710.03740, section 3.2), with Apex's initial scale and window.
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000}
    if run.precision != "fp32" and accumulation > 1:
        # DeepSpeed would sum micro-batches in 16 bits, which loses precision.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_optimization(run: RunConfig, *, has_gpu: bool) -> dict[str, Any]:
    """The sizes follow the model: a block's gradients are reduced while the one before it computes."""
    zero, sizes = run.zero, zero_sizes(run)
    config: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": has_gpu,
        "reduce_bucket_size": sizes.bucket_numel,
    }
    if zero.offload_optimizer == "cpu":
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
    if zero.stage < 3:
        return config
    config |= {
        "stage3_prefetch_bucket_size": sizes.prefetch_numel,
        "stage3_param_persistence_threshold": sizes.whole_below_numel,
        "zero_quantized_weights": zero.quantized_weights,
        "zero_quantized_gradients": zero.quantized_gradients,
        "zero_hpz_partition_size": zero.secondary_shards,
    }
    if zero.offload_parameters == "cpu":
        config["offload_param"] = {"device": "cpu", "pin_memory": has_gpu}
    return config
