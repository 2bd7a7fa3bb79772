"""``torch.topk``: what everybody has."""

from __future__ import annotations

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer


class TorchTopk(Peer):
    """See the module's first lines."""

    name = "torch.topk"
    stages = ("select",)
    distributions = ("torch",)
    deterministic = False
    ordered = False

    def available(self) -> str | None:
        return None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        scores, k = inputs["scores"], case["k"]
        if k > case["context"]:
            return None
        return Prepared(self.name, lambda: scores.topk(k, dim=1, sorted=False), lambda best: {"chosen": best.indices.int()})


PEERS = (TorchTopk(),)
