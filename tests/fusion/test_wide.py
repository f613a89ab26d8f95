"""The laws of wide heads, on the moments of real layers of tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headfuse.fusion.key_channels import planes
from headfuse.fusion.moments import KeyMoments, ValueMoments, key_moments, value_moments
from headfuse.fusion.wide import KeyBasis, even_sizes, key_basis, plain_basis
from headfuse.fusion.wide_attention import (
    cached_keys,
    cached_values,
    expanded_keys,
    expanded_values,
    wide_attention,
)
from headfuse.fusion.wide_layer import WideKeys, WideValues
from headfuse.models.attention import AttentionWeights
from headfuse.models.source import Source
from headfuse.models.streamed import StreamedModel
from headfuse.plan import HeadLayout
from tests.support.planted_heads import plant
from tests.support.tiny_models import tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "gpt_neox", "gptj", "opt")
"""Half-split planes, biases, normed keys, rotated in part, interleaved planes, not rotated at all."""
families = pytest.mark.parametrize("model_type", FAMILIES)
ALL = (0, 1, 2, 3)


class Layer:
    """The first layer of a tiny model on random tokens."""

    def __init__(self, folder: Path) -> None:
        source = Source.open(str(folder))
        streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
        tokens = torch.randint(300, (8, 48), generator=torch.Generator().manual_seed(5))
        tensors = streamed.layer_tensors(0)
        with streamed.layer(0, tensors) as layer:
            captures = layer.capture(streamed.embed(tokens))[1]
        self.heads: HeadLayout = source.heads
        self.captures, output = captures, AttentionWeights.of_layer(tensors, streamed.arch, source.heads).output
        self.keys: KeyMoments = key_moments(captures, source.heads)
        self.values: ValueMoments = value_moments(captures, output, source.heads, None)
        self.output = output.double()

    @property
    def full(self) -> int:
        return self.heads.num_key_value_heads * self.heads.head_dim


@families
def test_full_width_is_the_source(tmp_path: Path, model_type: str) -> None:
    layer = Layer(tiny_model(tmp_path / "model", model_type))
    key, value = layer.captures[0].key, layer.captures[0].value
    keys, values = key_basis(layer.keys), plain_basis(layer.values)
    assert cached_keys(key, keys).shape[-1] == cached_values(value, values).shape[-1] == layer.full
    torch.testing.assert_close(expanded_keys(cached_keys(key, keys), keys, layer.heads.rotary_dim), key)
    torch.testing.assert_close(expanded_values(cached_values(value, values), values), value)


def test_full_width_is_the_source_where_the_text_said_nothing() -> None:
    """A head without queries, a plane without keys, an output that reads one channel: full width stays the source."""
    keys = KeyMoments(torch.eye(3, dtype=torch.complex128).repeat(2, 1, 1), torch.ones(3, 2, dtype=torch.float64))
    keys.gram[1] = 0
    keys.query_energy[2] = 0
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = key_basis(keys)
    torch.testing.assert_close(expanded_keys(cached_keys(x, basis), basis, 4), x)
    gram = torch.zeros(3, 4, 4, dtype=torch.float64)
    gram[:, 0, 0] = 1
    values = plain_basis(ValueMoments(torch.zeros(3, 4, 3, 4, dtype=torch.float64), gram))
    torch.testing.assert_close(expanded_values(cached_values(x, values), values), x)


@families
def test_equal_heads_need_the_width_of_one(tmp_path: Path, model_type: str) -> None:
    folder = tiny_model(tmp_path / "model", model_type)
    plant(folder, [ALL])
    layer = Layer(folder)
    key, value, d = layer.captures[0].key, layer.captures[0].value, layer.heads.head_dim
    keys, values = key_basis(layer.keys).narrowed(d), plain_basis(layer.values).narrowed(d)
    assert cached_keys(key, keys).shape[-1] == cached_values(value, values).shape[-1] == d
    found = expanded_keys(cached_keys(key, keys), keys, layer.heads.rotary_dim)
    torch.testing.assert_close(found, key, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expanded_values(cached_values(value, values), values), value, rtol=1e-4, atol=1e-5)


@families
def test_one_group_of_twice_the_width_loses_no_more_than_two(tmp_path: Path, model_type: str) -> None:
    layer = Layer(tiny_model(tmp_path / "model", model_type))
    for lost in (lambda g: key_basis(layer.keys.of(g)).lost(), lambda g: plain_basis(layer.values.of(g)).lost()):
        two, one = lost((0, 2)) + lost((1, 3)), lost((0, 2, 1, 3))[::2]
        assert (one <= two + 1e-12 * two[0]).all()
        assert (one[1:-1] < two[1:-1]).any()


@families
def test_lost_energy_is_that_of_what_is_missing(tmp_path: Path, model_type: str) -> None:
    layer = Layer(tiny_model(tmp_path / "model", model_type))
    rotated, capture = layer.heads.rotary_dim, layer.captures[0]
    keys, values = key_basis(layer.keys), plain_basis(layer.values)
    lost_keys, lost_values = keys.lost(), values.lost()
    assert (lost_keys.diff() <= 0).all()
    assert (lost_values.diff() <= 0).all()
    assert lost_keys[-1] == lost_values[-1] == 0
    for width in (2, 8, 14, 20):
        missing = torch.cat(
            [c.key.double() - _back(c.key.double(), keys.narrowed(width), rotated) for c in layer.captures]
        )
        z = planes(missing[..., :rotated])  # [B, n, T, F]
        z = z - z.mean(2, keepdim=True)  # a softmax does not see what all keys of a window have in common
        energy = (z.abs().square().mean((0, 2)) * layer.keys.query_energy).sum() / 2
        if layer.keys.tail is not None:
            rest = missing[..., rotated:]
            rest = (rest - rest.mean(2, keepdim=True)).transpose(0, 1).flatten(1, 2)  # [n, B T, t]
            energy += torch.einsum("jta,jab,jtb->", rest, layer.keys.tail.output_gram, rest) / rest.shape[1]
        torch.testing.assert_close(lost_keys[width], energy, rtol=1e-6, atol=1e-9 * float(lost_keys[0]))
        narrow = values.narrowed(width)
        error = torch.zeros(())
        for head, weight in enumerate(layer.output.unbind(1)):
            probabilities = capture.probabilities(capture.key).double()  # of every head: one covariance for all
            missing = capture.value.double() - expanded_values(cached_values(capture.value.double(), narrow), narrow)
            source = layer.heads.source_head(head)
            averaged = probabilities @ missing[:, source, None]
            error = error + (averaged @ weight.T).square().sum(-1).mean()
        assert len(layer.captures) == 1
        torch.testing.assert_close(lost_values[width], error, rtol=1e-4, atol=1e-7 * float(lost_values[0]))


def _back(keys: torch.Tensor, basis: KeyBasis, rotated: int) -> torch.Tensor:
    return expanded_keys(cached_keys(keys, basis), basis, rotated)


@families
@pytest.mark.parametrize("query_heads", [4, 8], ids=["mha", "gqa"])
def test_queries_read_the_cached_head_as_it_is(tmp_path: Path, model_type: str, query_heads: int) -> None:
    """Attention over what is cached is attention over what it gives back; at full width, the source's."""
    if query_heads == 8 and model_type in ("gpt_neox", "gptj", "opt"):
        pytest.skip("this family has a key head for every query head")
    layer = Layer(tiny_model(tmp_path / "model", model_type, query_heads=query_heads))
    capture, heads = layer.captures[0], layer.heads
    readers = torch.tensor([heads.source_head(query) for query in range(query_heads)])
    for width in (10, 16, layer.full):
        bases = key_basis(layer.keys).narrowed(width), plain_basis(layer.values).narrowed(width)
        cached = cached_keys(capture.key, bases[0]), cached_values(capture.value, bases[1])
        found = wide_attention(capture.query, *cached, bases, readers, capture.scaling)
        keys = expanded_keys(cached[0], bases[0], heads.rotary_dim)
        wanted = capture.attend(keys, expanded_values(cached[1], bases[1]))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.transpose(1, 2), capture.output, rtol=1e-4, atol=1e-5)


