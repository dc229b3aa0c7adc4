"""Sequence parallelism: neighbouring ranks share the tokens of each sequence, for contexts too long for one.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509, section 3.1): each of the S ranks of a group computes
everything except attention on its 1/S of the tokens. For attention an all-to-all gives it all tokens of 1/S
of the heads, and a second one reverses that. ZeRO does not change: it shards over all ranks and sums their
gradients.

    # B batch, T tokens of a sequence, t = T/S of them, H query heads, K key/value heads, E head width
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B·T, H, E], k [B·T, K, E], v [B·T, K, E]) → [B·T, H, E]"""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences with this one; by default only this rank."""

    rank: int = 0
    size: int = 1
    processes: dist.ProcessGroup | None = None

    def columns(self, tokens: int) -> slice:
        """This rank's part of a sequence of `tokens` tokens."""
        mine = tokens // self.size
        return slice(self.rank * mine, (self.rank + 1) * mine)

    def attend(self, over_whole: Attend, rows: int, q_xhe: Tensor, k_xke: Tensor, v_xke: Tensor) -> Tensor:
        """Attention for this rank's tokens of `rows` sequences, by `over_whole`, which takes whole sequences.

        q [B·t, H, E], k and v [B·t, K, E] → [B·t, H, E]. If K is less than S, several ranks get the same keys
        and values.
        """
        ranks, heads, width = self.size, q_xhe.shape[1], q_xhe.shape[2]
        if ranks == 1:
            return over_whole(q_xhe, k_xke, v_xke)
        if (copies := ranks // k_xke.shape[1]) > 1:
            k_xke, v_xke = k_xke.repeat_interleave(copies, 1), v_xke.repeat_interleave(copies, 1)
        # One exchange for q, k and v: [B, t, S, h, E] → [S, B, t, h, E], where S are the receiving ranks.
        parts = [x.view(rows, -1, ranks, x.shape[1] // ranks, width) for x in (q_xhe, k_xke, v_xke)]
        shares = [part.shape[3] for part in parts]
        given = self._exchange(torch.cat(parts, dim=3).permute(2, 0, 1, 3, 4))
        # [S, B, t, h, E] → [B·T, h, E], where S are the sending ranks
        whole = given.transpose(0, 1).reshape(-1, sum(shares), width)
        out = over_whole(*torch.split(whole, shares, dim=1))
        # [B, S, t, h, E] → [S, B, t, h, E], and after the exchange → [B·t, H, E] with the heads of all ranks
        mine = self._exchange(out.view(rows, ranks, -1, shares[0], width).transpose(0, 1))
        return mine.permute(1, 2, 0, 3, 4).reshape(-1, heads, width)

    def _exchange(self, given: Tensor) -> Tensor:
        """Send part r of the first dimension to the group's rank r; the result has rank r's part at r."""
        given = given.contiguous()
        taken: Tensor = all_to_all_single(torch.empty_like(given), given, group=self.processes)  # type: ignore[no-untyped-call]
        return taken


WHOLE_SEQUENCES = SequenceGroup()
