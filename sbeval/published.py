"""Figures that others published, to stand beside ours; each with its source."""

# PaTH (Yang et al. 2025, arXiv 2505.16381), table 1: error rates of flip-flop language modelling, models of 1 layer,
# 2 heads and width 64, on tests in distribution, sparse and dense. `path` is their own method, which is not here.
FLIP_FLOP_SOURCE = "PaTH, arXiv 2505.16381, table 1"
FLIP_FLOP = {
    "rope": {"in_distribution": 0.069, "sparse": 0.403, "dense": 0.0001},
    "stick_breaking": {"in_distribution": 0.096, "sparse": 0.389, "dense": 0.0},
    "forgetting": {"in_distribution": 0.083, "sparse": 0.363, "dense": 0.0},
    "path": {"in_distribution": 0.0, "sparse": 0.000001, "dense": 0.0},
}
