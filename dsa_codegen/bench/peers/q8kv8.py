"""SGLang's sparse prefill attention with FP8 products, where a case allows them: one scale for all queries, one for keys."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ...problem.checks import FP8
from ...problem.op import Inputs
from ..cases import FP8_PRODUCTS, BenchCase
from ..stage import Prepared
from . import flashmla
from .base import Peer
from .libraries import imported, needs_gpu

MODULE = "sglang.kernels.ops.attention.sparse_mla_q8kv8_prefill_sm90"
_LARGEST = 448.0  # of e4m3


class Q8Kv8(Peer):
    """Its kernel on what was quantised beforehand; the cast of the queries, some per cent of the time, is not in the figure."""

    name = "SGLang Q8KV8"
    stages = ("attention_prefill",)
    distributions = ("sglang",)
    similarity = 2e-3  # its error is 1 to 3 % of the output's size

    def available(self) -> str | None:
        found = needs_gpu(90) or imported(MODULE)
        return found if isinstance(found, str) else None

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name if case.distribution == FP8_PRODUCTS else None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case.distribution != FP8_PRODUCTS or not flashmla.serves(case):
            return None
        library: Any = imported(MODULE)
        heads, indices, sm_scale = case["heads"], inputs["indices"], inputs["sm_scale"]
        q, q_scale = quantised(flashmla.padded(inputs["q"]))
        kv, kv_scale = quantised(inputs["kv"])
        return Prepared(
            flashmla.label(self.name, heads),
            lambda: library.sparse_mla_q8kv8_prefill_fwd(q, kv, indices, sm_scale, q_scale, kv_scale),
            lambda results: {"out": results[0][:, :heads]},
        )


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and the fp32 [1] scale by which they are to be multiplied."""
    scale = (values.abs().amax().float() / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (values.float() / scale).to(FP8), scale.reshape(1)


PEERS = (Q8Kv8(),)
