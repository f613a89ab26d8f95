"""What a conversion will cost, from headers alone: `headfuse fuse --dry-run`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from headfuse.choices import Placement
from headfuse.config.fuse import FuseConfig
from headfuse.config.presets import PRESETS
from headfuse.conversion.refine import refinement_passes
from headfuse.dha.loop import training_memory
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.models.families import architecture_of
from headfuse.models.placement import DeviceMemory, batch_tokens, optimizer_device
from headfuse.models.source import Source
from headfuse.models.speed import Speed
from headfuse.plan import HeadLayout
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.comparison import COMPARED_WINDOWS, FITTED_WINDOWS
from headfuse.planning.costs import measured_counts
from headfuse.planning.fused_variants import (
    FAST_PROBE_COST,
    PROBE_COST,
    ROWS_PER_UNKNOWN,
    probe_tokens,
    weighing_tokens,
)
from headfuse.planning.planner import SURVEYED, enough_for_end_losses, plan_options
from headfuse.planning.widths import measured_widths, width_quantum
from headfuse.text.calibration import START_LENGTH, STARTS_PER_WINDOW

LIBRARIES = 450 * 10**6
"""Bytes that the process takes with its libraries loaded."""
REFINED = 3.5
"""Cost of refining on one token within the layers, in forward passes: two forward passes, and the gradients."""
EIGEN, WIDE_EIGEN = 1, 10
"""Work on the groups of all head counts, over [n d, n d] products; on all widths, which take all eigenvectors."""
WIDE_PROBES = 2
"""Measured work on the costs of widths, relative to its count (SmolLM2-135M, docs/reference/layouts.md)."""
EFFICIENCY = 0.6
"""Speed of whole layers relative to that of one matrix product, measured on SmolLM2-135M with two cores."""


@dataclass(frozen=True)
class Cost:
    """Peak memory in bytes, without the mapped pages of the source's files, and time in seconds."""

    memory_bytes: int
    seconds: float


def estimate(source: Source, config: FuseConfig, speed: Speed, device: torch.device, placement: Placement) -> Cost:
    """Main memory and time of a conversion, on a machine with as much free memory as this one.

    Args:
        source: the opened source.
        config: the options of the conversion.
        speed: of matrix products.
        device: where layers are computed.
        placement: what stays there.
    """
    memory = count(source, config)[0]
    if refinement_passes(config.preset, config.method):
        needed = _device_memory(source, device)
        place = optimizer_device(needed.choose(placement, device), device, needed.optimizer)
        memory += needed.optimizer if place is not None and place.type == "cpu" else 0
    return Cost(memory, seconds_at(speed, source, config))


def seconds_at(speed: Speed, source: Source, config: FuseConfig) -> float:
    """Seconds that a conversion takes if matrix products run at `speed`."""
    work = count(source, config, speed.float32 / speed.in_layers)[1]
    return work / (EFFICIENCY * speed.float32) + 3 * source.checkpoint.nbytes / 1e9 + 5


