"""What every stage of one conversion reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headfuse.models.decoder_layers import DecoderLayers
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import FusionPlan
from headfuse.planning.planner import ProgressCallback
from headfuse.text.calibration import CalibrationText


@dataclass(frozen=True)
class Conversion:
    """A source, the text that statistics are taken on, and the folder that the fused model is written to."""

    source: Source
    streamed: StreamedModel
    """The source, layer by layer."""
    text: CalibrationText
    folder: Path
    """The folder in the making; it does not have the output's name yet."""
    on_progress: ProgressCallback


@dataclass(frozen=True)
class FusedModel:
    """The model that a conversion writes: its plan, and its layers as they are written."""

    plan: FusionPlan
    layers: DecoderLayers
