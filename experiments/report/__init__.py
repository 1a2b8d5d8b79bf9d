"""HTML reports: one self-contained page of facts, tables and figures, by the Jinja2 templates beside this file."""
