"""What keeping each number of heads costs: probes of the end loss and of the output error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import headfuse
from headfuse.choices import Side
from headfuse.config.fuse import FuseConfig
from headfuse.fusion import FUSION_METHODS
from headfuse.fusion.losses import lost_value_energy
from headfuse.fusion.maps import HeadMaps, plane_matrix
from headfuse.fusion.moments import value_moments
from headfuse.fusion.refit import FusedHeads, reconstructed_outputs, refit_output
from headfuse.models.capture import AttentionCapture
from headfuse.models.logits import kl_divergence
from headfuse.plan import Groups, HeadBudget
from headfuse.planning import planner as planning
from headfuse.planning.costs import cost_row, measured_counts
from headfuse.planning.end_loss_probes import EndLossProbes, Probe, costs
from headfuse.planning.error_probes import ErrorProbes, output_error
from headfuse.planning.fused_variants import probe_windows, with_heads
from headfuse.planning.survey import SurveyOptions, survey_layer
from headfuse.text.calibration import CalibrationText
from tests.planning.tiny_sources import WINDOWS, opened
from tests.support.planted_heads import edit_weights
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_probe_is_the_divergence_of_the_fused_model(tmp_path: Path, model_type: str) -> None:
    """Each variant's end loss is that of the whole model of equal counts with one side of one layer changed."""
    model = tiny_model(tmp_path / "model", model_type, layers=3)
    _, streamed = opened(model)
    equal = HeadBudget(key_heads=(3, 2, 4), value_heads=(4, 3, 4))
    probes = EndLossProbes(streamed, WINDOWS, equal, refit=False)
    generator, n, d = torch.Generator().manual_seed(4), 4, 8
    fused: dict[tuple[Side, int], tuple[HeadMaps, Groups]] = {}
    for count, groups in ((3, ((0, 2), (1,), (3,))), (1, ((0, 1, 2, 3),))):
        phases = torch.randn(n, d // 2, dtype=torch.complex128, generator=generator)
        fused["key", count] = (
            HeadMaps(torch.randn(n, d, d, dtype=torch.float64, generator=generator), plane_matrix(phases)),
            groups,
        )
        fused["value", count] = HeadMaps(*torch.randn(2, n, d, d, dtype=torch.float64, generator=generator)), groups
    for layer in streamed.walk([streamed.embed(WINDOWS)]):
        probes.advance(layer, fused if layer.index < 2 else {})
    lowered: dict[tuple[int, Side], int] = {(0, "key"): 3, (0, "value"): 4, (1, "key"): 1, (1, "value"): 3}
    results = {(p.layer_idx, p.side, p.count): p.divergence for p in probes.results()}
    assert set(results) == {(*place, count) for place in lowered for count in (1, 3, 4)}
    with torch.no_grad():
        wanted = headfuse.load(model)(WINDOWS).logits.flatten(0, 1).double()
        for (layer_idx, side, count), divergence in results.items():
            changed = headfuse.load(model)
            for (i, s), here in lowered.items():
                here = count if (i, s) == (layer_idx, side) else here
                if here < n:
                    module = changed.model.layers[i]
                    stored = {name: tensor.float() for name, tensor in module.state_dict().items()}
                    module.load_state_dict(with_heads(stored, streamed, {s: fused[s, here]}).tensors)
            got = changed(WINDOWS).logits.flatten(0, 1).double()
            assert divergence == pytest.approx(kl_divergence(got, wanted).item() / len(wanted), rel=1e-3)
            assert divergence > 1e-6


def random_maps(seed: int = 4) -> HeadMaps:
    """Maps of 4 heads of 8 channels that both sides may have: read maps commute with RoPE."""
    generator = torch.Generator().manual_seed(seed)
    phases = torch.polar(torch.ones(4, 4).double(), torch.rand(4, 4, dtype=torch.float64, generator=generator))
    return HeadMaps(plane_matrix(phases.conj()) / 2, plane_matrix(phases))


@pytest.mark.parametrize(("refit", "every_refit"), [(True, True), (True, False), (False, False)])
def test_errors_are_scaled_to_the_end_loss_of_their_side(tmp_path: Path, refit: bool, every_refit: bool) -> None:
    """Errors of equal counts add up to the divergence of the whole model with that side fused, its outputs refitted."""
    model = tiny_model(tmp_path / "model", "llama", layers=3)
    _, streamed = opened(model)
    text = torch.randint(300, (16, 48), generator=torch.Generator().manual_seed(5))
    probes = ErrorProbes(streamed, WINDOWS, HeadBudget(key_heads=(2, 2, 4), value_heads=(2, 3, 1)), refit)
    probes.every_refit = every_refit
    pairs: Groups = ((0, 1), (2, 3))
    changed: dict[Side, Any] = {"key": headfuse.load(model), "value": headfuse.load(model)}
    for layer in streamed.walk([streamed.embed(text)]):
        tensors, captures, maps = layer.tensors, layer.captures, random_maps(layer.index)
        fused: dict[tuple[Side, int], tuple[HeadMaps, Groups]] = {
            (side, count): (maps, groups) for side in changed for count, groups in ((2, pairs), (1, ((0, 1, 2, 3),)))
        }
        probes.advance(layer, fused)
        for side, other in changed.items():
            count = 1 if (layer.index, side) == (2, "value") else 2
            weights = dict(with_heads(tensors, streamed, {side: fused[side, count]}).tensors)
            if refit:
                output = tensors["self_attn.o_proj.weight"].view(32, 4, 8)
                seen = captures[max(1, len(captures) // 4) :] or captures
                refitted = refit_output(output, seen, {side: fused[side, count]})
                weights["self_attn.o_proj.weight"] = refitted.flatten(1)
            other.model.layers[layer.index].load_state_dict(weights)
    table = probes.costs()
    with torch.no_grad():
        wanted = headfuse.load(model)(WINDOWS).logits.flatten(0, 1).double()
        for side, other in changed.items():
            total = sum(table[i, side][1 if (i, side) == (2, "value") else 2] for i in range(3))
            divergence = kl_divergence(other(WINDOWS).logits.flatten(0, 1).double(), wanted).item() / len(wanted)
            assert total == pytest.approx(divergence, rel=1e-3)
            assert divergence > 1e-6
    assert {tuple(sorted(row)) for row in table.values()} == {(1, 2, 4)}
    assert all(row[4] == 0 < row[2] for row in table.values())


def test_errors_are_not_measured_where_the_output_was_fitted(tmp_path: Path) -> None:
    """Windows of one batch are divided as those of several batches are."""
    _, streamed = opened(tiny_model(tmp_path / "model", "llama"))
    text, found = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(5)), []
    for batch in (16, 128):
        streamed.layers.batch_tokens = batch
        probes = ErrorProbes(streamed, WINDOWS, HeadBudget(key_heads=(1, 1), value_heads=(1, 1)), refit=True)
        for layer in streamed.walk([streamed.embed(text)]):
            assert len(layer.captures) == len(text) * 16 // batch
            probes.advance(layer, {(side, 1): (random_maps(), ((0, 1, 2, 3),)) for side in probes.equal})
        found.append(probes.errors)
    one, several = found
    assert one.keys() == several.keys()
    for place, row in one.items():
        assert row == pytest.approx(several[place], rel=1e-3)


def test_a_token_of_massive_energy_hides_no_error(tmp_path: Path) -> None:
    """An error of a token counts by that token's own energy, not by the mean over all."""
    _, streamed = opened(tiny_model(tmp_path / "model", "llama"))
    states, tensors = streamed.embed(WINDOWS), streamed.layer_tensors(0)
    with streamed.layer(0, tensors) as run:
        _, captures = run.capture(states)
    output = tensors["self_attn.o_proj.weight"].view(32, 4, 8)
    targets = [capture.output.flatten(2) @ output.flatten(1).T for capture in captures]
    fused: FusedHeads = {"value": (random_maps(), ((0, 1), (2, 3)))}

    def error(hidden: torch.Tensor) -> float:
        return output_error(captures, targets, hidden, output, fused)

    massive = states.hidden.clone()
    massive[:, 0] *= 1e4
    assert 0 < error(massive) < error(states.hidden) < 1.5 * error(massive)
    assert error(torch.zeros_like(massive)) == pytest.approx(1)  # all error, no energy


@pytest.mark.parametrize(("family", "same"), [("olmo2", True), ("gemma3_text", True), ("glm4", True), ("llama", False)])
def test_an_error_counts_behind_the_norm_of_the_attention_output(tmp_path: Path, family: str, same: bool) -> None:
    """A norm takes off how large the output projection is, and what it takes off an error it takes off the cost."""
    model, lost = tiny_model(tmp_path / "model", family, query_heads=8), []
    fused: FusedHeads = {"value": (random_maps(), ((0, 1), (2, 3)))}
    for factor in (30.0, 3.0):
        edit_weights(model, lambda weights, *_, factor=factor: weights.output.mul_(factor))
        _, streamed = opened(model)
        states, tensors = streamed.embed(WINDOWS), streamed.layer_tensors(0)
        with streamed.layer(0, tensors) as run:
            _, captures = run.capture(states)
        output = streamed.attention_weights(tensors).output
        targets = [capture.output.flatten(2) @ output.flatten(1).T for capture in captures]
        assert all((capture.gain is None) != same for capture in captures)
        lost.append(output_error(captures, targets, states.hidden, output, fused))
    assert 0 < lost[0] < 1
    assert (lost[1] == pytest.approx(lost[0], rel=2e-3)) is same


def test_probes_see_text_that_nothing_was_fitted_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, said = list[torch.Tensor](), list[tuple[str, int, int]]()

    def watched(windows: torch.Tensor, tokens: int) -> torch.Tensor:
        seen.append(probe_windows(windows, tokens))
        return seen[-1]

    monkeypatch.setattr(planning, "probe_windows", watched)
    _, streamed = opened(tiny_model(tmp_path / "model"))
    config = FuseConfig.model_validate({"preset": "balanced", "layout": "decoupled", "budget": {"total": "1/2"}})
    for windows, apart in ((torch.arange(9 * 16).view(9, 16), True), (torch.arange(16).view(1, 16), False)):
        seen.clear()
        text = CalibrationText.split(windows, 0)
        said.clear()
        planning.survey(streamed, text, planning.plan_options(config), lambda *progress: said.append(progress))
        surveyed = text.part(planning.SURVEYED).statistics
        assert [not torch.isin(part, surveyed).any() for part in seen] == [apart, apart]
        assert said[:2] == [("survey", 1, 2), ("survey", 2, 2)]
        assert said[2:] == [("probes", done, len(part)) for part in seen for done in range(1, len(part) + 1)]


@pytest.mark.parametrize(
    ("tokens", "shape"), [(64, (1, 64)), (200, (2, 100)), (300, (2, 150)), (5000, (3, 512)), (1, (1, 1))]
)
def test_probe_windows(tokens: int, shape: tuple[int, int]) -> None:
    """Many beginnings rather than few long ones."""
    windows = torch.arange(3 * 512).view(3, 512)
    chosen = probe_windows(windows, tokens)
    assert chosen.shape == shape
    assert torch.equal(chosen, windows[: shape[0], : shape[1]])


def test_a_row_is_the_mean_of_its_measurements() -> None:
    """Counts that a measurement left out lie between its neighbours, as the lost energy does."""
    measured = [(1.0, {1: 4.0, 2: 2.0, 4: 0.0}), (3.0, {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.0})]
    assert cost_row([8.0, 4.0, 2.0, 0.0], measured) == pytest.approx([1.75, 1.25, 0.625, 0.0])


def test_costs_outside_what_was_measured_keep_its_unit() -> None:
    """They are the lost energy times the factor of the nearest measured count, whatever unit that energy has."""
    for unit in (1e-3, 1.0, 1e3):
        lost = [unit * energy for energy in (8.0, 4.0, 3.0, 2.0, 1.0, 0.0)]
        assert cost_row(lost, [(1.0, {3: 0.3, 6: 0.0})]) == pytest.approx([0.8, 0.4, 0.3, 0.2, 0.1, 0.0])
        assert cost_row(lost, [(1.0, {1: 0.0, 3: 0.3, 6: 0.0})]) == pytest.approx([0.0, 0.4, 0.3, 0.2, 0.1, 0.0])


@pytest.mark.parametrize(("heads", "every", "counts"), [(8, False, [1, 2, 4]), (4, True, [1, 2, 3]), (1, True, [])])
def test_measured_counts(heads: int, every: bool, counts: list[int]) -> None:
    assert measured_counts(heads, every) == counts


def test_maps_of_groups_that_several_counts_have(tmp_path: Path) -> None:
    """They are computed once, and give each count's maps and lost energy as if that were the only one."""
    source, streamed = opened(tiny_model(tmp_path / "model", "llama", kv_heads=8, query_heads=8))
    method = FUSION_METHODS["subspace"]
    options = SurveyOptions(method, "cluster", costs=True, every_count=True)
    layer = next(streamed.walk([streamed.embed(WINDOWS)]))
    found, fused = survey_layer(layer.captures, layer.weights.output, source.heads, options)
    moments = value_moments(layer.captures, layer.weights.output, source.heads, None)
    measured, seen = {c: maps for (side, c), maps in fused.items() if side == "value"}, list[tuple[int, ...]]()
    assert sorted(measured) == list(range(1, 8))
    for count, (maps, groups) in measured.items():
        assert isinstance(maps, HeadMaps)
        alone = method.value_maps(groups, moments)
        assert torch.equal(alone.write, maps.write)
        assert torch.equal(alone.read, maps.read)
        assert found.lost["value"][count - 1] == pytest.approx(lost_value_energy(alone, groups, moments))
        seen += [group for group in groups if len(group) > 1]
    assert len(set(seen)) < len(seen)


def test_a_refit_on_few_rows(tmp_path: Path) -> None:
    """Fewer rows than unknowns are solved from another Gram matrix, with the same ridge and weights."""
    _, streamed = opened(tiny_model(tmp_path / "model", "llama"))
    captures, tensors = list[AttentionCapture](), streamed.layer_tensors(0)
    with streamed.layer(0, tensors) as run:
        for window, weight in ((WINDOWS[:1, :12], 1.0), (WINDOWS[1:2, :8], 4.0)):
            captures += run.capture(streamed.embed(window, weight))[1]
    output = tensors["self_attn.o_proj.weight"].view(32, 4, 8)
    fused: FusedHeads = {"value": (random_maps(), ((0, 1), (2, 3)))}
    few = refit_output(output, captures, fused)  # 20 rows, 32 unknowns
    gram, cross = torch.zeros(32, 32).double(), torch.zeros(32, 32).double()
    for capture in captures:
        z = reconstructed_outputs(capture, fused)[0].transpose(0, 1).flatten(1).double()
        missing = (capture.output[0].flatten(1).double() - z) @ output.flatten(1).double().T
        gram, cross = gram + capture.weight * z.T @ z, cross + capture.weight * z.T @ missing
    ridge = 32 / 20 * gram.diagonal().mean()
    change = torch.linalg.solve(gram + ridge * torch.eye(32), cross).T
    assert torch.allclose((few - output).flatten(1).double(), change, atol=1e-5)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("side", ["key", "value"])
def test_probes_refit_the_output_projection(tmp_path: Path, side: Side) -> None:
    """With it a fused layer is nearer to the source's, and only the output projection differs."""
    _, streamed = opened(tiny_model(tmp_path / "model", "llama"))
    windows = torch.randint(300, (16, 48), generator=torch.Generator().manual_seed(5))
    tensors, states = streamed.layer_tensors(0), streamed.embed(windows)
    with streamed.layer(0, tensors) as run:
        reached, captures = run.capture(states)
    wanted, fused = reached.hidden, {side: (random_maps(), ((0, 1), (2, 3)))}
    output = tensors["self_attn.o_proj.weight"].view(32, 4, 8)
    errors, layers = [], []
    for refitted in (None, refit_output(output, captures, fused)):
        layers.append(with_heads(tensors, streamed, fused, refitted).tensors)
        with streamed.layer(0, layers[-1]) as run:
            errors.append((run(states).hidden - wanted).square().sum().item())
    assert 0 < errors[1] < 0.95 * errors[0]
    assert [name for name in tensors if not torch.equal(layers[0][name], layers[1][name])] == [
        "self_attn.o_proj.weight"
    ]


def test_probes_of_a_model_that_keeps_all_heads_start_from_the_source(tmp_path: Path) -> None:
    _, streamed = opened(tiny_model(tmp_path / "model"))
    probes = EndLossProbes(streamed, WINDOWS, HeadBudget(key_heads=(4, 4), value_heads=(4, 4)), refit=False)
    maps = HeadMaps(*torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    for layer in streamed.walk([streamed.embed(WINDOWS)]):
        probes.advance(layer, {("value", 2): (maps, ((0, 1), (2, 3)))})
    found = costs(probes.results())
    assert [row[4] for row in found.values()] == [0, 0]
    assert all(row[2] > 1e-6 for row in found.values())


def test_a_cost_is_what_the_missing_heads_add() -> None:
    probes = [Probe(0, "key", 4, 0.5), Probe(0, "key", 1, 0.75), Probe(0, "key", 2, 0.25), Probe(1, "value", 4, 0.0)]
    assert costs(probes) == {(0, "key"): {4: 0.0, 1: 0.25, 2: 0.0}, (1, "value"): {4: 0.0}}
