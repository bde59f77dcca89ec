"""Learning rates by step: warm-up, then cosine, power, constant, or constant with a linear decay (wsd)."""

import math

from sbeval.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: float) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.epoch_rows:
        # the place, in steps, at which its epoch began
        began = step * config.batch // config.epoch_rows * config.epoch_rows / config.batch
        step = max(config.warmup, began)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        return config.lr * min(1.0, (config.steps - step) / max(1, config.steps - config.trunk_steps))
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    start = int(config.steps * (1 - config.decay))
    tokens = (min(step, start) + 1) * config.batch * config.length
    rate = min(config.lr, config.batch * config.power_a * tokens**config.power_b)
    return float(rate * config.final_lr ** (max(0, step - start) / max(1, config.steps - start)))
