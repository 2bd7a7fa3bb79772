"""SGLang's sparse prefill attention in Triton for few heads, alone or with a union of neighbouring queries' tokens."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import from_file, needs_gpu

PATH = "kernels/ops/attention/dsa/triton_sparse_mla_prefill.py"
UNIONS = (1, 2, 4)
MOST_HEADS = 32
_UNION_ROWS = (16, 32)  # heads × queries of a union; with others it quietly takes query by query
_HEAD_DIM = 576
_D_V = 512


def library() -> Any:
    """The module, or why it cannot be used."""
    return from_file("sglang", PATH, "sglang")


class TritonMla(Peer):
    """See the module's first lines.

    Args:
        union: so many neighbouring queries gather the union of their tokens; 1: every query its own.
    """

    stages = ("attention_prefill",)
    distributions = ("sglang",)
    files = {"sglang": f"sglang/{PATH}"}  # noqa: RUF012

    def __init__(self, union: int) -> None:
        self.name = "SGLang Triton MLA" + (f" (union of {union})" if union > 1 else "")
        self._union = union

    def available(self) -> str | None:
        found = needs_gpu(90) or library()
        return found if isinstance(found, str) else None

    def serves(self, case: BenchCase) -> bool:
        """Whether it was made for the case's heads and channels, and takes its union of them."""
        heads, topk = case["heads"], case["k"]
        fits = self._union == 1 or (heads * self._union in _UNION_ROWS and topk & (topk - 1) == 0)
        return heads <= MOST_HEADS and case["head_dim"] == _HEAD_DIM and fits

    def build_key(self, case: BenchCase) -> Hashable | None:
        return (self.name, case["heads"], case["k"]) if self.serves(case) else None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if not self.serves(case):
            return None
        q, kv, indices, sm_scale = (inputs[name] for name in ("q", "kv", "indices", "sm_scale"))
        lengths = torch.full((len(q),), case["k"], dtype=torch.int32, device=q.device)
        attend = library().sparse_mla_prefill
        options = {"topk_length": lengths, "union": self._union if self._union > 1 else 0}
        return Prepared(
            self.name,
            lambda: attend(q, kv, indices, sm_scale, _D_V, **options),
            lambda out: {"out": out},
        )


PEERS = tuple(TritonMla(union) for union in UNIONS)
