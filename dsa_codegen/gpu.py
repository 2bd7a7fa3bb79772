"""The GPUs that kernels are generated for: their limits, their roofs, and the names people give them."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, replace
from typing import Any

from .errors import DsaError, NoGpu, SpecError, UnknownName


@dataclass(frozen=True)
class Gpu:
    """Limits and roofs of one GPU.

    Sizes are bytes, rates TFLOP/s (dense) and TB/s. The roofs are datasheet figures: good for ranking and percentages, not a
    promise. What ``detect`` finds has the limits that its driver tells, and an id of its own where they are not those of a
    listed GPU: a slice of it, or another board.
    """

    id: str
    name: str
    capability: int
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2: int
    bandwidth: float
    bf16: float
    fp8: float
    fp32: float
    regs_per_sm: int = 65536
    regs_per_thread: int = 255
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32
    memory: int = 0
    """Of the whole board; with the number of SMs it tells boards of one family apart."""

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
MIB = 1024 * KIB
GIB = 1024 * MIB

# fmt: off
_LISTED = (  # shared memory of a block in KiB, L2 in MiB, dense TFLOP/s by type, memory of the board in GiB
    # id,         name,                      sm_, SMs, KiB, MiB, TB/s, bf16,  fp8,  fp32, GiB
    ("a100",      "NVIDIA A100",              80, 108, 163,  40,  2.0,  312,    0,  19.5,  80),
    ("l40s",      "NVIDIA L40S",              89, 142,  99,  96, 0.86,  362,  733,  91.6,  45),
    ("rtx4090",   "NVIDIA GeForce RTX 4090",  89, 128,  99,  72, 1.01,  165,  330,  82.6,  24),
    ("h100",      "NVIDIA H100",              90, 132, 227,  50, 3.35,  989, 1979,  66.9,  80),
    ("h100-nvl",  "NVIDIA H100 NVL",          90, 132, 227,  50,  3.9,  835, 1671,  60.0,  94),
    ("h100-pcie", "NVIDIA H100 PCIe",         90, 114, 227,  50,  2.0,  756, 1513,  51.0,  80),
    ("gh200",     "NVIDIA GH200",             90, 132, 227,  50,  4.0,  989, 1979,  66.9,  96),
    ("h200",      "NVIDIA H200",              90, 132, 227,  60,  4.8,  989, 1979,  66.9, 140),
    ("h20",       "NVIDIA H20",               90,  78, 227,  60,  4.0,  148,  296,  44.0,  96),
    ("b200",      "NVIDIA B200",             100, 148, 227, 126,  8.0, 2250, 4500,  75.0, 180),
    ("rtx5090",   "NVIDIA GeForce RTX 5090", 120, 170,  99,  96, 1.79,  210,  419, 105.0,  32),
)
# fmt: on
_RESERVED = KIB  # of an SM's shared memory, for each block
_NARROW = {"threads_per_sm": 1536, "blocks_per_sm": 24}  # SMs of graphics cards


def _listed(id_: str, name: str, capability: int, sms: int, smem: int, l2: int, *roofs: Any) -> Gpu:
    *rates, memory = roofs
    sizes = smem * KIB, smem * KIB + _RESERVED, l2 * MIB
    further = {"memory": memory * GIB, **(_NARROW if capability in (89, 120) else {})}
    return Gpu(id_, name, capability, sms, *sizes, *rates, **further)


GPUS = {line[0]: _listed(*line) for line in _LISTED}
_SAME_MEMORY = 0.1  # what a driver keeps for itself is 1 to 5 % of the board's, the next larger board has 17 % more


def resolve(name: str) -> Gpu:
    """The GPU that ``name`` means: an id ("h100"), a marketing name, the id of the visible one, or "auto" for that.

    Raises:
        UnknownName: no GPU of the table is meant; the message lists them.
        NoGpu: "auto" was asked for and there is no CUDA device.
    """
    if name.lower() == "auto":
        found = detect()
        if found is None:
            raise NoGpu("--gpu auto")
        return found
    gpu = GPUS.get(name.lower()) or _visible_as(name.lower()) or (None if _PART.search(name.lower()) else _family(name))
    if gpu is None:
        raise UnknownName("GPU", name, GPUS)
    return gpu


def detect(device: int | None = None) -> Gpu | None:
    """What a CUDA device is, by default the current one; None where there is none, or one older than all that are listed.

    It is a listed GPU only where SMs, shared memory and memory are that GPU's: a MIG slice and another board of the family
    have an id of their own, so that their records are theirs; other GPUs' are borrowed. ``DSA_GPU`` names it where its own
    name is not recognised; its limits are the device's even so.

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
    if override:
        named = _family(override)
        if named is None:
            raise UnknownName("GPU", f"{override} (of DSA_GPU)", GPUS)
        if named.capability != capability:
            raise SpecError(
                "DSA_GPU", override, f"a GPU of sm_{capability}, which {properties.name} (cuda:{device}) is, or unset"
            )
        own_id = named.id if _limits(named) == _limits_of(properties) else f"{named.id}-{properties.multi_processor_count}sm"
        return _as_device(named, own_id, named.name, properties)
    known = _family(properties.name)
    if known is None or known.capability != capability:
        return _unlisted(properties, capability)
    same = _limits(known) == _limits_of(properties)
    if same and abs(properties.total_memory / known.memory - 1) < _SAME_MEMORY:
        return _as_device(known, known.id, known.name, properties)
    return _as_device(known, _own_id(known, properties), properties.name, properties)


