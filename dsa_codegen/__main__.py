"""``python -m dsa_codegen``: the same app as the installed command ``dsa``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
