"""The optimizer Muon, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum whose matrix is made orthogonal before the step.

    In float32 throughout: torch.optim.Muon works in bfloat16, which is slow on most CPUs.

    Args:
        parameters: matrices.
        lr: the step; its update has singular values near 1, times the square root of the ratio of rows to columns where
            that is above 1.
        momentum: of the gradients, in Nesterov's form.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do one step; there is no use for `closure`."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(average, group["momentum"]))
                rows, columns = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Pull the singular values of `matrix` towards 1 by Newton-Schulz steps with Muon's quintic coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
