"""``build``: a folder of a model's kernels, whole, compiled without the GPU that they are for."""

from __future__ import annotations

import json

import pytest

from dsa_codegen.command import prebuild
from dsa_codegen.errors import BuildError, SpecError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.build import whole
from dsa_codegen.kernels.render import render
from dsa_codegen.problem import presets
from dsa_codegen.records.lookup import lookup
from dsa_codegen.runtime import compiled, prebuilt

from command_line import cli

H100 = resolve("H100")
CALLS = prebuild.calls(presets.preset("tiny"), H100, ["quantize"])
FIRST, OTHER = CALLS[0], next(call for call in CALLS if call[1] != CALLS[0][1])


def test_the_command_writes_a_folder_that_opens(tmp_path):
    command = ["build", "--preset", "tiny", "--op", "quantize", "--gpu", "H100", "--out", "builds", "--json"]
    shown = cli(*command, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    rows = json.loads(shown.stdout)
    builds = prebuilt.opened(tmp_path / "builds")
    assert len(rows) == len(CALLS) == len(builds.entries)
    for op, spec, sizes in CALLS:
        entry = builds.entries[prebuilt.key_of(op.name, spec, sizes.bucket())]
        config = lookup(op, spec, sizes, H100).config
        assert (entry.config, entry.source_sha) == (config, render(op, spec, config).sha)
        assert whole(entry.folder)["arch"] == "sm_90a"


def test_what_an_earlier_run_left_makes_way_and_nothing_else(tmp_path):
    (tmp_path / "notes").mkdir()
    (first,) = prebuild.prebuild([FIRST], H100, tmp_path)
    (other,) = prebuild.prebuild([OTHER], H100, tmp_path)
    assert first.built.folder.name != other.built.folder.name
    left = {"notes", "index.json", other.built.folder.name}
    assert {path.name for path in tmp_path.iterdir()} == left | ({compiled.file_name()} if compiled.module() else set())


def test_a_spoilt_copy_is_copied_again(tmp_path):
    (done,) = prebuild.prebuild([FIRST], H100, tmp_path)
    copy = tmp_path / done.built.folder.name
    next(copy.glob("*.cubin")).write_bytes(b"")
    assert whole(copy) is None
    prebuild.prebuild([FIRST], H100, tmp_path)
    assert whole(copy) is not None


def test_a_config_that_does_not_build_gives_way_as_in_dispatch(tmp_path, monkeypatch):
    op, spec, sizes = FIRST
    config, plain = lookup(op, spec, sizes, H100).config, prebuild.build
    refused = render(op, spec, config)
    warps = next(value for value in (2, 4, 8) if value != config["num_warps"])
    other = config.replace(num_warps=warps)

    def build(rendered, gpu):
        if rendered.sha == refused.sha:
            raise BuildError("quantize", "a compiler of another day")
        return plain(rendered, gpu)

    monkeypatch.setattr(prebuild, "build", build)
    monkeypatch.setattr(prebuild, "stand_ins", lambda *args: [])
    with pytest.raises(BuildError, match="another day"):  # nothing stands in: said, and no index is written
        prebuild.prebuild([FIRST], H100, tmp_path)
    assert not (tmp_path / "index.json").exists()
    monkeypatch.setattr(prebuild, "stand_ins", lambda *args: [other])
    (done,) = prebuild.prebuild([FIRST], H100, tmp_path)
    assert (done.config, done.origin) == (other, prebuild.STAND_IN)
    (entry,) = prebuilt.opened(tmp_path).entries.values()
    assert entry.config == other


def test_the_build_cache_is_no_place_for_it(build_cache):
    with pytest.raises(SpecError, match="this is the build cache"):
        prebuild.prebuild([FIRST], H100, build_cache)
