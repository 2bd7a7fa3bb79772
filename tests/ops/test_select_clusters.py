"""Token selection by clusters of blocks in CUDA C++, on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsa_codegen.kernels.render import render
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.ops.select import OP, SelectSizes
from dsa_codegen.problem.op import Case
from dsa_codegen.proof.verify import verify

import emulator
from select_configs import CUDA, PLAIN, SLOTS
from support import H200

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on x86-64")
WIDE = replace(SLOTS, scores="fp32", topk=300)
KINDS = ("normal", "few", "relu", "ragged_special", "up", "narrow")


def emulated(spec, config, folder, order, change=("", "")):
    """A variant whose text has a part exchanged."""
    assert not OP.violations(spec, config, H200)
    rendered = render(OP, spec, config)
    assert change[0] in rendered.code
    rendered = replace(rendered, code=rendered.code.replace(*change))
    return Variant(OP, spec, config, H200, emulator.cuda_kernels(rendered, folder, order))


def failures(variant):
    """Of the usual cases, and of rows that every block has a part of."""
    long = [Case(SelectSizes(2, 20 * variant.spec.topk), kind) for kind in KINDS]
    cases = [OP.within_reach(variant.spec, variant.config, case) for case in [*OP.cases(variant.spec), *long]]
    return [case.id for case in cases if not verify(variant, case, "cpu", repeats=2).passed]


@pytest.mark.parametrize(
    ("spec", "changes", "order"),
    [
        (PLAIN, {"cluster": 2}, "ascending"),
        (SLOTS, {"digit_bits": 11, "items": 8}, "descending"),
        (WIDE, {"cluster": 8, "early": False}, "shuffled"),
    ],
    ids=["tokens", "slots", "many"],
)
def test_a_cluster_matches_the_reference(spec, changes, order, tmp_path):
    config = CUDA.replace(**{"cluster": 4, "threads": 256, "items": 4, **changes})
    assert not failures(emulated(spec, config, tmp_path, order))


MISTAKES = {"chosen": ("base += s.before_above;", ""), "ties": ("equal_base += s.before_equal;", "")}


@pytest.mark.parametrize("change", MISTAKES.values(), ids=MISTAKES)
def test_what_other_blocks_choose_counts(change, tmp_path):
    """A block's tokens lie behind those of the blocks before it: the emulation tells them apart."""
    config = CUDA.replace(cluster=4, threads=256, items=4)
    assert failures(emulated(PLAIN, config, tmp_path, "shuffled", change))
