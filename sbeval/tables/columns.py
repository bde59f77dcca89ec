"""What every column and metric of the result tables is. `sbeval.cli.columns` writes docs/columns.md from this.

A factor that is an option of its family's command has that option's help, unless it is described here.
"""

# Identity, Measurement and Provenance (`sbeval.tables.rows`), which every table has
COMMON = {
    "family": "Name of the table and of the command, with `_`.",
    "task": "Corpus (length_gen), benchmark or RULER task (few_shot, needle), step (benchmarks), else the family.",
    "model": "Size by name, or layers x width; of a checkpoint its name or digest.",
    "attention": "Attention method: a name of `--attention`, or the module of a method of one's own.",
    "options": "The method's options that are not at their defaults, as key=value,...; empty if all are.",
    "params": "Parameters of the model, embeddings included and tied ones once.",
    "train_len": "Tokens of a training sequence.",
    "eval_len": "Tokens of an evaluated sequence at most.",
    "seed": "Seed of weights and of the order of the data.",
    "metric": "What is measured; see each table.",
    "unit": "Unit of `value`; 1 for shares, ratios and perplexities.",
    "value": "The number.",
    "stderr": "Standard error of the value as a mean over `n` units; empty if it has none.",
    "n": "Number of independent units (documents, items, prompts, examples) of the mean.",
    "cell": "Id of the run: its run file is runs/<cell>.json.",
    "preset": "Preset whose options the command changed.",
    "corpus": "Training text, as given by --corpus; empty for generated data.",
    "tokenizer": "Tokenizer of the text; empty for generated data.",
    "train_tokens": "Tokens trained on, repetitions included.",
    "unique_tokens": "Tokens of one pass over the training text; empty for generated data.",
    "epochs": "train_tokens over unique_tokens.",
    "dtype": "Type of matrix products; weights are float32.",
    "device": "Card, or cpu with its number of threads.",
    "backend": "Implementation of attention that ran: triton, triton-hopper, flex, sdpa, cudnn, flash, fla or torch.",
    "commit": "Commit of the source, with +dirty if files differed from it.",
    "torch": "Version of torch.",
    "triton": "Version of Triton; none where it is not installed.",
    "utc": "Time of the end of the cell.",
}

_STATUS = "`overfit` where the held-out loss rose while the model trained; else empty."
_ENDS = "Of metric `solved`: how training ended, `solved`, `plateau`, `budget` (out of steps), `diverged` or `failed`."
_FROM, _TO = "First {} of the row, inclusive.", "End of the row's {}, exclusive."
_MAP = {"split": "Queries of an accuracy: `all`, `fresh` (a key's first value) or `stale` (it had another before)."}
_PROBLEM = {
    "step": "forward, forward_backward or decode; of models train or evaluate.",
    "batch": "Sequences, or rows of packed sequences.",
    "queries": "Query positions.",
    "keys": "Key positions.",
    "heads": "Query heads.",
    "kv_heads": "Key-value heads.",
    "head_dim": "Size of a head.",
    "sequences": "Sequences packed into a row.",
    "epsilon": "Mass below which blocks are skipped; 0: none are.",
    "logit_mean": "Mean of the logits of the inputs; empty: standard normal inputs.",
    "layer": "Layer of the inputs, from 0.",
    "head": "Head, from 0; empty: all heads.",
}

# factors of each table
FACTORS: dict[str, dict[str, str]] = {
    "length_gen": {
        "position_start": _FROM.format("position"),
        "position_end": _TO.format("positions"),
        "context_length": "Length l of a number over positions 1 ... l.",
        "last_k": "The number is over the last k of these positions, k a quarter of train_len.",
        "window": "Tokens of a disjoint window, for perplexities of whole documents.",
        "per": "Unit of such a perplexity: token, word or byte.",
        "eval_corpus": "Text of such windows; empty: the test documents of the corpus.",
        "targets": "Fixed targets: the last tokens of each window, the same at every context length.",
        "status": _STATUS,
    },
    "mqrar": _MAP | {
        "lr": "Peak learning rate.",
        "width": "Width of the model.",
        "max_steps": "Optimizer steps at most.",
        "stale_values": "Older values of the queried keys, for the split by their number.",
        "distance_start": _FROM.format("distance (positions between query and value)"),
        "distance_end": _TO.format("distances"),
        "distinct": "What is drawn without replacement: keys, values or queries.",
        "schedule": "Learning rate schedule; `by epoch`: the rate changes between epochs of the stored rows alone.",
        "decayed": "Parameters with weight decay: matrices, or all.",
        "warmup": "Steps of the warm-up; empty: 5 % of max_steps.",
        "status": _ENDS,
    },
    "attention_map": _MAP | {
        "kv_pairs": "Key-value pairs of an example.",
        "vocab_size": "Tokens: half are keys, half values.",
        "width": "Width of the model.",
        "lr": "Peak learning rate; empty for a given checkpoint.",
        "layer": "Layer, from 1.",
        "head": "Head, from 1.",
        "target": "What a weight is on: the `latest` value, `stale` ones, the query's `own` position (for "
        "stick-breaking the remainder), or `other` positions.",
        "query": "Position of the query in the example, from 0.",
        "key": "Position of the key in the example, from 0.",
    },
    "flip_flop": {
        "p_train": "Probability of `ignore` in training.",
        "lr": "Peak learning rate.",
        "test": "in_distribution, sparse, dense or validation.",
        "p_ignore": "Probability of `ignore` in the test.",
        "reads": "Reads of the error rate.",
        "distance_start": _FROM.format("distance (instructions between read and write)"),
        "distance_end": _TO.format("distances"),
        "status": _ENDS,
    },
    "needle": {
        "length": "Tokens of prompt and answer.",
        "depth_start": "First depth of the needle in the row, per cent; empty: all.",
        "depth_end": "End of the row's depths, exclusive (100 is in the last row).",
        "finetune_tokens": "Tokens of prompts to fine-tune on, at most.",
        "finetune_lr": "Learning rate of fine-tuning.",
        "chosen": "1 at the learning rate that validation chose, whose model all other rows are of; else 0.",
        "ended": "`solved` if the task was, by held-out prompts of the training length, within finetune_tokens "
        "(see `tokens_to_solve`); else `budget`, or `diverged`; empty where the model was not fine-tuned on it.",
        "copy_gain": "Nats per token that copying 512 random tokens saved before fine-tuning (half of train_len if "
        "less), as in diagnostics.",
        "status": _STATUS,
    },
    "diagnostics": {
        "tokens_seen": "Training tokens that the model had seen; 0 if unknown.",
        "distance": "Tokens between copies (gains, prefix_matching), or keys after which weight is summed.",
        "layer": "Layer, from 1; for one head of the finished model.",
        "head": "Head, from 1.",
        "heads": "`mean` or `highest` of all heads; empty for one head, and for metrics of the whole model.",
        "status": _STATUS,
    },
    "few_shot": {
        "part": "Part of the benchmark; empty: all of it.",
        "filter": "lm-eval's filter of the answer.",
        "shots": "Examples in a prompt.",
        "version": "Version of lm-eval's task.",
        "chance": "Accuracy of guessing; empty where there is none.",
        "items": "Source of the items: `hub` or `files`.",
        "cut": "Requests whose beginning was cut to fit eval_len.",
        "status": _STATUS,
    },
    "kernel": _PROBLEM,
    "model": _PROBLEM,
    "skipping": _PROBLEM,
}  # fmt: skip

