"""Fit the ranking of candidates without a GPU to sweeps, and say how well it ranks what was left out of the fit.

    python scripts/calibrate.py [SWEEP …] [--write]

By default all of benchmarks/sweeps, one for each template. Exit status 1 where none of the ten best is within 10 % of the best.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen.tune import ranking, sweep  # noqa: E402

WITHIN = 1.10


def main() -> int:
    """Parse, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", type=Path, default=sorted((ROOT / "benchmarks" / "sweeps").glob("*.json")))
    parser.add_argument("--write", action="store_true", help="keep it as what `tune` without a GPU ranks by")
    arguments = parser.parse_args()
    found = {}
    for path in arguments.sweeps:
        swept = sweep.read(path)
        name = f"{swept.op.name}.{swept.backend}"
        found[name] = ranking.calibrate(swept)
        for case, correlation in found[name].correlation.items():
            top = found[name].top[case]
            print(f"{name} {case}: rank correlation {correlation:.2f}, the fastest of ten takes {top:.2f} of the best's time")
    if arguments.write:
        ranking.write(found)
    return int(any(top > WITHIN for each in found.values() for top in each.top.values()))


if __name__ == "__main__":
    sys.exit(main())
