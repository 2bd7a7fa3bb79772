"""Token selection: the k highest scores of every row's window, as token numbers or as slots of a paged cache.

The choice is the highest score first and, among equal scores, the lowest token; what is chosen is given in ascending token
order, -1 behind it where the window is short. -0.0 equals +0.0, and NaN is taken only where nothing else is left. Tokens at
both ends of the window may always be kept (attention sinks and a sliding window); they count among the k.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, compare
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import GQA, MLA, Model
from ...problem.values import Sizes, Spec

SCORES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUTPUTS = ("tokens", "slots")
_NAMES = {dtype: name for name, dtype in SCORES.items()}
_REFERENCE_SCORES = 1 << 26  # sorted at once by the reference: 2 GB
_MAX_COLUMNS = 1 << 30  # tokens are int32, and kernels step a tile beyond a window's end


@dataclass(frozen=True)
class SelectSpec(Spec):
    """What changes the selection's code."""

    topk: int
    scores: str = "fp32"
    starts: bool = True
    """Whether windows have starts; otherwise they begin at token 0."""
    output: str = "tokens"
    """Token numbers, or the slots of a cache's pages that hold them."""
    page: int = 64
    """Tokens per page of the cache (no matter for token numbers)."""
    keep_first: int = 0
    """So many tokens at the window's start are always chosen."""
    keep_recent: int = 0
    """So many tokens at the window's end are always chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("topk", 1, 4096)
        self.require_in("scores", SCORES)
        self.require_in("output", OUTPUTS)
        self.require_range("page", 1, 65536)
        self.require_range("keep_first", 0, self.topk)
        self.require_range("keep_recent", 0, self.topk - self.keep_first)


@dataclass(frozen=True)
class SelectSizes(Sizes):
    """What varies from call to call."""

    rows: int
    columns: int
    # What decides is how many rows share the GPU (1, 4, 8, 16, 64 of several blocks each; from 1025 on they come in several
    # waves, whatever the blocks), and what a cluster's registers hold.
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {
        "rows": (2, 5, 9, 17, 65, 257, 1025),
        "columns": (8193, 16385, 32769, 65537, 131073, 1048577),
    }


class SelectProblem(Problem[SelectSpec, SelectSizes]):
    """See the module's first lines."""

    name = "select"
    summary = "Deterministic top-k of every row's window: token numbers, or slots through a page table."
    function = "select"
    schema = (
        "(Tensor scores, Tensor ends, int topk, Tensor? starts=None, Tensor? page_table=None, int page=64, "
        "int keep_first=0, int keep_recent=0) -> Tensor"
    )
    buffers = ("chosen",)
    spec_type = SelectSpec
    sizes_type = SelectSizes
    minor = frozenset({"starts", "output", "page", "keep_first", "keep_recent"})
    attentions = (MLA, GQA)

    def specs_of(self, model: Model) -> Sequence[SelectSpec]:
        tokens = model.block * model.pool  # of a block, where these are what is scored
        kept: dict[str, Any] = {name: getattr(model, name) // tokens for name in ("keep_first", "keep_recent")}
        if model.attention == GQA:  # rows are queries and KV heads, columns blocks; attention looks up where they lie
            return (SelectSpec(model.topk // model.block, starts=False, **kept),)
        topk = model.topk // model.pool
        slots = SelectSpec(topk, starts=False, output="slots", page=model.page, **kept)
        return (SelectSpec(topk, **kept), slots)

    def bind(self, *args: Any) -> tuple[SelectSpec, SelectSizes, Inputs]:
        scores, ends, topk, starts, page_table, page, keep_first, keep_recent, *brought = args
        scores = checks.tensor("scores", scores, (None, None), tuple(_NAMES), inner_contiguous=True)
        rows, columns = scores.shape
        if columns > _MAX_COLUMNS:
            raise InputError("scores", f"{columns} columns", f"at most {_MAX_COLUMNS}")
        ends = checks.tensor("ends", ends, (rows,), torch.int32, like=scores)
        if starts is not None:
            starts = checks.tensor("starts", starts, (rows,), torch.int32, like=scores)
        if page_table is not None:
            page_table = checks.tensor("page_table", page_table, (None, None), torch.int32, like=scores, inner_contiguous=True)
            requests = page_table.shape[0]
            if rows % max(requests, 1) or (rows and not requests):
                raise InputError("page_table", f"{requests} rows", f"a row per request, and the {rows} rows of scores shared")
        inputs = {"scores": scores, "ends": ends, "starts": starts, "page_table": page_table}
        if brought and brought[0] is not None:
            inputs["chosen"] = checks.tensor("out", brought[0], (rows, topk), torch.int32, like=scores)
        paged = {} if page_table is None else {"output": "slots", "page": page}
        dtype = _NAMES[scores.dtype]
        spec = SelectSpec(topk, dtype, starts is not None, keep_first=keep_first, keep_recent=keep_recent, **paged)
        return spec, SelectSizes(rows, columns), inputs

    def inputs(self, spec: SelectSpec, case: Case[SelectSizes], draw: Draw) -> Inputs:
        rows, columns = case.sizes.rows, case.sizes.columns
        windows, _, kind = case.distribution.rpartition("_")
        starts = torch.zeros(rows, dtype=torch.int32, device=draw.device)
        ends = torch.full_like(starts, columns)
        if windows == "ragged":
            starts = draw.integers(-2, columns, rows)
            ends = starts + draw.integers(-columns // 8, columns + 3, rows)
        if windows == "extreme":
            bounds = torch.tensor(_extremes(columns), dtype=torch.int32, device=draw.device)
            pairs = bounds[torch.arange(rows, device=draw.device) % len(bounds)]
            starts, ends = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
        padding = 5 if windows == "ragged" else 0  # the rows of indexer logits are padded, these to an odd stride
        scores = _DISTRIBUTIONS[kind](draw.normal(rows, columns + padding), draw)
        return {
            "scores": scores.to(SCORES[spec.scores])[:, :columns],
            "ends": ends,
            "starts": starts if spec.starts else None,
            "page_table": _page_table(spec, case, draw) if spec.output == "slots" else None,
        }

    def reference(self, spec: SelectSpec, inputs: Inputs) -> Outputs:
        scores = inputs["scores"]
        chosen = torch.empty(len(scores), spec.topk, dtype=torch.int32, device=scores.device)
        step = max(1, _REFERENCE_SCORES // max(scores.shape[1], 1))
        for first in range(0, len(scores), step):
            rows = slice(first, first + step)
            chosen[rows] = _tokens(spec, inputs, rows)
        return {"chosen": chosen if spec.output == "tokens" else _slots(spec, inputs, chosen)}

    def allocate(self, spec: SelectSpec, inputs: Inputs) -> Outputs:
        scores = inputs["scores"]
        if "chosen" in inputs:
            return {"chosen": inputs["chosen"]}
        return {"chosen": torch.empty(scores.shape[0], spec.topk, dtype=torch.int32, device=scores.device)}

    def check(self, spec: SelectSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return compare.equal("chosen", outputs["chosen"], reference["chosen"])

    def cost(self, spec: SelectSpec, case: Case[SelectSizes]) -> Cost:
        rows, columns = case.sizes.rows, case.sizes.columns
        return Cost(2 * rows * columns, rows * (columns * SCORES[spec.scores].itemsize + 4 * spec.topk), "fp32")

    def cases(self, spec: SelectSpec) -> Sequence[Case[SelectSizes]]:
        topk = spec.topk
        kinds = [Case(SelectSizes(4, 5 * topk + 77), f"ragged_{kind}") for kind in _DISTRIBUTIONS]
        plain = [Case(SelectSizes(2, 14 * topk), kind) for kind in ("normal", "relu")]
        sizes = ((1, 1), (1, topk), (3, topk + 1), (2, 0), (0, 40))
        extreme = Case(SelectSizes(8, 2 * topk + 77), "extreme_normal")
        return [*plain, *kinds, extreme, *(Case(SelectSizes(rows, columns), "normal") for rows, columns in sizes)]

    def long_cases(self, spec: SelectSpec) -> Sequence[Case[SelectSizes]]:
        # Every block of a cluster has its part of such a row; equal scores, few different ones and NaN lie in many of them.
        kinds = ("normal", "few", "ragged_equal", "ragged_special")
        return [Case(SelectSizes(3, 131072), kind) for kind in kinds]

    def options(self, spec: SelectSpec) -> Sequence[SelectSpec]:
        first = min(3, spec.topk)  # of a list of blocks there may be few
        kept = replace(spec, output="slots", page=48, keep_first=first, keep_recent=min(17, spec.topk - first))
        return (spec, replace(spec, starts=not spec.starts, scores="bf16"), kept)

    def workloads(self, spec: SelectSpec) -> Sequence[Case[SelectSizes]]:
        # Prefill selects token numbers for many rows, at a prompt's end for few, decode slots for few; each is kin to the
        # other's records.
        prefill = ((4096, 131072), (4096, 65536), (4096, 32768), (4096, 8192), (64, 131072))
        decode = itertools.product((64, 1, 4, 8, 16), (65536, 131072, 32768, 16384, 8192))
        batched = ((128, 65536), (128, 32768), (128, 16384), (128, 8192))
        sizes = prefill if spec.output == "tokens" else (*decode, *batched)
        return [Case(SelectSizes(rows, columns), "normal") for rows, columns in sizes]


def _tokens(spec: SelectSpec, inputs: Inputs, rows: slice) -> Tensor:
    """int32 [rows, topk]: the chosen tokens by a stable sort."""
    scores, ends = inputs["scores"][rows], inputs["ends"][rows, None]
    columns = scores.shape[1]
    if inputs["page_table"] is not None:
        columns = min(columns, inputs["page_table"].shape[1] * spec.page)
    start = torch.zeros_like(ends) if inputs["starts"] is None else inputs["starts"][rows, None].clamp(min=0)
    end = ends.clamp(max=columns)
    token = torch.arange(scores.shape[1], device=scores.device)
    rank = scores.double().nan_to_num(nan=-1e300, posinf=1e299, neginf=-1e299)
    rank = rank.masked_fill((token < start + spec.keep_first) | (token >= end - spec.keep_recent), 1e300)
    rank = rank.masked_fill((token < start) | (token >= end), -torch.inf)
    best, chosen = rank.sort(dim=1, descending=True, stable=True)
    chosen = chosen.masked_fill(best.isneginf(), columns)[:, : spec.topk].sort(dim=1).values
    chosen = torch.nn.functional.pad(chosen, (0, spec.topk - chosen.shape[1]), value=columns)
    return chosen.masked_fill(chosen == columns, -1).int()


def _slots(spec: SelectSpec, inputs: Inputs, chosen: Tensor) -> Tensor:
    table = inputs["page_table"]
    if not chosen.numel() or not table.shape[1]:
        return chosen
    table = table.repeat_interleave(len(chosen) // len(table), dim=0)
    token = chosen.clamp(min=0)
    page = table.gather(1, (token // spec.page).long())
    return torch.where((chosen < 0) | (page < 0), -1, page * spec.page + token % spec.page)


def _page_table(spec: SelectSpec, case: Case[SelectSizes], draw: Draw) -> Tensor:
    """int32 [requests, max_pages]: two rows of scores share a request where their number is even; ragged: some absent."""
    requests = case.sizes.rows // 2 if case.sizes.rows % 2 == 0 else case.sizes.rows
    max_pages = -(-case.sizes.columns // spec.page)
    table = draw.permutation(requests * max_pages + 1)[: requests * max_pages].view(requests, max_pages).int()
    if case.distribution.startswith("ragged"):
        table = table.masked_fill(draw.uniform(requests, max_pages) < 0.1, -1)
    return table


def _extremes(columns: int) -> list[tuple[int, int]]:
    """Windows at the ends of int32, where sums wrap, and at the row's end."""
    lowest, highest = -(2**31), 2**31 - 1
    outside = [(highest, highest), (highest - 70, highest), (highest, lowest), (lowest, lowest)]
    return [*outside, (lowest, highest), (columns, highest), (columns - 70, highest), (5, columns - 1)]


def _special(scores: Tensor, draw: Draw) -> Tensor:
    """Half NaN, and infinities and zeros of both signs."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=torch.float32, device=scores.device)
    return torch.where(draw.uniform(*scores.shape) < 0.5, torch.nan, values[draw.integers(0, 5, *scores.shape)] + scores * 0)


_DISTRIBUTIONS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "normal": lambda scores, draw: scores,
    "relu": lambda scores, draw: (scores - 2.2).relu(),  # most exactly 0: the threshold lies on a plateau
    "equal": lambda scores, draw: torch.full_like(scores, 0.37),
    "few": lambda scores, draw: (2 * scores).round(),
    "up": lambda scores, draw: scores.sort(dim=1).values,
    "down": lambda scores, draw: scores.sort(dim=1, descending=True).values,
    "narrow": lambda scores, draw: 100 + 1e-4 * scores,  # all in one bin of the first digit
    "special": _special,
}
