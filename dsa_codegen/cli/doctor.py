"""``doctor``: what this machine has and lacks."""

from __future__ import annotations

from ..bench import installed
from ..command import doctor as diagnosis
from ..command import show
from . import consoles, options


def doctor(as_json: options.Json = False) -> None:
    """Say what is here (GPU, compilers, records), what is missing and how to get it."""
    findings = [*diagnosis.diagnose(), *installed.findings()]
    consoles.show(as_json, show.findings(findings), [vars(finding) for finding in findings])
