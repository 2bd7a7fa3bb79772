"""Token selection: the k highest scores of every row's window, as token numbers or as slots of a paged cache.

The choice is the highest score first and, among equal scores, the lowest token; what is chosen is given in ascending token
order, -1 behind it where the window is short. -0.0 equals +0.0, and NaN is taken only where nothing else is left. Tokens at
both ends of the window may always be kept (attention sinks and a sliding window); they count among the k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, compare
from ..draw import Draw
from ..errors import InputError
from ..gpu import Gpu
from ..op import Accuracy, Case, Config, Cost, Inputs, Launch, Op, Outputs, Parameter, Violation, exceeds
from ..presets import Model
from ..values import Scalar, Sizes, Spec, next_power_of_two

SCORES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUTPUTS = ("tokens", "slots")
POOL_HEAD = 32  # int32 words before a pool's keys
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
        self.require_range("topk", 64, 4096)
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
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (17, 257), "columns": (16385, 65537)}


class Select(Op[SelectSpec, SelectSizes]):
    """See the module's first lines."""

    name = "select"
    summary = "Deterministic top-k of every row's window: token numbers, or slots through a page table."
    function = "select"
    schema = (
        "(Tensor scores, Tensor ends, int topk, Tensor? starts=None, Tensor? page_table=None, int page=64, "
        "int keep_first=0, int keep_recent=0) -> Tensor"
    )
    spec_type = SelectSpec
    sizes_type = SelectSizes
    backends = ("tilelang", "triton")
    minor = frozenset({"starts", "output", "page", "keep_first", "keep_recent"})

    def specs(self, model: Model) -> Sequence[SelectSpec]:
        return (SelectSpec(model.topk), SelectSpec(model.topk, starts=False, output="slots", page=model.page))

    def bind(self, *args: Any) -> tuple[SelectSpec, SelectSizes, Inputs]:
        scores, ends, topk, starts, page_table, page, keep_first, keep_recent = args
        scores = checks.tensor("scores", scores, (None, None), tuple(_NAMES), inner_contiguous=True)
        rows, columns = scores.shape
        if columns > _MAX_COLUMNS:
            raise InputError("scores", f"{columns} columns", f"at most {_MAX_COLUMNS}")
        checks.tensor("ends", ends, (rows,), torch.int32, like=scores)
        if starts is not None:
            checks.tensor("starts", starts, (rows,), torch.int32, like=scores)
        if page_table is not None:
            table = checks.tensor("page_table", page_table, (None, None), torch.int32, like=scores, inner_contiguous=True)
            requests = table.shape[0]
            if rows % max(requests, 1) or (rows and not requests):
                raise InputError("page_table", f"{requests} rows", f"a row per request, and the {rows} rows of scores shared")
        inputs = {"scores": scores, "ends": ends, "starts": starts, "page_table": page_table}
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
        scores, chosen = inputs["scores"], self.allocate(spec, inputs)["chosen"]
        step = max(1, _REFERENCE_SCORES // max(scores.shape[1], 1))
        for first in range(0, len(scores), step):
            rows = slice(first, first + step)
            chosen[rows] = _tokens(spec, inputs, rows)
        return {"chosen": chosen if spec.output == "tokens" else _slots(spec, inputs, chosen)}

    def allocate(self, spec: SelectSpec, inputs: Inputs) -> Outputs:
        scores = inputs["scores"]
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

    def options(self, spec: SelectSpec) -> Sequence[SelectSpec]:
        return (
            spec,
            replace(spec, starts=not spec.starts, scores="bf16"),
            replace(spec, output="slots", page=48, keep_first=3, keep_recent=17),
        )

    def workloads(self, spec: SelectSpec) -> Sequence[Case[SelectSizes]]:
        # Prefill selects token numbers for many rows, decode slots for few; each is kin to the other's records.
        prefill, decode = ((4096, 32768), (4096, 8192), (4096, 131072)), ((64, 65536), (64, 8192), (1, 65536), (1, 8192))
        longer = ((64, 131072), (64, 32768), (1, 131072), (1, 32768))
        sizes = prefill if spec.output == "tokens" else decode + longer
        return [Case(SelectSizes(rows, columns), "normal") for rows, columns in sizes]

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        shared = (
            Parameter(
                "scheme", ("row", "split"), "one block per row, or several and a second kernel that joins what they kept"
            ),
            Parameter("capacity", (4096, 256, 512, 1024, 2048, 8192, 16384), "scores that are kept of a row"),
        )
        if backend == "triton":
            return (
                *shared,
                Parameter("block_n", (4096, 128, 1024, 2048, 8192), "scores per step"),
                Parameter("sample", (4096, 256, 1024, 2048), "sampled scores"),
                Parameter("num_warps", (8, 4, 16), "warps per block"),
                Parameter("splits", (1, 2, 4, 8, 16, 32), "blocks per row", launch_only=True),
            )
        return (
            *shared,
            Parameter("threads", (512, 128, 256, 1024), "threads per block"),
            Parameter("vectors", (2, 1, 4), "16-byte loads per lane and tile"),
            Parameter("bins_log2", (11, 10, 12), "bits of a digit of the searches"),
            Parameter("sample_vectors", (1, 2, 4), "16-byte loads per thread for the sample"),
            Parameter("whole", (False, True), "whether windows that fit are kept whole, without a sample"),
            Parameter("blocks_per_sm", (2, 1, 3, 4), "blocks whose registers must fit an SM"),
            Parameter("splits", (1, 2, 4, 8, 16, 32), "blocks per row", launch_only=True),
        )

    def constraints(self, spec: SelectSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        # The sample is wrong by some standard deviations: room for a quarter more than is wanted.
        yield from exceeds("capacity", spec.topk + max(spec.topk // 4, 64), config["capacity"])
        if (config["scheme"] == "row") != (config["splits"] == 1):
            yield Violation("splits", 1.0, "splits: one with scheme row, several with scheme split")
        if config.backend == "triton":
            # The pool lies in registers, keys, tokens and ranks.
            yield from exceeds("pool registers", config["capacity"] / (32 * config["num_warps"]), 16)
            yield from exceeds("step registers", config["block_n"] / (32 * config["num_warps"]), 32)
            yield from exceeds("sample registers", config["sample"] / (32 * config["num_warps"]), 16)
            return
        threads, blocks, values = config["threads"], config["blocks_per_sm"], _derived(spec, config)
        yield from exceeds("threads per histogram", threads, 1 << config["bins_log2"])
        yield from exceeds("pool registers", config["capacity"] / threads, 16)
        yield from exceeds("threads per SM", threads * blocks, gpu.threads_per_sm)
        yield from exceeds("scores per lane", config["vectors"] * values["vector"], 16)
        # A fit to what ptxas reports: kept scores are moved with their tokens, a tile waits while its scores are ranked.
        registers = 6 + 7 * config["capacity"] // (2 * threads) + config["vectors"] * values["vector"]
        yield from exceeds("registers", registers * threads * blocks, gpu.regs_per_sm)
        smem = 8 * config["capacity"] + 4 * ((1 << config["bins_log2"]) + values["max_tiles"]) + 1024
        yield from exceeds("smem", smem, gpu.smem_per_block, " B")
        yield from exceeds("smem per SM", smem * blocks, gpu.smem_per_sm, " B")

    def guesses(self, spec: SelectSpec, sizes: SelectSizes, gpu: Gpu) -> Iterable[Config]:
        capacity = next(c for c in (256, 512, 1024, 2048, 4096, 8192) if c >= spec.topk * 3 // 2)
        threads = min(512 if capacity <= 4096 else 1024, capacity)
        config = Config.of(
            "tilelang",
            scheme="row",
            capacity=capacity,
            threads=threads,
            vectors=4 if spec.scores == "fp32" else 2,  # a lane's 16 scores share one scan and one reservation
            bins_log2=11,
            sample_vectors=4 if sizes.columns > 65536 else 2,
            whole=False,
            blocks_per_sm=2 if threads <= 512 else 1,
            splits=1,
        )
        if sizes.rows <= gpu.sms:  # few rows: latency counts, many threads shorten it
            config = config.replace(threads=min(1024, capacity), blocks_per_sm=1)
            if sizes.columns <= 8192 or sizes.rows > 16:  # 64 rows of 65536: 21 us, 32 where four blocks share a row
                config = config.replace(bins_log2=10)
            else:
                config = config.replace(scheme="split", vectors=1, splits=_splits(sizes, gpu))
        yield config
        yield config.replace(blocks_per_sm=1)
        splits = _splits(sizes, gpu) if sizes.rows <= 16 and sizes.columns > 8192 else 1
        yield Config.of(
            "triton",
            scheme="row" if splits == 1 else "split",
            capacity=max(capacity, 4096),
            block_n=4096,
            num_warps=8,
            sample=2048,
            splits=splits,
        )

    def derived(self, spec: SelectSpec, config: Config) -> dict[str, Scalar]:
        return _derived(spec, config)

    def launches(self, spec: SelectSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        scores, chosen, table = inputs["scores"], outputs["chosen"], inputs["page_table"]
        rows, limit = scores.shape
        if not rows:
            return ()
        if table is not None:
            limit = min(limit, table.shape[1] * spec.page)
        if not limit:
            chosen.fill_(-1)
            return ()
        starts = () if inputs["starts"] is None else (inputs["starts"],)
        window = (scores, *starts, inputs["ends"])
        tables = () if table is None else (table,)
        splits, triton = config["splits"], config.backend == "triton"
        programs = min(rows, 4 * gpu.sms)
        stride = (scores.stride(0),) if triton else ()
        pages = (table.stride(0), rows // len(table)) if triton and table is not None else ()
        if config["scheme"] == "row" and not triton:
            return (Launch("select_row", (rows, 1, 1), (*window, *tables, chosen, limit)),)
        pools = scores.new_empty(
            programs if config["scheme"] == "row" else rows, splits, POOL_HEAD + 2 * config["capacity"], dtype=torch.int32
        )
        if config["scheme"] == "row":
            args = (*window, *tables, pools, chosen, rows, limit, *stride, *pages)
            return (Launch("select_row", (programs, 1, 1), args),)
        count = (splits,) if triton else ()
        return (
            Launch("select_keep", (rows, splits, 1), (*window, pools, limit, *stride, *count)),
            Launch("select_finish", (rows, 1, 1), (*window, *tables, pools, chosen, limit, *stride, *count, *pages)),
        )


def _splits(sizes: SelectSizes, gpu: Gpu) -> int:
    """Blocks per row that fill the GPU once or twice and leave each at least 4096 scores."""
    splits = 2
    while splits < 32 and splits * sizes.rows < gpu.sms and sizes.columns >= 8192 * splits:
        splits *= 2
    return splits


def _derived(spec: SelectSpec, config: Config) -> dict[str, Any]:
    guess: dict[str, Any] = {
        "margin": 5,  # of independent scores, 4 standard deviations fail once in 30 000 rows; neighbours are alike, though
        "balance": math.isqrt(spec.topk * config["capacity"]),
    }
    if config.backend == "triton":
        pool = POOL_HEAD + 2 * config["capacity"]
        sample_log2 = config["sample"].bit_length() - 1
        return {"block_k": next_power_of_two(spec.topk), "pool": pool, "sample_log2": sample_log2, **guess}
    vector = 16 // SCORES[spec.scores].itemsize
    tile = 32 * config["vectors"] * vector
    longest = 1 << (20 if config["scheme"] == "row" else 18)  # scores of a row or of a split whose tiles have a place
    return {
        "vector": vector,
        **guess,
        "max_tiles": longest // tile,
        "whole_limit": config["capacity"] if config["whole"] else 0,
    }


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
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], device=scores.device)
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


OP = Select()
