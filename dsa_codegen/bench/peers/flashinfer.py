"""FlashInfer's top-k: its radix selection, and the same with a deterministic outcome."""

from __future__ import annotations

from typing import Any

from ...op import Inputs
from ..cases import BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import imported, needs_gpu


class FlashInferTopk(Peer):
    """See the module's first lines."""

    stages = ("select",)
    distributions = ("flashinfer-python",)

    def __init__(self, name: str, **options: bool) -> None:
        self.name = name  # type: ignore[misc]
        self._options = options

    def available(self) -> str | None:
        found = needs_gpu(80) or imported("flashinfer")
        return found if isinstance(found, str) else None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        library: Any = imported("flashinfer")
        scores, k, options = inputs["scores"], case["k"], self._options

        def run() -> Any:
            return library.top_k(scores, k, sorted=False, **options)

        return Prepared(self.name, run, lambda result: {"chosen": result[1].int()})


PEERS = (FlashInferTopk("FlashInfer"), FlashInferTopk("FlashInfer (deterministic)", deterministic=True))
