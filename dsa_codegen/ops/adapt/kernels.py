"""Kernels of the adaptive choice (Triton): a window's weights added up by several blocks, then a row's cut, in registers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar, next_power_of_two
from .problem import AdaptSizes, AdaptSpec

_BLOCK_N = 2048  # scores of a step of `total`
_MOST_SPLITS = 64  # of a row's window
_WARP = 32  # entries of a list at least, so that each lane has one of its own
_BLOCKS_PER_SM = 4  # of `total`: as many windows or shares of them as are read at once


class AdaptKernels(Kernels[AdaptSpec, AdaptSizes]):
    """See the module's first lines."""

    backends = ("triton",)

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return (Parameter("num_warps", (1, 2, 4, 8, 16), "warps per row"),)

    def constraints(self, spec: AdaptSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        # Token, score, key and weight of an entry lie in registers throughout.
        yield from exceeds("entries per thread", _block_k(spec) / (_WARP * config["num_warps"]), 16)

    def guesses(self, spec: AdaptSpec, sizes: AdaptSizes, gpu: Gpu) -> Iterable[Config]:
        # 32 sums one behind the other: few rows wait for each, many share the SMs.
        for entries in (8, 16) if sizes.rows <= gpu.sms else (16,):
            yield Config.of("triton", num_warps=max(1, _block_k(spec) // (_WARP * entries)))

    def derived(self, spec: AdaptSpec, config: Config) -> dict[str, Scalar]:
        return {"block_k": _block_k(spec), "block_n": _BLOCK_N, "most_splits": _MOST_SPLITS}

    def launches(self, spec: AdaptSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        scores, chosen = inputs["scores"], inputs["chosen"]
        rows, columns = scores.shape
        if not rows:
            return ()
        if not columns:
            outputs["out"].fill_(-1)
            outputs["lengths"].zero_()
            if spec.chosen_scores:
                outputs["out_scores"].fill_(-torch.inf)
            return ()
        windows = [inputs[name] for name in ("starts", "ends") if inputs[name] is not None]
        splits = min(max(_BLOCKS_PER_SM * gpu.sms // rows, 1), _MOST_SPLITS, -(-columns // _BLOCK_N))
        sizes = (columns, scores.stride(0))
        before: tuple[Launch, ...] = ()
        partial: tuple[torch.Tensor, ...] = ()
        if spec.mass == "window":
            partial = (torch.empty(rows, splits, dtype=torch.int64, device=scores.device),)
            shares = (scores, chosen, *windows, *partial, *sizes, inputs["mass_scale"], splits)
            before = (Launch("total", (rows * splits, 1, 1), shares),)
        optional = [inputs[name] for name in ("page_table", "min_scores", "masses", "counts") if inputs[name] is not None]
        table = inputs["page_table"]
        paging = (1, 0, 0, 1) if table is None else (rows // len(table), table.shape[1], table.stride(0), inputs["page"])
        kept = (inputs["keep_first"], inputs["keep_recent"])
        # A threshold that is NaN stands below every score.
        least, share = inputs["min_score"], inputs["mass"]
        rule = (math.nan if least is None else least, 1.0 if share is None else share, inputs["mass_scale"])
        args = (scores, chosen, *windows, *optional, *partial, *outputs.values(), *sizes, *kept, *rule, splits, *paging)
        return (*before, Launch("adapt", (rows, 1, 1), args))


def _block_k(spec: AdaptSpec) -> int:
    return max(next_power_of_two(spec.topk), _WARP)
