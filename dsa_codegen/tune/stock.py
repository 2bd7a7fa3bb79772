"""Stock: what tuning runs compiled, kept for the next run on this machine within a limit; the folder is one for all runs."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

LIMIT = 2 << 30
"""Bytes: some thousand builds, of 30 to 600 kB each."""
_IN_USE_S = 3600.0  # what was used within the last hour another run may be about to load


def used(build: Path) -> None:
    """Note that a build is of use."""
    try:
        os.utime(build)
    except OSError:  # another user's, or gone: then it is compiled again
        return


def trim(folder: Path, limit: int = LIMIT, in_use_s: float = _IN_USE_S) -> None:
    """Remove the builds that were used longest ago until the others take no more than ``limit`` bytes."""
    now = time.time()
    builds = sorted((build for build in folder.glob("*") if build.is_dir()), key=_last_used, reverse=True)
    total = 0
    for build in builds:
        total += sum(file.stat().st_size for file in build.rglob("*") if file.is_file())
        if total > limit and now - _last_used(build) > in_use_s:
            shutil.rmtree(build, ignore_errors=True)


def _last_used(build: Path) -> float:
    try:
        return build.stat().st_mtime
    except OSError:
        return 0.0
