"""Kernels that record what they are launched with, for tests of plans."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_codegen.kernels.tma import Tiled
from dsa_codegen.ops import indexer_paged
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.runtime import dispatch

from fake_gpu import FakeGpu

PAGED = indexer_paged.IndexerPagedSpec(64, 128)
HOPPER = Config.of("gluon", part_queries=1, block_n=64, num_stages=4, accumulators=1, blocks_per_sm=4, gathered=1)
SPLIT = Config.of("triton", scheme="split", capacity=4096, block_n=4096, num_warps=8, sample=2048, splits=4)
OF_HITS = [
    pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned"),
    pytest.mark.usefixtures("fresh_dispatch"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler"),
]
"""Of all tests of hits in C."""


def scores(rows: int = 3, columns: int = 500, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What ``select`` chooses from, and where each row ends."""
    return torch.zeros(rows, columns, dtype=dtype), torch.full((rows,), columns, dtype=torch.int32)


def paged(seed: int, context: int = 260) -> dict[str, Any]:
    """Arguments of ``indexer_logits_paged``, which ``HOPPER`` reads by tiles."""
    return dict(indexer_paged.OP.inputs(PAGED, Case(indexer_paged.IndexerPagedSizes(2, context), "full"), Draw(seed)))


@dataclass
class Kernels(dict):
    """Every kernel there might be: records what it is launched with, and lets a test step in."""

    takes_addresses: bool = False
    launched: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None

    def __missing__(self, name: str) -> Kernel:
        return self.setdefault(name, Kernel(name, self))

    def __bool__(self) -> bool:
        return True


class Kernel:
    """One of them."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self._name, self._kernels, self.takes_addresses = name, kernels, kernels.takes_addresses

    def __call__(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        self._kernels.launched.append((self._name, grid, args))
        self._kernels.meanwhile()


def gpu(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[FakeGpu, Kernels]:
    kernels = Kernels(takes_addresses=options.pop("takes_addresses", False))
    return FakeGpu(monkeypatch, kernels=kernels, **options), kernels


def without_plans(call: Callable[[], Any]) -> Any:
    """What a call gives after everything was forgotten."""
    dispatch._plans.clear()
    dispatch._guarded.clear()
    return call()


def told(kernels: Kernels, tensors: Sequence[Any], result: Any) -> list[Any]:
    """The launches since the last look: every tensor by what it is, or by its place where it belongs to the call."""
    results = [result] if isinstance(result, Tensor) else list(result or ())
    given = [each for each in tensors if isinstance(each, Tensor)]
    names = {id(each): f"argument {place}" for place, each in enumerate(given)}
    names |= {id(each): f"result {place}" for place, each in enumerate(results) if id(each) not in names}
    workspaces: dict[int, str] = {}

    def name(value: Any) -> Any:
        if isinstance(value, Tiled):
            (owner,) = (place for place, each in enumerate(given) if _begins_in(value.data_ptr(), each))
            return owner, value.data_ptr() - given[owner].data_ptr(), tuple(value.shape), tuple(value.strides), value.padding
        if not isinstance(value, Tensor):
            return type(value), value
        known = names.get(id(value)) or workspaces.setdefault(id(value), f"workspace {len(workspaces)}")
        return known, value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes()

    launches = [(kernel, grid, [name(value) for value in args]) for kernel, grid, args in kernels.launched]
    kernels.launched.clear()
    return [launches, [(each.shape, each.stride(), each.dtype, each.untyped_storage().nbytes()) for each in results]]


def _begins_in(address: int, tensor: Tensor) -> bool:
    return tensor.data_ptr() <= address < tensor.data_ptr() + tensor.untyped_storage().nbytes()


class Seen(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