def test_slots_rotate_with_their_frequencies(tmp_path: Path) -> None:
    """The cached key of rotated keys is the cached key of keys, each slot rotated by its own frequency."""
    layer = Layer(tiny_model(tmp_path / "model", "gptj"))
    basis, rotated = key_basis(layer.keys).narrowed(14), layer.heads.rotary_dim
    key = layer.captures[0].key.double()
    angle = torch.arange(key.shape[2])[:, None] * torch.tensor([1.0, 0.01])  # of any position and plane

    def rotate(x: torch.Tensor, count: int, angles: torch.Tensor) -> torch.Tensor:
        z = planes(x[..., :count]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag, x[..., count:]], -1)

    wanted = rotate(cached_keys(key, basis), 2 * len(basis.frequency), angle[:, basis.frequency])
    torch.testing.assert_close(cached_keys(rotate(key, rotated, angle), basis), wanted)
    assert basis.frequency.tolist() == sorted(basis.frequency.tolist())


@families
def test_channels_of_one_size_change_nothing_else(tmp_path: Path, model_type: str) -> None:
    layer = Layer(tiny_model(tmp_path / "model", model_type))
    groups, width = (ALL,), layer.full // 2
    keys = WideKeys((key_basis(layer.keys).narrowed(width),), layer.heads.rotary_dim)
    values = WideValues((plain_basis(layer.values).narrowed(width),))
    for maps, even, states in (
        (keys, keys.even(layer.captures, groups), [capture.key for capture in layer.captures]),
        (values, values.even(layer.captures, groups), [capture.value for capture in layer.captures]),
    ):
        torch.testing.assert_close(even.reconstruct(states[0], groups), maps.reconstruct(states[0], groups))
        before, after = (torch.cat([one.cached(part, groups) for s in states for part in s]) for one in (maps, even))
        largest = after.abs().amax(0)
        slots = len(keys.bases[0].energy) if maps is keys else 0
        pairs = torch.maximum(largest[:slots], largest[slots : 2 * slots])
        sizes = torch.cat([pairs, largest[2 * slots :]])
        torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes), rtol=1e-4, atol=0)
        assert before.abs().amax(0).std() > 1e-3


def test_sizes_of_channels_that_hold_nothing() -> None:
    assert even_sizes(torch.zeros(3)).tolist() == [1, 1, 1]
    sizes = even_sizes(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    assert sizes[0] / sizes[1] == 4
    assert sizes.log().sum() == pytest.approx(0, abs=1e-12)
    assert sizes[2] > 0
