"""How commands are called where this runs: by module in a checkout, by the console script in an installed wheel."""

from __future__ import annotations

import re
from pathlib import Path

#: A wheel holds the commands in this folder of the library, where ``python -m`` does not find them.
_IN_A_WHEEL = Path(__file__).resolve().parts[-5:-3] == ("eva_lightning", "checkout")


def as_called(text: str) -> str:
    """`text` with each ``python -m experiments.NAME`` written as it can be called here.

    Of the benchmarks a wheel's commands start two: ``eva-lightning vtab benchmark``, and metaworld's.
    """
    if not _IN_A_WHEEL:
        return text
    text = re.sub(r"python -m benchmarks (vtab|metaworld)\b", r"eva-lightning \1 benchmark", text)
    return re.sub(r"python -m experiments\.(?=\w)", "eva-lightning ", text)
