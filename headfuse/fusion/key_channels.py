"""How the channels of a source key divide into rotary planes that turn and channels that do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def planes(x: torch.Tensor) -> torch.Tensor:
    """Rotated channels `[..., 2 F]` in the canonical order as complex planes `[..., F]`: plane f is (f, f + F)."""
    first, second = x.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


@dataclass(frozen=True)
class KeyChannels:
    """The channels of a source key or query in the canonical order.

    `rotated`: channels that RoPE rotates; `still`: rotary planes, the slowest ones, that are read as channels that do
    not turn, so that any linear map may mix them.
    """

    rotated: int
    still: int = 0

    @property
    def planes(self) -> int:
        """Rotary planes that turn."""
        return self.rotated // 2 - self.still

    def order(self, head_dim: int) -> list[int]:
        """The channels `[head_dim]` with those of turning planes first, in the canonical order, then all others."""
        f, p = self.rotated // 2, self.planes
        return [*range(p), *range(f, f + p), *range(p, f), *range(f + p, 2 * f), *range(2 * f, head_dim)]

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels `[..., d]` as turning planes `[..., p]`, complex, and the rest `[..., d - 2 p]`."""
        rotated, rest = x[..., : self.rotated], x[..., self.rotated :]
        if not self.still:
            return planes(rotated), rest
        turning, still = rotated.unflatten(-1, (2, -1)).split([self.planes, self.still], dim=-1)
        return planes(turning.flatten(-2)), torch.cat([still.flatten(-2), rest], dim=-1)

    def join(self, turning: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        """The inverse of `split`; `rest` is None where there is none."""
        if rest is None:
            return torch.cat([turning.real, turning.imag], dim=-1)
        first, second, others = rest.split([self.still, self.still, rest.shape[-1] - 2 * self.still], dim=-1)
        return torch.cat([turning.real, first, turning.imag, second, others], dim=-1)
