"""The name by which ``python -m benchmarks`` was called before: ``python -m experiments.benchmark init|resize``."""

from __future__ import annotations

from benchmarks.__main__ import main
from experiments.runner.ending import leave

if __name__ == "__main__":
    leave(main())
