"""What storing into the paged FP8 caches and gathering from them share: the spec's fields, parameters and guesses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..gpu import Gpu
from ..problem.kv_layouts import Layout
from ..problem.op import Config, Kernels, Parameter, Violation
from ..problem.paged import D_ROPE, LAYOUTS, ROPES, SLOTS, WIDTHS, layout_of, template_names
from ..problem.values import Scalar, Spec
from . import rows


@dataclass(frozen=True)
class PagedRowsSpec(Spec):
    """What changes the code of an operation on rows of a paged cache."""

    layout: str
    width: int
    """Channels that are quantised: head_dim of the index keys, d_nope of a KV cache."""
    page: int = 64
    slots: str = "i32"
    d_rope: int = field(default=D_ROPE, kw_only=True)
    """Channels behind them that stay bf16 (no matter for index keys)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("layout", LAYOUTS)
        self.require_in("width", WIDTHS[self.layout])
        self.require_range("page", 1, 1024)
        self.require_in("slots", SLOTS)
        self.require_in("d_rope", ROPES[self.layout])

    @property
    def cache(self) -> Layout:
        """How a block of the cache is laid out."""
        return layout_of(self.layout, self.page, self.width, self.d_rope)


R = TypeVar("R", bound=PagedRowsSpec)
Z = TypeVar("Z", bound=rows.RowSizes)


class PagedRowsKernels(Kernels[R, Z], Generic[R, Z]):
    """Blocks of ``block_t`` rows, each row's groups padded to a power of two."""

    backends = ("triton",)
    min_capability = 89

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return rows.PARAMETERS

    def constraints(self, spec: R, config: Config, gpu: Gpu) -> Iterable[Violation]:
        names = self.derived(spec, config)
        yield from rows.values_per_thread(config, int(names["groups_padded"]) * int(names["group"]))

    def guesses(self, spec: R, sizes: Z, gpu: Gpu) -> Iterable[Config]:
        # 16 values per thread; few tokens are spread over more, smaller blocks.
        wide = spec.width > 128
        if sizes.tokens < 8 * gpu.sms:
            yield Config.of("triton", block_t=1, num_warps=2 if wide else 1)
        else:
            yield Config.of("triton", block_t=4 if wide else 16, num_warps=4)

    def derived(self, spec: R, config: Config) -> dict[str, Scalar]:
        return template_names(spec.cache, spec.width)
