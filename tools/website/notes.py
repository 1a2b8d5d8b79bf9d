"""What pages say of their code blocks in comments: which of them the tests do not run, and why."""

from __future__ import annotations

import re

NOT_RUN = {
    "gpu": "CUDA GPUs",
    "data": "data or weights that are not in the repository",
}
"""Why a Python block is not run. A page says it in the line before the block, ``<!-- not run: gpu -->``, and the site
shows it; ``tests/documents/test_code_blocks.py`` lists all such blocks."""

BEFORE_A_BLOCK = re.compile(r"<!-- not run: (\w+) -->\s*\Z")
_ANYWHERE = re.compile(r"<!-- not run: (\w+) -->")


def with_reasons(markdown: str) -> str:
    """`markdown` with those comments as a line that readers see."""
    return _ANYWHERE.sub(lambda found: f"*Not run by the tests: needs {NOT_RUN[found[1]]}.*", markdown)
