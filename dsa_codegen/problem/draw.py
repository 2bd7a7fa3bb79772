"""Seeded random tensors for inputs; on the "meta" device only shapes, so that launches can be planned without memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Draw:
    """A stream of random tensors, reproducible for a seed and device."""

    seed: int = 0
    device: str = "cpu"
    _generator: torch.Generator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.device != "meta":
            self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal numbers with standard deviation ``scale``; FP8 dtypes are rounded from fp32."""
        values = torch.randn(*shape, dtype=torch.float32, device=self.device, generator=self._generator)
        return (values * scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """fp32 numbers in [low, high)."""
        return torch.rand(*shape, dtype=torch.float32, device=self.device, generator=self._generator) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, device=self.device, generator=self._generator, dtype=dtype)

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 … n-1, int64."""
        if self.device == "meta":
            return torch.empty(n, dtype=torch.int64, device="meta")
        return torch.randperm(n, device=self.device, generator=self._generator)
