"""A kernel that does nothing worth while, to learn what Triton's own way of launching costs the host."""

import triton
import triton.language as tl


@triton.jit
def touch(x: tl.tensor) -> None:
    """Write one number."""
    tl.store(x, 1.0)
