"""Devices, ranks, progress display, files and out-of-memory handling."""
