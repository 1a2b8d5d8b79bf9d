"""``python -m experiments.analysis``."""

import sys

from experiments.analysis import command_line

if __name__ == "__main__":
    sys.exit(command_line())
