"""Cells, and how many of them are run."""
