"""Cells of an experiment, and the scheduler that runs them."""
