"""The windows for statistics, short windows cut from them, and held-out windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headfuse.text.random_tokens import with_random_windows
from headfuse.text.windows import with_start

START_LENGTH, STARTS_PER_WINDOW, START_WEIGHT = 4, 16, 4.0


@dataclass(frozen=True)
class CalibrationText:
    """Token windows: `statistics [n, T]`, `starts [m, START_LENGTH]` cut from them, and `held_out [k, T]`.

    With a BOS token (`bos`), all of them begin with it. Some of the statistics windows may hold random tokens instead
    of text (`random [n]`): they serve the closed form, while plans are made and models refined on text `alone`.
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

    def mixed(self, count: int, tokens: torch.Tensor, seed: int) -> CalibrationText:
        """With `count` windows of random `tokens [v]` between those of the statistics (`with_random_windows`)."""
        windows, random = with_random_windows(self.statistics, count, tokens, self.bos, seed)
        return CalibrationText(windows, start_windows(windows, self.bos), self.held_out, self.bos, random)

    @property
    def alone(self) -> CalibrationText:
        """The same without random windows."""
        return CalibrationText(self.text, start_windows(self.text, self.bos), self.held_out, self.bos)

    @property
    def text(self) -> torch.Tensor:
        """The statistics windows that are text, `[at most n, T]`."""
        return self.of_text(self.statistics)

    def of_text(self, rows: torch.Tensor) -> torch.Tensor:
        """Of `rows [n, ...]`, one for each statistics window, those of text."""
        return rows if self.random is None else rows[~self.random.to(rows.device)]

    def part(self, share: float) -> CalibrationText:
        """The first `share` of the statistics windows, at least one, and nothing held out."""
        used = max(1, round(len(self.statistics) * share))
        windows, random = self.statistics[:used], None if self.random is None else self.random[:used]
        return CalibrationText(windows, start_windows(windows, self.bos), self.held_out[:0], self.bos, random)

    def after(self, part: CalibrationText) -> torch.Tensor:
        """The windows of text behind the first ones, which `part` holds; none where it holds them all."""
        return self.text[len(part.text) :]


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
