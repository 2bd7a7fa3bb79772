"""Calls as data: what a variant launches for a small case, every tensor and argument stated, to be read without the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..gpu import Gpu
from ..kernels.tma import Tiled
from ..problem.draw import Draw
from ..problem.op import Config, Op
from ..problem.values import Spec


def small_call(op: Op, spec: Spec, config: Config, gpu: Gpu) -> dict[str, Any]:
    """The launches of the first of the operation's small cases that launches anything, as ``standalone.run`` reads them."""
    for case in op.cases(spec):
        inputs = op.inputs(spec, case, Draw(0))
        outputs = op.allocate(spec, inputs)
        launches = op.launches(spec, config, inputs, outputs, gpu)
        if launches:
            stated = _Stated({**inputs, **outputs}, outputs)
            told = [
                {"kernel": each.kernel, "grid": list(each.grid), "args": [stated.argument(value) for value in each.args]}
                for each in launches
            ]
            return {"sizes": case.sizes.to_dict(), "tensors": stated.tensors, "launches": told}
    raise AssertionError(f"no small case of {op.name} launches anything")


class _Stated:
    """Tensors by the memory they lie in; what is no tensor of the call is a workspace."""

    def __init__(self, named: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, dict[str, Any]] = {}
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []
        for name, value in named.items():
            if isinstance(value, Tensor):
                self._add(name, value, empty=name in outputs)

    def argument(self, value: Any) -> Any:
        """A number as it is, a tensor as a view of a stated one."""
        if isinstance(value, Tiled):
            assert value.tensor is not None, "a view that was just made has its tensor"
            place = value.tensor.storage_offset() * value.tensor.element_size()
            offset = value.data_ptr() - value.tensor.data_ptr() + place
            return {
                "tiles": self._name(value.tensor),
                "shape": list(value.shape),
                "stride": list(value.strides),
                "offset": offset,
            }
        if not isinstance(value, Tensor):
            return value
        return {"of": self._name(value), "offset": value.storage_offset(), **_described(value)}

    def _name(self, tensor: Tensor) -> str:
        memory = tensor.untyped_storage().data_ptr()
        if memory not in self._names:
            self._add(f"workspace{len(self._kept)}", tensor, empty=True)
        return self._names[memory]

    def _add(self, name: str, tensor: Tensor, empty: bool) -> None:
        self._kept.append(tensor)  # or its memory could be another's
        self._names.setdefault(tensor.untyped_storage().data_ptr(), name)
        self.tensors[name] = {**_described(tensor), "bytes": tensor.untyped_storage().nbytes()}
        if tensor.dtype.is_floating_point:
            return
        low, high = (0, 0) if empty or not tensor.numel() else (int(tensor.min()), int(tensor.max()))
        self.tensors[name]["range"] = [low, high]


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "stride": list(tensor.stride())}
