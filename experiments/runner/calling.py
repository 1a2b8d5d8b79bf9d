"""How commands are called where this runs: by module in a checkout, by the console script in an installed wheel."""

from __future__ import annotations

import re
from pathlib import Path

#: A wheel holds the commands in this folder of the library, where ``python -m`` does not find them.
_IN_A_WHEEL = Path(__file__).resolve().parts[-5:-3] == ("eva_lightning", "checkout")


def as_called(text: str) -> str:
    """`text` with each ``python -m experiments.NAME`` written as it can be called here."""
    return re.sub(r"python -m experiments\.(?=\w)", "eva-lightning ", text) if _IN_A_WHEEL else text
