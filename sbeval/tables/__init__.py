"""Result tables, run files, statistics and comparisons, without torch."""
