"""Optimizers by name: AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
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


class RecordedMuon(torch.optim.Muon):
    """Muon whose learning rate is a tensor, so that a CUDA graph reads it anew at every replay.

    Matrices of one shape are made orthogonal together, in a fraction of the kernels.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure is used here
        for group in self.param_groups:
            for _, same in groupby(sorted(group["params"], key=_size), key=_size):
                self._update(group, [parameter for parameter in same if parameter.grad is not None])

    def _update(self, group: Mapping[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        """Update matrices of one shape."""
        if not parameters:
            return
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
        momentum = torch.stack([self.state[parameter]["momentum_buffer"] for parameter in parameters])
        momentum.lerp_(gradients, 1 - group["momentum"])
        updates = orthogonal(gradients.lerp_(momentum, group["momentum"]), group)
        rate = group["lr"]
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, moment, update in zip(parameters, momentum, updates, strict=True):
            self.state[parameter]["momentum_buffer"].copy_(moment)
            parameter.mul_(1 - rate * group["weight_decay"]).sub_(rate * scale * update.float())


def _size(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)


def orthogonal(matrices: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return matrices (N, A, B) with singular values near 1, in bfloat16: Newton-Schulz, as the group says."""
    a, b, c = group["ns_coefficients"]
    x = matrices.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def optimizer_for(model: Decoder, config: TrainConfig, *, recorded: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of a config. recorded: for a CUDA graph, with learning rates that are tensors.

    Weight decay is on matrices alone, or on all parameters (`decay_all`); inside the blocks the learning rate of
    matrices is divided by m_width (muP).
    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal; scaled
    as in arXiv 2502.16982, section 2.2, it is as large as AdamW's and takes the same learning rate.
    """
    groups: dict[tuple[bool, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
        in_block = is_matrix and name.startswith("blocks.")
        muon = config.optimizer == "muon" and in_block and parameter.ndim == 2
        divisor = model.config.m_width if in_block else 1.0
        decay = config.weight_decay if is_matrix or config.decay_all else 0.0
        groups.setdefault((muon, decay, divisor), []).append(parameter)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        _described(groups, muon=False),
        lr=config.lr,
        betas=(config.beta_1, config.beta_2),
        eps=config.eps,
        fused=True,
        capturable=recorded,
    )
    if config.optimizer == "muon":
        kind = RecordedMuon if recorded else torch.optim.Muon
        matrices = kind(_described(groups, muon=True), lr=config.lr, adjust_lr_fn="match_rms_adamw")
        optimizer = Together([optimizer, matrices])
    if recorded:
        device = next(model.parameters()).device
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr, device=device)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, each divided by its divisor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate / group["divisor"])
        else:
            group["lr"] = rate / group["divisor"]


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
