"""``list``: the records that are here, and which of them serve."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import gpu as gpus
from ..command import show
from ..invocation import command
from ..records import listing
from . import consoles, options


def list_records(gpu: Annotated[str, typer.Option("--gpu", help="Only this GPU.")] = "", as_json: options.Json = False) -> None:
    """Show what tuned/ holds (and DSA_TUNED_DIR, where it is set), and which records serve calls."""
    wanted = gpus.resolve(gpu).id if gpu else ""
    found = list(listing.listing(wanted))
    serving = sum(each.status == listing.SERVES for each in found)
    head = f"{len(found)} records, {serving} serve calls of their GPU"
    if not found:
        head = f"no records; {command()} tune --gpu {wanted or 'auto'} makes some"
    rows = [{**show.record_row(each.record), "status": each.status, "why": each.why} for each in found]
    consoles.show(as_json, show.listed(found, head), rows)
