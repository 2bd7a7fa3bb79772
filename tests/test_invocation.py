"""What messages tell a user to type is what works where the user is."""

from __future__ import annotations

import pytest

from dsa_codegen import invocation


@pytest.mark.parametrize(
    ("called", "checkout", "command"),
    [
        ("/usr/bin/dsa", True, "dsa"),
        ("cli.py", False, "python cli.py"),
        ("/x/dsa_codegen/__main__.py", False, "python -m dsa_codegen"),
        ("serve.py", True, "python cli.py"),
        ("serve.py", False, "dsa"),
    ],
)
def test_the_command_is_the_one_that_the_user_has(monkeypatch, called, checkout, command):
    monkeypatch.setattr("sys.argv", [called, "tune"])
    monkeypatch.setattr("dsa_codegen.paths.is_checkout", lambda: checkout)
    assert invocation.command() == command


def test_an_extra_of_a_wheel_is_named_by_what_it_asks_for(monkeypatch):
    stated = [
        "torch>=2.11",
        "optuna<6,>=5; extra == 'tune'",
        'dsa-codegen[tune]; extra == "bench"',
        "matplotlib>=3.9; extra == 'bench'",
    ]
    monkeypatch.setattr("dsa_codegen.paths.is_checkout", lambda: False)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: stated)
    assert invocation.install("bench") == "pip install 'optuna<6,>=5' 'matplotlib>=3.9'"
    monkeypatch.setattr("dsa_codegen.paths.is_checkout", lambda: True)
    assert invocation.install("bench") == "pip install -e '.[bench]'"
