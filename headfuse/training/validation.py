"""The NLL of held-out windows, shared among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from headfuse.models.logits import nll_in_batches
from headfuse.models.states import document_positions


def student_nll(accelerator: Accelerator, wrapped: nn.Module, windows: torch.Tensor, eos: int | None) -> float | None:
    """Mean NLL per token of windows, each process its share; None without windows.

    `eos` ends a document, where documents do not see each other; None where they do.
    """

    def nll_of(batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = wrapped(batch, None, None if eos is None else document_positions(batch, eos), "nll")
        return found

    training = wrapped.training
    wrapped.eval()
    nll = mean_nll(accelerator, windows, nll_of)
    wrapped.train(training)
    return nll


@torch.no_grad()
def mean_nll(
    accelerator: Accelerator, windows: torch.Tensor, nll: Callable[[torch.Tensor], torch.Tensor]
) -> float | None:
    """The mean of what `nll` gives for every window, each process its share; None without windows."""
    if not len(windows):
        return None
    world, share = accelerator.num_processes, -(-len(windows) // accelerator.num_processes)
    order = [min(accelerator.process_index + i * world, len(windows) - 1) for i in range(share)]
    found = nll_in_batches(windows[order], accelerator.device, nll)
    gathered = accelerator.gather(found.float().to(accelerator.device)).view(world, share)
    return gathered.T.flatten()[: len(windows)].cpu().double().mean().item() if world > 1 else found.mean().item()
