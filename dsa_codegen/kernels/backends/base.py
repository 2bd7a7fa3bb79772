"""What a backend must be able to do: compile a rendered module for a GPU, report its resources, load it for launching."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import ToolBroken, ToolMissing
from ...gpu import Gpu

Launchable = Callable[[tuple[int, int, int], tuple[Any, ...]], None]
"""Launches one kernel on the current stream: ``launchable(grid, args)``."""


C_COMPILER = "Triton builds the code that launches a kernel with it: install gcc or clang, or name one in CC"
"""The remedy where there is none."""


@dataclass(frozen=True)
class Resources:
    """What the assembler says of one kernel."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes of local memory per thread."""
    smem: int
    """Bytes of shared memory per block, static and dynamic."""
    threads: int
    """Per block."""


class Backend(ABC):
    """One compiler. Stateless; ``compile`` may run in any process, also where there is no GPU."""

    name: str

    @abstractmethod
    def toolchain(self) -> dict[str, str]:
        """Versions that a build depends on.

        Raises:
            ToolMissing: the compiler is not installed; the message says how to get it.
        """

    @abstractmethod
    def compile(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Resources]:
        """Compile every kernel of the module at ``source`` into the folder ``out``.

        Raises:
            BuildError: the compiler refused it.
        """

    @abstractmethod
    def load(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Launchable]:
        """Make the kernels compiled into ``out`` launchable on the current CUDA device."""

    def load_ahead(self, source: Path, gpu: Gpu, out: Path) -> Mapping[str, Launchable]:
        """As ``load``, where no compiler is, neither the backend's nor C's."""
        return self.load(source, gpu, out)


def import_module(source: Path) -> ModuleType:
    """Import a rendered module by its path; once per process and path, as the compilers re-read the file."""
    name = source.stem
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(source):
        return known
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def report_of(tool: str | Path, *arguments: str | Path, remedy: str) -> str:
    """What a tool that is there prints.

    Raises:
        ToolBroken: it cannot be run, or fails.
    """
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolBroken(str(tool), str(error), remedy) from error


_USAGE = re.compile(r"Function (\w+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cubin_usage(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """(registers, local bytes, static shared bytes) of each kernel of a cubin, read by Triton's cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    remedy = "it comes with the triton package for Linux on x86-64: pip install --force-reinstall triton"
    if not tool.exists():
        raise ToolMissing("cuobjdump", remedy)
    report = report_of(tool, "--dump-resource-usage", cubin, remedy=remedy)
    return {
        name: (int(registers), max(int(stack), int(local)), int(shared))
        for name, registers, stack, shared, local in _USAGE.findall(report)
    }
