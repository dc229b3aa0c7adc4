"""Which fields of a run config may change on resume: freely, with a warning, or not at all.

The launcher checks changes against these rules, and every checkpoint stores a fingerprint of the fields that
must match. Torch-free.
"""

import json
from enum import Enum, auto

import xxhash

from data_pipeline.config_file import dotted
from gpt.config.run import RunConfig


class Change(Enum):
    """What a change of a field on resume means for the run."""

    FREE = auto()  # It changes no number, or only the order in which the same numbers are summed.
    WARNED = auto()  # It takes effect from the resumed step onwards, as the user expects.
    MUST_MATCH = auto()  # With another value it would be another run.


# The longest name that equals a field or a table around it decides. A test covers all fields of a run config.
RULES = {
    "name": Change.FREE,
    "seed": Change.MUST_MATCH,
    "precision": Change.MUST_MATCH,
    "compile": Change.WARNED,
    "deterministic": Change.FREE,
    "profile": Change.FREE,
    "model": Change.MUST_MATCH,
    "model.attention": Change.WARNED,
    "model.recompute": Change.FREE,
    "data.path": Change.FREE,  # The place may change; the data itself must match, by its fingerprint.
    "data.mixture": Change.MUST_MATCH,
    "data.mixture.path": Change.FREE,
    "data.schedule": Change.MUST_MATCH,
    "data.document_mask": Change.MUST_MATCH,
    "data.packing": Change.MUST_MATCH,
    "data.max_epochs": Change.WARNED,
    "data.skip": Change.WARNED,
    "data.verify": Change.FREE,
    "data.changed_from": Change.FREE,
    "batch.global_batch_tokens": Change.MUST_MATCH,
    "batch.micro_batch": Change.FREE,
    "batch.warmup": Change.MUST_MATCH,
    "optimizer": Change.MUST_MATCH,
    "schedule": Change.MUST_MATCH,
    "schedule.total_steps": Change.WARNED,
    "schedule.total_tokens": Change.WARNED,
    "zero.stage": Change.FREE,
    "zero.offload_optimizer": Change.FREE,
    "zero.offload_parameters": Change.FREE,
    "zero.reduce_dtype": Change.WARNED,
    "zero.bucket_numel": Change.FREE,
    "zero.prefetch_numel": Change.FREE,
    "zero.whole_below_numel": Change.FREE,
    "zero.secondary_shards": Change.FREE,
    "zero.quantized_weights": Change.WARNED,
    "zero.quantized_gradients": Change.WARNED,
    "parallel.sequence": Change.FREE,
    "checkpoint": Change.FREE,
    "evaluation": Change.FREE,
    "tracking": Change.FREE,
    "launch": Change.FREE,
    "divergence": Change.FREE,
}


def rule_of(field: str) -> str:
    """The name in RULES that decides about a dotted field; indexes into lists are ignored."""
    parts = [part for part in field.split(".") if not part.isdigit()]
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(name for name in names if name in RULES)


def config_fingerprint(config: RunConfig) -> str:
    """A fingerprint that is equal for configs that agree in every field that must match.

    Fields at their default are left out, so a field that a later version adds changes no fingerprint.
    """
    fields = dotted(config.model_dump(mode="json", exclude_defaults=True), into_lists=True)
    kept = {name: value for name, value in fields if RULES[rule_of(name)] is Change.MUST_MATCH}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())
