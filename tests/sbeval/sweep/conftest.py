"""A study of tiny models on short texts."""

from pathlib import Path

import pytest

STUDY = """
models: {{attention: [rope, alibi], train_len: 16, train_tokens: 128, batch_tokens: 32, corpus: {corpus}}}
length_gen: {{eval_len: 64, documents: 3, attention: [rope, "rope:scaling=ntk,factor=4", alibi]}}
needle: {{tasks: [niah_single_1], lengths: [1024], samples: 1, finetune: 0, essays: {essay}}}
flip_flop: {{seq_len: 16, width: 8, batch: 4, steps: 4, test_rows: 20}}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "texts").mkdir()
    for role in ("train0", "test0", "test1", "test2"):
        (folder / "texts" / f"{role}.txt").write_text(f"{role} says this and that. " * 9)
    (folder / "essay.txt").write_text("This is a sentence. Here is another one! Is it? " * 30)
    path = folder / "tiny.yaml"
    path.write_text(STUDY.format(corpus=folder / "texts", essay=folder / "essay.txt"))
    return path
