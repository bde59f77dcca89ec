"""Evaluation and benchmarking of stick-breaking attention (Tan et al., ICLR 2025, arXiv 2410.17980).

The functions below are those of `sbeval.api`, which is imported when one of them is used.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbeval.api import attention, draw, evaluate, load_results, run

__all__ = ["attention", "draw", "evaluate", "load_results", "run"]
__version__ = "0.1.0"

# in a checkout without links (a zip of the repository, Windows) kernels/, tasks/ and plots/ are beside the package only
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sbeval' has no attribute {name!r}")
    from sbeval import api

    return getattr(api, name)