def count(source: Source, config: FuseConfig, price: float = 1.0) -> tuple[int, float]:
    """Peak bytes of convert.py, and its floating-point operations; an operation in float64 counts twice.

    Args:
        source: the opened source.
        config: the options of the conversion.
        price: what an operation inside the layers, or in the loss of the refinement, counts.
    """
    method = FUSION_METHODS[config.method]
    sizes = _Sizes.of(source, config, 1.0 if method.trained else price)
    if method.trained:
        return LIBRARIES + training_memory(source, config), _training_work(sizes, config)
    memory, work = _closed_form(sizes)
    if ALLOCATORS[config.budget.allocator].costs == "measured" and not LAYOUTS[config.layout].one_count:
        work += _measuring_work(sizes, config)
    if sizes.wide and (candidates := ALLOCATORS[config.budget.allocator].candidates):
        work += _comparing_work(sizes, len(candidates))
    if config.budget.cross_layer:
        work += _reading_work(sizes, _channels_read(config, sizes.heads))
    if passes := refinement_passes(config.preset, config.method):
        work += passes * sizes.text * (REFINED * sizes.once + 3 * 2 * sizes.price * sizes.head)
        work += sizes.held_out * (sizes.once + 2 * sizes.head)
        states = (sizes.layers * sizes.length + sizes.seen + 16 * sizes.length) * sizes.width
        memory += 4 * (states + 3 * sizes.length * sizes.vocabulary // 4)
    return int(memory), work


def _device_memory(source: Source, device: torch.device) -> DeviceMemory:
    heads, checkpoint = source.heads, source.checkpoint
    return DeviceMemory.of(
        checkpoint.shapes, checkpoint.dtypes, architecture_of(heads.model_type), heads.num_hidden_layers,
        batch_tokens(device, heads.hidden_size) * heads.hidden_size,
    )  # fmt: skip


def on_device(source: Source, device: torch.device, placement: Placement) -> dict[str, Any] | None:
    """The placement on a device other than the CPU, and the bytes that it takes there."""
    if device.type == "cpu":
        return None
    memory = _device_memory(source, device)
    chosen = memory.choose(placement, device)
    return {"name": str(device), "placement": chosen, "memory_bytes": memory.needed(chosen)}


@dataclass(frozen=True)
class _Sizes:
    """Sizes that the formulas share: tokens, channels, parameters."""

    heads: HeadLayout
    vocabulary: int
    length: int
    """Tokens of a window."""
    seen: int
    """Tokens that the closed form is fitted to."""
    text: int
    """Those of them that are text, on which plans are made and models refined."""
    held_out: int
    outer: int
    """Parameters outside the layers."""
    layer: int
    """Parameters of a layer."""
    wide: bool
    price: float
    """What an operation counts in the layers, and in the output embeddings where layers are refined; those in another
    dtype than float32 count less where it is faster.
    """

    @classmethod
    def of(cls, source: Source, config: FuseConfig, price: float) -> _Sizes:
        heads, calibration, shapes = source.heads, config.calibration, source.checkpoint.shapes
        length = calibration.sequence_length
        held_out = calibration.held_out_windows(calibration.samples) * length
        text = calibration.samples * length - held_out
        seen = text + calibration.random_windows * length
        text, seen = (tokens + tokens // length * STARTS_PER_WINDOW * START_LENGTH for tokens in (text, seen))
        stem = architecture_of(heads.model_type).layer_prefix(0).removesuffix("0")
        outer = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith(stem))
        layer = (sum(map(math.prod, shapes.values())) - outer) // heads.num_hidden_layers
        wide = LAYOUTS[config.layout].wide
        return cls(heads, source.config.vocab_size, length, seen, text, held_out, outer, layer, wide, price)

    @property
    def layers(self) -> int:
        return self.heads.num_hidden_layers

    @property
    def width(self) -> int:
        return self.heads.hidden_size

    @property
    def queries(self) -> int:
        """Channels of all query heads of a layer."""
        return self.heads.num_attention_heads * self.heads.head_dim

    @property
    def pairs(self) -> int:
        """Channels of all key heads of a layer."""
        return self.heads.num_key_value_heads * self.heads.head_dim

    @property
    def head(self) -> int:
        """Parameters of the output embeddings."""
        return self.vocabulary * self.width

    @property
    def once(self) -> float:
        """Operations of one token through all layers."""
        return self.price * self.layers * (2 * self.layer + 4 * self.queries * self.length)

    @property
    def value_sums(self) -> int:
        """Operations of one token's averaged values in the moments of a layer, in float64."""
        pairs, length = self.pairs, self.length
        return 2 * self.heads.num_attention_heads * length**2 + 2 * length * pairs + 2 * pairs**2

    @property
    def refit(self) -> int:
        """Operations of one token in the refit of a layer's output."""
        return 2 * self.queries * (self.queries + self.width) + 4 * self.queries * self.length

    @property
    def surveyed(self) -> float:
        """Tokens that the survey measures again."""
        return self.text * SURVEYED


def _closed_form(sizes: _Sizes) -> tuple[int, float]:
    """Memory and work of the survey's moments and of the fused layers."""
    seen, held_out, length, width = sizes.seen, sizes.held_out, sizes.length, sizes.width
    queries, pairs, num_heads = sizes.queries, sizes.pairs, sizes.heads.num_attention_heads
    hidden = 2 * (seen + 2 * held_out) * width  # input and output of a layer
    captures = seen * (2 * queries + 2 * pairs)
    attention = 4 * num_heads * length**2 + length * sizes.vocabulary
    statistics = 2 * (3 * queries**2 + (8 if sizes.wide else 4) * pairs**2)  # float64
    at_work = max(2 * sizes.layer, sizes.layer + statistics)  # while the text runs through it; while it is fused
    memory = LIBRARIES + 4 * (sizes.outer + at_work + hidden + captures + attention)

    solve = 3 * queries**3
    groups = (WIDE_EIGEN if sizes.wide else EIGEN) * pairs**3
    moments = (seen + sizes.surveyed) * sizes.value_sums + solve + groups  # float64
    passes = seen + 2 * held_out + sizes.surveyed
    work = passes * sizes.once + sizes.layers * (seen * sizes.refit + 2 * moments) + 2 * 2 * held_out * sizes.head
    return memory, work


def _measuring_work(sizes: _Sizes, config: FuseConfig) -> float:
    """Work of measuring what each head count, or width, costs."""
    preset, refits = PRESETS[config.preset], FUSION_METHODS[config.method].refits_output
    seen, layers, length, width, queries = sizes.text, sizes.layers, sizes.length, sizes.width, sizes.queries
    n = sizes.heads.num_key_value_heads
    counts, few = len(measured_counts(n, preset.end_loss_probes == "all")), len(measured_counts(n, False))
    if sizes.wide:
        counts = few = len(measured_widths(sizes.pairs // width_quantum(sizes.heads)))
    rows = min(sizes.surveyed, ROWS_PER_UNKNOWN * queries)
    smaller = min(rows, queries)
    refit = rows * (2 * queries * (smaller + width) + 4 * queries * length) + 6 * smaller**2 * queries
    error = sizes.surveyed / 4 * (4 * queries * width + 4 * queries * length)
    refitted = 1 if sizes.wide else few  # errors of the other widths are scaled
    work = layers * 2 * (refitted * refit * refits + (few + sizes.wide) * error)
    work += 3 * weighing_tokens(seen) * (sizes.once + 2 * sizes.head)
    price = PROBE_COST if preset.end_loss_probes else FAST_PROBE_COST
    enough = probe_tokens(seen, layers, counts, price) >= enough_for_end_losses(layers)
    if enough if sizes.wide else preset.end_loss_probes:
        work += price * seen * sizes.once + layers * (2 * counts + 1) * refit * refits
        work += layers * 2 * counts * probe_tokens(seen, layers, counts, price) * 2 * sizes.head
    return WIDE_PROBES * work if sizes.wide else work


def _comparing_work(sizes: _Sizes, plans: int) -> float:
    """Work of comparing plans, at most: walks over the text that layers are fitted to and over unseen windows."""
    fitted, unseen = min(sizes.surveyed, FITTED_WINDOWS * sizes.length), COMPARED_WINDOWS * sizes.length
    moments = fitted * sizes.value_sums + WIDE_EIGEN * sizes.pairs**3  # float64
    refit = fitted * sizes.refit + 6 * sizes.queries**3
    layers = sizes.layers * (2 * moments + plans * refit)
    return layers + (fitted + (1 + plans) * unseen) * sizes.once + (1 + plans) * unseen * 2 * sizes.head


def _channels_read(config: FuseConfig, heads: HeadLayout) -> int:
    """Channels of a side that a layer reads of those before it, at equal widths."""
    rules = plan_options(config).rules
    layers = min(config.budget.cross_layer or 0, heads.num_hidden_layers - 1)
    return layers * rules.allocate("uniform", heads).key_heads[0] * rules.channels(heads)


def _reading_work(sizes: _Sizes, read: int) -> float:
    """Work of reading other layers: one more pass over the survey's text, and regressions on the read channels."""
    sums = 2 * read * (read + sizes.heads.num_key_value_heads) + 2 * (sizes.pairs + read) ** 2 - 2 * sizes.pairs**2
    tokens = sizes.seen + 2 * sizes.surveyed  # the survey's text twice: for the slots, and for what is cached
    regressions = 3 * WIDE_EIGEN * (read**3 + (read + sizes.pairs) ** 3)
    return sizes.surveyed * sizes.once + 2 * sizes.layers * (tokens * (sums + 2 * sizes.length * read) + regressions)


def _training_work(sizes: _Sizes, config: FuseConfig) -> float:
    """Work of method `dha`: forward and backward, and the teacher's forward where the loss needs it."""
    tokens = (config.dha.search_steps + config.dha.fusion_steps) * config.dha.batch_size * sizes.length
    return tokens * (3 + (config.dha.loss == "kl")) * (sizes.once + 2 * sizes.head)
