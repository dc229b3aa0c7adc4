"""How many logits exist at a time. Torch-free, so that the memory plan reads what the loss uses."""


def chunk_elements(*, is_bf16: bool) -> int:
    """Logits of a chunk, which exist at a time in the dtype of the products.

    In bf16 256 MiB, because each chunk costs a pass over the head's gradient in fp32, unless one is enough.
    Otherwise 64 MiB in fp32: there the product itself adds to that gradient, and in fp16 few terms add up.
    """
    return 2**27 if is_bf16 else 2**24


def block_elements(*, is_cpu: bool) -> int:
    """Logits that exist in fp32 at a time: as many as fit a CPU's caches, or as fill a GPU."""
    return 2**20 if is_cpu else 2**25


def rows_within(elements: int, vocabulary: int) -> int:
    """The largest power of two of rows with at most `elements` logits, so that a batch divides evenly."""
    return 1 << max(1, elements // vocabulary).bit_length() - 1
