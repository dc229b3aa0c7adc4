"""Cross-entropy of the next token, summed over what is scored.

# X = B·T positions, V vocabulary
"""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def cross_entropy_sum(logits_xv: Tensor, targets_x: Tensor) -> Tensor:
    """Sum in nats, fp32, of -log p(target) over the targets that are not IGNORED.

    A sum, not a mean: the divisor is the count of scored targets over all ranks and micro-batches, so
    that the gradient does not depend on how a batch is cut.
    """
    return F.cross_entropy(logits_xv.float(), targets_x, ignore_index=IGNORED, reduction="sum")
