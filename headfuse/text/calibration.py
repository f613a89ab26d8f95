"""The windows for statistics, short windows cut from them, and held-out windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headfuse.text.windows import with_start

START_LENGTH, STARTS_PER_WINDOW, START_WEIGHT = 4, 16, 4.0


@dataclass(frozen=True)
class CalibrationText:
    """Token windows: `statistics [n, T]`, `starts [m, START_LENGTH]` cut from them, and `held_out [k, T]`.

    With a BOS token (`bos`), all of them begin with it. Windows of random tokens `[r, T]` may stand beside them.
    """

    statistics: torch.Tensor
    starts: torch.Tensor
    held_out: torch.Tensor
    bos: int | None = None
    random: torch.Tensor | None = None

    @classmethod
    def split(cls, windows: torch.Tensor, held_out: int, bos: int | None = None) -> CalibrationText:
        """Keep the last `held_out` of the windows `[samples, T]` from the statistics."""
        used = len(windows) - held_out
        return cls(windows[:used], start_windows(windows[:used], bos), windows[used:], bos)

    @property
    def fitted(self) -> CalibrationText:
        """What the closed form is fitted to: the statistics windows, and the random ones behind them.

        Plans are made and models refined without random windows (docs/experiments/random-tokens.md).
        """
        if self.random is None:
            return self
        windows = torch.cat([self.statistics, self.random])
        return CalibrationText(windows, start_windows(windows, self.bos), self.held_out, self.bos)

    def part(self, share: float) -> CalibrationText:
        """The first `share` of the statistics windows, at least one, and nothing held out."""
        used = max(1, round(len(self.statistics) * share))
        windows = self.statistics[:used]
        return CalibrationText(windows, start_windows(windows, self.bos), self.held_out[:0], self.bos)

    def after(self, part: CalibrationText) -> torch.Tensor:
        """The statistics windows behind the first ones, which `part` holds; none where it holds them all."""
        return self.statistics[len(part.statistics) :]


def start_windows(windows: torch.Tensor, bos: int | None = None) -> torch.Tensor:
    """Short windows from all over the text; with `bos`, all of them begin with it.

    The token at position 0 sees only itself, and in many models its attention output triggers the massive activations
    that become the attention sink of all later tokens. A long window has only one such token, so a fit on long windows
    alone fails on first tokens that it never saw (docs/experiments.md).
    """
    if bos is not None:
        return with_start(_spread(windows[:, 1:], START_LENGTH - 1), bos)
    return _spread(windows, START_LENGTH)


def _spread(windows: torch.Tensor, longest: int) -> torch.Tensor:
    """Pieces of at most `longest` tokens from evenly spread places of windows `[n, T]`."""
    length = min(longest, windows.shape[1])
    stride = max(length, windows.shape[1] // STARTS_PER_WINDOW)
    offset = stride // 2 if windows.shape[1] >= stride // 2 + length else 0
    return windows[:, offset:].unfold(1, length, stride).flatten(0, 1)
