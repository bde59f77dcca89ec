"""Evaluation and benchmarking of stick-breaking attention (Tan et al., ICLR 2025, arXiv 2410.17980)."""

__version__ = "0.1.0"
