"""Tables of studies in documents: their numbers are those of made-up tables, and a study that was not run says so."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sbeval.cli import documents_studies
from sbeval.cli.documents_studies import best_rates, contexts, gaps, needles, recall_rates, recall_steps
from sbeval.tables import curves
from sbeval.tables.results import Results

COMMON: dict[str, Any] = {
    "family": "length_gen", "task": "books", "model": "25m", "corpus": "books", "tokenizer": "bpe:8192", "dtype": "x",
    "train_len": 2048, "eval_len": 16384, "context_length": 2048, "metric": "perplexity", "preset": "figure5", "n": 16,
    "options": "", "seed": 0, "stderr": 0.0, "train_tokens": 10**8, "optimizer": "adamw", "schedule": "cosine",
    "batch_tokens": 131072, "lr": 2e-3, "unit": "1",
}  # fmt: skip
SPREAD = {"attention": "stick_breaking", "options": "remainder=none,logit_bias=spread"}


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([COMMON | row for row in rows])


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_gaps_by_tokens(tmp_path: Path) -> None:
    counts = np.array([60e6, 120e6, 240e6, 480e6])
    gap = -0.05 + 0.1 * counts[0] / counts
    rows = [
        of | {"train_tokens": int(count), "value": math.exp(3 + less), "schedule": "wsd"}
        for of, each in (({"attention": "rope"}, 0 * gap), (SPREAD, gap))
        for count, less in zip(counts, each, strict=True)
    ]
    head, _, line = cells(gaps(frame(*rows), tmp_path))
    assert head[1:] == [
        "60 M",
        "120 M",
        "240 M",
        "480 M",
        "limit",
        "exponent",
        "where the fit is 0",
        "seeds, and RoPE's",
    ]
    assert line[0] == "stick-breaking (no remainder, logit offsets spread)"
    assert line[1:] == ["+0.050", "+0.000", "−0.025", "−0.038", "−0.050", "1.000", "120 M", "1 and 1"]
    assert gaps(frame(*rows[:3]), tmp_path) == ""


def test_each_method_has_its_best_rate_on_held_out_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    # the lowest on held-out text is not the lowest of the table
    for method, best, values in (({"attention": "rope"}, 1e-3, (3.5, 3.4)), (SPREAD, 2e-3, (3.3, 3.45))):
        for recipe in ({}, {"optimizer": "muon", "batch_tokens": 32768}):
            for lr, loss in zip((1e-3, 2e-3), values, strict=True):
                row = COMMON | method | recipe | {"lr": lr, "value": math.exp(loss - bool(recipe))}
                row["cell"] = f"{len(rows)}"
                curves.write(Results(tmp_path), row["cell"], {"held_out_loss": [(1, 9.0), (2, 4.0 + (lr != best))]})
                rows.append(row)
    head, _, stick, rope = cells(best_rates(frame(*rows), tmp_path))
    assert head[1:] == ["AdamW, 131,072 tokens a step", "Muon, 32,768 tokens a step"]
    assert stick[1:] == ["3.450 (−0.050) at 0.002", "2.450 (−0.050) at 0.002"]
    assert rope == ["RoPE", "3.500 at 0.001", "2.500 at 0.001"]


def test_a_rate_is_not_best_for_its_seeds(tmp_path: Path) -> None:
    """The second seed, at the best rate alone, is a worse one."""
    rows = []
    for seed, lr, held_out in ((0, 1e-3, 4.1), (0, 2e-3, 4.0), (1, 2e-3, 4.4)):
        cell = f"{seed}-{lr}"
        curves.write(Results(tmp_path), cell, {"held_out_loss": [(1, held_out)]})
        rows.append({"attention": "rope", "lr": lr, "seed": seed, "cell": cell, "value": math.exp(3 + lr)})
    assert cells(best_rates(frame(*rows), tmp_path))[-1] == ["RoPE", "3.002 at 0.002"]


def test_perplexities_by_context(tmp_path: Path) -> None:
    rows = [
        {"attention": "rope", "context_length": at, "value": value, "seed": seed}
        for at, value in ((512, 20.0), (1024, 1.0), (2048, 10.0), (16384, 40.0))
        for seed in (0, 1)
    ]
    assert cells(contexts(frame(*rows), tmp_path)) == [
        ["perplexity per token over the first l tokens, l =", "seeds", "512", "2048", "16384"],
        ["---"] * 5,
        ["RoPE", "2", "20.0", "10.0", "40.0"],
    ]


def test_steps_until_recall_is_solved_by_seed(tmp_path: Path) -> None:
    of = {"vocab_size": 1024, "lr": 1e-3, "split": "all"}
    rows = []
    for heads, pairs, seed, steps, solved in ((1, 192, 1, 900, 1), (1, 192, 0, 500, 1), (8, 32, 0, 6000, 0)):
        cell = of | {"heads": heads, "kv_pairs": pairs, "seed": seed, "attention": "rope", "cell": f"{pairs}-{seed}"}
        ended = {"status": "solved" if solved else "budget", "split": ""}
        rows += [
            cell | {"metric": "accuracy", "value": 0.991 if solved else 0.25},
            cell | ended | {"metric": "steps", "value": steps},
            cell | ended | {"metric": "solved", "value": solved},
        ]
    assert cells(recall_steps(frame(*rows), tmp_path)) == [
        ["steps until solved", "1 head, 192 pairs", "8 heads, 32 pairs"],
        ["---"] * 3,
        ["RoPE", "500, 900", "(0.25)"],
    ]
    faster = [row | {"lr": 2e-3, "cell": "other"} for row in rows[-3:]]
    assert cells(recall_rates(frame(*rows, *faster), tmp_path)) == [
        ["pairs", "steps until solved, rate =", "0.001", "0.002"],
        ["---"] * 4,
        ["32", "RoPE", "(0.25)", "(0.25)"],
        ["192", "RoPE", "500, 900", ""],
    ]


def test_needles_by_task(tmp_path: Path) -> None:
    of = {"finetune_tokens": 10**8, "depth_start": np.nan, "chosen": np.nan}
    rows = []
    for seed in (0, 1):
        for task, ended, after in (("vt", "budget", 1e8), ("niah_single_1", "solved", 1e7 * (1 + seed))):
            same = of | {"attention": "rope", "seed": seed, "task": task, "ended": ended, "cell": f"{seed}-{task}"}
            rows += [
                same | {"metric": "score", "length": at, "value": score + 0.1 * seed}
                for at, score in ((2048, 0.9), (4096, 0.4))
            ]
            rows += [
                same | {"metric": "tokens_to_solve", "length": 2048, "value": value, "chosen": chosen}
                for value, chosen in ((after, 1), (9e7, 0))
            ]
    assert cells(needles(frame(*rows), tmp_path)) == [
        ["tokens until solved: score at 2048, 4096 tokens", "RoPE"],
        ["---"] * 2,
        ["niah_single_1", "10 M, 20 M: 0.95, 0.45"],
        ["vt", "(0.95, 0.45)"],
    ]


def test_means_of_needles_less_those_of_stick_breaking(tmp_path: Path) -> None:
    def means(scores: dict[str, float], lengths: tuple[int, ...] = (2048, 4096)) -> list[list[str]]:
        of = {"finetune_tokens": 1, "ended": "solved", "task": "vt", "metric": "score", "n": 100, "depth_start": np.nan}
        rows = [
            of | {"attention": name, "length": at, "value": score if at > 2048 else 1.0, "cell": name, "stderr": 0.01}
            for name, score in scores.items()
            for at in lengths
        ]
        rows.append(rows[0] | {"depth_start": 0})
        (tmp_path / "retrieval").mkdir(exist_ok=True)
        frame(*rows).to_csv(tmp_path / "retrieval" / "needle.csv", index=False)
        heading, _, *lines, _, note = cells(documents_studies.needle_means(tmp_path))
        assert heading[-1] == "past 2048, less stick-breaking's"
        assert note[0].startswith("Means over `vt`; differences: ")
        return [*lines, [note[0].partition("differences: ")[2]]]

    stick, rope, over = means({"stick_breaking": 0.9, "rope": 0.5})
    assert stick == ["stick-breaking", "1.00", "0.90", ""] and rope[:3] == ["RoPE", "1.00", "0.50"]
    assert rope[3].startswith("−0.400 [") and over[0].startswith("95 % over 1 seed each, ")
    # without stick-breaking, with it alone, and without a length past that of training there is none
    assert means({"rope": 0.5}) == [["RoPE", "1.00", "0.50", ""], ["none."]]
    assert means({"stick_breaking": 0.9}) == [["stick-breaking", "1.00", "0.90", ""], ["none."]]
    assert means({"stick_breaking": 0.9, "rope": 0.5}, (2048,))[2] == ["none."]


def test_a_study_that_was_not_run_and_one_with_a_figure(tmp_path: Path) -> None:
    block = documents_studies.of_study("125m", lambda table, folder: f"{len(table)} rows", {"a": "A", "b": "B"})
    assert block(tmp_path) == "No results yet: `sbeval run 125m`."
    (tmp_path / "125m" / "figures").mkdir(parents=True)
    (tmp_path / "125m" / "length_gen.csv").write_text("cell,metric\nx,y\n")
    (tmp_path / "125m" / "figures" / "b.png").touch()
    assert block(tmp_path) == '1 rows\n\n<img src="../results/125m/figures/b.png" width="75%" alt="B">'


@pytest.mark.parametrize("name", documents_studies.BLOCKS)
def test_no_study_is_needed(name: str, tmp_path: Path) -> None:
    assert documents_studies.BLOCKS[name](tmp_path).startswith("No results yet: `sbeval run ")
