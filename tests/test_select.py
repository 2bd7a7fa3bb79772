"""Token selection: its kernels against a stable sort, what it refuses, what it compiles to."""

from __future__ import annotations

import pytest
import torch
from support import H200, assert_compiles, assert_matches_reference

from dsa_codegen import ops
from dsa_codegen.draw import Draw
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.op import Case, Config
from dsa_codegen.ops.select import OP, SelectSizes, SelectSpec

PLAIN = SelectSpec(64)
SLOTS = SelectSpec(77, scores="bf16", starts=False, output="slots", page=48, keep_first=3, keep_recent=17)
ROW = Config.of("triton", scheme="row", capacity=256, block_n=128, sample=256, num_warps=4, splits=1)
SPLIT = ROW.replace(scheme="split", splits=4)


@pytest.mark.parametrize("case", OP.cases(PLAIN), ids=lambda case: case.id)
def test_row_matches_the_reference(interpreter, case):
    assert_matches_reference(interpreter, OP, PLAIN, ROW, case)


@pytest.mark.parametrize("case", OP.cases(SLOTS)[::2], ids=lambda case: case.id)
def test_split_matches_the_reference(interpreter, case):
    assert_matches_reference(interpreter, OP, SLOTS, SPLIT, case)
