"""A checkpoint with separate projections and channels in the canonical order."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from headfuse.checkpoint.reader import Checkpoint
from headfuse.modeling.configuration_headfuse import HeadfuseConfig
from headfuse.models.attention import canonical_order, split_projections
from headfuse.models.families import Architecture
from headfuse.plan import HeadLayout


class CanonicalCheckpoint:
    """A checkpoint with a projection each for queries, keys and values, and channels in the canonical order.

    Args:
        checkpoint: one whose projections are packed, head by head, or whose channels have another order, not both.
        arch: the family's table entry.
        heads: the heads.
    """

    def __init__(self, checkpoint: Checkpoint, arch: Architecture, heads: HeadLayout) -> None:
        self.checkpoint, self.folder, self.nbytes = checkpoint, checkpoint.folder, checkpoint.nbytes
        self.shapes, self.dtypes = dict(checkpoint.shapes), dict(checkpoint.dtypes)
        self.arch, self.heads, self.order = arch, heads, canonical_order(arch, heads)
        prefixes = [arch.attention_prefix(layer_idx) for layer_idx in range(heads.num_hidden_layers)]
        self.reordered = {f"{prefix}.{name}.weight" for prefix in prefixes for name in (arch.query, arch.key)}
        self.parts: dict[str, tuple[str, int]] = {}
        self._split = "", list[torch.Tensor | None]()
        for packed in [f"{prefix}.{arch.packed}.{kind}" for prefix in prefixes for kind in ("weight", "bias")]:
            rows, *columns = self.shapes.get(packed, ()) or (0,)
            if rows and rows % 3 == 0:
                del self.shapes[packed]
                dtype, (prefix, kind) = self.dtypes.pop(packed), packed.split(f".{arch.packed}.")
                for side, name in enumerate((arch.query, arch.key, arch.value)):
                    part = f"{prefix}.{name}.{kind}"
                    self.parts[part] = packed, side
                    self.shapes[part], self.dtypes[part] = (rows // 3, *columns), dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, checked to be finite."""
        if name in self.parts:
            packed, side = self.parts[name]
            split = self._split  # read once: a thread may be at another layer
            if split[0] != packed:  # its three parts are read one after another
                kind = packed.rsplit(".", 1)[1]
                whole = {f"{self.arch.packed}.{kind}": self.checkpoint.read(packed)}
                split = self._split = packed, split_projections(whole, kind, self.arch, self.heads)
            part = split[1][side]
            assert part is not None
            return part
        tensor = self.checkpoint.read(name)
        if self.order is None or name not in self.reordered:
            return tensor
        return tensor.unflatten(0, (-1, self.heads.head_dim))[:, self.order].flatten(0, 1)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


def decoupled_config(config: PreTrainedConfig, heads: HeadLayout) -> HeadfuseConfig:
    """The decoupled model that has every head of the source."""
    layers, each = heads.num_hidden_layers, list(range(heads.num_key_value_heads))
    readers = [[heads.source_head(query) for query in range(heads.num_attention_heads)]] * layers
    return HeadfuseConfig(
        source_config=config.to_dict(),
        num_key_heads=[len(each)] * layers,
        num_value_heads=[len(each)] * layers,
        key_head_of_query=readers,
        value_head_of_query=readers,
    )
