"""Texts as tokens, and what generated examples are drawn by."""
