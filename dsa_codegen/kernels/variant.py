"""A variant: one operation, spec and config with its kernels at hand; the smallest thing that can be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..gpu import Gpu
from ..problem.draw import Draw
from ..problem.op import Config, Inputs, Launch, Op, Outputs
from ..problem.values import Spec
from .backends import Launchable


@dataclass(frozen=True)
class Variant:
    """Launches the kernels of one config; no checks, no look-ups, no synchronisation."""

    op: Op
    spec: Spec
    config: Config
    gpu: Gpu
    kernels: Mapping[str, Launchable]

    def run(self, inputs: Inputs, outputs: Outputs) -> Outputs:
        """Write ``outputs`` from ``inputs`` (both as the op names them) on the current stream."""
        self.launch(inputs, outputs)
        return outputs

    def launch(self, inputs: Inputs, outputs: Outputs) -> Sequence[Launch]:
        """What ``run`` does; returns what it launched."""
        launches = self.op.launches(self.spec, self.config, inputs, outputs, self.gpu)
        for launch in launches:
            self.kernels[launch.kernel](launch.grid, launch.args)
        return launches

    def within(self, sms: int) -> Variant:
        """The same kernels, with grids as for a GPU of at most so many SMs."""
        return replace(self, gpu=replace(self.gpu, sms=min(sms, self.gpu.sms)))

    def rehearse(self, device: str) -> None:
        """Launch every kernel once, on small problems, so that no code is left to be loaded by a first launch.

        TileLang loads a kernel then, and while a CUDA graph is captured the driver refuses.
        """
        waiting = set(self.kernels)
        for case in self.op.cases(self.spec):
            if not waiting:
                return
            case = self.op.within_reach(self.spec, self.config, case)
            inputs = self.op.inputs(self.spec, case, Draw(0, device))
            launches = self.launch(inputs, self.op.allocate(self.spec, inputs))
            waiting -= {launch.kernel for launch in launches}
