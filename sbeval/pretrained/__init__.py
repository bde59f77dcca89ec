"""Models that are loaded instead of trained."""
