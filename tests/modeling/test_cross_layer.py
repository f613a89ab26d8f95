"""Shipped model code of layers that read what an earlier layer caches."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from headfuse.modeling import LatentConfig
from tests.modeling.test_latent import fused_config, random_model, tokens

WHOLE = [[0, 1, 2, 3]]
SOURCE = (WHOLE, [20], [13], [[0, 0, 1, 1, 2, 2, 3, 3, 3, 1]])
HEADS_APART = ([[0], [1], [2], [3]], [8] * 4, [8] * 4, [[0, 1, 2, 3]] * 4)
NARROW = (WHOLE, [4], [3], [[1, 2]])
NOTHING: Any = (WHOLE, [0], [0], [[]])
VALUES_ALONE: Any = (WHOLE, [0], [13], [[]])
MODELS: dict[str, tuple[list[Any], list[list[int]], list[list[int]]]] = {
    "beside its own": ([SOURCE, NARROW, SOURCE, NARROW], [[], [0], [], [2]], [[], [0], [], [0]]),
    "instead of its own": ([SOURCE, NOTHING, NOTHING], [[], [0], [0]], [[], [0], [0]]),
    "keys alone": ([SOURCE, VALUES_ALONE], [[], [0]], [[], []]),
    "values of untouched heads": ([HEADS_APART, SOURCE, NARROW], [[], [], [0]], [[], [], [0]]),
    "all layers before": ([HEADS_APART, NARROW, NARROW, NOTHING], [[], [0], [0, 1], [1, 2]], [[], [0], [1, 0], [0, 1]]),
}


def config_of(name: str) -> LatentConfig:
    layers, keys, values = MODELS[name]
    names = ("groups", "key_widths", "value_widths", "rotary_slots")
    widths = dict(zip(names, map(list, zip(*layers, strict=True)), strict=True))
    config = fused_config([SOURCE] * len(layers)).to_dict()
    return LatentConfig(**{**config, **widths, "key_sources": keys, "value_sources": values})


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(config_of(request.param))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_tokens_equal_uncached_ones(model: Any, cache: str, attention: str) -> None:
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    kind = None if cache == "dynamic" else cache
    found = model.generate(tokens(), cache_implementation=kind, disable_compile=True, **options)
    assert torch.equal(found, model.generate(tokens(), use_cache=False, **options))


@torch.no_grad()
def test_beams(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    assert torch.equal(model.generate(tokens(), **options), model.generate(tokens(), use_cache=False, **options))


@torch.no_grad()
def test_the_cache_holds_the_own_widths_alone(model: Any) -> None:
    cache = model(tokens(), use_cache=True).past_key_values
    for layer, keys, values in zip(cache.layers, model.config.key_widths, model.config.value_widths, strict=True):
        assert (layer.keys.shape[-1], layer.values.shape[-1]) == (sum(keys), sum(values))
        assert layer.keys.numel() + layer.values.numel() == 2 * 12 * (sum(keys) + sum(values))


@torch.no_grad()
def test_what_a_reader_reads_matters(model: Any) -> None:
    """A source's cached states reach a later layer by its read maps: another read map, other logits."""
    before = model(tokens()).logits
    model.model.layers[-1].self_attn.value_read.mul_(-1)
    assert not torch.allclose(before, model(tokens()).logits)


def test_copies_do_not_share_states(model: Any) -> None:
    """After a training step, whose states are kept for gradient checkpoints."""
    model(tokens()).logits.sum().backward()
    copied = copy.deepcopy(model)
    attentions = [
        layer.self_attn for layer in copied.model.layers if getattr(layer.self_attn, "shared", None) is not None
    ]
    assert len({id(attention.shared) for attention in attentions}) == 1
    assert attentions[0].shared is not model.model.layers[0].self_attn.shared
    with torch.no_grad():
        torch.testing.assert_close(copied(tokens()).logits, model(tokens()).logits)
        again = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
        assert not copied.model.layers[0].self_attn.shared, "states of a pass without gradients do not outlive it"


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_reach_the_source_through_its_readers(checkpoints: bool) -> None:
    """With gradient checkpoints, too, which compute layers again: against finite differences."""
    model = random_model(config_of("instead of its own")).double().train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weight = model.model.layers[0].self_attn.v_proj.weight
    loss = model(tokens()).logits.square().mean()
    loss.backward()
    direction, step = weight.grad.sign(), 1e-3
    losses = []
    with torch.no_grad():
        for move in (step, -2 * step):
            weight.add_(move * direction)
            losses.append(model(tokens()).logits.square().mean())
    torch.testing.assert_close((weight.grad * direction).sum(), (losses[0] - losses[1]) / (2 * step), rtol=1e-2, atol=0)


@pytest.mark.parametrize("copied", [False, True])
def test_checkpoints_of_several_passes_before_one_backward_pass(copied: bool) -> None:
    """Each computes its layers again with the states of its own pass; so does a copy of the model."""
    model = random_model(config_of("instead of its own")).double().train()
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        trained = copy.deepcopy(model) if copied else model
        trained.zero_grad()
        first, second = tokens(), tokens().flip(1)
        (trained(first, labels=first).loss + 2 * trained(second, labels=second).loss).backward()
        gradients.append({name: weight.grad for name, weight in trained.named_parameters() if weight.grad is not None})
        gradients[-1] = {name: gradient.clone() for name, gradient in gradients[-1].items()}
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_reentrant_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="need use_reentrant=False"):
        random_model(config_of("instead of its own")).gradient_checkpointing_enable({"use_reentrant": True})


def test_threads_have_passes_of_their_own() -> None:
    model = random_model(config_of("instead of its own")).eval()
    with torch.no_grad():
        wanted = [model(tokens()[:, : 4 + i]).logits for i in range(4)]

    @torch.no_grad()
    def run(i: int) -> bool:
        return all(torch.equal(model(tokens()[:, : 4 + i]).logits, wanted[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_compiled_it_is_one_graph(model: Any) -> None:
    with torch.no_grad():
        assert torch._dynamo.explain(model)(tokens()).graph_break_count == 0


BAD: dict[str, dict[str, Any]] = {
    "different earlier layers": {"key_sources": [[], [1]]},
    "one entry per|one per layer": {"key_sources": [[]]},
    "from 1 to 32": {"key_widths": [[20], [0]], "rotary_slots": [SOURCE[3], [[]]]},
}


@pytest.mark.parametrize("message", BAD)
def test_configs_that_no_reader_can_follow(message: str) -> None:
    fields = {**fused_config([SOURCE, NARROW]).to_dict(), **BAD[message]}
    with pytest.raises(ValueError, match=message):
        LatentConfig(**fields)
