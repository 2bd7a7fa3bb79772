"""Op: the one contract between an operation and the pipeline (render, tune, verify, measure, dispatch)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..errors import NoConfig, SpecError, UnknownName
from ..gpu import Gpu
from .config import Config as Config
from .config import Parameter as Parameter
from .config import Violation as Violation
from .config import exceeds as exceeds
from .fitting import Fitting
from .presets import MLA, Model
from .values import Bucket, Scalar, Sizes, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from .draw import Draw

Inputs = Mapping[str, Any]
"""Named arguments of one call: tensors, None for an absent optional tensor, floats."""
Outputs = dict[str, "Tensor"]

S = TypeVar("S", bound=Spec)
Z = TypeVar("Z", bound=Sizes)


@dataclass(frozen=True)
class Cost:
    """What the problem itself needs, never padded work: operations of ``unit`` and the least bytes to move."""

    flops: float
    bytes: float
    unit: str

    def limit_us(self, gpu: Gpu) -> float:
        """The roofline: the larger of arithmetic and memory time on this GPU, in microseconds."""
        return max(self.flops / gpu.rate(self.unit) / 1e6, self.bytes / gpu.bandwidth / 1e6)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel's name in the rendered module, its grid and its arguments in order."""

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    touched: int | None = None
    """Bytes of its tensors that it touches, where that is not about all of them: its share of a call's time is judged by it."""


@dataclass(frozen=True)
class Case(Generic[Z]):
    """A problem to verify or to time: sizes, and the distribution that its inputs are drawn from."""

    sizes: Z
    distribution: str = "normal"

    @property
    def id(self) -> str:
        """Readable test id: ``queries4-context64-ragged``."""
        return f"{self.sizes.id}-{self.distribution}"


@dataclass(frozen=True)
class Accuracy:
    """The outcome of comparing outputs with the reference."""

    passed: bool
    max_abs: float
    similarity: float
    """The largest 1 - 2·Σab / Σ(a²+b²) over the outputs (0 = equal)."""
    detail: str = ""
    stray: bool = False
    """Whether something was written beside the outputs."""


