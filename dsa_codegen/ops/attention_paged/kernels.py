"""Kernels of sparse MLA decode: clusters that split channels (CUDA C++), groups with roles (Gluon), tiles; split rows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...gpu import Gpu
from ...kernels.waves import until_done
from ...problem.channels import padded_to
from ...problem.checks import pieces, step
from ...problem.kv_layouts import AnyKvLayout, KvPlainLayout
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.paged import FIXED, divider, group_of, scales_of, tile_of
from ...problem.values import Scalar
from .problem import AttentionPagedSizes, AttentionPagedSpec
from .turns import in_turns

_COMBINE_D, _COMBINE_S = 128, 16  # channels and parts of a step of `combine`: all its loads are in flight at once
_GLUON_PARTS = 8  # of the Gluon template's, whose program has all channels
_GLUON_TILE = 64  # heads of a block, and entries per step: what one warpgroup instruction takes
# Per thread: together they fill the register file, lead takes 208. The accumulators are 128 of them.
_GLUON_REGISTERS = {"registers": 128, "follow_registers": 160, "produce_registers": 72}
_CUDA_TILE = 64  # entries per step
_CUDA_THREADS = 384  # two groups of 128 multiply, one gathers
_CUDA_REGISTERS = {"consumer_registers": 216, "producer_registers": 72}  # per thread; 3 * 168 of a block
_CUDA_STAGES = (4, 3)  # tiles that are gathered, waiting or in use, as many as fit
_CUDA_STAGED = 5 * 16 * 4 + 8  # bytes of a token on their way: five words of each of four threads, scales
_CUDA_HEADS = 64  # of a group; up to so many both groups take all heads, of every second tile
_CUDA_HANDED = 33 * 128 * 16  # bytes that one then hands to the other
_CUDA_ROWS = 16  # from which on clusters serve more than 64 heads where no record says otherwise
_CUDA_COMBINERS = 128  # threads that join the parts of a row and head
_HOPPER_SMEM = 232448  # bytes of a block
_PARTIAL_BYTES = 1 << 30  # of the parts that splits leave, at most
_INVARIANT_TILES = 8  # of a part, where all rows are split alike
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class AttentionPagedKernels(Kernels[AttentionPagedSpec, AttentionPagedSizes]):
    """See the module's first lines."""

    backends = ("cuda", "gluon", "triton")
    budgeted = True

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        meaning = "blocks that share a row's entries"
        if backend in ("cuda", "gluon"):
            return (Parameter("splits", (0, *_SPLITS), f"{meaning}; 0: as many as end soonest", launch_only=True),)
        return (
            Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
            Parameter("block_n", (16, 32, 64), "entries gathered per step"),
            Parameter("num_stages", (2, 3), "stages of the loop over tiles"),
            Parameter("num_warps", (4, 8), "warps per block"),
            Parameter("dequantize", ("bits", "cast"), "e4m3 -> bf16 by placing bits, or by the compiler's conversion"),
            Parameter("splits", _SPLITS, meaning, launch_only=True),
        )

    def constraints(self, spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "cuda":
            if gpu.capability != 90:
                reason = f"capability: the CUDA template is Hopper's, {gpu.name} is sm_{gpu.capability}"
                yield Violation("capability", 1.0, reason)
            if spec.kv_layout not in FIXED:
                yield Violation("layout", 1.0, f"layout: the CUDA template reads v32 and v4, Triton's {spec.kv_layout}")
            return
        if config.backend == "gluon":
            if gpu.capability != 90:
                reason = f"capability: the Gluon template is Hopper's, {gpu.name} is sm_{gpu.capability}"
                yield Violation("capability", 1.0, reason)
            if spec.kv_layout not in FIXED:
                reason = f"layout: the Gluon template reads v32 and v4, Triton's {spec.kv_layout}"
                yield Violation("layout", 1.0, reason)
                return
            if spec.extra_topk:
                yield Violation(
                    "second pool", 1.0, "second pool: the Gluon template gathers from one cache, the others from two"
                )
            yield from exceeds("smem", _gluon_smem(spec), gpu.smem_per_block, " B")
            return
        if config["dequantize"] == "cast":
            yield from exceeds("capability for e4m3 conversion", 89, gpu.capability)
        yield from exceeds("padded heads", config["block_h"], max(16, 2 * spec.heads - 1))
        # Accumulator and tile lie in registers: beyond 256 of their values per thread they spill on every architecture.
        values = (config["block_h"] + config["block_n"]) * _padded(spec) / (32 * config["num_warps"])
        # Rows with scales of any channels spill 112 to 400 bytes at 256 (Triton 3.6, sm_90a).
        yield from exceeds("values per thread", values, 192 if spec.general and spec.kv_layout != "bf16" else 256)
        if spec.kv_layout == "bf16" and config["dequantize"] != "bits":
            yield Violation("dequantize", 1.0, "dequantize: bits; there is nothing to dequantize in bf16 rows")
        if (spec.kv_layout == "v4" or spec.rope_in_value) and not _warpgroups(config, gpu):
            yield from exceeds("heads per block of the v4 layout", config["block_h"], 16)  # at 32, 440 bytes spill
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def order(self, spec: AttentionPagedSpec, config: Config) -> str | None:
        """A row's entries tile by tile, in as many parts as the config says; by the number of rows where it says none."""
        if config.backend != "triton":
            return f"{config.backend}-{config['splits']}" if config["splits"] else None
        shape = ("block_h", "block_n", "num_warps", "dequantize", "splits")
        return "-".join(["triton", *(str(config[name]) for name in shape)])

    def guesses(self, spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> Iterable[Config]:
        wide = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8, dequantize="bits", splits=1)
        some = wide.replace(block_h=32)
        few = wide.replace(block_h=16, block_n=32, num_warps=4)
        widest = wide if gpu.capability == 90 else some  # 64 heads spill 216 to 304 bytes elsewhere
        best = few if spec.heads <= 16 else some if spec.heads <= 32 else widest
        fixed = _fixed_splits(spec)
        if not spec.batch_invariant and (spec.extra_topk or _clusters_pay(spec, sizes, gpu)):
            yield Config.of("cuda", splits=0)
        # On an H100 at batch 64 with 128 heads: 101 µs against Triton's 194.
        yield Config.of("gluon", splits=fixed if spec.batch_invariant else 0)
        for config in (best, best.replace(block_n=32), some, few, few.replace(block_n=16)):
            yield config.replace(splits=fixed if spec.batch_invariant else _splits(spec, config, sizes, gpu))

    def derived(self, spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
        layout = spec.layout
        names: dict[str, Scalar] = {
            "general": spec.general,
            "scales": scales_of(layout),
            "d_nope": layout.d_nope,
            "d_rope": layout.d_rope,
            "d_v": layout.d_v,
            **_places(layout),
            "head_blocks": _head_blocks(spec, config),
            "combine_d": _COMBINE_D,
            "combine_s": _COMBINE_S,
        }
        if config.backend == "cuda":
            return names | _cuda_derived(spec)
        if spec.general:
            shared = group_of(layout)
            group = tile_of(shared)
            names |= {
                "group": group,
                "shared": shared // group,
                "groups": layout.d_nope // group,
                "nope_padded": padded_to(layout.d_nope),
                "rope_padded": padded_to(layout.d_rope),
            }
        if config.backend == "gluon":
            chunks = [f"acc{chunk}" for chunk in range(layout.d_v // group_of(layout))]
            half = len(chunks) // 2
            names |= {"left": ", ".join(chunks[:half]), "right": ", ".join(chunks[half:])}
            names |= {"combine_s": _GLUON_PARTS, "block_h": _GLUON_TILE, "block_n": _GLUON_TILE, **_GLUON_REGISTERS}
        return names

    def launches(
        self, spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
        batch, next_n = q.shape[:2]
        rows, d_v = batch * next_n, spec.layout.d_v
        pools = [_pool(inputs, spec.layout)]
        if spec.extra_topk:
            pools.append(_pool(inputs, spec.extra_layout, "extra_"))
        if not rows:
            return ()
        if not any(slots for _, (slots, *_) in pools):
            out.zero_()
            lse.fill_(-math.inf)
            return ()
        # Records are tuned for few queries per sequence; a prompt's thousands would make the parts take tens of GB.
        most = max(1, _PARTIAL_BYTES // (4 * d_v * rows * spec.heads))
        if spec.batch_invariant and config["splits"] > most:
            turns = in_turns(inputs, outputs, _PARTIAL_BYTES // (4 * d_v * spec.heads * config["splits"]))
            return [launch for turn in turns for launch in self.launches(spec, config, *turn, gpu)]
        if config.backend == "cuda":
            return _cuda_launches(spec, config, inputs, outputs, gpu)
        blocks = _head_blocks(spec, config) * rows
        whole, splits = 0, min(config["splits"], most)
        last: tuple[int, ...] = ()
        combined = (rows * spec.heads, -(-d_v // _COMBINE_D), 1)
        if config.backend == "gluon":
            whole, splits = (0, splits) if splits else _shared_out(spec, blocks, gpu)
            combined, last = ((blocks - whole) * min(spec.heads, _GLUON_TILE), 1, 1), (whole,)
        parts = combined[0] * splits if splits > 1 else 0
        partial_out = torch.empty(parts, d_v, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
        sink = (inputs["sink"],) if spec.sink else ()
        (listed, places), *extra = pools
        strides = (pieces(q, dimension) for dimension in range(3))
        shared = (inputs["scale"],) if "scale" in inputs else ()
        tensors = (q, *listed, *sink, *(tensor for more, _ in extra for tensor in more), out, lse, partial_out, partial_lse)
        scalars = (
            *places,
            *(value for _, more in extra for value in more),
            next_n,
            *strides,
            splits,
            inputs["sm_scale"],
            *shared,
        )
        main = Launch("attention_paged", (whole + (blocks - whole) * splits, 1, 1), (*tensors, *scalars, *last))
        if splits == 1:
            return (main,)
        joined = (*sink, partial_out, partial_lse, out, lse, splits, *last)
        return (main, Launch("combine", combined, joined))


def _clusters_pay(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> bool:
    """Whether clusters are known to take less than Gluon's blocks of 64 heads.

    On an H200 with 128 heads 33.6 µs against 36.6 at 16 rows, 87 against 103 at 64, 25 each at 8; with 64 heads 63 and 66 at
    64 rows, where each has a cluster of its own, 28 against 26 at 16, 123 against 106 at 128.
    """
    rows, clusters = sizes.batch * sizes.next_n, gpu.sms // 2
    if spec.heads > _CUDA_HEADS:
        return rows >= _CUDA_ROWS
    return spec.heads > _CUDA_HEADS // 2 and clusters // 2 < rows <= clusters


def _fixed_splits(spec: AttentionPagedSpec) -> int:
    """Of a batch-invariant row: parts of eight tiles, the compromise between a single row and many."""
    tiles = -(-(spec.topk + spec.extra_topk) // _GLUON_TILE)
    return max(splits for splits in _SPLITS if splits <= max(1, tiles // _INVARIANT_TILES))


def _cuda_derived(spec: AttentionPagedSpec) -> dict[str, Scalar]:
    layout = spec.layout
    d_qk = layout.d_nope + layout.d_rope
    stages = next(stages for stages in _CUDA_STAGES if _cuda_staged(spec, stages) <= _HOPPER_SMEM)
    return {
        "d_qk": d_qk,
        "half": layout.d_v // 2,
        "half_tail": (d_qk - layout.d_v) // 2,
        "turns": True,
        "num_stages": stages,
        "threads": _CUDA_THREADS,
        "smem": _cuda_smem(spec, stages),
        "smem_with_staging": _cuda_staged(spec, stages),
        "combine_threads": _CUDA_COMBINERS,
        **_CUDA_REGISTERS,
    }


def _cuda_smem(spec: AttentionPagedSpec, stages: int) -> int:
    """Bytes of shared memory per block: half of the channels of tiles and of q, mail, masks, barriers."""
    tile, mailbox, barrier = _CUDA_TILE * (spec.layout.d_nope + spec.layout.d_rope), 2048 + 1024 + 128, 8
    q = -(-spec.heads // _CUDA_HEADS) * tile
    return stages * (tile + 8 + 2 * barrier) + q + 2 * barrier + 8 * (mailbox + 2 * barrier)


def _cuda_staged(spec: AttentionPagedSpec, stages: int) -> int:
    """The same with a tile of the cache's bytes on their way."""
    return -(-_cuda_smem(spec, stages) // 16) * 16 + _CUDA_TILE * _CUDA_STAGED


def _cuda_launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Clusters that stay, each with one row or part of a row after another; then the parts are joined."""
    q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
    rows, d_v = q.shape[0] * q.shape[1], spec.layout.d_v
    clusters = max(gpu.sms // 2, 1)
    whole, splits = (0, config["splits"]) if config["splits"] else _shared_by_clusters(spec, rows, clusters)
    splits = min(splits, max(1, _PARTIAL_BYTES // (4 * d_v * (rows - whole or 1) * spec.heads)))
    parts = (rows - whole) * spec.heads * splits if splits > 1 else 0
    partial_out = torch.empty(parts, d_v, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
    sink = (inputs["sink"],) if spec.sink else ()
    (listed, places), *extra = (
        _pool(inputs, spec.layout),
        *([_pool(inputs, spec.extra_layout, "extra_")] if spec.extra_topk else []),
    )
    strides = (pieces(q, dimension) for dimension in range(3))
    tensors = (q, *listed, *sink, *(tensor for more, _ in extra for tensor in more), out, lse, partial_out, partial_lse)
    scalars = (*places, *(value for _, more in extra for value in more), q.shape[1], *strides, splits, inputs["sm_scale"])
    grid = (2 * min(whole + (rows - whole) * splits, clusters), 1, 1)
    scratch = (q.new_empty(grid[0] * _CUDA_HANDED // 2),) if spec.heads <= _CUDA_HEADS else ()
    main = Launch("attention_paged", grid, (*tensors, *scratch, *scalars, whole, rows))
    if splits == 1:
        return (main,)
    joined = (*sink, partial_out, partial_lse, out, lse, splits, whole)
    return (main, Launch("combine", ((rows - whole) * spec.heads, 1, 1), joined))


@functools.lru_cache(maxsize=1 << 10)
def _shared_by_clusters(spec: AttentionPagedSpec, rows: int, clusters: int) -> tuple[int, int]:
    """(rows that a cluster takes whole, parts that each of the others is split into), so that all end soonest.

    The unit is a tile, 2 µs: a cluster starts in 1.5, joining takes 1.5, and a quarter for every MB of parts.
    """
    tiles = -(-spec.topk // _CUDA_TILE) + -(-spec.extra_topk // _CUDA_TILE)
    part = 4 * spec.layout.d_v * spec.heads
    least = 2 if spec.heads > _CUDA_HEADS else 3  # of the longest part: fewer are filled up, to two of each group

    def duration(shares: tuple[int, int]) -> float:
        whole, splits = shares
        joining = 1.5 + (rows - whole) * splits * part / 4e6 if splits > 1 else 0
        return until_done(rows, clusters, tiles, whole, splits, start=1.5) + joining

    def fits(shares: tuple[int, int]) -> bool:
        whole, splits = shares
        return splits == 1 or (-(-tiles // splits) >= least and (rows - whole) * splits * part <= _PARTIAL_BYTES)

    waves = rows // clusters
    whole = (0, max(waves - 1, 0) * clusters, waves * clusters)
    return min(filter(fits, itertools.product(whole, _SPLITS)), key=duration)


def _pool(inputs: Inputs, layout: AnyKvLayout, prefix: str = "") -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What a kernel takes of a pool: its tensors; its slots, pages and lists in numbers."""
    cache, indices, lengths = (inputs[f"{prefix}{name}"] for name in ("cache", "indices", "lengths"))
    rows_per_length = indices.shape[1] if lengths is not None and lengths.dim() == 1 else 1
    tensors = (cache, indices) if lengths is None else (cache, indices, lengths)
    scales_base = 0 if isinstance(layout, KvPlainLayout) else layout.scales.base
    page = (layout.page, *divider(layout.page), scales_base)
    listed = (indices.shape[2], step(indices, 0), step(indices, 1), rows_per_length)
    return tensors, (len(cache) * layout.page, cache.stride(0), *page, *listed)


def _head_blocks(spec: AttentionPagedSpec, config: Config) -> int:
    return -(-spec.heads // int(config["block_h"] if config.backend == "triton" else _GLUON_TILE))


def _splits(spec: AttentionPagedSpec, config: Config, sizes: AttentionPagedSizes, gpu: Gpu) -> int:
    """The number that ends soonest, in units of a tile: whole waves of blocks, each with a start, and joining the parts."""
    blocks = max(1, sizes.batch * sizes.next_n) * _head_blocks(spec, config)
    tiles = -(-spec.topk // config["block_n"]) + -(-spec.extra_topk // config["block_n"])
    resident = gpu.sms * (8 // config["num_warps"])

    def duration(splits: int) -> float:
        joining = 1 + splits / 16 if splits > 1 else 0
        return until_done(blocks, resident, tiles, 0, splits, start=1.5) + joining

    return min((splits for splits in _SPLITS if splits <= tiles), key=duration)


@functools.lru_cache(maxsize=1 << 10)
def _shared_out(spec: AttentionPagedSpec, blocks: int, gpu: Gpu) -> tuple[int, int]:
    """(blocks that take all entries of their row, programs that each of the others is split into), so that all end soonest.

    The unit is a tile, 3 µs on an H100: a program starts in 2, joining takes 1, and a quarter for every MB of parts.
    """
    tiles = -(-spec.topk // _GLUON_TILE)
    part = 4 * spec.layout.d_v * min(spec.heads, _GLUON_TILE)

    def duration(shares: tuple[int, int]) -> float:
        whole, splits = shares
        joining = 1 + (blocks - whole) * splits * part / 4e6 if splits > 1 else 0
        return until_done(blocks, gpu.sms, tiles, whole, splits, start=2) + joining

    def fits(shares: tuple[int, int]) -> bool:
        whole, splits = shares
        return splits == 1 or (splits <= tiles and (blocks - whole) * splits * part <= _PARTIAL_BYTES)

    waves = blocks // gpu.sms
    whole = (0, max(waves - 1, 0) * gpu.sms, waves * gpu.sms)
    return min(filter(fits, itertools.product(whole, _SPLITS)), key=duration)


def _warpgroups(config: Config, gpu: Gpu) -> bool:
    """Whether the products run on whole tiles from shared memory (wgmma, tcgen05), not on warps' registers (mma.sync)."""
    return config["block_h"] >= 64 and 90 <= gpu.capability < 120


def _smem(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory per block, as the compiler reports them, and up to 1 KB more."""
    layout, block_h, block_n = spec.layout, config["block_h"], config["block_n"]
    if spec.general:
        return _general_smem(spec, config, gpu)
    assert not isinstance(layout, KvPlainLayout)
    v4 = spec.kv_layout == "v4"
    q = 2 * block_h * (layout.d_nope + layout.d_rope)
    entry = layout.d_v + 2 * layout.d_rope + layout.scales.width + 12  # a tile in flight, and its slots
    if _warpgroups(config, gpu):
        entry += 2 * layout.d_v + (0 if v4 else 2 * layout.d_rope)  # the dequantised tile, the rope of the running one
    else:
        entry += 4 * layout.d_v if v4 else 2 * block_h
    # The results change their layout through the same memory.
    results = 4 * layout.d_v * block_h if _warpgroups(config, gpu) or block_h == 16 else 0
    return max(q + block_n * entry + 256, results)


def _general_smem(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> int:
    """The same of any channels: queries, tiles in flight as they are stored, and the tile that is multiplied."""
    layout, block_h, block_n = spec.layout, config["block_h"], config["block_n"]
    plain = isinstance(layout, KvPlainLayout)
    width, rope = padded_to(layout.d_nope), padded_to(layout.d_rope)
    stored = (2 if plain else 1) * width + 2 * rope
    scales = 0 if isinstance(layout, KvPlainLayout) else 4 * padded_to(layout.groups)
    flight = (stored + scales + 12) * (config["num_stages"] if plain else 1)
    own = 2 * (width + rope) if not plain or not _warpgroups(config, gpu) else 0
    entry = flight + own + (0 if _warpgroups(config, gpu) else 2 * block_h)
    return int(max(2 * block_h * (width + rope) + block_n * entry + 1024, 4 * (width + rope) * block_h))


def _padded(spec: AttentionPagedSpec) -> int:
    """Channels of the value in a kernel's tiles."""
    if not spec.general:
        return spec.layout.d_v
    return padded_to(spec.layout.d_nope) + (padded_to(spec.d_rope) if spec.rope_in_value else 0)


def _places(layout: AnyKvLayout) -> dict[str, Scalar]:
    """Where the fields of a token lie in its page: in bytes, or in bf16 channels of rows as they are."""
    if isinstance(layout, KvPlainLayout):
        whole = layout.width
        return {
            **{"group": layout.d_nope, "power_of_two": False, "nope_base": 0, "rope_base": layout.d_nope},
            **{"token_stride": whole, "scales_stride": 0},
        }
    return {
        "group": layout.group,
        "power_of_two": layout.stored_scales == "e8m0",
        "nope_base": layout.nope.base,
        "rope_base": layout.rope.base,
        "token_stride": layout.nope.stride,
        "scales_stride": layout.scales.stride,
    }


def _gluon_smem(spec: AttentionPagedSpec) -> int:
    """Queries and two tiles of bf16 latents, a tile of weights, and less than 2 KB of biases, row values and barriers."""
    return 3 * 2 * _GLUON_TILE * (spec.layout.d_nope + spec.layout.d_rope) + 2 * _GLUON_TILE**2 + 2048
