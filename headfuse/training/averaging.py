"""An exponential moving average (EMA) of the trained weights: what validations see and what is written.

Steps on few windows move the weights to and fro. The average over the last steps has less of that noise, so the weights
are good before the learning rate has fallen. The averages lie in the state of the optimizer, so checkpoints hold
them and FSDP shards them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

AVERAGE = "average"
"""Name in the optimizer's state of a weight."""


def keep_averages(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Update the averages of all weights after every step of `optimizer`.

    In step n from 1 an average moves towards its weight by `max(1 - decay, 9 / (n + 9))` of the distance. So it is the
    weight itself after one step, it forgets its start in short runs, and later it covers about `1 / (1 - decay)` steps
    (Polyak and Juditsky, 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage).
    """

    @torch.no_grad()
    def update(trained: torch.optim.Optimizer, *_: object) -> None:
        for group in trained.param_groups:
            group["averaged_steps"] = step = group.get("averaged_steps", 0) + 1
            for weight in group["params"]:
                state = trained.state.get(weight)
                if not state:  # it had no gradient yet
                    continue
                if AVERAGE not in state:
                    state[AVERAGE] = weight.detach().clone()
                else:
                    state[AVERAGE].lerp_(weight.detach(), max(1 - decay, 9 / (step + 9)))

    optimizer.register_step_post_hook(update)


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights hold their averages, if there are any."""
    swap_averages(optimizer)
    try:
        yield
    finally:
        swap_averages(optimizer)


@torch.no_grad()
def swap_averages(optimizer: torch.optim.Optimizer) -> None:
    """Exchange the weights and their averages, one at a time."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            average = optimizer.state.get(weight, {}).get(AVERAGE)
            if average is not None:
                kept = weight.detach().clone()
                weight.copy_(average)
                average.copy_(kept)
