"""Control: one kernel that two libraries ship, timed as two contestants: what their times differ by, no speed makes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .labels import Row

_TWINS = ("FlashMLA", "sgl-flash-mla")
"""The same prefill kernel; one library launches two small ones behind it, 10 µs of whatever a call takes."""
_STAGES = ("attention_prefill", "attention_prefill_paged")
_LONG_US = 1000.0


def differences(rows: Sequence[Row]) -> list[float]:
    """The share by which the second differs from the first, of each case in which both prefill for a millisecond or longer."""
    first, second = _TWINS
    pairs = [
        (row["peers"].get(name.replace(second, first)), us)
        for row in rows
        if row["stage"] in _STAGES
        for name, us in row["peers"].items()
        if second in name and (row["stage"] == _STAGES[0] or name.startswith("gather_kv"))
    ]
    return [two / one - 1 for one, two in pairs if one and one >= _LONG_US]


def control(rows: Sequence[Row]) -> str:
    """A sentence; nothing where no case has both."""
    sizes = sorted(100 * abs(each) for each in differences(rows))
    if not sizes:
        return ""
    return (
        f"The control: {' and '.join(_TWINS)} ship one prefill kernel. In {len(sizes)} cases of a millisecond or longer their"
        f" times differ by {statistics.median(sizes):.1f} % in the median and {sizes[-1]:.1f} % at most."
    )
