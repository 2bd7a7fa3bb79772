"""Default: what tells the default that a record was timed beside from another one that would serve today."""

from __future__ import annotations

import hashlib
import json

from ..errors import NoConfig
from ..gpu import Gpu
from ..kernels.render import code_values, render
from ..problem.op import Config, Op
from ..problem.values import Sizes, Spec
from .record import GpuKey, Record

_TRITON = "3.6.0"
"""Texts are compared as they read for this Triton, whichever is installed: a newer one makes no other default."""


def default_of(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu) -> Config | None:
    """The config that serves these sizes untuned; None where there is none."""
    try:
        return op.default_config(spec, sizes, gpu)
    except NoConfig:
        return None


def still_default(op: Op, record: Record, gpu: Gpu) -> bool:
    """Whether the default that a record was timed beside is today's, as far as the record and this GPU can tell."""
    if not record.default_sha or record.gpu != GpuKey.of(gpu):
        return True
    spec, sizes = op.spec_type.from_dict(record.spec), op.sizes_type.from_dict(record.sizes)
    return default_sha(op, spec, default_of(op, spec, sizes, gpu)) == record.default_sha


def default_sha(op: Op, spec: Spec, config: Config | None) -> str:
    """sha256 of a default's rendered code and of what its config says beyond that, of the launch; empty where there is none."""
    if config is None:
        return ""
    code = code_values(op, config)
    launch = {name: value for name, value in config.values if name not in code}
    return hashlib.sha256(f"{render(op, spec, config, _TRITON).sha} {json.dumps(launch, sort_keys=True)}".encode()).hexdigest()
