"""Specs of token selection, and a config of each design."""

from __future__ import annotations

from dsa_codegen.ops.select import SelectSpec
from dsa_codegen.problem.op import Config

PLAIN = SelectSpec(64)
SLOTS = SelectSpec(77, scores="bf16", starts=False, output="slots", page=48, keep_first=3, keep_recent=17)
ROW = Config.of("triton", scheme="row", capacity=256, block_n=128, sample=256, num_warps=4, splits=1)
SPLIT = ROW.replace(scheme="split", splits=4)
NEAR, FAR = 131072, 1048576
CUDA = Config.of(
    "cuda",
    cluster=1,
    threads=512,
    items=16,
    blocks_per_sm=1,
    digit_bits=12,
    early=True,
    persistent=False,
    stages=0,
    ring=0,
    longest=NEAR,
)
STREAMED = CUDA.replace(items=8, digit_bits=11, early=False, stages=2)
