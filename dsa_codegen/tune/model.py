"""Model: microseconds of a compiled candidate on a GPU that is not here, from its resources and the grid it would launch.

Roofline time of what the config really does, stretched by three things that compilers and launches tell: SMs that idle in the
last wave, too few warps in flight to hide latency, and registers spilled to memory. Good for ranking, not for promises:
records that come of it say "modelled".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..gpu import Gpu
from ..kernels.backends import Resources
from ..problem.draw import Draw
from ..problem.op import Case, Config, Launch, Op
from ..problem.values import Spec

VERSION = 1
"""Part of a modelled study's identity: times of another model do not compare."""
LAUNCH_US = (1.0, 1.1)
"""The first launch of a graph and each further one, as measured on an H200."""
PEAK = 0.7  # the share of the roofs that good kernels reach
_HALF_WARPS = 3.0  # warps in flight per SM at which half of the peak is reached
_L2_SPEED = 2.0  # of DRAM's bandwidth; a gather on an H200 read 8.4 TB/s from L2
_SPILL_BYTES = 64.0  # spilled bytes per thread that double the time
_RESERVED_SMEM = 1024  # shared memory that the system takes of every block since sm_80
_REGISTER_UNIT = 256  # registers are handed out to warps in such units


def blocks_per_sm(usage: Resources, gpu: Gpu) -> int:
    """Resident blocks per SM that registers, shared memory, threads and slots allow; 0 where the kernel cannot run."""
    warps = -(-usage.threads // 32)
    per_warp = -(-max(usage.registers, 1) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    if usage.smem > gpu.smem_per_block:
        return 0
    return min(
        gpu.regs_per_sm // (per_warp * warps),
        gpu.smem_per_sm // (usage.smem + _RESERVED_SMEM),
        gpu.threads_per_sm // (warps * 32),
        gpu.blocks_per_sm,
    )


def plan(op: Op, spec: Spec, config: Config, case: Case, gpu: Gpu) -> Sequence[Launch]:
    """The launches of a case, planned on the "meta" device: shapes and grids without memory."""
    inputs = op.inputs(spec, case, Draw(0, "meta"))
    return op.launches(spec, config, inputs, op.allocate(spec, inputs), gpu)


def modelled_us(op: Op, spec: Spec, config: Config, case: Case, gpu: Gpu, usage: Mapping[str, Resources]) -> float:
    """Microseconds of one call; infinite where a kernel does not fit the GPU."""
    launches = plan(op, spec, config, case, gpu)
    if not launches:
        return 0.0
    work_us = _work_us(op, spec, config, case, gpu) / PEAK
    touched = [max(_touched(launch), 1) for launch in launches]
    kernels_us = sum(
        stretch(launch, usage[launch.kernel], gpu, _stages(config)) * work_us * share / sum(touched)
        for launch, share in zip(launches, touched, strict=True)
    )
    return LAUNCH_US[0] + LAUNCH_US[1] * (len(launches) - 1) + kernels_us


def _work_us(op: Op, spec: Spec, config: Config, case: Case, gpu: Gpu) -> float:
    """Roofline of what the config does; what it moves beyond the least comes from L2."""
    least, work = op.cost(spec, case), op.work(spec, config, case)
    arithmetic = replace(work, bytes=0.0).limit_us(gpu)
    return max(arithmetic, replace(least, flops=0.0).limit_us(gpu), replace(work, flops=0.0).limit_us(gpu) / _L2_SPEED)


def stretch(launch: Launch, usage: Resources, gpu: Gpu, stages: int) -> float:
    """How much longer a launch takes than the same work spread evenly over all SMs at full throughput."""
    blocks, resident = math.prod(launch.grid), blocks_per_sm(usage, gpu)
    if resident == 0:
        return math.inf
    full_waves, rest = divmod(blocks, resident * gpu.sms)
    time = full_waves * resident / _throughput(resident * usage.threads / 32, stages)
    if rest:
        deepest = -(-rest // gpu.sms)
        time += deepest / _throughput(deepest * usage.threads / 32, stages)
    return time * gpu.sms / blocks * (1 + usage.spills / _SPILL_BYTES)


def _throughput(warps: float, stages: int) -> float:
    """Share of an SM's peak that so many warps reach; tiles in flight hide latency as further warps would."""
    in_flight = warps * math.sqrt(max(stages, 1))
    return in_flight / (in_flight + _HALF_WARPS)


def _stages(config: Config) -> int:
    stages = config.to_dict().get("num_stages", 1)
    return stages if isinstance(stages, int) else 1


def _touched(launch: Launch) -> int:
    """Bytes of the tensors a launch is given, or that it says: its share of the operation's work, where there are several."""
    if launch.touched is not None:
        return launch.touched
    return sum(arg.numel() * arg.element_size() for arg in launch.args if isinstance(arg, Tensor))
