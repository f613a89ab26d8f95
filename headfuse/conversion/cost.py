"""What a conversion will cost, from headers alone: `headfuse fuse --dry-run`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from headfuse.config.fuse import FuseConfig
from headfuse.config.presets import PRESETS
from headfuse.dha.loop import training_memory
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.models.families import architecture_of
from headfuse.models.loading import pick_device
from headfuse.models.source import Source
from headfuse.planning.allocators import ALLOCATORS
from headfuse.planning.budget import width_quantum
from headfuse.planning.costs import measured_counts
from headfuse.planning.fused_variants import PROBE_COST, ROWS_PER_UNKNOWN, probe_tokens, weighing_tokens
from headfuse.planning.planner import SURVEYED
from headfuse.planning.wide_survey import measured_widths
from headfuse.text.calibration import START_LENGTH, STARTS_PER_WINDOW

LIBRARIES = 450 * 10**6
"""Bytes that the process takes with its libraries loaded."""
REFINED = 3.5
"""Price of a token's refinement within the layers, in forward passes: two of them, and the gradients."""
EIGEN, WIDE_EIGEN = 1, 10
"""Work on the groups of all head counts, over [n d, n d] products; on all widths, which take all eigenvectors."""
EFFICIENCY = 0.6
"""Share of a matrix product's speed that whole layers reach: SmolLM2-135M on two cores."""


@dataclass(frozen=True)
class Cost:
    """Peak memory in bytes, without the mapped pages of the source's files, and time in seconds."""

    memory_bytes: int
    seconds: float


def estimate(source: Source, config: FuseConfig, device: str = "auto") -> Cost:
    """What a conversion takes, at the speed of a matrix product measured here.

    Args:
        source: the opened source.
        config: the options of the conversion.
        device: as for `fuse`.
    """
    memory, work = count(source, config)
    return Cost(memory, work / (EFFICIENCY * _speed(device)) + 3 * source.checkpoint.nbytes / 1e9 + 5)


def count(source: Source, config: FuseConfig) -> tuple[int, float]:
    """Bytes that convert.py holds at once, and its floating-point operations; those in float64 count twice.

    Args:
        source: the opened source.
        config: the options of the conversion.
    """
    heads, calibration, shapes = source.heads, config.calibration, source.checkpoint.shapes
    vocabulary, arch = source.config.vocab_size, architecture_of(heads.model_type)
    length, width, d = calibration.sequence_length, heads.hidden_size, heads.head_dim
    held_out = calibration.held_out_windows(calibration.samples) * length
    seen = calibration.samples * length - held_out
    seen += seen // length * STARTS_PER_WINDOW * START_LENGTH
    layers, queries, pairs = heads.num_hidden_layers, heads.num_attention_heads * d, heads.num_key_value_heads * d
    stem = arch.layer_prefix(0).removesuffix("0")
    outer = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith(stem))
    layer = (sum(map(math.prod, shapes.values())) - outer) // layers
    head = vocabulary * width

    hidden = 2 * (seen + 2 * held_out) * width  # input and output of a layer
    captures = seen * (2 * queries + 2 * pairs)
    attention = 4 * heads.num_attention_heads * length**2 + length * vocabulary
    maps = 8 if LAYOUTS[config.layout].wide else 4
    statistics = 2 * (3 * queries**2 + maps * pairs**2)  # float64
    at_work = max(2 * layer, layer + statistics)  # while the text runs through it; while it is fused
    memory = LIBRARIES + 4 * (outer + at_work + hidden + captures + attention)

    once = 2 * layer * layers + 4 * queries * length * layers  # of one token through all layers
    per_token = 2 * queries * (queries + width) + 4 * queries * length  # refit of one layer
    solve = 3 * queries**3
    surveyed = seen * SURVEYED
    sums = 2 * heads.num_attention_heads * length**2 + 2 * length * pairs + 2 * pairs**2  # of one token's values
    groups = (WIDE_EIGEN if LAYOUTS[config.layout].wide else EIGEN) * pairs**3
    moments = (seen + surveyed) * sums + solve + groups  # float64
    passes = seen + 2 * held_out + surveyed
    work = passes * once + layers * (seen * per_token + 2 * moments) + 2 * 2 * held_out * head

    if FUSION_METHODS[config.method].trained:
        steps = config.dha.search_steps + config.dha.fusion_steps
        tokens = steps * config.dha.batch_size * length
        per_token = (3 + (config.dha.loss == "kl")) * (once + 2 * head)  # forward, backward, the teacher's forward
        return LIBRARIES + training_memory(source, config), tokens * per_token

    preset = PRESETS[config.preset]
    refits = FUSION_METHODS[config.method].refits_output
    if ALLOCATORS[config.budget.allocator].costs == "measured" and not LAYOUTS[config.layout].one_count:
        n = heads.num_key_value_heads
        counts, few = len(measured_counts(n, preset.end_loss_probes == "all")), len(measured_counts(n, False))
        if LAYOUTS[config.layout].wide:
            counts = few = len(measured_widths(pairs // width_quantum(heads)))
        rows = min(surveyed, ROWS_PER_UNKNOWN * queries)
        smaller = min(rows, queries)
        refit = rows * (2 * queries * (smaller + width) + 4 * queries * length) + 6 * smaller**2 * queries
        error = surveyed / 4 * (4 * queries * width + 4 * queries * length)
        work += layers * 2 * few * (refit * refits + error) + 3 * weighing_tokens(seen) * (once + 2 * head)
        if preset.end_loss_probes or LAYOUTS[config.layout].wide:
            work += PROBE_COST * seen * once + layers * (2 * counts + 1) * refit * refits
            work += layers * 2 * counts * probe_tokens(seen, layers, counts) * 2 * head
    if preset.model_passes and refits:
        trained = preset.model_passes * seen
        work += trained * (REFINED * once + 3 * 2 * head) + held_out * (once + 2 * head)
        memory += 4 * ((layers * length + seen + 16 * length) * width + 3 * length * vocabulary // 4)
    return int(memory), work


def _speed(device: str) -> float:
    """Floating-point operations per second of a float32 matrix product of a layer's size."""
    a = torch.ones(512, 1024, device=pick_device(device))
    b = torch.ones(1024, 1024, device=a.device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # reading one number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / best
