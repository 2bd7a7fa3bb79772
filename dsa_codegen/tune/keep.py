"""Keep: a winner's build goes from the run's cache to the user's, so that the first call that needs it need not compile."""

from __future__ import annotations

import shutil
import uuid

from .. import paths
from ..kernels.build import Built


def keep(built: Built) -> None:
    """Copy a build, unless it is there; a cache that cannot be written costs a later call its compilation, nothing else."""
    target = paths.cache() / built.folder.name
    if target.exists():
        return
    staging = target.with_name(f".staging-{uuid.uuid4().hex}")
    try:
        shutil.copytree(built.folder, staging)
        staging.rename(target)
    except OSError:  # another process was first, or the cache cannot be written: it is compiled when it is needed
        shutil.rmtree(staging, ignore_errors=True)