class Problem(ABC, Generic[S, Z]):
    """What an operation computes: its specs, arguments, inputs, reference and cost; no word of how."""

    name: ClassVar[str]
    """The stem: folder, templates, records, tests and docs are named by it."""
    summary: ClassVar[str]
    function: ClassVar[str]
    """The public function and torch operator."""
    schema: ClassVar[str]
    """The torch operator's arguments and results, without the name: ``(Tensor q, ...) -> Tensor``."""
    buffers: ClassVar[tuple[str, ...]] = ()
    """Outputs that a caller may bring: the operator ``<function>_into`` takes them behind the others, and returns nothing."""
    spec_type: ClassVar[type[Spec]]
    sizes_type: ClassVar[type[Sizes]]
    training: ClassVar[bool] = False
    """Whether only training calls it: then it is no part of what serving a model needs, and is run where it is named."""
    attentions: ClassVar[tuple[str, ...]] = (MLA,)
    """The kinds of attention (``Model.attention``) whose models have a use for it."""
    minor: ClassVar[frozenset[str]] = frozenset()
    """Fields of the spec that leave the best config nearly as it is: where no record has their values, another's serves."""

    def specs(self, model: Model) -> Sequence[S]:
        """Every spec that serving the model needs of this operation; none where it has no use for it."""
        return self.specs_of(model) if model.attention in self.attentions else ()

    @abstractmethod
    def specs_of(self, model: Model) -> Sequence[S]:
        """``specs`` of a model with one of ``attentions``."""

    @abstractmethod
    def bind(self, *args: Any) -> tuple[S, Z, Inputs]:
        """Check the arguments of a call (in the order of ``schema``, then ``buffers``) and name them; runs before every launch.

        Raises:
            InputError: names the argument, what came and what is allowed.
        """

    @abstractmethod
    def inputs(self, spec: S, case: Case[Z], draw: Draw) -> Inputs:
        """Fresh inputs as ``bind`` would name them; ``draw`` fixes seed and device (also "meta")."""

    @abstractmethod
    def reference(self, spec: S, inputs: Inputs) -> Outputs:
        """The oracle: a few lines of plain PyTorch in fp32 or fp64, on any device."""

    @abstractmethod
    def allocate(self, spec: S, inputs: Inputs) -> Outputs:
        """Uninitialised outputs on the inputs' device."""

    @abstractmethod
    def check(self, spec: S, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        """Compare; which comparison of ``verify`` holds for this operation."""

    @abstractmethod
    def cost(self, spec: S, case: Case[Z]) -> Cost:
        """Operations and least bytes of the case."""

    @abstractmethod
    def cases(self, spec: S) -> Sequence[Case[Z]]:
        """Small, awkward cases that verification runs (also in the interpreter: keep them tiny)."""

    def long_cases(self, spec: S) -> Sequence[Case[Z]]:
        """Cases that a GPU verifies as well, too long for the interpreter: loops and rings of buffers go round many times."""
        return ()

    @abstractmethod
    def workloads(self, spec: S) -> Sequence[Case[Z]]:
        """The cases that are tuned and timed, at least one per bucket that people serve."""

    def repeatable(self, spec: S) -> bool:
        """Whether the same inputs give the same bits in every run, which verification then holds it to."""
        return True

    def options(self, spec: S) -> Sequence[S]:
        """The spec and its neighbours in the options a caller may set; verification covers them all."""
        return (spec,)


class Kernels(ABC, Generic[S, Z]):
    """How an operation is computed: tuning parameters, what they cannot be, names for the templates, launches."""

    backends: ClassVar[tuple[str, ...]]
    """The backends that have a template, the preferred one first."""
    min_capability: ClassVar[int] = 80
    """The oldest GPU generation the templates compile for (FP8 arithmetic needs 89)."""
    budgeted: ClassVar[bool] = False
    """Whether grids are made for the GPU's SMs, so that a call may be given fewer (``sms``); ``launches`` then sees those."""

    @abstractmethod
    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        """The tuning parameters of a backend's template with their fixed ranges."""

    @abstractmethod
    def constraints(self, spec: S, config: Config, gpu: Gpu) -> Iterable[Violation]:
        """Graded violations, the ONE place for what a template cannot do; used by tuner, dispatcher and tests.

        They follow from the arguments alone: what was looked at to refuse one config refuses all others that agree in it.
        """

    def reach(self, spec: S, config: Config, bucket: Bucket) -> Iterable[Violation]:
        """Graded violations of a config that cannot serve all sizes of a bucket: a row that its registers must hold, say.

        A bound of None is no bound. Asked beside ``constraints`` wherever a config is chosen for sizes.
        """
        return ()

    def order(self, spec: S, config: Config) -> str | None:
        """In which order a config adds up what a row sums; configs of one order give a row the same bits.

        None where it depends on the rows beside it, their number or the GPU's SMs; empty where a row sums nothing, or nothing
        that is rounded. A spec that states ``batch_invariant`` is served in one order alone (``Op.canonical``).
        """
        return ""

    def within_reach(self, spec: S, config: Config, case: Case[Z]) -> Case[Z]:
        """The case, cut to sizes that the config reaches: what verification runs in its place."""
        return case

    @abstractmethod
    def guesses(self, spec: S, sizes: Z, gpu: Gpu) -> Iterable[Config]:
        """Configs by judgement, the most promising first; not all of them fit every spec and GPU."""

    @abstractmethod
    def derived(self, spec: S, config: Config) -> dict[str, Scalar]:
        """Names for the template beyond the fields of spec and config; all arithmetic happens here."""

    @abstractmethod
    def launches(self, spec: S, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu) -> Sequence[Launch]:
        """The launches of one call, in order; workspaces come from torch's allocator. Empty where torch did what was to do.

        They follow from everything but data and addresses, since ``plans`` repeats them for other tensors: arguments are
        tensors of the call (or TMA's views of them), outputs, uninitialised workspaces, and values of the host.
        """


_CANONICAL: dict[Any, str] = {}


def table(op: Kernels[Any, Any], backend: str) -> tuple[Parameter, ...]:
    """An operation's parameters; to open the studies of a model's selection asks for them two million times."""
    return _table(op.parameters, backend)


@functools.cache
def _table(parameters: Callable[[str], tuple[Parameter, ...]], backend: str) -> tuple[Parameter, ...]:
    return parameters(backend)


class Op(Problem[S, Z], Kernels[S, Z]):
    """An operation of sparse attention: the one contract. One instance lives in ``ops/<name>/`` as ``OP``."""

    def work(self, spec: S, config: Config, case: Case[Z]) -> Cost:
        """What a config really does: operations on padded rows, and every byte its blocks load and store, again and again.

        Only the ranking without a GPU looks at it; an operation that says nothing is taken to do no more than it must.
        """
        return self.cost(spec, case)

    def violations(self, spec: S, config: Config, gpu: Gpu, bucket: Bucket | None = None) -> list[Violation]:
        """All graded violations: values outside the ranges, a GPU that is too old, then the op's own constraints.

        Args:
            bucket: the sizes that the config is to serve, which must be in its reach; None where none are meant.
        """
        strange = []
        for parameter in table(self, config.backend):
            if config[parameter.name] not in parameter.choices:
                allowed = ", ".join(map(str, parameter.choices))
                strange.append(Violation(parameter.name, 1.0, f"{parameter.name}: {config[parameter.name]}, not in {allowed}"))
        return strange or list(self._broken(spec, config, gpu, bucket))

    def _broken(self, spec: S, config: Config, gpu: Gpu, bucket: Bucket | None) -> Iterator[Violation]:
        """Of a config whose values are choices."""
        if gpu.capability < self.min_capability:
            reason = f"capability: sm_{self.min_capability} or newer needed, {gpu.name} is sm_{gpu.capability}"
            yield Violation("capability", 1.0, reason)
            return
        yield from self.constraints(spec, config, gpu)
        if bucket is not None:
            yield from self.reach(spec, config, bucket)
        yield from self._disorder(spec, config, gpu)

    def fitting(self, spec: S, backend: str, gpu: Gpu, bucket: Bucket | None = None) -> Fitting:
        """All configs of a backend that break no constraint and reach the bucket, in the order of their choices."""
        return Fitting(backend, table(self, backend), lambda config: self._broken(spec, config, gpu, bucket))

    def canonical(self, spec: S, gpu: Gpu) -> str:
        """The one order of summation of a batch-invariant spec on a GPU: that of the first guess which has one and fits.

        It follows from nothing else, neither from sizes nor from records, so that all ranks and all calls agree on it.

        Raises:
            NoConfig: no guess has one.
        """
        key = (self.name, spec, gpu)
        if key not in _CANONICAL:
            sizes = self.workloads(spec)[0].sizes
            fitting = (each for each in self.guesses(spec, sizes, gpu) if not any(self.constraints(spec, each, gpu)))
            orders = (self.order(spec, each) for each in fitting)
            found = next((order for order in orders if order is not None), None)
            if found is None:
                raise NoConfig(self.name, gpu.name, ["batch_invariant: no kernel adds this up in an order of its own"])
            _CANONICAL[key] = found
        return _CANONICAL[key]

    def _disorder(self, spec: S, config: Config, gpu: Gpu) -> Iterable[Violation]:
        """Where a spec is batch invariant: a config that adds up in another order than the spec's."""
        if not getattr(spec, "batch_invariant", False):
            return
        own = self.order(spec, config)
        wanted = self.canonical(spec, gpu)
        if own != wanted:
            named = "an order that depends on other rows" if own is None else own
            yield Violation("batch_invariant", 1.0, f"batch_invariant: sums are taken as {named}, the spec's are as {wanted}")

    def cases_for(self, spec: S, config: Config) -> Sequence[Case[Z]]:
        """All cases that a GPU verifies a config with, cut to what it reaches."""
        cases = (*self.cases(spec), *self.long_cases(spec))
        return list(dict.fromkeys(self.within_reach(spec, config, case) for case in cases))

    def default_config(self, spec: S, sizes: Z, gpu: Gpu, backend: str = "") -> Config:
        """What the dispatcher uses untuned, and where a search begins: the first guess that breaks no constraint.

        Args:
            backend: only its configs, where one is named.

        Raises:
            NoConfig: there is none, nor any other config.
        """
        bucket = sizes.bucket()
        for config in self.guesses(spec, sizes, gpu):
            if backend in ("", config.backend) and not self.violations(spec, config, gpu, bucket):
                return config
        fallback = "triton" if "triton" in self.backends else self.backends[0]  # the one that serves every GPU
        return self.seed_config(spec, backend or fallback, gpu, bucket)

    def seed_config(self, spec: S, backend: str, gpu: Gpu, bucket: Bucket | None = None) -> Config:
        """The first config of a backend, in the order of its choices, that breaks no constraint and reaches the bucket.

        Raises:
            NoConfig: there is none.
        """
        fitting = self.fitting(spec, backend, gpu, bucket)
        first = next(iter(fitting), None)
        if first is None:
            raise NoConfig(f"{self.name} ({backend})", gpu.name, fitting.reasons())
        return first

    def completed(self, spec: Mapping[str, Any]) -> dict[str, Scalar]:
        """A record's spec with the defaults of fields that are newer than the record; as it is where it is no spec any more."""
        try:
            return self.spec_type.from_dict(spec).to_dict()
        except SpecError:
            return dict(spec)

    def kin(self, spec: S, other: Mapping[str, Any]) -> bool:
        """Whether a record's completed spec differs from ``spec`` in minor fields only.

        What was searched in one order of summation alone is no measure for specs that are free of it.
        """
        own = spec.to_dict()
        if other.get("batch_invariant") and not own.get("batch_invariant"):
            return False
        return own.keys() == other.keys() and all(other[name] == own[name] for name in own.keys() - self.minor)

    def config(self, backend: str, values: Mapping[str, Any]) -> Config:
        """A config of untrusted values (a record, a command line), checked by name and type.

        Raises:
            UnknownName: the operation has no such backend.
            SpecError: a parameter is missing, unknown or has a value that is not one of its choices.
        """
        if backend not in self.backends:
            raise UnknownName(f"backend of {self.name}", backend, self.backends)
        table = {parameter.name: parameter for parameter in self.parameters(backend)}
        values = {**{name: each.before for name, each in table.items() if each.before is not None}, **values}
        for name in values.keys() ^ table.keys():
            raise SpecError(f"{self.name}.{backend}.{name}", values.get(name), f"exactly the parameters {', '.join(table)}")
        for name, parameter in table.items():
            kinds = {type(choice) for choice in parameter.choices}  # True equals 1, and renders as another text
            if values[name] not in parameter.choices or type(values[name]) not in kinds:
                raise SpecError(f"{self.name}.{backend}.{name}", values[name], ", ".join(map(str, parameter.choices)))
        return Config.of(backend, **values)
