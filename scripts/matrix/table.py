"""The matrix as it is committed: ``docs/matrix.json``, what was compiled, and ``docs/matrix.md``, the same for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsa_codegen.gpu import GPUS
from dsa_codegen.kernels.render import template_sha
from dsa_codegen.records.publish import publish

from subjects import COMPILERS, NVCC, ROOT, TRITONS, Key, subjects

FILE = ROOT / "docs" / "matrix.json"
PAGE = ROOT / "docs" / "matrix.md"
COMMAND = "python scripts/matrix"
_HEAD = f"""# What compiles with what

Written by `{COMMAND}`, which compiles what is not in this table yet; CI fails where a template renders a text, or a GPU gets a
default, that no line below holds. Every default of every preset for every GPU of the table, and every shipped record, compiled
without a GPU, within its shared memory. GPUs of one architecture share texts: {{gpus}}.

A line is a template and a compiler; numbers are texts that compiled, for each architecture.
"""


@dataclass
class Line:
    """A template under one compiler."""

    template_sha: str
    commit: str
    date: str
    compiled: dict[str, list[str]] = field(default_factory=dict)
    """architecture -> texts (12 digits of their sha)."""
    refused: dict[str, str] = field(default_factory=dict)
    """"architecture text" -> the reason."""


@dataclass
class Table:
    """All lines, by compiler and template, and the Pythons that rendered and compiled the same."""

    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    lines: dict[str, dict[str, Line]] = field(default_factory=dict)
    pythons: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_whole: dict[str, list[str]] = field(default_factory=dict)
    """``waiting`` as it was when the file was written."""

    def holds(self, compiler: str, key: Key) -> bool:
        """Whether this text was compiled for this architecture."""
        template, text, arch = key
        line = self.lines.get(compiler, {}).get(template)
        return line is not None and text in line.compiled.get(arch, ())

    def missing(self, compiler: str) -> list[Key]:
        """What was never compiled, or did not compile."""
        return [key for key in subjects(compiler) if not self.holds(compiler, key)]

    def waiting(self) -> dict[str, list[str]]:
        """Templates of which no line is whole yet, by compiler: said on the page until they are."""
        return {compiler: sorted({key[0] for key in missing}) for compiler in COMPILERS if (missing := self.missing(compiler))}

    def add(self, compiler: str, key: Key, reason: str, commit: str, date: str) -> None:
        """A result; it dates the line."""
        template, text, arch = key
        line = self.lines.setdefault(compiler, {}).setdefault(template, Line("", "", ""))
        line.template_sha, line.commit, line.date = template_sha(template), commit, date
        line.refused.pop(f"{arch} {text}", None)
        if reason:
            line.refused[f"{arch} {text}"] = reason.splitlines()[0][:200]
        else:
            line.compiled[arch] = sorted({*line.compiled.get(arch, ()), text})

    def prune(self) -> None:
        """Forget texts that nothing renders any more; a template that only reads differently keeps its line, with its hash."""
        for compiler in COMPILERS:
            wanted, lines = set(subjects(compiler)), self.lines.get(compiler, {})
            for template in list(lines):
                line = lines[template]
                line.compiled = {
                    arch: kept
                    for arch, texts in sorted(line.compiled.items())
                    if (kept := [text for text in texts if (template, text, arch) in wanted])
                }
                line.refused = {name: why for name, why in line.refused.items() if (template, *name.split()[::-1]) in wanted}
                if not line.compiled and not line.refused:
                    del lines[template]
                elif all(self.holds(compiler, key) for key in wanted if key[0] == template):
                    line.template_sha = template_sha(template)


def load() -> Table:
    """The committed table; an empty one where there is none."""
    if not FILE.exists():
        return Table()
    content = json.loads(FILE.read_text())
    lines = {
        compiler: {template: Line(**line) for template, line in found.items()} for compiler, found in content["lines"].items()
    }
    return Table(content["versions"], lines, content["pythons"], content["not_whole"])


def save(table: Table) -> None:
    """Write the file and its page."""
    table.not_whole = table.waiting()
    publish(FILE, json.dumps(asdict(table), indent=1, sort_keys=True) + "\n")
    publish(PAGE, page(table))


def page(table: Table) -> str:
    """The table for people."""
    archs = list(dict.fromkeys(gpu.arch for gpu in GPUS.values()))
    gpus = "; ".join(f"{arch}: {', '.join(gpu.id for gpu in GPUS.values() if gpu.arch == arch)}" for arch in archs)
    parts = [_HEAD.format(gpus=gpus)]
    head = ["template", "its hash", "with", *archs, "commit", "date"]
    rows = [
        [f"`{template}`", line.template_sha, _with(compiler), *(_cell(line, arch) for arch in archs), line.commit, line.date]
        for template in sorted({template for lines in table.lines.values() for template in lines})
        for compiler in COMPILERS
        if (line := table.lines.get(compiler, {}).get(template))
    ]
    parts.append(_rows(head, rows))
    refused = [
        [f"`{template}`", _with(compiler), name, why]
        for compiler, lines in table.lines.items()
        for template, line in lines.items()
        for name, why in line.refused.items()
    ]
    waiting = [[_with(compiler), ", ".join(f"`{name}`" for name in names)] for compiler, names in table.not_whole.items()]
    if waiting:
        parts += ["## Not whole yet\n", _rows(["with", "templates"], waiting)]
    if refused:
        parts += ["## Refused\n", _rows(["template", "with", "architecture and text", "reason"], refused)]
    parts += ["## Environments\n", _rows(["compiler", "versions"], [[_with(c), _stated(v)] for c, v in table.versions.items()])]
    python = [
        [name, _stated(found["versions"]), found["rendered"], f"{found['compiled']} of {found['templates']}", found["commit"]]
        for name, found in sorted(table.pythons.items(), key=lambda item: int(item[0].split(".")[1]))
    ]
    head = ["Python", "versions", "texts", "templates that compile for sm_90a", "commit"]
    parts += [
        "## Pythons\n",
        "Each renders every text as the others do, and compiles one of each template.\n",
        _rows(head, python),
    ]
    return "\n".join(parts)


def _with(compiler: str) -> str:
    return "nvcc" if compiler == NVCC else f"Triton {TRITONS[compiler]}"


def _cell(line: Line, arch: str) -> str:
    refused = sum(name.startswith(f"{arch} ") for name in line.refused)
    return f"{len(line.compiled.get(arch, ())) or '–'}" + (f", {refused} refused" if refused else "")


def _stated(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version != "none")


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
