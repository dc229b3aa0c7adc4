"""How many logits exist at a time, for the loss and for the memory plan. Torch-free."""


def chunk_elements(*, is_bf16: bool) -> int:
    """Logits of a chunk, which exist at a time in the dtype of the products.

    256 MiB in bf16: every chunk costs a pass over the weight's gradient in fp32, except when one chunk is
    all. Otherwise 64 MiB in fp32: there the sum is part of the product, and fp16 sums few terms.
    """
    return 2**27 if is_bf16 else 2**24


def block_elements(*, is_cpu: bool) -> int:
    """Logits of a chunk that exist in fp32 at a time: what fits a CPU's caches, or what fills a GPU."""
    return 2**20 if is_cpu else 2**25


def rows_within(elements: int, vocabulary: int) -> int:
    """Rows of at most `elements` logits: a power of two, so that batches are cut evenly, into one shape."""
    return 1 << max(1, elements // vocabulary).bit_length() - 1
