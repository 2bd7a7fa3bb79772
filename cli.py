#!/usr/bin/env python3
"""The command line of a checkout: the same app as the installed command ``dsa``."""

from __future__ import annotations

from dsa_codegen.cli import main

if __name__ == "__main__":
    main()
