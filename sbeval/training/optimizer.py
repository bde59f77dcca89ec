"""Optimizers by name: AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sbeval.models.decoder import Decoder
from sbeval.training.config import TrainConfig

ADAMW_STATE, MUON_STATE = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        # shared, so that state restored here is theirs
        for part in parts:
            part.state = self.state

    def step(self) -> None:  # type: ignore[override]  # no closure is used here
        for part in self.parts:
            part.step()


def optimizer_for(model: Decoder, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a config.

    Weight decay is on matrices alone; inside the blocks their learning rate is divided by m_width (muP).
    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal; scaled
    as in arXiv 2502.16982, section 2.2, it is as large as AdamW's and takes the same learning rate.
    """
    groups: dict[tuple[bool, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
        in_block = is_matrix and name.startswith("blocks.")
        muon = config.optimizer == "muon" and in_block and parameter.ndim == 2
        divisor = model.config.m_width if in_block else 1.0
        groups.setdefault((muon, config.weight_decay if is_matrix else 0.0, divisor), []).append(parameter)
    adamw = torch.optim.AdamW(
        _described(groups, muon=False), lr=config.lr, betas=(config.beta_1, config.beta_2), eps=config.eps, fused=True
    )
    if config.optimizer == "adamw":
        return adamw
    return Together(
        [adamw, torch.optim.Muon(_described(groups, muon=True), lr=config.lr, adjust_lr_fn="match_rms_adamw")]
    )


def _described(
    groups: Mapping[tuple[bool, float, float], list[torch.nn.Parameter]], *, muon: bool
) -> list[dict[str, Any]]:
    return [
        {"params": params, "weight_decay": decay, "divisor": divisor}
        for (is_muon, decay, divisor), params in groups.items()
        if is_muon == muon
    ]


def state_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Return the names of the state of each parameter: `step` is a scalar, others have the parameter's shape."""
    return {
        parameter: MUON_STATE if "ns_steps" in group else ADAMW_STATE
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
