"""The versions that a measurement depends on, read without touching a GPU; what a record states and a report prints."""

from __future__ import annotations

import re
from pathlib import Path

from . import backends

_DRIVER = Path("/proc/driver/nvidia/version")


def versions(backend: str) -> dict[str, str]:
    """Versions of the backend's compilers, of torch, of CUDA as torch uses it and of the driver ("none" where absent).

    Raises:
        ToolMissing: the backend is not installed, or broken.
    """
    import torch

    return {
        **backends.get(backend).toolchain(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "driver": driver(),
    }


def driver() -> str:
    """The NVIDIA driver's version, "none" where there is none."""
    try:
        found = re.search(r"\b(\d{3}\.[\d.]+)\b", _DRIVER.read_text())
    except OSError:
        return "none"
    return found.group(1) if found else "unknown"
