"""Anatomy: instructions by kind and by depth of loops, read off a listing, and off what compilers make."""

from __future__ import annotations

import pytest

from dsa_codegen import ops
from dsa_codegen.kernels import anatomy
from dsa_codegen.kernels.render import render
from dsa_codegen.problem.presets import preset

from support import H200

LISTING = """
//--------------------- .text.scale                --------------------------
        .section        .text.scale,"ax",@progbits
.text.scale:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDS R3, [R2] ;
.L_x_2:
        /*0030*/                   FFMA R4, R4, R5, R6 ;
        /*0040*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   STS [R2], R4 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5], R6 ;
        /*0090*/              @!P0 BRA `(.L_x_3) ;
        /*00a0*/                   STG.E [R2], R4 ;
        /*00b0*/               @P3 BRA `(.L_x_4) ;
        /*00c0*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_4:
        /*00d0*/                   EXIT ;
        /*00e0*/                   NOP ;
.L_x_5:
//--------------------- .nv.shared.reserved.0      --------------------------
"""


def test_kinds_and_depths():
    ((name, kernel),) = anatomy.read(LISTING).items()
    assert name == "scale"
    assert kernel.loops == 2, "the third one only waits, the last branch goes forwards"
    outside = {"integer": 2, "load": 1, "barrier": 1, "store": 1, "branch": 3}
    assert kernel.counts == (outside, {"shared": 2, "branch": 1}, {"float": 1, "mma": 1, "branch": 1}, {})
    assert (kernel.at("mma", 2), kernel.at("mma", 1), kernel.total("branch"), kernel.at("mma", 9)) == (1, 0, 5, 0)


@pytest.mark.parametrize(("name", "backend", "busiest"), [("select", "cuda", "shared"), ("indexer", "triton", "mma")])
def test_what_compilers_make(name, backend, busiest):
    op = ops.get(name)
    spec = op.specs(preset("tiny"))[0]
    config = op.default_config(spec, op.workloads(spec)[0].sizes, H200, backend)
    built = anatomy.dissected(render(op, spec, config), H200)
    assert built.anatomies.keys() == built.resources.keys()
    for kernel in built.anatomies.values():
        assert kernel.total(busiest) > 0
        assert kernel.total("local") == 0
        assert sum(map(sum, (each.values() for each in kernel.counts))) > 100
