"""Kernels of sparse MLA decode, a file for each backend: which serves when, and what all of them share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import ModuleType

from ...gpu import Gpu
from ...problem.op import Config, Inputs, Kernels, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.paged import scales_of
from ...problem.values import Bucket, Scalar
from . import alone, clusters, columns, entries, flat, gluon, rounds, shared, stream, triton
from .problem import AttentionPagedSizes, AttentionPagedSpec
from .turns import in_turns

_CUDA = (
    *gluon.PARAMETERS,
    entries.SHARERS,
    columns.COLUMNS,
    stream.PLACERS,
    rounds.HEAD_ROUNDS,
    rounds.TILE_TOKENS,
    Parameter(
        "flat", (False, True), "whether prefill's kernels attend to BF16 rows, which an FP8 cache is read back to", before=False
    ),
    Parameter("interleave", (False, True), "as in attention, of which flat rows are", before=False),
    Parameter("sweep", (False, True), "as in attention, of which flat rows are", before=False),
)
_PARAMETERS = {"cuda": _CUDA, "gluon": gluon.PARAMETERS, "triton": triton.PARAMETERS}
_CLUSTERS = Config.of(
    "cuda",
    splits=0,
    sharers=0,
    columns=0,
    placers=0,
    head_rounds=0,
    tile_tokens=rounds.TILES[-1],
    flat=False,
    interleave=False,
    sweep=False,
)
_FLAT = _CLUSTERS.replace(flat=True)


class AttentionPagedKernels(Kernels[AttentionPagedSpec, AttentionPagedSizes]):
    """See the module's first lines."""

    backends = ("cuda", "gluon", "triton")
    budgeted = True

    def parameters(self, backend: str) -> tuple[Parameter, ...]:
        return _PARAMETERS[backend]

    def constraints(self, spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "cuda" and not _streams(config):
            yield from exceeds("placers beside other designs", config["placers"], 0)
        if config.backend == "cuda" and not _in_rounds(config):
            yield from exceeds("tile_tokens beside other designs", rounds.TILES[-1], config["tile_tokens"])
        yield from self._of_design(spec, config, gpu)

    def _of_design(self, spec: AttentionPagedSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
        if config.backend == "gluon":
            return gluon.constraints(spec, gpu)
        if config.backend == "triton":
            return triton.constraints(spec, config, gpu)
        if config["head_rounds"]:
            return rounds.constraints(spec, config, gpu)
        if config["columns"]:
            return (columns if config["sharers"] else stream).constraints(spec, config, gpu)
        if config["sharers"]:
            return (alone if config["sharers"] == 1 else entries).constraints(spec, config, gpu)
        return flat.constraints(spec, config, gpu) if config["flat"] else clusters.constraints(spec, config, gpu)

    def reach(self, spec: AttentionPagedSpec, config: Config, bucket: Bucket) -> Iterable[Violation]:
        if _is_alone(config):
            return ()
        if _shares(config):
            return _sharing(config).reach(spec, config, bucket)
        if _in_rounds(config):
            return rounds.reach(spec, config, bucket)
        return flat.reach(spec, bucket) if _is_flat(config) else ()

    def order(self, spec: AttentionPagedSpec, config: Config) -> str | None:
        """A row's entries tile by tile, in as many parts as the config says; by the number of rows where it says none."""
        if config.backend == "triton":
            return "-".join(["triton", *(str(config[name]) for name in triton.ORDER)])
        if _is_flat(config):
            return flat.order(spec, config)
        if _is_alone(config):
            return "cuda-alone" if spec.batch_invariant else None
        if _shares(config):
            return f"cuda-sharers-{config['sharers']}" + (f"-{config['columns']}" if config["columns"] else "")
        if _in_rounds(config):
            return f"cuda-rounds-{config['head_rounds']}-{config['tile_tokens']}"
        if _streams(config):
            name = "roles" if config["placers"] else "columns"
            return f"cuda-{name}-{config['columns']}-{config['splits']}" if config["splits"] else None
        return f"{config.backend}-{config['splits']}" if config["splits"] else None

    def guesses(self, spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> Iterable[Config]:
        if flat.is_first_choice(spec, sizes):
            if flat.sweeps(spec, sizes):
                yield _FLAT.replace(sweep=True)
            yield _FLAT.replace(interleave=flat.interleaves(spec, sizes))
        if not spec.batch_invariant:
            yield from _few_rows(spec, sizes, gpu)
        splits = shared.fixed_splits(spec) if spec.batch_invariant else 0
        # One order serves all sizes: that of clusters where Gluon's do not.
        if spec.general if spec.batch_invariant else clusters.pay(spec, sizes, gpu):
            yield _CLUSTERS.replace(splits=splits)
        # On an H100 at batch 64 with 128 heads: 101 µs against Triton's 194.
        yield gluon.CONFIG.replace(splits=splits)
        yield from triton.guesses(spec, sizes, gpu)

    def derived(self, spec: AttentionPagedSpec, config: Config) -> dict[str, Scalar]:
        layout = spec.layout
        names: dict[str, Scalar] = {
            "general": spec.general,
            "scales": scales_of(layout),
            "d_nope": layout.d_nope,
            "d_rope": layout.d_rope,
            "d_v": layout.d_v,
            **shared.places_of(layout),
        }
        if config.backend == "cuda":
            if config["head_rounds"]:
                return names | rounds.derived(spec, config)
            if _is_alone(config):
                return names | alone.derived(spec)
            if config["sharers"]:
                return names | _sharing(config).derived(spec, config)
            if config["columns"]:
                return names | stream.derived(spec, config)
            return names | (flat.derived(spec, config) if config["flat"] else clusters.derived(spec))
        return names | (gluon.derived(spec) if config.backend == "gluon" else triton.derived(spec, config))

    def launches(
        self, spec: AttentionPagedSpec, config: Config, inputs: Inputs, outputs: Outputs, gpu: Gpu
    ) -> Sequence[Launch]:
        rows = math.prod(inputs["q"].shape[:2])
        if not rows:
            return ()
        if shared.no_slots(spec, inputs):
            outputs["out"].zero_()
            outputs["lse"].fill_(-math.inf)
            return ()
        if spec.batch_invariant and config["splits"] > shared.most_splits(spec, rows):
            turns = in_turns(inputs, outputs, shared.rows_of_turn(spec, config["splits"]))
            return [launch for turn in turns for launch in self.launches(spec, config, *turn, gpu)]
        if _is_alone(config):
            return alone.launches(spec, inputs, outputs, gpu)
        if _shares(config):
            return _sharing(config).launches(spec, config, inputs, outputs)
        if _in_rounds(config):
            return rounds.launches(spec, config, inputs, outputs)
        if _streams(config):
            return stream.launches(spec, config, inputs, outputs, gpu)
        design = {"cuda": clusters.launches, "gluon": gluon.launches, "triton": triton.launches}[config.backend]
        return (flat.launches if _is_flat(config) else design)(spec, config, inputs, outputs, gpu)


def _few_rows(spec: AttentionPagedSpec, sizes: AttentionPagedSizes, gpu: Gpu) -> Iterable[Config]:
    if rounds.fill(spec, sizes, gpu):
        yield _CLUSTERS.replace(head_rounds=1, tile_tokens=rounds.TILES[0])
    heads, placers = stream.best(spec, sizes)
    if heads:
        yield _CLUSTERS.replace(columns=heads, placers=placers)
    sharers, heads = columns.best(spec, sizes, gpu)
    if sharers:
        yield _CLUSTERS.replace(sharers=sharers, columns=heads)
        return
    head_rounds, tokens = rounds.best(spec, sizes, gpu)
    if head_rounds:
        yield _CLUSTERS.replace(head_rounds=head_rounds, tile_tokens=tokens)
    elif alone.best(spec, sizes):
        yield _CLUSTERS.replace(sharers=1)
    elif sharers := entries.best(spec, sizes, gpu):
        yield _CLUSTERS.replace(sharers=sharers)


def _is_flat(config: Config) -> bool:
    return config.backend == "cuda" and bool(config["flat"])


def _in_rounds(config: Config) -> bool:
    return config.backend == "cuda" and bool(config["head_rounds"])


def _streams(config: Config) -> bool:
    return config.backend == "cuda" and bool(config["columns"]) and not config["sharers"]


def _shares(config: Config) -> bool:
    return config.backend == "cuda" and bool(config["sharers"])


def _is_alone(config: Config) -> bool:
    return _shares(config) and config["sharers"] == 1 and not config["columns"]


def _sharing(config: Config) -> ModuleType:
    return columns if config["columns"] else entries
