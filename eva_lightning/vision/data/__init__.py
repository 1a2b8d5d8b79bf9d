"""VTAB-1K data: tasks, splits, images, cache, data module."""
