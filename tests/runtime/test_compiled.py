"""The compiled module: made once, found again, mended; and whatever stands in its way is said and costs nothing but time."""

from __future__ import annotations

import os
import shutil
import stat
import sysconfig

import pytest

from dsa_codegen.command import doctor
from dsa_codegen.runtime import compiled

needs_compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty build cache, and nothing found yet."""
    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DSA_NATIVE", raising=False)
    compiled._found.cache_clear()
    yield tmp_path / "cache"
    compiled._found.cache_clear()


def again() -> tuple[bool, str]:
    """What a process that starts now would find."""
    compiled._found.cache_clear()
    return compiled.state()


@needs_compiler
def test_it_is_compiled_once(cache, monkeypatch):
    served, words = again()
    (file,) = cache.iterdir()
    assert served and words == str(file) and compiled.module().Hits
    monkeypatch.setattr(compiled, "_compile", lambda file: pytest.fail("once more"))
    assert again() == (True, words)


@needs_compiler
def test_a_broken_file_is_made_anew(cache):
    file = cache / compiled.file_name()
    cache.mkdir()
    file.write_bytes(b"not a library")
    assert again() == (True, str(file)) and file.stat().st_size > 10_000


@needs_compiler
def test_a_folder_of_builds_brings_it(cache, monkeypatch, tmp_path):
    """As for a machine without a compiler; one of another source makes way, one that does not load is passed by."""
    ahead = tmp_path / "builds"
    ahead.mkdir()
    (ahead / "hits-old.so").write_bytes(b"")
    again()
    compiled.copy_into(ahead)
    (file,) = ahead.iterdir()
    monkeypatch.setenv("DSA_BUILDS", str(ahead))
    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(compiled, "_compile", lambda file: pytest.fail("compiled"))
    assert again() == (True, str(file))
    monkeypatch.undo()
    monkeypatch.setenv("DSA_CACHE_DIR", str(cache))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / file.name).write_bytes(b"not a library")
    monkeypatch.setenv("DSA_BUILDS", str(broken))
    assert again() == (True, str(cache / file.name))


@needs_compiler
@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_it_can_be_refused(cache, monkeypatch, value):
    monkeypatch.setenv("DSA_NATIVE", value)
    assert again() == (False, "DSA_NATIVE says not to") and not cache.exists()


def test_without_a_compiler_it_says_so(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert again() == (False, "no C compiler: install gcc or clang, or name one in CC")
    assert compiled.module() is None and not list(cache.glob("*"))


def test_without_pythons_headers_it_says_so(cache, monkeypatch, tmp_path):
    known = sysconfig.get_config_var
    monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda: {"include": str(tmp_path / "nowhere")})
    if shutil.which("gcc"):
        assert again()[0]  # they are where Python itself says
    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(compiled.sysconfig, "get_config_var", lambda name: "/none" if name == "INCLUDEPY" else known(name))
    served, words = again()
    assert not served and words.endswith("nowhere or /none: install python3-dev")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no room >&2; exit 3", "failed: no room"),
        ("exit 0", "No such file"),
        ("kill -9 $$", "failed"),
        (None, "No such file"),
    ],
)
def test_a_compiler_that_fails_is_named(cache, monkeypatch, tmp_path, script, words):
    compiler = tmp_path / "cc-of-the-test"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", f"{compiler} -pipe")
    served, said = again()
    assert not served and words in said and not list(cache.glob("*"))


def test_a_python_without_a_lock_is_not_served(cache, monkeypatch):
    values = {"Py_GIL_DISABLED": 1}
    known = sysconfig.get_config_var
    monkeypatch.setattr(compiled.sysconfig, "get_config_var", lambda name: values.get(name, known(name)))
    assert again() == (False, "this Python runs without a global lock")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_cache_that_cannot_be_written_is_said(cache):
    cache.mkdir()
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    served, words = again()
    assert not served and "Permission denied" in words


def test_the_doctor_says_which_way_calls_go(cache, monkeypatch):
    monkeypatch.setenv("DSA_NATIVE", "0")
    (finding,) = (each for each in doctor.diagnose() if each.what == "calls")
    assert finding.ok and finding.state == "in Python: DSA_NATIVE says not to"
