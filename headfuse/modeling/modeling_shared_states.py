"""What the layers of a model that read other layers' caches hand to each other in a forward pass.

This file is shipped beside the weights, so it imports only torch and the standard library.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

States = tuple[torch.Tensor, torch.Tensor]


class SharedStates:
    """Cached keys and values of the layers that later ones read, on their way through a forward pass.

    One object for all layers of a model, with a dict for each pass: threads that generate side by side have each their
    own, and so has a checkpoint that computes a layer again, whose pass need not be the last one. It is not part of a
    copy or a pickle of the model.
    """

    def __init__(self) -> None:
        self._passes: dict[int, dict[int, States]] = {}
        self._computing_again = False

    def __len__(self) -> int:
        return sum(map(len, self._passes.values()))

    def _thread(self) -> int:
        """The pass under way; 0 with gradients, where checkpoints compute layers again in other threads."""
        one = torch.is_grad_enabled() or torch.compiler.is_compiling()  # which does not know threads
        return 0 if one else threading.get_ident()

    def update(self, states: dict[int, States]) -> None:
        """Keep what layers of this pass cached elsewhere."""
        self._passes.setdefault(self._thread(), {}).update(states)

    def clear(self) -> None:
        """Let go of the pass."""
        self._passes.pop(self._thread(), None)

    def put(self, layer_idx: int, states: States, begins: bool) -> None:
        """Keep what a layer caches; the first layer that others read begins a pass."""
        if self._computing_again and torch.is_grad_enabled():
            return
        if begins:
            self.clear()
        self.update({layer_idx: states})

    def of(self, layer_idx: int) -> States:
        """What a layer before cached in this pass."""
        return self._passes[self._thread()][layer_idx]

    def finish(self) -> None:
        """Let go of the pass, if no gradient needs it."""
        if not torch.is_grad_enabled():
            self.clear()

    def contexts(self, more: Callable[[], Any]) -> tuple[Any, Any]:
        """What a gradient checkpoint runs a layer in, and computes it again in: with the states of the same pass.

        Args:
            more: gives such a pair of contexts, to be entered as well, or nothing.
        """
        first, again = more() or (contextlib.nullcontext(), contextlib.nullcontext())
        return first, self._again(self._passes.get(0), again)

    @contextlib.contextmanager
    def _again(self, states: dict[int, States] | None, more: Any) -> Iterator[None]:
        before = self._passes.pop(0, None)
        self._passes[0], self._computing_again = states or {}, True
        try:
            with more:
                yield
        finally:
            self._computing_again = False
            del self._passes[0]
            if before is not None:
                self._passes[0] = before

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return SharedStates, ()


def checkpointing_options(shared: SharedStates, given: dict[str, Any] | None) -> dict[str, Any]:
    """Options of `torch.utils.checkpoint` with which layers are computed again with the states of their own pass.

    Raises:
        ValueError: for reentrant checkpoints, which lose the gradients of what is shared.
    """
    options = {"use_reentrant": False, "context_fn": tuple, **(given or {})}
    if options["use_reentrant"]:
        raise ValueError("layers that read other layers' caches need use_reentrant=False")
    # not a lambda: copies and pickles of the model have states of their own
    return {**options, "context_fn": functools.partial(shared.contexts, options["context_fn"])}
