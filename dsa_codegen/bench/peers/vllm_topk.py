"""vLLM's selections of a decode step, ``cooperative_topk`` (at most 64 rows) and ``persistent_topk``."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import loaded, needs_gpu

LIBRARY = "_C_stable_libtorch.*so"
TOPKS = (512, 1024, 2048)
_WORKSPACE = 1 << 20  # bytes, as its engine gives it


class VllmTopk(Peer):
    """One of them.

    Args:
        operator: its name among vLLM's operators.
        most_rows: rows that it takes.
    """

    stages = ("select",)
    distributions = ("vllm",)
    deterministic = False
    ordered = False

    def __init__(self, operator: str, most_rows: float = math.inf) -> None:
        self.name = f"vLLM {operator}"
        self._operator, self._most_rows = operator, most_rows

    def available(self) -> str | None:
        return needs_gpu(90) or loaded("vllm", LIBRARY, "vllm")

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        topk, context = case["k"], case["context"]
        if topk not in TOPKS or case["rows"] > self._most_rows or context % 4:
            return None
        scores, ends, workspace = inputs["scores"], inputs["ends"], _workspace(inputs["scores"].device)
        chosen = torch.empty(len(scores), topk, dtype=torch.int32, device=scores.device)
        select = getattr(torch.ops._C, self._operator).default

        def run() -> Tensor:
            select(scores, ends, chosen, workspace, topk, context)
            return chosen

        return Prepared(self.name, run, lambda chosen: {"chosen": chosen})


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Shared by all calls: they follow one another on a stream."""
    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)


PEERS = (VllmTopk("cooperative_topk", 64), VllmTopk("persistent_topk"))
