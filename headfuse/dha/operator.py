"""The fusion operator inside a model: projections that mix the heads of a group (DHA, arXiv 2406.06567, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from headfuse.dha import ratios as dha
from headfuse.models.loading import load_model
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import Groups, head_of_source


class MixedProjection(nn.Module):
    """A key or value projection of m heads that gives every query head its own mixture of them (equation 5).

    Parameters `weight [m, d, D]`, `bias [m, d]` or None, `omega [n_q, m, d]`; output `[..., n_q d]`.
    """

    same: torch.Tensor
    start: torch.Tensor

    def __init__(self, stock: nn.Linear, readers: Sequence[int], head_dim: int) -> None:
        super().__init__()
        self.readers = list(readers)
        self.weight = nn.Parameter(stock.weight.detach().unflatten(0, (-1, head_dim)).clone())
        self.bias = (
            None if stock.bias is None else nn.Parameter(stock.bias.detach().unflatten(0, (-1, head_dim)).clone())
        )
        self.group(single_heads(len(self.weight)))

    def group(self, groups: Groups) -> None:
        """Let the heads of each group mix, from the identity on."""
        self.groups, device = groups, self.weight.device
        start = dha.identity(self.readers, *self.weight.shape[:2]).to(device)
        self.omega = nn.Parameter(start.clone())
        self.register_buffer("start", start)
        self.register_buffer("same", dha.members(groups)[self.readers][:, :, None].to(device))

    def ratios(self) -> torch.Tensor:
        """omega, the identity outside the groups."""
        return torch.where(self.same, self.omega, self.start)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project `hidden [..., D]`."""
        omega = self.ratios()
        bias = None if self.bias is None else dha.fuse(omega, self.bias[..., None]).flatten()
        return F.linear(hidden, dha.fuse(omega, self.weight).flatten(0, 1), bias)

    def collapse(self) -> None:
        """Replace the heads of every group by one."""
        with torch.no_grad():
            omega = self.ratios()
            self.weight = nn.Parameter(dha.collapse(omega, self.weight, self.groups, self.readers))
            if self.bias is not None:
                bias = dha.collapse(omega, self.bias[..., None], self.groups, self.readers)[..., 0]
                self.bias = nn.Parameter(bias)
        owner = head_of_source(self.groups)
        self.readers = [owner[head] for head in self.readers]


def load_weights(source: Source, streamed: StreamedModel, trust_remote_code: bool) -> PreTrainedModel:
    """The whole source model, in float32, on the device of its layers."""
    return load_model(source.folder, device=str(streamed.device), dtype="float32", trust_remote_code=trust_remote_code)


def install(model: PreTrainedModel, streamed: StreamedModel, groups: Sequence[Groups]) -> list[MixedProjection]:
    """Put fusion operators into a model: those of all keys, then those of all values."""
    arch, heads, found = streamed.arch, streamed.heads, list[MixedProjection]()
    readers = [heads.source_head(query) for query in range(heads.num_attention_heads)]
    for name in (arch.key, arch.value):
        for layer_idx in range(heads.num_hidden_layers):
            attention: Any = model.get_submodule(arch.attention_prefix(layer_idx))
            side = MixedProjection(getattr(attention, name), readers, heads.head_dim)
            side.group(groups[len(found)])
            setattr(attention, name, side)
            attention.num_key_value_groups = 1  # every query head has a key and a value of its own
            found.append(side)
    return found


def uninstall(model: PreTrainedModel, source: Source, streamed: StreamedModel, trust_remote_code: bool) -> None:
    """Make the model the source again: the search measures, fusion starts from the source."""
    fresh, arch, heads = load_weights(source, streamed, trust_remote_code), streamed.arch, streamed.heads
    for layer_idx in range(heads.num_hidden_layers):
        attention: Any = model.get_submodule(arch.attention_prefix(layer_idx))
        stock: Any = fresh.get_submodule(arch.attention_prefix(layer_idx))
        for name in (arch.key, arch.value):
            setattr(attention, name, getattr(stock, name))
    model.load_state_dict(fresh.state_dict())


def collapsed_weights(model: PreTrainedModel, streamed: StreamedModel) -> dict[str, torch.Tensor]:
    """The weights by the names of a checkpoint, projections as plain matrices."""
    names = [f"{side}.omega" for side, module in model.named_modules() if isinstance(module, MixedProjection)]
    dropped = {name.removesuffix("omega") + part for name in names for part in ("omega", "start", "same")}
    mixed = tuple(name.removesuffix("omega") for name in names)
    return {
        name: tensor.flatten(0, 1) if name.startswith(mixed) else tensor
        for name, tensor in model.state_dict().items()
        if name not in dropped
    }


def single_heads(num_heads: int) -> Groups:
    """The partition in which every head stays alone."""
    return tuple((j,) for j in range(num_heads))
