"""Kernels of sparse MLA decode, a file for each backend: which serves when, and what all of them share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation
from ...problem.paged import scales_of
from ...problem.values import Scalar
from . import cuda, gluon, shared, triton
from .problem import AttentionPagedSizes, AttentionPagedSpec
from .turns import in_turns

_PARAMETERS = {"cuda": cuda.PARAMETERS, "gluon": gluon.PARAMETERS, "triton": triton.PARAMETERS}
_LAUNCHES = {"cuda": cuda.launches, "gluon": gluon.launches, "triton": triton.launches}


class AttentionPagedKernels(Kernels[AttentionPagedSpec, AttentionPagedSizes]):
    """See the module's first lines."""

    backends = ("cuda", "gluon", "triton")
    budgeted = True

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return _PARAMETERS[backend]

    def constraints(self, spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "cuda":
            return cuda.constraints(spec, gpu)
        return gluon.constraints(spec, gpu) if config.backend == "gluon" else triton.constraints(spec, config, gpu)

    def order(self, spec: AttentionPagedSpec, config: Config) -> str | None:
        """A row's entries tile by tile, in as many parts as the config says; by the number of rows where it says none."""
        if config.backend != "triton":
            return f"{config.backend}-{config['splits']}" if config["splits"] else None
        return "-".join(["triton", *(str(config[name]) for name in triton.ORDER)])

    def guesses(self, spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> Iterable[Config]:
        splits = shared.fixed_splits(spec) if spec.batch_invariant else 0
        # One order serves all sizes: that of clusters where Gluon's do not.
        if spec.general if spec.batch_invariant else (spec.extra_topk or cuda.pay(spec, sizes, gpu)):
            yield cuda.CONFIG.replace(splits=splits)
        # On an H100 at batch 64 with 128 heads: 101 µs against Triton's 194.
        yield gluon.CONFIG.replace(splits=splits)
        yield from triton.guesses(spec, sizes, gpu)

    def derived(self, spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
        layout = spec.layout
        names: dict[str, Scalar] = {
            "general": spec.general,
            "scales": scales_of(layout),
            "d_nope": layout.d_nope,
            "d_rope": layout.d_rope,
            "d_v": layout.d_v,
            **shared.places_of(layout),
        }
        if config.backend == "cuda":
            return names | cuda.derived(spec)
        return names | (gluon.derived(spec) if config.backend == "gluon" else triton.derived(spec, config))

    def launches(
        self, spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        rows = math.prod(inputs["q"].shape[:2])
        if not rows:
            return ()
        if shared.no_slots(spec, inputs):
            outputs["out"].zero_()
            outputs["lse"].fill_(-math.inf)
            return ()
        if spec.batch_invariant and config["splits"] > shared.most_splits(spec, rows):
            turns = in_turns(inputs, outputs, shared.rows_of_turn(spec, config["splits"]))
            return [launch for turn in turns for launch in self.launches(spec, config, *turn, gpu)]
        return _LAUNCHES[config.backend](spec, config, inputs, outputs, gpu)
