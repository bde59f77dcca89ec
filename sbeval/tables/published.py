"""Published results to compare with, each with its source."""

# Tan et al., Scaling Stick-Breaking Attention, ICLR 2025
PAPER = "arXiv 2410.17980"
# trained at 2^11 tokens, evaluated up to 2^14: figure 5, models of 350 M parameters; the abstract claims it of all
LENGTHS = (2048, 16384)
# perplexity on Wikitext of models of 1 B parameters, table 2
WIKITEXT = {"stick_breaking": 13.4, "rope": 13.8}
# associative recall, figure 3: the most key-value pairs solved, with a vocabulary of 8192 in 768 tokens, after
# at most 64 epochs of 100,000 rows (the authors' code, which stops at an accuracy of 0.99)
SOLVED = {"stick_breaking": 192, "rope": 128}
SOLVED_AT = {"vocab_size": 8192, "seq_len": 768}
SOLVED_ACCURACY, SOLVED_TOKENS = 0.99, 64 * 100_000 * 768
# of 256 rows
SOLVED_STEPS = 64 * 100_000 // 256
# tokens per second in training, as a share of softmax's with FlashAttention-2, models of 1 B parameters
SPEED = 0.78
# the authors' package (commit 3147a38) forward, as a share of FlashAttention-2 through SDPA in the same run, by head
# size: 16384 tokens, 12 heads, bfloat16, one H200, torch 2.11, Triton 3.6. Measured here, not published by them; its
# backward pass does not compile with these versions.
AUTHORS_KERNEL = {64: 154 / 271, 128: 178 / 311}

# Hsieh et al. 2024, arXiv 2404.06654: the tasks of RULER, and the fewest and most tokens of a prompt with its answer
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
SHORTEST, LONGEST = 512, 131072

# PaTH (Yang et al. 2025, arXiv 2505.16381), table 1: error rates of flip-flop language modelling, models of 1 layer,
# 2 heads and width 64, on tests in distribution, sparse and dense. `path` is their own method, not in sbeval.
FLIP_FLOP_SOURCE = "PaTH, arXiv 2505.16381, table 1"
FLIP_FLOP_TESTS = ("in_distribution", "sparse", "dense")
FLIP_FLOP = {
    "rope": {"in_distribution": 0.069, "sparse": 0.403, "dense": 0.0001},
    "stick_breaking": {"in_distribution": 0.096, "sparse": 0.389, "dense": 0.0},
    "forgetting": {"in_distribution": 0.083, "sparse": 0.363, "dense": 0.0},
    "path": {"in_distribution": 0.0, "sparse": 0.000001, "dense": 0.0},
}
