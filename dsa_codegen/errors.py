"""One class per mistake a user can make; every message says what came, what is allowed and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .invocation import command


class DsaError(Exception):
    """Base of all errors this package raises for its users."""


class SpecError(DsaError, ValueError):
    """A spec, preset or tuning parameter states something that no kernel can serve."""

    def __init__(self, field: str, got: object, allowed: str) -> None:
        super().__init__(f"{field} = {got!r} is not possible; allowed: {allowed}.")
        self.field, self._got, self.allowed = field, got, allowed

    def inside(self, owner: str, remedy: str) -> SpecError:
        """The same of a field of ``owner``, and what to do instead."""
        return SpecError(f"{owner}.{self.field}", self._got, f"{self.allowed}; {remedy}")


class InputError(DsaError, ValueError):
    """A tensor or scalar argument of an operation has a wrong shape, dtype, device, stride or range."""

    def __init__(self, argument: str, got: object, allowed: str) -> None:
        super().__init__(f"{argument}: got {got}; expected {allowed}.")
        self.argument, self._got, self._allowed = argument, got, allowed

    def renamed(self, names: Mapping[str, str]) -> InputError:
        """The same of the argument's public name, where it has another one."""
        return InputError(names.get(self.argument, self.argument), self._got, self._allowed)


class UnknownName(DsaError, KeyError):
    """A name (operation, backend, preset, GPU) that the package does not know."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.message = f"unknown {kind} {name!r}; known: {', '.join(known)}."
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class NoGpu(DsaError, RuntimeError):
    """Something needs a CUDA device and there is none."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} needs a CUDA GPU and none is visible; `{command()} doctor` says what is missing, and generate, "
            "verify, tune and explain work without one for the GPU that you name (--gpu H100)."
        )


class ToolMissing(DsaError, RuntimeError):
    """A compiler or package that this step needs is not installed."""

    def __init__(self, tool: str, remedy: str) -> None:
        self._say(f"{tool} was not found", remedy)

    def _say(self, state: str, remedy: str) -> None:
        self.state, self.remedy = state, remedy
        super().__init__(f"{state}; {remedy}.")


class ToolBroken(ToolMissing):
    """A compiler or package is installed and cannot be used: a library of its own is missing, it does not fit this machine."""

    def __init__(self, tool: str, reason: str, remedy: str) -> None:
        self._say(f"{tool} is installed but does not work ({reason})", remedy)


class BuildError(DsaError, RuntimeError):
    """A rendered kernel did not compile."""

    def __init__(self, kernel: str, reason: str) -> None:
        super().__init__(f"{kernel} did not compile: {reason}")
        self.reason = reason


class CaptureError(DsaError, RuntimeError):
    """A kernel that is not built yet was asked for while a CUDA graph is being captured."""

    def __init__(self, op: str) -> None:
        super().__init__(
            f"{op}: this spec and size bucket is not built, and nothing may compile while a CUDA graph is captured; "
            "call dsa_codegen.warmup(...) (or run the step once) before the capture."
        )


class RecordError(DsaError, ValueError):
    """A record in tuned/ cannot be read; it counts as a miss and is never overwritten."""


class PrebuiltError(DsaError, RuntimeError):
    """A folder of kernels built ahead cannot serve here: other sources, another architecture, a part that is missing."""

    def __init__(self, folder: object, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(f"kernels built ahead in {folder}: {reason}; {remedy}, or unset DSA_BUILDS.")


class OverrideError(DsaError, ValueError):
    """The file that DSA_OVERRIDES names, or an entry of it, pins what cannot be."""

    def __init__(self, path: object, number: int, reason: str) -> None:
        where = f", entry {number}" if number else ""
        super().__init__(f"overrides in {path}{where}: {reason}; correct the file, or unset DSA_OVERRIDES.")
        self.reason = reason


class NoConfig(DsaError, RuntimeError):
    """No configuration of any backend fits the spec on this GPU."""

    def __init__(self, op: str, gpu: str, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        why = "; ".join(self.reasons) or "nothing to choose from"
        super().__init__(f"no configuration of {op} fits {gpu}: {why}. Another GPU (--gpu) or other fields of the spec may.")
