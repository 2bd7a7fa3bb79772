"""A Postgres server of a test's own: in a temporary folder, reached by a socket there, gone with the test."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PLACES = ("/usr/lib/postgresql", "/opt/homebrew/opt")


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server that runs while the block does; skips the test where no Postgres is installed."""
    pytest.importorskip("psycopg2", reason="psycopg2 reaches Postgres")
    initdb, postgres = (_tool(name) for name in ("initdb", "postgres"))
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name  # Postgres refuses to run as root
    options = {"user": user} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="dsa-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if options:
            shutil.chown(folder, user)
        subprocess.run(
            [initdb, "-D", folder / "data", "-A", "trust", "-N"], check=True, capture_output=True, cwd="/", **options
        )
        command = [postgres, "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/", **options)
        try:
            for line in process.stderr:
                if "ready to accept connections" in line:
                    break
            assert process.poll() is None, "the server did not start"
            yield f"postgresql+psycopg2://{user}@/postgres?host={folder}"
        finally:
            process.kill()
            process.wait()


def _tool(name: str) -> str:
    found = shutil.which(name) or next((str(path) for place in _PLACES for path in Path(place).glob(f"*/bin/{name}")), None)
    return found or pytest.skip(f"needs a Postgres server; there is no {name}")
