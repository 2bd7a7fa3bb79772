"""SGLang's top-k, made for DeepSeek-V3.2: 2048 of the fp32 scores of a row, in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import needs_gpu, sgl_kernel

TOPK = 2048
LIBRARY = "sm90/common_ops.abi3.so"


def reason() -> str | None:
    """Why it cannot be used here."""
    return needs_gpu(90) or sgl_kernel(LIBRARY)


def chosen_like(rows: Tensor) -> Tensor:
    """Where the choice for so many rows is written."""
    return torch.empty(len(rows), TOPK, dtype=torch.int32, device=rows.device)


class FastTopk(Peer):
    """See the module's first lines."""

    name = "fast_topk"
    stages = ("select",)
    distributions = ("sglang-kernel",)

    def available(self) -> str | None:
        return reason()

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case["k"] != TOPK:
            return None
        scores, ends = inputs["scores"], inputs["ends"]
        chosen, select = chosen_like(scores), torch.ops.sgl_kernel.fast_topk.default
        return Prepared("fast_topk", lambda: select(scores, chosen, ends, None), lambda _: {"chosen": chosen})


PEERS = (FastTopk(),)
