"""Which lines of a CUDA C++ text the instruction at an address stands for: what a sanitizer's report of a kernel is about.

Builds have no line numbers. A text is compiled once more with them, and that counts only where the instructions are the same.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels import anatomy
from dsa_codegen.kernels.backends import cuda
from dsa_codegen.kernels.build import Built

TOUCH = {
    "Read": ("LDS", "LDSM", "ATOMS", "SYNCS", "LD"),
    "Write": ("STS", "STSM", "STAS", "LDGSTS", "ATOMS", "SYNCS", "ST"),
    "Remote": ("LD",),
}
"""Instructions that touch shared memory, barriers in it too, some by an address of any memory: a race is between such; remote
is another block's of a cluster."""
Group = Sequence[str]
"""Parts of lines: a report is about a group where each place in it stands for a line with one of them."""
Place = tuple[str, tuple[str, ...]]
"""An instruction's name, and the lines that it stands for: the innermost function's, then those that it was inlined at."""

_SECTION = re.compile(r"^//-+ \.text\.(\S+)")
_LINE = re.compile(r"^\s*//## File \"([^\"]*)\", line (\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_]*)")
_AT = re.compile(r"(Read|Write) access at (\w+)\+0x([0-9a-f]+)")
_REMOTE = re.compile(r"Potential invalid __shared__ read of .*?\bat (\w+)\+0x([0-9a-f]+)", re.DOTALL)


def explained(race: str, groups: Iterable[Group], builds: Iterable[Built]) -> bool:
    """Whether a racecheck report is about one of these groups, whichever of the builds it is of.

    A report is of a race, or of a read from a block of the cluster that "might have already exited".
    """
    found = [*_AT.findall(race), *(("Remote", *place) for place in _REMOTE.findall(race))]
    at = [(how, (kernel, int(address, 16))) for how, kernel, address in found]
    possible = [built for built in builds if all(instructions(built.folder).get(one) in TOUCH[how] for how, one in at)]
    each = [[places(built.folder, built.gpu).get(one, ("", ())) for _, one in at] for built in possible]
    return bool(at and each) and all(any(_about(found, group) for group in groups) for found in each)


def _about(found: Iterable[Place], group: Group) -> bool:
    return all(any(part in line for line in lines for part in group) for _, lines in found)


@functools.cache
def instructions(folder: Path) -> Mapping[tuple[str, int], str]:
    """Their names by kernel and address, of a build of the backend ``cuda``."""
    return {at: name for at, (name, _) in read(anatomy.listing(folder / cuda.BINARY), ()).items()}


@functools.cache
def places(folder: Path, gpu: Gpu) -> Mapping[tuple[str, int], Place]:
    """By kernel and address, of such a build; none where line numbers change its instructions."""
    with tempfile.TemporaryDirectory(prefix="dsa-lines-") as name:
        again = Path(name)
        text = (folder / cuda.TEXT).read_text()
        (again / cuda.TEXT).write_text(text)
        subprocess.run([*cuda.command(gpu, again), "-lineinfo"], check=True, capture_output=True)
        found = read(anatomy.listing(again / cuda.BINARY, "-gi"), text.splitlines())
    return found if {at: name for at, (name, _) in found.items()} == instructions(folder) else {}


def read(listing: str, text: Sequence[str]) -> dict[tuple[str, int], Place]:
    """What nvdisasm's listing (``-gi``) says of a text's instructions; a row of lines holds until the next."""
    found: dict[tuple[str, int], Place] = {}
    kernel, lines, in_row = "", [], False
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            kernel, lines = section[1], []
        elif number := _LINE.match(line):
            mine = [text[int(number[2]) - 1]] if number[1].endswith(cuda.TEXT) else []
            lines = [*(lines if in_row else ()), *mine]
        elif kernel and (instruction := _INSTRUCTION.match(line)):
            found[kernel, int(instruction[1], 16)] = instruction[2], tuple(lines)
        in_row = line.lstrip().startswith("//##")
    return found
