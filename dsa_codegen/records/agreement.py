"""All ranks of a job choose from one set of records, though their files may differ: one reads, the others follow."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from .lookup import follow, search_path

Texts = Mapping[str, Mapping[str, str]]
"""Origin -> path below its folder -> the file's text."""


def broadcast(group: dist.ProcessGroup | None = None, source: int = 0) -> int:
    """Let every rank of a group look records up in what one of them has; called by all, before the first call or ``warmup``.

    A file that is being written, or an image that is older on one host, would otherwise let ranks choose other kernels, whose
    results may differ in their last bits. Later changes of files are not seen; what a rank has loaded before stays loaded until
    ``dsa_codegen.reset()``. Configs pinned by hand (``DSA_OVERRIDES``) and kernels built ahead are each rank's own.

    Args:
        group: by default all processes. Its backend must carry Python objects: gloo, or NCCL with a current device.
        source: the rank, among all processes, whose records count.

    Returns:
        How many files all ranks now look at.
    """
    held: list[Texts | None] = [_texts(search_path()) if dist.get_rank() == source else None]
    dist.broadcast_object_list(held, source, group)
    texts = held[0]
    assert texts is not None  # the source sent them
    follow(_written(texts))
    return sum(map(len, texts.values()))


def _texts(folders: Mapping[str, Path]) -> Texts:
    return {
        origin: {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.glob("*/*.json"))}
        for origin, folder in folders.items()
    }


def _written(texts: Texts) -> dict[str, Path]:
    """The texts as files of this process alone, which go when it ends."""
    root = Path(tempfile.mkdtemp(prefix="dsa-records-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for origin, files in texts.items():
        (root / origin).mkdir()
        for name, text in files.items():
            path = root / origin / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return {origin: root / origin for origin in texts}
