"""Installed: which libraries of peers are here, and of which version; what ``doctor`` says of them."""

from __future__ import annotations

from collections.abc import Iterator

from ..command.doctor import Finding
from . import peers


def findings() -> Iterator[Finding]:
    """A line for every library that is here, with the peers that come of it, and one for all others."""
    found = peers.load(peers.sources())
    here = {name: version for peer in found for name, version in peer.versions().items()}
    wanted = sorted({name for peer in found for name in peer.distributions})
    for name in (name for name in wanted if name in here):
        served = dict.fromkeys(peer.name for peer in found if name in peer.distributions)
        yield Finding(f"peer {name}", f"{here[name]}: {', '.join(served)}", True)
    missing = [name for name in wanted if name not in here]
    if missing:
        yield Finding("peers not installed", f"{', '.join(missing)} (for bench --against; docs/benchmark.md says how)", True)