def alike(gpu: Gpu) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` would call each visible device that is ``gpu``, the current one first."""
    import torch

    if not torch.cuda.is_available():
        return []
    names = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    current = torch.cuda.current_device()
    same = [device for device in range(torch.cuda.device_count()) if detect(device) == gpu]
    same.sort(key=lambda device: device != current)
    return [names[device].strip() if device < len(names) else str(device) for device in same]


_PART = re.compile(r"mig\b|\d+sm$")
"""In a name: a slice, or an id that ``_own_id`` made."""


def _family(name: str) -> Gpu | None:
    """The GPU whose id is a word of a marketing name: "NVIDIA H100 80GB HBM3", "H100-SXM"; "GB200" is none of them."""
    joined = re.sub(r"(?<=[a-z])[^a-z0-9]+(?=\d)", "", name.lower())  # "RTX 4090" is one word, "H100 80GB" two
    for gpu_id in sorted(GPUS, key=len, reverse=True):  # "h100-pcie" before "h100"
        if re.search(rf"(?<![a-z0-9]){gpu_id.replace('-', '[^a-z0-9]*')}(?!\d)", joined):
            return GPUS[gpu_id]
    return None


def _visible_as(gpu_id: str) -> Gpu | None:
    try:
        here = detect()
    except DsaError:  # of DSA_GPU: that is told where the device is used
        return None
    return here if here is not None and here.id == gpu_id else None


def _limits(gpu: Gpu) -> tuple[int, int]:
    return gpu.sms, gpu.smem_per_block


def _limits_of(properties: Any) -> tuple[int, int]:
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _own_id(known: Gpu, properties: Any) -> str:
    """An id by the device's name, and by its SMs and memory where only these tell it from ``known``."""
    slug = re.sub(r"^(nvidia|geforce)-", "", _slug(properties.name))
    sms = properties.multi_processor_count
    if sms != known.sms:
        return f"{slug}-{sms}sm"
    return f"{slug}-{round(properties.total_memory / GIB)}gb" if slug == known.id else slug


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _as_device(model: Gpu, own_id: str, name: str, properties: Any) -> Gpu:
    """``model`` with the device's limits; its roofs go with the SMs, the bandwidth with the memory (so do MIG slices)."""
    same = own_id == model.id
    scale = 1.0 if same else properties.multi_processor_count / model.sms
    share = 1.0 if same else properties.total_memory / model.memory
    return replace(
        model,
        id=own_id,
        name=name,
        sms=properties.multi_processor_count,
        smem_per_block=properties.shared_memory_per_block_optin,
        smem_per_sm=properties.shared_memory_per_multiprocessor,
        l2=properties.L2_cache_size,
        threads_per_sm=properties.max_threads_per_multi_processor,
        memory=properties.total_memory,
        bandwidth=model.bandwidth * share,
        bf16=model.bf16 * scale,
        fp8=model.fp8 * scale,
        fp32=model.fp32 * scale,
    )


def _unlisted(properties: Any, capability: int) -> Gpu | None:
    """A GPU outside the table: its own limits as the driver tells them, roofs by those of the newest that is no newer."""
    older = [gpu for gpu in GPUS.values() if gpu.capability <= capability]
    if not older:
        return None
    model = replace(max(older, key=lambda gpu: gpu.capability), capability=capability)
    return _as_device(model, _slug(properties.name), properties.name, properties)
