"""Evaluation and benchmarking of stick-breaking attention (Tan et al., ICLR 2025, arXiv 2410.17980)."""

import os

__version__ = "0.1.0"

# in a checkout without links (a zip of the repository, Windows) kernels/, tasks/ and plots/ are beside the package only
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))
