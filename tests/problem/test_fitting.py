"""Configs that fit are those of asking about each, in the same order, whatever a constraint looks at before it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import NoConfig
from dsa_codegen.gpu import resolve
from dsa_codegen.problem.config import Config, Parameter, Violation, exceeds
from dsa_codegen.problem.fitting import Fitting

from support import H200, of_preset

TABLE = (
    Parameter("tile", (64, 128, 256), "of a block"),
    Parameter("warps", (4, 8), "of a block"),
    Parameter("design", ("plain", "ring"), "how"),
    Parameter("stages", (2, 3, 4, 5), "of a ring"),
)


def points(table: tuple[Parameter, ...]) -> Iterator[Config]:
    for values in itertools.product(*(parameter.choices for parameter in table)):
        yield Config.of("triton", **dict(zip((parameter.name for parameter in table), values, strict=True)))


def by_index(config: Config) -> Iterator[Violation]:
    if config["design"] == "ring":
        yield from exceeds("smem", config["tile"] * config["stages"], 512)
    else:
        yield from exceeds("stages of no ring", config["stages"], 2)
    yield from exceeds("rows of a warp", config["tile"] / config["warps"], 32)


def by_list(config: Config) -> list[Violation]:
    values = config.to_dict()
    return list(exceeds("tile", values["tile"] * values["warps"], 600))


def by_hash(config: Config) -> list[Violation]:
    known = {Config.of("triton", tile=64, warps=4, design="plain", stages=3)}
    return [] if config in known else [Violation("unknown", 1.0, "unknown")]


def by_copy(config: Config) -> list[Violation]:
    return list(by_index(config.replace(stages=2)))


@pytest.mark.parametrize("broken", [by_index, by_list, by_hash, by_copy])
def test_what_fits_is_what_breaks_nothing(broken):
    found = list(Fitting("triton", TABLE, broken))
    assert found == [config for config in points(TABLE) if not list(broken(config))]
    assert 0 < len(found) < 48
    assert {type(config) for config in found} == {Config}


def test_a_second_iteration_finds_the_same():
    fitting = Fitting("triton", TABLE, by_index)
    assert next(iter(fitting)) == next(iter(list(fitting)))
    assert list(fitting) == list(fitting)


def test_what_is_refused_without_a_look_is_asked_about_once():
    asked = []

    def never(config: Config) -> Iterator[Violation]:
        asked.append(config)
        yield Violation("capability", 1.0, "never")
        yield from by_index(config)

    fitting = Fitting("triton", TABLE, never)
    assert not list(fitting) and len(asked) == 1
    assert fitting.reasons() == ["never"]


def test_what_holds_for_some_choices_alone_is_no_reason():
    """Here of every config that is asked about first: the others are known by then."""

    def broken(config: Config) -> Iterator[Violation]:
        yield from exceeds("warps", config["warps"], 0)
        yield from exceeds("tile", 65, config["tile"])

    fitting = Fitting("triton", TABLE, broken)
    assert not list(fitting)
    assert sorted(fitting.reasons()) == ["warps: 4 needed, 0 allowed", "warps: 8 needed, 0 allowed"]


@pytest.mark.parametrize("op", [op for op in ops.all_ops().values() if not op.training], ids=lambda op: op.name)
def test_every_operation_says_what_it_says_without_a_search(op):
    for spec in op.options(of_preset(op)[0]):
        for backend in op.backends:
            table = op.parameters(backend)
            every = points_of(backend, table, most=3000)
            if every is None:
                continue
            assert list(op.fitting(spec, backend, H200)) == [each for each in every if not op.violations(spec, each, H200)]


def points_of(backend: str, table: tuple[Parameter, ...], most: int) -> list[Config] | None:
    """All configs of a space, where it is small."""
    names = [parameter.name for parameter in table]
    every = list(itertools.islice(itertools.product(*(parameter.choices for parameter in table)), most + 1))
    return None if len(every) > most else [Config.of(backend, **dict(zip(names, values, strict=True))) for values in every]


def test_a_reason_that_no_choice_changes_is_told_alone():
    op = ops.get("attention_paged")
    spec = of_preset(op)[0]
    with pytest.raises(NoConfig) as error:
        op.seed_config(spec, "cuda", resolve("A100"))
    assert error.value.reasons == ("capability: the CUDA template is Hopper's, NVIDIA A100 is sm_80",)
