"""What the matrix compiles: the default of every call of a preset, for every GPU of the table, and the shipped records."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsa_codegen import ops, paths
from dsa_codegen.gpu import GPUS, Gpu
from dsa_codegen.kernels.render import Rendered, render, template_name
from dsa_codegen.ops.needs import needs
from dsa_codegen.problem import presets
from dsa_codegen.problem.op import Config, Op
from dsa_codegen.problem.values import Spec
from dsa_codegen.records import files
from dsa_codegen.records.record import MEASURED

ROOT = Path(__file__).resolve().parents[2]
TRITONS = {"3.6": "3.6.0", "3.7": "3.7.1", "3.8": "3.8.0", "3.9": "3.9.0"}
"""release -> the version that stands for it."""
NVCC = "nvcc"
"""What compiles templates whose text does not depend on Triton."""
COMPILERS = (*TRITONS, NVCC)
FIRST = ("deepseek-v3.2", "tiny")
"""The models that are compiled first, and alone where a run is to be short."""
_BY_NVCC = ("tilelang", "cuda")


Key = tuple[str, str, str]
"""(template, first 12 digits of the text's sha, architecture)."""


@dataclass(frozen=True)
class Subject:
    """One text for one architecture; of GPUs that share both, the first."""

    template: str
    rendered: Rendered
    gpu: Gpu
    first: bool
    """Of a record, or of the models in ``FIRST``."""

    @property
    def key(self) -> Key:
        """What was compiled once need not be compiled again."""
        return self.template, self.rendered.sha[:12], self.gpu.arch


@functools.cache
def _served() -> tuple[tuple[Op, Spec, Config, Gpu, bool], ...]:
    """Every config that is a default or a record, once for each architecture, and whether it is of the first."""
    found: dict[tuple[str, Spec, Config, str], tuple[Op, Spec, Config, Gpu, bool]] = {}
    others = [name for name in presets.names() if name not in FIRST]
    for first, served in ((True, (*_defaults(FIRST), *_drafts(), *_records())), (False, _defaults(others))):
        for op, spec, config, gpu in served:
            found.setdefault((op.name, spec, config, gpu.arch), (op, spec, config, gpu, first))
    return tuple(found.values())


def _defaults(names: Iterable[str]) -> Iterator[tuple[Op, Spec, Config, Gpu]]:
    for model in map(presets.preset, names):
        for gpu in GPUS.values():
            able = [op.name for op in ops.all_ops().values() if gpu.capability >= op.min_capability]
            for need in needs(model, able, gpu):
                yield need.op, need.spec, need.op.default_config(need.spec, need.case.sizes, gpu), gpu


def _drafts() -> Iterator[tuple[Op, Spec, Config, Gpu]]:
    """Three to six queries of a sequence have a template of their own, but no preset states them."""
    op = ops.get("indexer_paged")
    (spec, *_), gpu = op.specs(presets.preset(FIRST[0])), GPUS["h200"]
    for wide in (replace(spec, next_n=queries) for queries in range(3, 7)):
        for case in op.workloads(wide):
            config = op.default_config(wide, case.sizes, gpu)
            if config.backend in _BY_NVCC:
                yield op, wide, config, gpu


def _records() -> Iterator[tuple[Op, Spec, Config, Gpu]]:
    for op in ops.all_ops().values():
        for record in files.read_all(paths.shipped_records(), op.name):
            if record.evidence == MEASURED:
                yield op, op.spec_type.from_dict(record.spec), record.config_for(op), GPUS[record.gpu.id]


@functools.cache
def subjects(compiler: str) -> dict[Key, Subject]:
    """What this compiler is asked to compile, by key; what people serve most comes first.

    Args:
        compiler: one of ``COMPILERS``.
    """
    found: dict[Key, Subject] = {}
    for op, spec, config, gpu, first in _served():
        if (config.backend in _BY_NVCC) == (compiler == NVCC):
            rendered = render(op, spec, config, TRITONS.get(compiler, ""))
            subject = Subject(template_name(op, config.backend), rendered, gpu, first)
            found.setdefault(subject.key, subject)
    return found


def digest(compiler: str) -> str:
    """Of all the texts for this compiler: the same on every Python."""
    return hashlib.sha256(repr(sorted(subjects(compiler))).encode()).hexdigest()[:12]
