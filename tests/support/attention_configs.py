"""A config of each design of sparse prefill attention."""

from __future__ import annotations

from dsa_codegen.problem.op import Config

TRITON = Config.of("triton", block_h=16, block_n=32, num_stages=3, num_warps=4)
MULTISTAGE = Config.of("tilelang", pipeline="multistage", block_h=16, block_n=32, num_stages=2, threads=128)
SPECIALISED = Config.of("tilelang", pipeline="specialised", block_h=64, block_n=64, num_stages=2, threads=384)
CLUSTER = Config.of(
    "cuda", num_stages=3, turns=True, interleave=False, l2_prefetch=256, sweep=False, value_tokens=64, consumer_registers=224
)
PAIR = Config.of(
    "cuda", num_stages=2, turns=False, interleave=False, l2_prefetch=256, sweep=False, value_tokens=16, consumer_registers=216
)
RING = Config.of(
    "cuda", num_stages=7, turns=False, interleave=False, l2_prefetch=256, sweep=False, value_tokens=64, consumer_registers=168
)
