"""Damaged and hostile files for every reader of the project: ``python -m tests.fuzz --seconds 60 --seed 0``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.engine import Report, fuzz
from tests.fuzz.readers import READERS


def run(seconds: float, seed: int, names: list[str] | None = None, save: Path | None = None) -> list[Report]:
    """Share the time among the readers."""
    chosen = [reader for reader in READERS if not names or reader.name in names]
    reports = []
    for reader in chosen:
        report = fuzz(reader, seconds / len(chosen), seed, save)
        reports.append(report)
        print(
            f"{report.name:<15}{report.inputs:>8} inputs {report.equal:>7} as written {report.refused:>8} refused "
            f"{sum(report.kinds.values()):>6} findings",
            flush=True,
        )
        for finding in report.findings:
            print(f"    {finding}", flush=True)
    return reports


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for all readers together")
    parser.add_argument("--seed", type=int, default=0, help="the same inputs in the same order")
    parser.add_argument("--reader", action="append", choices=[reader.name for reader in READERS], help="only these")
    parser.add_argument("--save", type=Path, help="folder for the inputs that are findings")
    options = parser.parse_args()
    reports = run(options.seconds, options.seed, options.reader, options.save)
    found = sum(sum(report.kinds.values()) for report in reports)
    print(f"{sum(report.inputs for report in reports)} inputs, {found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
