"""The model that ranks without a GPU: occupancy by the book, waves, spills, and launches planned for every operation."""

from __future__ import annotations

import math

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import NoConfig
from dsa_codegen.gpu import GPUS
from dsa_codegen.kernels.backends import Resources
from dsa_codegen.problem.op import Launch
from dsa_codegen.problem.presets import preset
from dsa_codegen.tune.model import blocks_per_sm, modelled_us, plan, stretch

from support import H200, of_preset
from toy import OP
from tune_support import CASE, DEFAULT, SPEC, config

USAGE = Resources(registers=228, spills=0, smem=59 * 1024, threads=128)


@pytest.mark.parametrize(
    ("usage", "blocks"),
    [
        (Resources(32, 0, 0, 128), 16),  # threads: 2048 / 128
        (Resources(255, 0, 0, 256), 1),  # registers: 8 warps of 8192 fill the file
        (Resources(128, 0, 0, 128), 4),
        (Resources(228, 0, 59 * 1024, 128), 2),
        (Resources(32, 0, 100 * 1024, 128), 2),  # shared memory with its kilobyte of the system
        (Resources(32, 0, 227 * 1024, 128), 1),
        (Resources(32, 0, 228 * 1024, 128), 0),
        (Resources(16, 0, 0, 32), 32),  # slots
    ],
)
def test_occupancy_of_hopper(usage, blocks):
    assert blocks_per_sm(usage, H200) == blocks


def test_a_last_wave_of_one_block_costs_a_wave():
    full = stretch(Launch("k", (2 * H200.sms, 1, 1), ()), USAGE, H200, 3)
    more = stretch(Launch("k", (2 * H200.sms + 1, 1, 1), ()), USAGE, H200, 3)
    assert more > 1.3 * full


def test_too_few_blocks_leave_sms_idle():
    few = stretch(Launch("k", (8, 1, 1), ()), USAGE, H200, 3)
    many = stretch(Launch("k", (64 * H200.sms, 1, 1), ()), USAGE, H200, 3)
    assert few > 10 * many


def test_spills_cost():
    spilling = Resources(228, 64, 59 * 1024, 128)
    launch = Launch("k", (2 * H200.sms, 1, 1), ())
    assert stretch(launch, spilling, H200, 3) == pytest.approx(2 * stretch(launch, USAGE, H200, 3))


def test_what_does_not_fit_takes_for_ever():
    assert modelled_us(OP, SPEC, DEFAULT, CASE, H200, {"indexer": Resources(32, 0, 300 * 1024, 128)}) == math.inf


def test_never_below_the_roofline():
    assert modelled_us(OP, SPEC, DEFAULT, CASE, H200, {"indexer": USAGE}) > OP.cost(SPEC, CASE).limit_us(H200)


def test_launch_parameters_count():
    times = {splits: modelled_us(OP, SPEC, config(splits=splits), CASE, H200, {"indexer": USAGE}) for splits in (1, 8)}
    assert times[1] != times[8]


@pytest.mark.parametrize("name", ops.all_ops())
@pytest.mark.parametrize("model", ["deepseek-v3.2", "deepseek-v4-pro", "minimax-m3", "tiny"])
def test_every_operation_can_be_planned_without_memory(name, model):
    op = ops.get(name)
    for spec in op.specs(preset(model)) or of_preset(op):
        for case in op.workloads(spec):
            for gpu in (H200, GPUS["rtx5090"]):
                try:
                    config = op.default_config(spec, case.sizes, gpu)
                except NoConfig:
                    continue
                launches = plan(op, spec, config, case, gpu)
                assert launches
                assert all(min(launch.grid) >= 1 for launch in launches)
