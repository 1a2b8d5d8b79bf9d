"""The name by which ``python -m benchmarks`` was called before: ``python -m experiments.benchmark init|resize``."""

from __future__ import annotations

import sys

from benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
