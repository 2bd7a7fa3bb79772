"""Designs of paged attention in CUDA C++: the config from which theirs differ, and a check of their kernels."""

from __future__ import annotations

from pathlib import Path

from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops import get
from dsa_codegen.ops.attention_paged import AttentionPagedSizes, AttentionPagedSpec
from dsa_codegen.problem.op import Case, Config
from dsa_codegen.proof.verify import verify

import emulator
from support import H200

CLUSTERS = Config.of(
    "cuda",
    splits=0,
    sharers=0,
    columns=0,
    placers=0,
    head_rounds=0,
    tile_tokens=128,
    flat=False,
    interleave=False,
    sweep=False,
)
CASES = ((1, 2, 300), "random"), ((1, 1, 40), "ragged")
"""Shares of several tiles, of one, of none; rows without a token."""


def assert_emulated(
    spec: AttentionPagedSpec, config: Config, folder: Path, cases: tuple[tuple, ...] = CASES, gpu: Gpu = H200
) -> None:
    """All kernels of the config, threads in a shuffled order, against the reference."""
    op = get("attention_paged")
    kernels = emulator.cuda_kernels(render(op, spec, config), folder, "shuffled")
    variant = Variant(op, spec, config, gpu, kernels)
    for sizes, distribution in cases:
        accuracy = verify(variant, Case(AttentionPagedSizes(*sizes), distribution), "cpu", repeats=1)
        assert accuracy.passed, (sizes, accuracy.detail)
