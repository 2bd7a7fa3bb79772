"""Kernels of sparse MLA prefill: pairs of tiles, clusters, FP8, rings for few heads (CUDA C++), groups with roles, tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...gpu import Gpu
from ...problem.channels import D_V, padded, padded_to
from ...problem.checks import pieces, step
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Scalar
from .. import pair
from . import fp8, staying
from .problem import AttentionSizes, AttentionSpec, sharing

_SPECIALISED_THREADS = 384  # one group of 128 gathers, one scores, one adds up
# The configs to try in turn: the first without a violation is the default. The specialised pipeline pads to 64 heads and still
# wins below: 1968 µs against 2017 (Triton, 16 heads) and 1973 against 4143 (multistage, 32), the gather being the limit.
_SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=_SPECIALISED_THREADS)
_WIDE = Config.of("triton", block_h=64, block_n=64, num_stages=2, num_warps=8)
_FEW = Config.of("triton", block_h=16, block_n=64, num_stages=3, num_warps=4)
# 128 heads, H100: 3864 µs at 4096 x 8192 and 4013 at 32768, where TileLang's takes 8 to 15 % longer. As many tiles as fit.
_CLUSTER = Config.of("cuda", num_stages=4, turns=True, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=224)
_CLUSTERS = (_CLUSTER, _CLUSTER.replace(num_stages=3))
_CLUSTER_HEADS = 128  # of one query; 64, two queries a cluster, lost to TileLang's
_CLUSTER_TOPK = 1024  # shorter lists were not measured; between two queries pass 5 to 9 thousand of a query's 110 at 2048
# 64 and 128 heads, H200, 4096 queries: 1747 and 3393 µs of 8192 tokens, 1910 and 3944 of 32768. Of 131072 64 heads take 2551,
# and interleaved 2514; 128 heads 4312 and 4551, but 4252 and 4122 on another card. Of lines of 128 bytes 64 heads of 131072
# take 2459, 2561 without, interleaved 2466 and 2524; 128 heads 4463 and 4348. Gatherers of fewer than 72 registers spill.
_PAIR = Config.of("cuda", num_stages=2, turns=False, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=216)
_PAIR_TOPK = 512  # shorter lists were not measured
_LINE = 128  # bytes
_SORTERS = 256  # threads that sort a list
_SORTED_EACH = (8, 16)  # entries that each of them has, in registers
_PATIENCE = 128  # looks at a counter of steps: some 60 us
# H200, 4096 queries, without and with: 64 heads of 32K 1989 and 1932 µs, of 64K 2266 and 2008, of 128K 2453 and 2219; 128 heads
# 3908 and 3821, 4102 and 3960, 4198 and 4168; 16 heads of 64K 1481 and 1167, of 128K 1772 and 1251. k 512 loses (590 and 622,
# 64 heads of 48K), k 1024 gains nothing (2021 and 2046).
_SWEPT_TOPK = 2048
_LAG = 4  # steps, of a pair of tiles, that a block may be ahead
# FP8 products, 64 and 128 heads: tiles of half the bytes, so that two for each group fit. H200, 128 heads, 4096 queries of 32K
# tokens: 2670 µs, where FlashMLA's products of bf16 take 4213.
_FP8_PAIR = Config.of("cuda", num_stages=4, turns=False, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=216)
_FP8_CAPABILITY = 89
_FP8_STEP = 32  # channels that a product of FP8 takes at least
# Few heads, H100, 4096 x 32768: 1297, 1338 and 1645 µs of 8, 16 and 32 heads where TileLang's kernel takes 2048, 2021 and 2134.
# As many stages as fit: of 16 heads 7 take 1338, 6 1377, 5 1655.
_FEW_HEADS = 32  # of 64 the output would not fit the registers of a group
_RING = Config.of("cuda", num_stages=7, turns=False, interleave=False, l2_prefetch=256, sweep=False, consumer_registers=168)
_RINGS = tuple(_RING.replace(num_stages=stages) for stages in (13, 11, 9, 8, 7, 6, 5))
_MASKS = 8  # of tiles in the ring; of narrow ones there are more
_NARROW = 256  # channels of value, with which a tile is one part of the ring
_TOKEN_BITS = 28  # of an entry of a union; a cache of as many tokens would have 300 GB
_UNITERS = 512  # threads that join the lists of neighbouring queries
_UNITED_EACH = (1, 2, 4)  # entries of a list that each of them keeps in registers; of longer lists none
_TABLE = 1 << 13  # words, of as many bits for tokens that they look at together
_NEAR_BYTES = 44 << 20  # of latents that an L2 of 50 MB keeps
_DEFAULTS = (
    _SPECIALISED,
    _WIDE,
    _WIDE.replace(block_n=32, num_stages=3),
    _WIDE.replace(block_h=32, block_n=32, num_stages=3),
)


class AttentionKernels(Kernels[AttentionSpec, AttentionSizes]):
    """See the module's first lines."""

    backends = ("cuda", "tilelang", "triton")
    budgeted = True

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        if backend == "cuda":
            return (
                Parameter(
                    "num_stages",
                    (2, 3, 4, 5, 6, 7, 8, 9, 11, 13),
                    "tiles of 64 tokens in flight, 2 one for each group that multiplies; with few heads, parts of them",
                ),
                Parameter("turns", (True, False), "whether the two groups that multiply take turns"),
                Parameter(
                    "interleave",
                    (False, True),
                    "whether the other group's values come between the scores of a tile's halves, not behind them",
                    before=False,
                ),
                Parameter(
                    "l2_prefetch",
                    (256, _LINE),
                    "bytes that the L2 brings at a time; of rows of 1152 that memory has, 256 bring a ninth more",
                    before=256,
                ),
                Parameter(
                    "sweep",
                    (False, True),
                    "whether lists are sorted first and all blocks go through the cache together, so that one read serves many",
                    before=False,
                ),
                Parameter(
                    "consumer_registers", (168, 216, 224, 232), "per thread that multiplies; one that gathers has the rest"
                ),
            )
        tile = (
            Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
            Parameter("block_n", (32, 64), "tokens gathered per step"),
        )
        if backend == "triton":
            stages = Parameter(
                "num_stages", (2, 3, 5, 7), "stages of the loop: a tile in flight takes two, for indices and rows"
            )
            return (*tile, stages, Parameter("num_warps", (4, 8), "warps per block"))
        stages = Parameter("num_stages", (2, 3, 4, 5, 6), "tiles in flight")
        pipeline = Parameter(
            "pipeline", ("specialised", "multistage"), "warp groups with roles of their own, or all threads doing everything"
        )
        return (*tile, stages, Parameter("threads", (128, 256, _SPECIALISED_THREADS), "threads per block"), pipeline)

    def constraints(self, spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend != "triton" and not (_wide(spec) or (config.backend == "cuda" and _narrow(spec))):
            reason = f"channels: {spec.d_qk} of {spec.d_v} are served by the Triton template, the others take 512 + 64 or 512"
            yield Violation("channels", 1.0, f"{reason}, up to {_FEW_HEADS} heads a value of 64, 128, 192 or 256")
            return
        if spec.math == "fp8" and (config.backend == "tilelang" or gpu.capability < _FP8_CAPABILITY):
            served = f"in CUDA C++ and Triton, from sm_{_FP8_CAPABILITY} on"
            reason = f"math: FP8 products are served {served}, not by {config.backend} on {gpu.name}"
            yield Violation("math", 1.0, reason)
            return
        if config.backend == "cuda":
            yield from _cuda_constraints(spec, config, gpu)
            return
        if config.backend == "triton":
            # The output's accumulator lies in registers; beyond 128 of 255 (block_h 64 on 4 warps) 1160 bytes spill.
            values = config["block_h"] * padded_to(spec.d_v) / (32 * config["num_warps"])
            yield from exceeds("accumulator registers", values, 128)
        else:
            yield from _tilelang_constraints(spec, config, gpu)
        # A block that serves no head at all would only cost time.
        yield from exceeds("padded heads", config["block_h"], max(64 if _specialised(config) else 16, 2 * spec.heads - 1))
        yield from exceeds("smem", _smem(spec, config, gpu), gpu.smem_per_block, " B")

    def order(self, spec: AttentionSpec, config: Config) -> str | None:
        """A query's list tile by tile, by blocks that have nothing else; a union of lists is in its neighbours' order, a sorted
        one in that of its round."""
        if config.backend == "cuda":  # tiles of 64 tokens, however many wait
            if config["sweep"]:
                return None
            design = _design(spec, config)
            if design == "pair":  # whose values are added first
                return "pair-interleaved" if config["interleave"] else "pair"
            return None if design == "few" and spec.share > 1 else design
        if _specialised(config):
            return "specialised"
        shape = ("block_h", "block_n", "num_warps" if config.backend == "triton" else "threads")
        return "-".join([config.backend, *(str(config[name]) for name in shape)])

    def guesses(self, spec: AttentionSpec, sizes: AttentionSizes, gpu: Gpu) -> Iterable[Config]:
        if spec.math == "fp8":
            few = (_FEW.replace(num_warps=8), _FEW.replace(block_n=32)) if spec.heads <= 16 else ()
            return (_FP8_PAIR, *few, *_DEFAULTS[2:], *_DEFAULTS)  # in Triton values widen: wider tiles spill
        if spec.heads <= _FEW_HEADS:
            registers = 216 if _columns(spec) > 16 and _wide(spec) else pair.REGISTERS
            rings = tuple(ring.replace(consumer_registers=registers) for ring in _RINGS)
            sorts = tuple(ring.replace(sweep=True) for ring in rings) if _sweeps(spec, sizes) else ()
            return (*sorts, *rings, _SPECIALISED, *((_FEW, _FEW.replace(block_n=32)) if spec.heads <= 16 else ()), *_DEFAULTS)
        clusters = (*_CLUSTERS, *_DEFAULTS) if spec.topk >= _CLUSTER_TOPK else (*_DEFAULTS, *_CLUSTERS)
        far = sizes.tokens >= sizes.EDGES["tokens"][-1] and spec.heads == pair.HEADS
        lines = far and spec.d_qk > D_V  # rows that are no multiple of 256 bytes
        pairs = _PAIR.replace(interleave=far and not spec.batch_invariant, l2_prefetch=_LINE if lines else 256)
        sorts = (_PAIR.replace(sweep=True),) if _sweeps(spec, sizes) else ()
        return (*sorts, pairs, *clusters) if spec.topk >= _PAIR_TOPK else (*clusters, pairs)

    def derived(self, spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
        if config.backend == "cuda":
            return _cuda_derived(spec, config)
        values: dict[str, Scalar] = {
            "d_tail": spec.d_qk - spec.d_v,
            "padded_v": padded_to(spec.d_v),
            "padded_tail": _padded_tail(spec),
            "head_blocks": _head_blocks(spec, config),
        }
        if spec.math == "fp8":
            values["top"] = fp8.TOP
        if config.backend == "tilelang":
            gatherers = 128 if _specialised(config) else config["threads"]
            values["rounds"] = config["block_n"] * 8 // gatherers
            values["q_rounds"] = -(-config["block_h"] * 8 // gatherers)
        return values

    def launches(self, spec: AttentionSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        q, kv = inputs["q"], inputs["kv"]
        if not len(q):
            return ()
        if not len(kv):
            outputs["out"].zero_()
            for name in outputs.keys() - {"out"}:
                outputs[name].fill_(-math.inf)
            return ()
        optional = [inputs[name] for name in ("lengths", "sink") if inputs[name] is not None]
        scales = [inputs[name] for name in ("q_scale", "kv_scale") if spec.math == "fp8"]
        tensors = (q, kv, *scales, inputs["indices"], *optional, *outputs.values())
        if config.backend == "cuda" and _design(spec, config) in staying.LAUNCHES:
            return staying.LAUNCHES[_design(spec, config)](spec, config, inputs, outputs, gpu)
        indices, sm_scale = inputs["indices"], inputs["sm_scale"]
        if config.backend == "cuda":
            scalars = (len(q), len(kv), spec.topk, step(q, 0), step(q, 1), step(kv, 0), step(indices, 0), sm_scale)
            blocks = 2 * min(len(q), max(gpu.sms // 2, 1))  # clusters take one query after another
            if _design(spec, config) == "fp8":  # 64 heads of a query after another
                blocks = min(len(q) * spec.heads // pair.HEADS, gpu.sms)
            return (Launch("attention", (blocks, 1, 1), (*tensors, *scalars)),)
        grid = (len(q) * _head_blocks(spec, config), 1, 1)
        if config.backend == "tilelang":  # reads sizes and strides from the tensors
            return (Launch("attention", grid, (*tensors, sm_scale)),)
        strides = (pieces(q, 0), pieces(q, 1), pieces(kv, 0), step(indices, 0))
        return (Launch("attention", grid, (*tensors, len(kv), spec.topk, *strides, sm_scale)),)


def _head_blocks(spec: AttentionSpec, config: Config) -> int:
    return -(-spec.heads // int(config["block_h"]))


def _padded_tail(spec: AttentionSpec) -> int:
    tail = padded_to(spec.d_qk - spec.d_v)
    return max(tail, _FP8_STEP) if tail and spec.math == "fp8" else tail


def _specialised(config: Config) -> bool:
    return config.backend == "tilelang" and config["pipeline"] == "specialised"


def _cuda_constraints(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the CUDA template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    design = {"few": _few_constraints, "pair": _pair_constraints, "cluster": _cluster_constraints, "fp8": _fp8_constraints}
    yield from design[_design(spec, config)](spec, config)
    yield from exceeds("smem", _cuda_smem(spec, config), gpu.smem_per_block, " B")


def _design(spec: AttentionSpec, config: Config) -> str:
    """Which of the CUDA template's designs a config asks for."""
    if spec.math == "fp8":
        return "fp8"
    if spec.heads <= _FEW_HEADS:
        return "few"
    return "pair" if config["num_stages"] == _PAIR["num_stages"] else "cluster"


def _without(config: Config, *names: str) -> Iterable[Violation]:
    for name in names:
        if config[name] != _PAIR[name]:
            yield Violation(name, 1.0, f"{name}: this design has no choice")


def _few_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    yield from _without(config, "turns", "interleave", "l2_prefetch")
    if sharing(spec.heads, spec.share) > 1:
        yield from _without(config, "sweep")
    yield from _sweep_constraints(spec, config)
    # One more than a tile has parts. Else a group that waits for its next tile passes while the other's before it has not come
    # yet: the phase before the awaited one looks like it. 3 parts in 3 stages lost the context on an H200, 4 and 6 are right.
    yield from exceeds("stages of a tile", _chunks(spec) + 1, config["num_stages"])
    yield from exceeds("accumulator registers", _columns(spec) * spec.d_v / 128 + 88, config["consumer_registers"])


def _pair_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    yield from _without(config, "turns")
    yield from _sweep_constraints(spec, config)
    if spec.heads % pair.HEADS:
        yield Violation("heads", 1.0, f"heads: a block takes {pair.HEADS}, of which {spec.heads} are no multiple")
    yield from exceeds("accumulator registers", 216, config["consumer_registers"])


def _fp8_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    yield from _without(config, "interleave", "l2_prefetch", "sweep")
    yield from _pair_constraints(spec, config)
    if config["num_stages"] != _FP8_PAIR["num_stages"]:
        yield Violation("num_stages", 1.0, f"num_stages: places of tiles are built for {_FP8_PAIR['num_stages']}")


def _cluster_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    yield from _without(config, "interleave", "l2_prefetch", "sweep")
    if spec.heads != _CLUSTER_HEADS:
        excess = _CLUSTER_HEADS / spec.heads - 1
        yield Violation("heads", excess, f"heads: a cluster takes {_CLUSTER_HEADS} of one query, not {spec.heads}")
    if spec.max_logits:
        yield Violation("max_logits", 1.0, "max_logits: a cluster keeps powers of two that may lag behind the maxima")
    yield from exceeds("accumulator registers", 216, config["consumer_registers"])


def _cuda_smem(spec: AttentionSpec, config: Config) -> int:
    """Bytes of shared memory per block, as the templates lay it out."""
    barrier = 8
    if _design(spec, config) == "pair":
        return pair.smem(spec.d_qk, spec.max_logits)
    if _design(spec, config) == "fp8":  # tiles, their scales and masks; q; of four tiles weights and changes; facts of heads
        of_tiles = config["num_stages"] * (64 * (spec.d_qk + 12) + 8 + 2 * barrier)
        return of_tiles + 64 * spec.d_qk + 4 * (64 * 64 + 256 + 16 + barrier) + 6 * 256 + 4 * barrier
    if spec.heads > _FEW_HEADS:  # of a cluster: half of the channels of tiles and of q, mail, masks, barriers
        tile, mailbox = 64 * spec.d_qk, 2048 + 1024 + 128
        tiles = config["num_stages"] * (tile + 8 + 2 * barrier)
        return tiles + 2 * tile + 2 * barrier + 8 * (mailbox + 2 * barrier)
    columns, width = _columns(spec), 64 * _pieces(spec)
    chunk = 128 * width // _chunks(spec)
    q, weights, facts = columns * width * 2, columns * 128, columns * 16
    return (
        config["num_stages"] * (chunk + 2 * barrier)
        + 2 * (q + weights + facts + 2 * barrier)
        + 8 * _masks(spec) * sharing(spec.heads, spec.share)
    )


def _masks(spec: AttentionSpec) -> int:
    return _MASKS if _wide(spec) else 2 * _MASKS


def _pieces(spec: AttentionSpec) -> int:
    """Pieces of 64 channels, of which the last may have fewer."""
    return -(-spec.d_qk // 64)


def _columns(spec: AttentionSpec) -> int:
    """Columns of the products of few heads: those of a query, padded, for all queries that share."""
    return sharing(spec.heads, spec.share) * next(columns for columns in (8, 16, _FEW_HEADS) if columns >= spec.heads)


def _wide(spec: AttentionSpec) -> bool:
    """Whether channels are those that all designs take."""
    return spec.d_v == D_V and spec.d_qk in (D_V, D_V + 64)


def _narrow(spec: AttentionSpec) -> bool:
    """Whether few heads' channels fit a tile that comes as a whole."""
    return spec.heads <= _FEW_HEADS and spec.d_v % 64 == 0 and spec.d_v <= _NARROW


def _chunks(spec: AttentionSpec) -> int:
    """Parts of a tile of few heads: 3 of 192 channels, or 4 of 128; of narrow ones the whole."""
    if not _wide(spec):
        return 1
    return 3 if spec.d_qk > D_V else 4


def _cuda_derived(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    design = _design(spec, config)
    if design == "pair":
        options = {"max_logits": spec.max_logits, "divides": staying.divides(spec), "lines": config["l2_prefetch"] == _LINE}
        block = pair.derived(spec.d_qk, config["consumer_registers"], **options)
        return {"design": design, **block, **_sweep(spec, config)}
    values: dict[str, Scalar] = {
        "threads": pair.THREADS,
        "producer_registers": pair.gatherers_registers(config["consumer_registers"]),
        "smem": _cuda_smem(spec, config),
    }
    if design == "fp8":
        return {**values, "design": design}
    if spec.heads > _FEW_HEADS:
        return {**values, "design": "cluster", "half": D_V // 2, "half_tail": (spec.d_qk - D_V) // 2}
    share, chunks = sharing(spec.heads, spec.share), _chunks(spec)
    few = {
        **_sweep(spec, config),
        "share": share,
        "ragged": spec.lengths or share > 1,
        "token_bits": _TOKEN_BITS,
        "uniters": _UNITERS,
        "table": _TABLE,
        "united_each": next((each for each in _UNITED_EACH if spec.topk <= each * _UNITERS), 0),
        "near_tokens": _NEAR_BYTES // (2 * spec.d_qk),
        "columns": _columns(spec),
        "chunks": chunks,
        "chunk_pieces": _pieces(spec) // chunks,
        "masks": _masks(spec),
        "narrow": not _wide(spec),
        "registers": pair.REGISTERS,
    }
    return {**values, "design": "few", **few}


def _sweeps(spec: AttentionSpec, sizes: AttentionSizes) -> bool:
    """Whether lists are sorted by default, which takes an order that nothing else decides."""
    if spec.batch_invariant or not _SWEPT_TOPK <= spec.topk <= _SORTED_EACH[-1] * _SORTERS:
        return False
    near, far, _ = sizes.EDGES["tokens"]
    if spec.heads <= _FEW_HEADS:
        return _wide(spec) and sharing(spec.heads, spec.share) == 1 and sizes.tokens >= far
    return sizes.tokens >= (near if sizes.queries >= sizes.EDGES["queries"][0] else far)


def _sweep(spec: AttentionSpec, config: Config) -> dict[str, Scalar]:
    each = next((each for each in _SORTED_EACH if spec.topk <= each * _SORTERS), _SORTED_EACH[-1])
    return {"sweep": config["sweep"], "sorters": _SORTERS, "sorted_each": each, "patience": _PATIENCE, "lag": _LAG}


def _sweep_constraints(spec: AttentionSpec, config: Config) -> Iterable[Violation]:
    if config["sweep"]:
        yield from exceeds("entries of a sorted list", spec.topk, _SORTED_EACH[-1] * _SORTERS)


def _tilelang_constraints(spec: AttentionSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    if gpu.capability != 90:
        yield Violation("capability", 1.0, f"capability: the TileLang template is Hopper's, {gpu.name} is sm_{gpu.capability}")
    threads = config["threads"]
    if _specialised(config):
        wanted = {"block_h": 64, "block_n": 64, "num_stages": 2, "threads": _SPECIALISED_THREADS}
        for name, value in wanted.items():
            if config[name] != value:
                yield Violation(name, abs(config[name] / value - 1), f"{name}: the specialised pipeline is built for {value}")
        return
    yield from exceeds("threads", threads, 256)
    yield from exceeds("accumulator registers", config["block_h"] * D_V / threads, 128)
    if config["block_h"] < 64:  # mma.sync: each warp takes a share of the columns, at least 8
        yield from exceeds("columns per warp", 8, config["block_n"] * 32 / threads)


def _smem(spec: AttentionSpec, config: Config, gpu: Gpu) -> int:
    """Bytes of shared memory per block, as the compilers report them, and up to 4 KB more."""
    block_h, block_n, stages = config["block_h"], config["block_n"], config["num_stages"]
    width = padded(spec.d_qk, spec.d_v)
    q, tile, weights = 2 * block_h * width, 2 * block_n * width, 2 * block_h * block_n
    small = 4096
    if config.backend == "tilelang":
        if _specialised(config):  # the weights take the tails' place, which is there without a tail too
            return q + 2 * (2 * block_n * D_V + weights) + small
        return q + stages * tile + weights + small
    if block_h < 64 or gpu.capability < 90 or gpu.capability >= 120:  # mma.sync: operands wait in registers
        # The one tile of a short list is in no loop, and is copied between its two products: up to as much again.
        tiles = 2 if spec.topk <= block_n else max(1, (stages - 1) // 2)
        return q + tiles * tile + weights + small
    # Half of the stages fetch indices. Datacentre Blackwell keeps a copy of q and of the weights besides.
    return q + max(2, (stages + 1) // 2) * tile + small + (64 * 1024 if gpu.capability >= 100 else 0)
