"""CUDA devices that are not there: tensors claim to lie on one, builds and runs are counted, kernels are not launched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from dsa_codegen import ops
from dsa_codegen.functions import operators
from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels.backends import Launchable
from dsa_codegen.kernels.render import Rendered
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.problem.op import Op
from dsa_codegen.runtime import dispatch, guards

from support import H200

_NAMES = {"quantize": ("quantize_q", "quantize_k"), "quantize_paged": ("store_k", "store_kv")}
_NAMES["sparse_attention_gqa"] = ("sparse_attention_gqa", "sparse_attention_gqa_paged")
"""What the public functions call an operator that serves several of them."""


def under_public_functions(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU that is not there, which the public functions call with tensors that are only shapes."""

    def function(op: Op) -> Callable[..., Any]:
        schema = torch._C.parse_schema(f"any::{op.function}{op.schema}")
        defaults = [argument.default_value for argument in schema.arguments]
        written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
        single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"

        def call(*args: Any) -> Any:
            taken = args[: len(defaults)]  # without the SMs
            results = dispatch.call(op, [*taken, *defaults[len(taken) :]])
            outputs = tuple(value for name, value in results.items() if name not in written)
            return outputs[0] if single else outputs

        return call

    for op in (op for op in ops.all_ops().values() if not op.training):
        for name in _NAMES.get(op.function, (op.function,)):
            monkeypatch.setattr(operators, name, function(op))
    dispatch.reset()
    return FakeGpu(monkeypatch)


class FakeGpu:
    """Stands in for CUDA in ``dispatch``.

    Args:
        gpus: what each device is.
        device: where the inputs of every call claim to lie.
        capturing: whether a CUDA graph is being captured.
        kernels: what every build holds; calls then launch them, and leave plans. Without, no variant launches anything.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        gpus: Mapping[int, Gpu] | None = None,
        device: int = 0,
        capturing: bool = False,
        kernels: Mapping[str, Launchable] | None = None,
    ) -> None:
        self.device, self.current, self.entered = device, 0, []
        self.builds: list[tuple[str, Gpu]] = []
        self.runs: list[Variant] = []
        self._gpus = gpus or {0: H200}
        cuda = dispatch.torch.cuda
        monkeypatch.setattr(dispatch, "_device", lambda inputs: torch.device("cuda", self.device))
        monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(dispatch, "current_device", lambda: self.current)
        monkeypatch.setattr(cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(cuda, "device", type("device", (_Guard,), {"_fake": self}))  # a class: torch.compile asks for one
        monkeypatch.setattr(dispatch.gpus, "detect", lambda device=None: self._gpus[self.current if device is None else device])
        monkeypatch.setattr(dispatch, "find", lambda rendered, gpu: self if (rendered.sha, gpu) in self.builds else None)
        monkeypatch.setattr(dispatch, "build", self._build)
        monkeypatch.setattr(dispatch, "build_all", self._build_all)
        self._kernels = kernels
        monkeypatch.setattr(guards, "sketched", functools.partial(self._keyed, guards.sketched))
        if kernels is None:
            monkeypatch.setattr(Variant, "run", lambda variant, inputs, outputs: self._run(variant, outputs))
        else:
            monkeypatch.setattr(Variant, "rehearse", lambda variant, device: None)

    def _build(self, rendered: Rendered, gpu: Gpu) -> FakeGpu:
        if (rendered.sha, gpu) not in self.builds:
            self.builds.append((rendered.sha, gpu))
        return self

    def _build_all(self, sources: Iterable[Rendered], gpu: Gpu, processes: int | None = None) -> dict[str, str]:
        for rendered in sources:
            self._build(rendered, gpu)
        return {}

    def load(self) -> Mapping[str, Launchable]:
        """What a build gives."""
        return self._kernels or {}

    def _keyed(self, describe: Callable[[str, Sequence[Any]], Any], op: str, args: Sequence[Any]) -> Any:
        """The tensors' device, which keys and guards look at, is the one that they claim."""
        described = describe(op, args)
        if self._kernels is None or described is None:
            return None
        return (*described[0], self.device), *described[1:]

    def _run(self, variant: Variant, outputs: dict) -> dict:
        assert self.current == self.device, "launched on another device than the tensors'"
        self.runs.append(variant)
        return outputs


class _Guard:
    _fake: FakeGpu

    def __init__(self, device: torch.device | int) -> None:
        self._device, self._before = getattr(device, "index", device), self._fake.current

    def __enter__(self) -> None:
        self._fake.entered.append(self._device)
        self._fake.current = self._device

    def __exit__(self, *error: object) -> None:
        self._fake.current = self._before
