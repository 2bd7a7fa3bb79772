"""The GPUs that kernels are generated for: their limits, their roofs, and the names people give them."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from typing import Any

from .errors import NoGpu, SpecError, UnknownName


@dataclass(frozen=True)
class Gpu:
    """Limits and roofs of one GPU.

    Sizes are bytes, rates TFLOP/s (dense) and TB/s; ``clock_ghz`` is the sustained SM clock under tensor load.
    The roofs are datasheet figures: good for ranking and percentages, not a promise.
    """

    id: str
    name: str
    capability: int
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2: int
    clock_ghz: float
    bandwidth: float
    bf16: float
    fp8: float
    fp32: float
    regs_per_sm: int = 65536
    regs_per_thread: int = 255
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32

    @property
    def arch(self) -> str:
        """The target that nvcc and ptxas are given; Hopper and later need the ``a`` form for their own instructions."""
        return f"sm_{self.capability}{'a' if self.capability >= 90 else ''}"

    def rate(self, unit: str) -> float:
        """Dense TFLOP/s of the unit ("fp8", "bf16" or "fp32") that an operation's arithmetic runs on."""
        rates = {"fp8": self.fp8 or self.bf16, "bf16": self.bf16, "fp32": self.fp32}
        if unit not in rates:
            raise UnknownName("arithmetic unit", unit, rates)
        return rates[unit]


KIB = 1024
MIB = 1024 * 1024

GPUS: dict[str, Gpu] = {
    gpu.id: gpu
    for gpu in (
        Gpu("a100", "NVIDIA A100", 80, 108, 163 * KIB, 164 * KIB, 40 * MIB, 1.30, 2.0, 312, 0, 19.5),
        Gpu(
            "l40s",
            "NVIDIA L40S",
            89,
            142,
            99 * KIB,
            100 * KIB,
            96 * MIB,
            2.20,
            0.86,
            362,
            733,
            91.6,
            threads_per_sm=1536,
            blocks_per_sm=24,
        ),
        Gpu(
            "rtx4090",
            "NVIDIA GeForce RTX 4090",
            89,
            128,
            99 * KIB,
            100 * KIB,
            72 * MIB,
            2.50,
            1.01,
            165,
            330,
            82.6,
            threads_per_sm=1536,
            blocks_per_sm=24,
        ),
        Gpu("h100", "NVIDIA H100", 90, 132, 227 * KIB, 228 * KIB, 50 * MIB, 1.60, 3.35, 989, 1979, 66.9),
        Gpu("h200", "NVIDIA H200", 90, 132, 227 * KIB, 228 * KIB, 60 * MIB, 1.60, 4.8, 989, 1979, 66.9),
        Gpu("h20", "NVIDIA H20", 90, 78, 227 * KIB, 228 * KIB, 60 * MIB, 1.70, 4.0, 148, 296, 44.0),
        Gpu("b200", "NVIDIA B200", 100, 148, 227 * KIB, 228 * KIB, 126 * MIB, 1.70, 8.0, 2250, 4500, 75.0),
        Gpu(
            "rtx5090",
            "NVIDIA GeForce RTX 5090",
            120,
            170,
            99 * KIB,
            100 * KIB,
            96 * MIB,
            2.40,
            1.79,
            210,
            419,
            105.0,
            threads_per_sm=1536,
            blocks_per_sm=24,
        ),
    )
}


def resolve(name: str) -> Gpu:
    """The GPU that ``name`` means: an id ("h100"), a marketing name, or "auto" for the visible one.

    Raises:
        UnknownName: no GPU of the table is meant; the message lists them.
        NoGpu: "auto" was asked for and there is no CUDA device.
    """
    if name.lower() == "auto":
        found = detect()
        if found is None:
            raise NoGpu("--gpu auto")
        return found
    gpu = _match(name)
    if gpu is None:
        raise UnknownName("GPU", name, GPUS)
    return gpu


def detect(device: int | None = None) -> Gpu | None:
    """What a CUDA device is, by default the current one; None where there is none, or one older than all that are listed.

    ``DSA_GPU`` names it where its own name is not recognised.

    Raises:
        UnknownName: ``DSA_GPU`` names no GPU.
        SpecError: ``DSA_GPU`` names a GPU of another architecture, whose kernels this device could not run.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return _detect(torch.cuda.current_device() if device is None else device, os.environ.get("DSA_GPU"))


@functools.cache
def _detect(device: int, override: str | None) -> Gpu | None:
    import torch

    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    known = resolve(override) if override else _match(properties.name)
    if known is not None and known.capability == capability:
        return known
    if override:
        raise SpecError("DSA_GPU", override, f"a GPU of sm_{capability}, which {properties.name} (cuda:{device}) is, or unset")
    return _unlisted(properties, capability)


def _match(name: str) -> Gpu | None:
    """The GPU whose id is a word of a marketing name: "NVIDIA H100 80GB HBM3", "H100-SXM"; "GH200" is none of them."""
    joined = re.sub(r"(?<=[a-z])[^a-z0-9]+(?=\d)", "", name.lower())  # "RTX 4090" is one word, "H100 80GB" two
    for gpu_id, gpu in GPUS.items():
        if re.search(rf"(?<![a-z0-9]){gpu_id}(?!\d)", joined):
            return gpu
    return None


def _unlisted(properties: Any, capability: int) -> Gpu | None:
    """A GPU outside the table: its own limits as the driver tells them, roofs of the nearest older listed one."""
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    if not older:
        return None
    model = max(older, key=lambda gpu: gpu.capability)
    sms = properties.multi_processor_count
    scale = sms / model.sms
    slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return Gpu(
        slug,
        properties.name,
        capability,
        sms,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.L2_cache_size,
        model.clock_ghz,
        model.bandwidth,
        model.bf16 * scale,
        model.fp8 * scale,
        model.fp32 * scale,
        threads_per_sm=properties.max_threads_per_multi_processor,
        blocks_per_sm=model.blocks_per_sm,
    )
