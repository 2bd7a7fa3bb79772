"""Anatomy: what a compiled kernel consists of, instruction by instruction, and how deep in loops each stands.

Read off the machine code by nvdisasm, which comes with Triton; no GPU is needed. Warps that wait spin in loops of a few
instructions around a barrier: those are no loops here, as nobody knows how often they turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ToolBroken, ToolMissing
from ..gpu import Gpu
from .backends.base import report_of
from .build import Built, build
from .render import Rendered

DEEPEST = 3
"""Loops within loops that are told apart; deeper ones count as these."""
_SPIN = 24  # instructions of a loop that only waits, at most
_REMEDY = "it comes with the triton package for Linux on x86-64: pip install --force-reinstall triton"

KINDS: Mapping[str, Sequence[str]] = {
    "mma": ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA"),
    "float": ("FFMA", "FADD", "FMUL", "FMNMX", "FSETP", "FSEL", "FSET", "FCHK", "HADD2", "HMUL2", "HFMA2", "HMNMX2"),
    "special": ("MUFU", "F2F", "F2FP", "F2I", "I2F", "FRND", "I2FP", "POPC", "FLO", "BREV"),
    "load": ("LDG", "LDGSTS", "UTMALDG", "UBLKCP", "LD"),
    "store": ("STG", "UTMASTG", "ST"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "STAS"),
    "shared_atomic": ("ATOMS",),
    "atomic": ("ATOM", "ATOMG", "RED", "UBLKRED"),
    "local": ("LDL", "STL"),
    "exchange": ("SHFL", "VOTE", "VOTEU", "REDUX", "MATCH"),
    "barrier": ("BAR", "SYNCS", "MEMBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "FENCE"),
    "branch": ("BRA", "BRX", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "BREAK", "WARPSYNC", "JMP"),
}
"""Kinds of instruction by the first part of their names; whatever is in none of them is integer arithmetic ("integer")."""
_MIXED = ("mma", "float", "load", "shared", "shared_atomic", "exchange", "barrier", "branch")
_KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes}

_SECTION = re.compile(r"^//-+ \.text\.(\S+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Anatomy:
    """Instructions of one kernel: by depth (0 is outside of all loops) and kind."""

    counts: tuple[Mapping[str, int], ...]
    loops: int
    """Loops that are no waiting."""

    def at(self, kind: str, depth: int) -> int:
        """Instructions of a kind at a depth."""
        return self.counts[depth].get(kind, 0) if depth < len(self.counts) else 0

    def total(self, kind: str) -> int:
        """Instructions of a kind at any depth."""
        return sum(each.get(kind, 0) for each in self.counts)

    @property
    def mix(self) -> dict[str, int]:
        """How many instructions there are, in loops, in loops within loops, and of some kinds: what a ranking looks at."""
        by_depth = [sum(each.values()) for each in self.counts]
        kinds = {kind: self.total(kind) for kind in _MIXED}
        return {"all": sum(by_depth), "loops": sum(by_depth[1:]), "nested": sum(by_depth[2:]), **kinds}


@dataclass(frozen=True)
class _Instruction:
    address: int
    opcode: str
    target: str
    """The label that it may jump to; "" for all but branches."""


@dataclass(frozen=True)
class Dissected(Built):
    """A build that says what its kernels consist of."""

    anatomies: Mapping[str, Anatomy] = field(default_factory=dict)
    """By kernel; empty where there is no nvdisasm, or it cannot read the machine code."""


def dissected(rendered: Rendered, gpu: Gpu) -> Dissected:
    """As ``build``, and read; a job for a process of its own, as reading takes half a second."""
    built = build(rendered, gpu)
    try:
        anatomies = of(built)
    except (ToolMissing, ToolBroken):
        anatomies = {}
    return Dissected(built.rendered, built.gpu, built.folder, built.resources, anatomies)


def of(built: Built) -> dict[str, Anatomy]:
    """By kernel, what a build's machine code consists of.

    Raises:
        ToolMissing: there is no nvdisasm.
        ToolBroken: it cannot read the machine code.
    """
    found = {}
    for cubin in sorted(built.folder.rglob("*.cubin")):
        kernels = read(listing(cubin))
        # A file of one kernel may name it as its compiler pleases; the folder or the file has the kernel's own name.
        names = [name for name in built.resources if name in cubin.relative_to(built.folder).parts or name == cubin.stem]
        found.update({names[0]: next(iter(kernels.values()))} if len(kernels) == len(names) == 1 else kernels)
    return {name: found[name] for name in built.resources if name in found}


def listing(cubin: Path, *options: str) -> str:
    """What nvdisasm says of machine code.

    Raises:
        ToolMissing: there is none.
        ToolBroken: it cannot read the machine code.
    """
    return report_of(_tool(), "-c", *options, cubin, remedy=_REMEDY)


def _tool() -> Path:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        raise ToolMissing("nvdisasm", _REMEDY)
    return tool


def read(listing: str) -> dict[str, Anatomy]:
    """By function, what a listing of nvdisasm says."""
    return {name: _anatomy(instructions, labels) for name, instructions, labels in _functions(listing)}


def _functions(listing: str) -> Iterator[tuple[str, list[_Instruction], dict[str, int]]]:
    name = ""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in listing.splitlines():
        section = _SECTION.match(line)
        if section or line.startswith("//---"):
            if name:
                yield name, instructions, labels
            name, instructions, labels, waiting = section.group(1) if section else "", [], {}, []
        elif label := _LABEL.match(line):
            waiting.append(label.group(1))
        elif name and (match := _INSTRUCTION.match(line)):
            address, opcode, _, operands = match.groups()
            target = _TARGET.search(operands)
            labels.update(dict.fromkeys(waiting, int(address, 16)))
            waiting.clear()
            instructions.append(_Instruction(int(address, 16), opcode, target.group(1) if target else ""))
    if name:
        yield name, instructions, labels


def _anatomy(instructions: Sequence[_Instruction], labels: Mapping[str, int]) -> Anatomy:
    loops = _loops(instructions, labels)
    counts: list[Counter[str]] = [Counter() for _ in range(DEEPEST + 1)]
    for each in instructions:
        if each.opcode != "NOP":
            depth = sum(first <= each.address <= last for first, last in loops)
            counts[min(depth, DEEPEST)][_KIND.get(each.opcode, "integer")] += 1
    return Anatomy(tuple(map(dict, counts)), len(loops))


def _loops(instructions: Sequence[_Instruction], labels: Mapping[str, int]) -> list[tuple[int, int]]:
    """First and last address of every loop: what a branch backwards goes round; the widest, where several share their first."""
    widest: dict[int, int] = {}
    for each in instructions:
        first = labels.get(each.target, each.address + 1)
        if first < each.address:
            widest[first] = max(each.address, widest.get(first, 0))
    return [loop for loop in widest.items() if not _waits(each for each in instructions if loop[0] <= each.address <= loop[1])]


def _waits(body: Iterable[_Instruction]) -> bool:
    """Whether a loop only waits: short, and all that it touches is barriers."""
    opcodes = [each.opcode for each in body]
    works = any(_KIND.get(opcode) in ("mma", "load", "store", "shared", "shared_atomic", "atomic") for opcode in opcodes)
    return len(opcodes) <= _SPIN and not works and any(_KIND.get(opcode) == "barrier" for opcode in opcodes)
