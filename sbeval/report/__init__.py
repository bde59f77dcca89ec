"""Figures, and the report: claims, verdicts and figures on one page."""
