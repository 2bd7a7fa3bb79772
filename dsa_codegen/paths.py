"""Where templates, shipped records and the build cache lie, from a checkout and from an installed wheel alike."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries templates/ and tuned/ inside the package; a checkout keeps them beside it, where people edit them.
_DATA = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent


def is_checkout() -> bool:
    """Whether this is a checkout (or an editable install of one) and no wheel."""
    return _DATA != _PACKAGE / "_data"


def templates() -> Path:
    """The folder of ``<op>/<backend>.py.jinja``."""
    return _DATA / "templates"


def shipped_records() -> Path:
    """The folder of the records that came with the package."""
    return _DATA / "tuned"


def user_records() -> Path | None:
    """The folder ``DSA_TUNED_DIR`` names, looked up before the shipped records; None when unset."""
    folder = os.environ.get("DSA_TUNED_DIR")
    return Path(folder) if folder else None


def sources() -> dict[str, Path]:
    """The folders, by name, whose files decide what is built and how it is launched."""
    return {"templates": templates(), **{wing: _PACKAGE / wing for wing in ("kernels", "ops", "problem")}}


def prebuilt() -> Path | None:
    """The folder of kernels built ahead that ``DSA_BUILDS`` names; None when unset."""
    folder = os.environ.get("DSA_BUILDS")
    return Path(folder) if folder else None


def overrides() -> Path | None:
    """The file of configs pinned by hand that ``DSA_OVERRIDES`` names; None when unset."""
    file = os.environ.get("DSA_OVERRIDES")
    return Path(file) if file else None


def cache() -> Path:
    """The build cache: ``DSA_CACHE_DIR``, by default ``dsa_codegen`` in the user's cache folder."""
    folder = os.environ.get("DSA_CACHE_DIR")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsa_codegen"


def unwritable(folder: Path) -> str:
    """Why files cannot be put into a folder, which may have to be made first; empty where they can. Nothing stays behind."""
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return ""
    except OSError as error:
        return f"{nearest}: {error.strerror}"
