"""Tiny sources, and windows of tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel

WINDOWS = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(3))


def opened(model: Path) -> tuple[Source, StreamedModel]:
    source = Source.open(str(model))
    return source, StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
