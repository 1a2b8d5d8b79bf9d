"""Download, build and check VTAB-1K."""
