"""Peer: what an adapter says of somebody else's implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from ...problem.op import Inputs
from ..agreement import PEER_SIMILARITY
from ..cases import BenchCase
from ..stage import Prepared
from .libraries import version_of


class Peer(ABC):
    """An implementation that people run today. Its library is used where it can be imported and is never required.

    What stands here is said by the class, or by each of its objects where one class serves several names.
    """

    name: str
    stages: tuple[str, ...]
    """The stages that it serves, in some cases at least."""
    distributions: tuple[str, ...] = ()
    """The libraries, as the package index knows them; their versions are noted."""
    files: ClassVar[Mapping[str, str]] = {}
    """For a library that may have been carried without its metadata: a file of it, as ``package/path``."""
    deterministic: bool = True
    """Whether the same inputs give the same result on every call; of a selection: the same set."""
    ordered: bool | None = None
    """Whether chosen tokens come in ascending order; None where nothing is chosen."""
    similarity: ClassVar[float] = PEER_SIMILARITY
    """What its outputs may differ from the reference by."""

    @abstractmethod
    def available(self) -> str | None:
        """Why it cannot be used here; None where it can."""

    @abstractmethod
    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        """Make ready for one set of inputs, with everything done beforehand that its users do beforehand.

        Returns:
            None where it does not serve the case. The label says where the case had to be padded.
        """

    def build_key(self, case: BenchCase) -> Hashable | None:
        """What it compiles for on the first call: cases of one key compile once. None: nothing."""
        return None

    def versions(self) -> dict[str, str]:
        """The installed versions of its libraries."""
        found = {name: version_of(name, self.files.get(name, "")) for name in self.distributions}
        return {name: version for name, version in found.items() if version is not None}

    def facts(self) -> dict[str, Any]:
        """What a row says of it: of which version it is, and what its users may count on."""
        version = ", ".join(f"{name} {version}" for name, version in self.versions().items())
        return {"version": version, "deterministic": self.deterministic, "ordered": self.ordered}

    def reason(self) -> str | None:
        """``available``, whatever a foreign library does when it is looked at."""
        try:
            return self.available()
        except Exception as error:
            return f"cannot be looked at: {type(error).__name__}: {error}"[:200]
