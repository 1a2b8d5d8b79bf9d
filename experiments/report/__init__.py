"""HTML reports: self-contained pages of facts, tables and figures, by the Jinja2 templates beside this file.

``python -m experiments.report RUN...`` makes one on any finished runs.
"""

from experiments.report.of_runs import command_line, main, parse

__all__ = ["command_line", "main", "parse"]
