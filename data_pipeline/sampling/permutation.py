"""A pseudo-random permutation of 0 … size-1 as a function: no table, O(1) memory and time per lookup.

A Feistel network permutes the smallest power of two that is at least `size`; it is a permutation for any
round function (Luby & Rackoff 1988). A result outside the range is permuted again until it is inside (cycle
walking, Black & Rogaway 2002), on average fewer than two times. The order is part of a run's results: a
change here changes every run, so a test pins it.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # even, so that halves of different widths end where they began


class Permutation:
    """The permutation of 0 … `size`-1 that `key` determines."""

    def __init__(self, size: int, key: str) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} numbers")
        self.size = size
        # At least two bits: with an empty half, the network would mix nothing.
        bits = max(2, (size - 1).bit_length())
        self._high_bits, self._low_bits = bits // 2, bits - bits // 2
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers at `positions`, each in [0, size)."""
        if positions.size and not (positions.min() >= 0 and positions.max() < self.size):
            raise IndexError(f"positions outside [0, {self.size})")
        numbers = self._permute_power_of_two(positions.astype(np.uint64))
        outside = np.flatnonzero(numbers >= self.size)
        while outside.size:
            numbers[outside] = self._permute_power_of_two(numbers[outside])
            outside = outside[numbers[outside] >= self.size]
        return numbers.astype(np.int64)

    def _permute_power_of_two(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high_bits, low_bits = self._high_bits, self._low_bits
        high, low = values >> np.uint64(low_bits), values & np.uint64((1 << low_bits) - 1)
        for key in self._round_keys:
            mixed = high ^ (_mix(low + key) & np.uint64((1 << high_bits) - 1))
            high, low = low, mixed
            high_bits, low_bits = low_bits, high_bits
        return (high << np.uint64(low_bits)) | low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finalizer of SplitMix64 (Steele, Lea & Flood 2014): every input bit affects every output bit.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