_TIMES = {
    "time": "Median time of a run, in ms.",
    "time_q20": "20 % quantile of the times.",
    "time_q80": "80 % quantile of the times.",
    "relative_error": "Norm of the difference from a float64 reference, over that of the reference.",
}
METRICS: dict[str, dict[str, str]] = {
    "length_gen": {
        "loss": "Mean loss at the positions of the row, in nats per token.",
        "perplexity": "exp of the mean loss at positions 1 ... context_length, or over whole documents in windows.",
        "bits_per_byte": "That loss in bits per byte of the text, which makes tokenizers comparable.",
        "loss_fixed_targets": "Mean loss of the fixed targets, the same tokens at every context length.",
        "loss_fixed_targets_unrelated": "The same, with another document's text further back than the training length.",
        "loss_last_k": "Mean loss at the last k of context_length positions.",
    },
    "mqrar": {
        "accuracy": "Share of queries answered correctly, on test examples.",
        "validation_accuracy": "The same on validation examples, by which rates are ranked where none solves the task.",
        "solved": "1 if training ended above --stop-accuracy, else 0.",
        "steps": "Optimizer steps of training; until solved they rank learning rates.",
    },
    "attention_map": {
        "accuracy": "Share of queries answered correctly.",
        "share": "Mean attention weight on `target` at the queries with stale values.",
        "weight": "Weight of `query` on `key` in one example.",
        "token": "Token at position `key` of that example.",
    },
    "flip_flop": {
        "error_rate": "Share of reads that are not the bit last written.",
        "solved": "1 if the validation error fell to --stop-error, else 0.",
    },
    "needle": {
        "score": "RULER's score of the completion: share of the answers in it.",
        "greedy": "Share of prompts after which the reference answer is the likeliest at every token.",
        "log_probability": "Of the reference answer's tokens, summed, in nats.",
        "filled": "Tokens of prompt and answer over `length`.",
        "tokens_to_solve": "Tokens of fine-tuning until `greedy` was 0.95 on held-out prompts of the training length, "
        "as in the mean of the four or more validations from there on, or of 256 prompts at the end; finetune_tokens "
        "where it was not (`ended` is `budget`).",
        "held_out": "`greedy` on those prompts at the last validation of fine-tuning.",
    },
    "diagnostics": {
        "copy_gain": "Loss on random tokens minus loss on the same tokens repeated right after them.",
        "passage_gain": "Loss that 64 tokens of text save where they were read `distance` tokens before.",
        "in_context_score": "Loss at token 500 minus loss at token 50, each averaged over 17 positions.",
        "prefix_matching": "Weight on the token behind the last occurrence of the query's token.",
        "weight_beyond": "1 minus the weight on the `distance` nearest keys; of stick-breaking the stick that is left.",
        "mean_distance": "Mean of the weights' distances; the query's own position, and with it a remainder, is 0.",
        "gate_half_life": "Tokens after which the product of a head's mean gate is 1/2.",
    },
    "few_shot": {
        "acc": "Share of items whose answer has the highest log-likelihood.",
        "acc_norm": "The same with log-likelihoods per byte of the answer.",
        "gold_bits_per_byte": "Bits of all right answers over their bytes, the space before them included.",
        "other": "Metrics of lm-eval's tasks, by their names there.",
    },
    "kernel": _TIMES | {
        "throughput": "TFLOP/s, the causal half of the matrix counted.",
        "bandwidth": "GB/s of keys and values read.",
        "peak_memory": "MB allocated at most.",
    },
    "model": {
        "throughput": "Tokens per second.",
        "flops": "FLOP/s of matrix products, causal attention counted as half.",
        "mfu": "That over the card's dense peak.",
    },
    "skipping": _TIMES | {"reach": "Keys that a query reads until its remaining mass is below epsilon."},
}  # fmt: skip
