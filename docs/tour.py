# %% [markdown]
# # sbeval from Python
#
# A notebook as a script: editors and Jupyter (with jupytext) open its cells. It takes a few seconds on a CPU and reads
# nothing from the network; a test runs it.

# %%
import tempfile

import matplotlib.pyplot as plt
import torch

import sbeval
from sbeval.models.config import ModelConfig
from sbeval.models.decoder import Decoder

# %% [markdown]
# **Attention.** Every method has one signature: queries (B, T, H, D), keys and values (B, S, G, D). The sum of
# stick-breaking's weights is below 1; the default adds the remainder times the query's own value.

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(1, 128, 4, 16) for _ in range(3))
stick_breaking = sbeval.attention(q, k, v)
windowed = sbeval.attention(q, k, v, method="sliding_window:window=32")
print(stick_breaking.shape, windowed.shape)

# %% [markdown]
# **A study** is what `sbeval run` runs: a name, a file, or the same as a mapping. Finished cells are not run again.

# %%
folder = tempfile.mkdtemp()
results = sbeval.run(
    {"flip_flop": {"attention": ["stick_breaking", "rope"], "steps": 20, "seq_len": 32, "test_rows": 50}},
    results_dir=folder,
    device="cpu",
    quiet=True,
)
table = results["flip_flop"]
print(table[["attention", "metric", "test", "value", "stderr", "n"]].head())
print(results.run_file(table["cell"].iloc[0])["config"])

# %% [markdown]
# **Any language model**: a module that maps tokens to logits, of this package, of transformers or your own. The result
# is a table of losses by position and perplexities by context length; `docs/columns.md` explains its columns.

# %%
tokens = torch.randint(256, (4, 257))


class Bigram(torch.nn.Module):
    """A model of your own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(256, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(tokens)
        return logits


ours = Decoder(ModelConfig(vocab_size=256, width=32, layers=1, heads=2, hidden=64))
losses = sbeval.evaluate(ours, tokens, train_len=64, name="stick_breaking")
theirs = sbeval.evaluate(Bigram(), tokens, train_len=64, name="bigram")
print(losses[losses["metric"] == "perplexity"][["context_length", "value", "stderr"]])

# %% [markdown]
# **Figures**: whole ones as `sbeval plot` draws them, or one panel into axes of your own.

# %%
figure = sbeval.draw(table)
own, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
sbeval.draw(losses, axes=left)
sbeval.draw(theirs[theirs["metric"] == "loss"], x="position_start", axes=right)
right.set_title("a bigram model")
