"""Publish a text file whole: whoever reads it sees the old or the new content, never a part, whatever happens meanwhile."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def publish(path: Path, text: str) -> None:
    """Replace a file's content by a temporary file, fsync and an atomic rename; writers that merge hold a lock of their own."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from a team
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
