"""TileLang's example of a sparse MLA backward, read from a folder that ``--peer-folder`` names; nothing of it is kept here."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType

import torch

from ...problem.op import Inputs
from ..cases import IN_ORDER, BenchCase
from ..stage import Prepared
from .base import Peer
from .libraries import needs_gpu, peer_folder

FILE = "sparse_mla_bwd.py"
_LOG2E = 1.4426950408889634


class TileLangBackward(Peer):
    """``examples/deepseek_v32/sparse_mla_bwd.py`` of TileLang. It masks tokens behind the query's own number."""

    name = "TileLang's example"
    stages = ("attention_backward",)
    distributions = ("tilelang",)
    deterministic = False

    def available(self) -> str | None:
        folder = peer_folder()
        if folder is None or not (folder / FILE).is_file():
            return f"--peer-folder has no {FILE}"
        found = _example(str(folder))
        return needs_gpu(90) or (found if isinstance(found, str) else None)

    def build_key(self, case: BenchCase) -> Hashable | None:
        return case.shape  # every size is part of its code

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        example = _example(str(peer_folder()))
        other = case.distribution == IN_ORDER or case["head_dim"] != 576 or case["k"] % 32 or case["k"] > case["context"]
        if other or isinstance(example, str):
            return None
        q, kv, out, do = (inputs[name][None] for name in ("q", "kv", "out", "do"))
        lse = (inputs["lse"] * _LOG2E)[None].contiguous()
        listed = _behind(inputs["indices"], case["context"])[None].contiguous()

        def outputs(results: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"dq": results[0][0], "dkv": results[1][0]}

        return Prepared(self.name, lambda: example.sparse_mla_bwd(q, kv, out, do, listed, lse), outputs)


def _behind(indices: torch.Tensor, context: int) -> torch.Tensor:
    """The lists with tokens behind the query, which the example masks, in place of absent ones: it reads and adds to them too.

    Each query's are spread out: one token for all costs it 27 of 59 ms (4096 queries, 128 heads), in atomics on one row.
    """
    query = torch.arange(len(indices), device=indices.device)[:, None, None]
    place = torch.arange(indices.shape[-1], device=indices.device)
    spread = query + 1 + place % (context - 1 - query).clamp(min=1)
    return torch.where(indices < 0, spread, indices).to(indices.dtype)


@functools.cache
def _example(folder: str) -> ModuleType | str:
    """The example as a module, or why it cannot be imported; what it imports for its own test is left out."""
    path = Path(folder) / FILE
    found = importlib.util.spec_from_file_location("tilelang_sparse_mla_bwd", path)
    assert found is not None and found.loader is not None  # it ends in .py
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    helpers = ModuleType("utils")
    helpers.assert_tensors_similar = None  # type: ignore[attr-defined]
    kept = sys.modules.get("utils")
    sys.modules["utils"] = helpers
    try:
        found.loader.exec_module(module)
    except Exception as error:  # a foreign file may fail in any way while it is imported
        return f"{path} cannot be imported: {type(error).__name__}: {error}"[:200]
    finally:
        sys.modules.pop("utils") if kept is None else sys.modules.update(utils=kept)
    return module


PEERS = (TileLangBackward(),)
