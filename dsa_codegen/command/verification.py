"""What ``cli.py verify`` runs: every operation, option and template of a model, on the GPU or, without one, offline.

On a GPU every case runs with poisoned outputs against the reference and repeats bit for bit. Offline the Triton kernels
run in the interpreter and every template is compiled for the GPU that was named.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import ops
from ..errors import BuildError, DsaError, NoConfig, ToolMissing
from ..gpu import Gpu
from ..kernels.build import build, build_all
from ..kernels.render import render
from ..kernels.variant import Variant
from ..ops.needs import specs
from ..problem.op import Config, Op
from ..problem.presets import Model
from ..problem.values import Spec
from ..proof.verify import interpret, verify
from ..runtime import dispatch
from ..worker import JobFailed, Worker

GPU_REPEATS = 20
CASE_SECONDS = 120.0


@dataclass(frozen=True)
class Subject:
    """One rendered source to verify."""

    op: Op
    spec: Spec
    config: Config

    def __reduce__(self) -> tuple[object, tuple[str, Spec, Config]]:
        return _subject, (self.op.name, self.spec, self.config)  # operations are singletons: send the name


def _subject(op_name: str, spec: Spec, config: Config) -> Subject:
    return Subject(ops.get(op_name), spec, config)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check of one subject."""

    subject: Subject
    check: str
    """"compile", "interpret" or "run"."""
    passed: bool
    similarity: float
    seconds: float
    detail: str


def subjects(model: Model, gpu: Gpu, names: Sequence[str] = ()) -> list[Subject]:
    """Every operation of the model (or the named ones), option and backend, each with its default or tuned configs."""
    found: dict[tuple[str, Spec, Config], Subject] = {}
    for op, model_spec in specs(model, names, gpu):
        for subject in subjects_of(op, model_spec, gpu):
            found[op.name, subject.spec, subject.config] = subject
    return list(found.values())


def subjects_of(op: Op, model_spec: Spec, gpu: Gpu) -> Iterator[Subject]:
    """Those of one spec that a model calls: the spec's own first, then its options'."""
    for spec in op.options(model_spec):
        for config in dict.fromkeys(_configs(op, spec, gpu, tuned=spec == model_spec)):
            yield Subject(op, spec, config)


def _configs(op: Op, spec: Spec, gpu: Gpu, tuned: bool) -> Iterator[Config]:
    sizes = [case.sizes for case in op.workloads(spec)]
    for size in sizes if tuned else sizes[:1]:
        # An option that this GPU has no kernel for (FP8 products before sm_89) is none of its; the model's own spec must be.
        with contextlib.nullcontext() if tuned else contextlib.suppress(NoConfig):
            yield op.default_config(spec, size, gpu)
    for size in sizes if tuned else ():
        yield dispatch.chosen(op, spec, size, gpu).config
    for backend in op.backends:
        for size in (sizes[0], sizes[-1]):  # a template's parts may differ with them: one block or a cluster, say
            with contextlib.suppress(NoConfig):  # this template does not serve them; another backend's does
                yield op.default_config(spec, size, gpu, backend)


def build_ahead(subjects: Sequence[Subject], gpu: Gpu) -> None:
    """Build all subjects in parallel; one that fails to build says so when it is checked."""
    build_all((render(subject.op, subject.spec, subject.config) for subject in subjects), gpu)


def offline(subject: Subject, gpu: Gpu, interpreter: Worker) -> Iterator[Verdict]:
    """Compile for ``gpu``; interpret the Triton kernels on the CPU (``interpreter``: a worker with TRITON_INTERPRET=1)."""
    yield compiled(subject, gpu)
    if subject.config.backend == "triton":
        for case in subject.op.cases(subject.spec):
            start = time.monotonic()
            try:
                accuracy = interpreter.call(
                    interpret, subject.op.name, subject.spec, subject.config, case, gpu, timeout=CASE_SECONDS
                )
                passed, similarity, detail = accuracy.passed, accuracy.similarity, accuracy.detail
            except DsaError as error:
                passed, similarity, detail = False, float("nan"), str(error)
            yield Verdict(subject, f"interpret {case.id}", passed, similarity, time.monotonic() - start, detail)


def compiled(subject: Subject, gpu: Gpu) -> Verdict:
    """Compile for ``gpu`` and hold the resource report against its limits."""
    start = time.monotonic()
    try:
        built = build(render(subject.op, subject.spec, subject.config), gpu)
        usage = built.resources.values()
        passed = all(kernel.smem <= gpu.smem_per_block for kernel in usage)
        registers, spills = max(kernel.registers for kernel in usage), max(kernel.spills for kernel in usage)
        detail = f"{registers} registers, {spills} B spilled, {max(kernel.smem for kernel in usage)} B shared"
    except (BuildError, ToolMissing) as error:
        passed, detail = False, str(error)
    return Verdict(subject, f"compile {gpu.arch}", passed, 0.0, time.monotonic() - start, detail)


def on_gpu(subject: Subject, gpu: Gpu, worker: Worker, repeats: int = GPU_REPEATS) -> list[Verdict]:
    """Run every case in the worker's process; a crash is a verdict, not the end."""
    try:
        return worker.call(run_cases, subject, gpu, repeats, timeout=CASE_SECONDS * 5)
    except JobFailed as error:
        detail = f"{error.kind}: {error.message}"
    except DsaError as error:
        detail = str(error)
    worker.kill()  # its CUDA context may be poisoned
    return [Verdict(subject, "run", False, float("nan"), 0.0, detail)]


def run_cases(subject: Subject, gpu: Gpu, repeats: int) -> list[Verdict]:
    """The worker's job: build, load and verify all cases on the current device."""
    op, spec, config = subject.op, subject.spec, subject.config
    variant = Variant(op, spec, config, gpu, build(render(op, spec, config), gpu).load())
    verdicts = []
    for case in op.cases_for(spec, config):
        start = time.monotonic()
        accuracy = verify(variant, case, "cuda", repeats=repeats)
        seconds = time.monotonic() - start
        verdicts.append(Verdict(subject, f"run {case.id}", accuracy.passed, accuracy.similarity, seconds, accuracy.detail))
    return verdicts
