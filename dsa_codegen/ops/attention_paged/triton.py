"""Paged attention in Triton: tiles of heads and entries, of any layout and on every GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ...gpu import Gpu
from ...kernels.waves import until_done
from ...problem.channels import padded_to
from ...problem.kv_layouts import KvPlainLayout
from ...problem.op import Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.paged import group_of, tile_of
from ...problem.values import Scalar
from . import shared
from .problem import AttentionPagedSizes, AttentionPagedSpec

PARAMETERS = (
    Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
    Parameter("block_n", (16, 32, 64), "entries gathered per step"),
    Parameter("num_stages", (2, 3), "stages of the loop over tiles"),
    Parameter("num_warps", (4, 8), "warps per block"),
    Parameter("dequantize", ("bits", "cast"), "e4m3 -> bf16 by placing bits, or by the compiler's conversion"),
    Parameter("splits", shared.SPLITS, "blocks that share a row's entries", launch_only=True),
)
ORDER = ("block_h", "block_n", "num_warps", "dequantize", "splits")
"""What decides in which order a row is added up."""
_WIDE = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8, dequantize="bits", splits=1)
_SOME = _WIDE.replace(block_h=32)
_FEW = _WIDE.replace(block_h=16, block_n=32, num_warps=4)


def constraints(spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do."""
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


def guesses(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> Iterator[Config]:
    """Configs by judgement, the most promising first."""
    widest = _WIDE if gpu.capability == 90 else _SOME  # 64 heads spill 216 to 304 bytes elsewhere
    best = _FEW if spec.heads <= 16 else _SOME if spec.heads <= 32 else widest
    for config in (best, best.replace(block_n=32), _SOME, _FEW, _FEW.replace(block_n=16)):
        yield config.replace(splits=shared.fixed_splits(spec) if spec.batch_invariant else _splits(spec, config, sizes, gpu))


def derived(spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    layout = spec.layout
    names: dict[str, Scalar] = {
        "head_blocks": _head_blocks(spec, config),
        "combine_d": shared.COMBINE_D,
        "combine_s": shared.COMBINE_S,
    }
    if not spec.general:
        return names
    together = group_of(layout)
    group = tile_of(together)
    return names | {
        "group": group,
        "shared": together // group,
        "groups": layout.d_nope // group,
        "nope_padded": padded_to(layout.d_nope),
        "rope_padded": padded_to(layout.d_rope),
    }


def launches(spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
    """Blocks of some heads of a row, or of a part of one; then the parts are joined."""
    q, out, lse = inputs["q"], outputs["out"], outputs["lse"]
    rows = q.shape[0] * q.shape[1]
    splits = min(config["splits"], shared.most_splits(spec, rows))
    partial = shared.partials(spec, rows * spec.heads * splits if splits > 1 else 0, q.device)
    sink = (inputs["sink"],) if spec.sink else ()
    tensors, scalars = shared.arguments(spec, inputs, (q, sink, (out, lse, *partial)))
    one = (inputs["scale"],) if "scale" in inputs else ()
    grid = (_head_blocks(spec, config) * rows * splits, 1, 1)
    main = Launch("attention_paged", grid, (*tensors, *scalars, splits, inputs["sm_scale"], *one))
    if splits == 1:
        return (main,)
    combined = (rows * spec.heads, -(-spec.layout.d_v // shared.COMBINE_D), 1)
    return (main, Launch("combine", combined, (*sink, *partial, out, lse, splits)))


def _splits(spec: AttentionPagedSpec, config: Config, sizes: AttentionPagedSizes, gpu: Gpu) -> int:
    """The number that ends soonest, in units of a tile: whole waves of blocks, each with a start, and joining the parts."""
    blocks = max(1, sizes.batch * sizes.next_n) * _head_blocks(spec, config)
    tiles = -(-spec.topk // config["block_n"]) + -(-spec.extra_topk // config["block_n"])
    resident = gpu.sms * (8 // config["num_warps"])

    def duration(splits: int) -> float:
        joining = 1 + splits / 16 if splits > 1 else 0
        return until_done(blocks, resident, tiles, 0, splits, start=1.5) + joining

    return min((splits for splits in shared.SPLITS if splits <= tiles), key=duration)


def _head_blocks(spec: AttentionPagedSpec, config: Config) -> int:
    return -(-spec.heads // int(config["block_h"]))


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
