"""The joint least-squares refit of a layer's output projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from headfuse.choices import Side
from headfuse.fusion.maps import Reconstruction
from headfuse.models.capture import AttentionCapture
from headfuse.models.placement import exact, widened
from headfuse.plan import Groups

REFIT_RIDGE = 1.0
"""Ridge strength relative to mean(diag(Gram)) * unknowns / rows, the size of the noise that least squares would fit."""
FusedHeads = Mapping[Side, tuple[Reconstruction, Groups]]
"""Maps and groups of each fused side: `key`, `value` or both."""


def reconstructed_outputs(capture: AttentionCapture, fused: FusedHeads) -> torch.Tensor:
    """Head outputs `[B, n_q, T, d]`, computed with reconstructed keys, values or both."""

    def left(side: Side, source: torch.Tensor) -> torch.Tensor:
        return fused[side][0].reconstruct(source, fused[side][1]) if side in fused else source

    return capture.attend(left("key", capture.key), left("value", capture.value))


def refit_output(output: torch.Tensor, captures: Sequence[AttentionCapture], fused: FusedHeads) -> torch.Tensor:
    """Refit the source's output projection to the reconstructed keys, values or both.

    The source's head outputs are regressed on the reconstructed ones by least squares, shrunk towards the identity. The
    resulting map `I + M` is the best one under any output projection `W`. So `W (I + M)` is the best projection
    (mathematics.md section 4.5).

    Args:
        output: output projection of the source `[D, n_q, d]`.
        captures: the layer on calibration windows.
        fused: maps and groups of the sides that are fused.

    Returns:
        `[D, n_q, d]`, float64.
    """
    return refit_to(output, captures, lambda index: reconstructed_outputs(captures[index], fused))


def refit_to(
    output: torch.Tensor, captures: Sequence[AttentionCapture], outputs: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """The same, given the head outputs `[B, n_q, T, d]` of each capture as the fused layer computes them."""

    def rows(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        capture, z = captures[index], outputs(index).transpose(1, 2).flatten(2).flatten(0, 1)  # [B T, n_q d]
        # a difference of head outputs, not of two products: it vanishes on heads that are truly redundant
        return z, capture.output.flatten(2).flatten(0, 1) - z

    count, size = sum(capture.output.shape[:2].numel() for capture in captures), output[0].numel()
    wanted = output.double().to(exact(captures[0].output.device)).flatten(1)
    if count < size:  # the same solution from the smaller Gram matrix
        pairs = [[x * capture.weight**0.5 for x in rows(index)] for index, capture in enumerate(captures)]
        z, missing = (torch.cat(part) for part in zip(*pairs, strict=True))
        gram = widened(z @ z.T)
        gram.diagonal().add_((REFIT_RIDGE * gram.diagonal().mean()).clamp_min(1e-300))
        lost = widened(missing @ wanted.T.to(missing))
        change = torch.linalg.solve(gram, lost).T.to(z) @ z
        return (wanted + widened(change)).view_as(output).to(output.device)
    gram = torch.zeros(size, size, dtype=torch.float64, device=wanted.device)
    cross = torch.zeros_like(gram)
    for index, capture in enumerate(captures):
        z, missing = rows(index)
        gram += capture.weight * widened(z.T @ z)
        cross += capture.weight * widened(z.T @ missing)
    gram.diagonal().add_((REFIT_RIDGE * size / count * gram.diagonal().mean()).clamp_min(1e-300))
    return (wanted + torch.linalg.solve(gram, cross @ wanted.T).T).view_as(output).to(output.device)
