"""Peer: what an adapter says of somebody else's implementation."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import ClassVar

from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared


class Peer(ABC):
    """An implementation that people run today. Its library is used where it can be imported and is never required."""

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]
    """The stages that it serves, in some cases at least."""
    distributions: ClassVar[tuple[str, ...]] = ()
    """The libraries, as the package index knows them; their versions are noted."""

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
        found = {}
        for name in self.distributions:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found
