"""The training objective: its terms, and the same in chunks of tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headfuse.models.loading import load_model
from headfuse.models.logits import kl_divergence
from headfuse.models.states import document_positions, model_states
from headfuse.training.objective import LossWeights, Objective
from tests.support.tiny_models import tiny_config


def test_kl_of_identical_models_and_its_gradient_are_zero(source: Path) -> None:
    student, teacher = load_model(source, device="cpu"), load_model(source, device="cpu")
    batch = torch.randint(0, 42, (2, 16))
    loss = Objective(student, teacher.get_output_embeddings())(batch, model_states(teacher, batch))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in student.parameters() if p.grad is not None) < 1e-6


def test_kl_is_the_forward_divergence() -> None:
    logits, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    assert torch.allclose(kl_divergence(logits, teacher), (p * (p / q).log()).sum())
    assert not torch.allclose(kl_divergence(logits, teacher), (q * (q / p).log()).sum())


def reference_loss(
    student: Any, teacher: Any, batch: torch.Tensor, weights: LossWeights, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of whole logits, as its words say it."""
    with torch.no_grad():
        taught = teacher(batch, position_ids=positions, output_hidden_states=True, use_cache=False)
    mine = student(batch, position_ids=positions, output_hidden_states=True, use_cache=False)
    logits, p = mine.logits, taught.logits.softmax(-1)
    loss = weights.kl * (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None]).mean()
    loss = loss + weights.cross_entropy * nll
    if weights.hidden:  # transformers norms the last entry; there is one layer before it
        a, b = mine.hidden_states[1], taught.hidden_states[1]
        loss = loss + weights.hidden * ((a - b).square().sum(-1) / b.square().sum(-1)).mean()
    return loss


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0, 1), LossWeights(0.7, 0.3), LossWeights(1, 0.5)])
@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("separate", [False, True])
def test_chunks_have_loss_and_gradient_of_the_whole_logits(
    source: Path, fused: Path, weights: LossWeights, chunk: int, separate: bool
) -> None:
    student, teacher = load_model(fused, device="cpu"), load_model(source, device="cpu")
    batch = torch.randint(0, 12, (2, 16))
    positions = document_positions(batch, 1) if separate else None
    objective = Objective(student, teacher.get_output_embeddings(), weights, chunk)
    with torch.no_grad():
        states = model_states(teacher, batch, positions)
    results = []
    for loss in (reference_loss(student, teacher, batch, weights, positions), objective(batch, states, positions)):
        student.zero_grad()
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-4, atol=1e-6)


def test_capped_logits_have_the_loss_and_gradient_that_autograd_gives() -> None:
    config = tiny_config("gemma2")
    config.final_logit_softcapping = 0.5
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2))
    for model in (student, teacher):
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    batch, weights = torch.randint(0, 300, (2, 16)), LossWeights(0.7, 0.3)
    objective, results = Objective(student, teacher.get_output_embeddings(), weights, 5), []
    with torch.no_grad():
        states = model_states(teacher, batch)
        assert teacher(batch).logits.abs().max() > 0.4
    for loss in (reference_loss(student, teacher, batch, weights), objective(batch, states)):
        student.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-4, atol=1e-6)


def test_hidden_state_term(source: Path, fused: Path) -> None:
    student, teacher, batch = (
        load_model(fused, device="cpu"), load_model(source, device="cpu"), torch.randint(0, 42, (2, 16)),
    )  # fmt: skip
    states = model_states(teacher, batch, layers=True)
    with torch.no_grad():
        first, last = teacher(batch, output_hidden_states=True).hidden_states[1:]
    assert torch.equal(states.outputs[0], first)
    assert torch.equal(states.inputs[1], first)
    assert torch.equal(teacher.model.norm(states.outputs[1]), last)
    head = teacher.get_output_embeddings()
    plain = Objective(student, head, LossWeights())(batch, states)
    both = model_states(student, batch, layers=True).outputs, states.outputs
    errors = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(*both, strict=True)]
    whole = Objective(student, head, LossWeights(hidden=2.0))(batch, states)
    assert torch.allclose(whole, plain + sum(errors), rtol=1e-5)


def test_layerwise_loss_gives_every_layer_the_teachers_input(source: Path, fused: Path) -> None:
    student, teacher, batch = (
        load_model(fused, device="cpu"), load_model(source, device="cpu"), torch.randint(0, 42, (2, 16)),
    )  # fmt: skip
    with torch.no_grad():
        states = model_states(teacher, batch, layers=True)
    loss = Objective(student, teacher.get_output_embeddings())(batch, states, None, "layerwise")
    rotary = student.model.rotary_emb(states.inputs[0], torch.arange(16)[None])
    errors = []
    for layer, before, after in zip(student.model.layers, states.inputs, states.outputs, strict=True):
        out = layer(before, position_embeddings=rotary)
        errors.append(((out - after).square().sum(-1) / (after - before).square().sum(-1)).mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.model.layers.parameters())
    assert student.model.norm.weight.grad is None
    same = Objective(teacher, teacher.get_output_embeddings())(batch, states, None, "layerwise")
    assert same.item() < 1e-10


@pytest.mark.parametrize("layout", ["gqa", "decoupled"])
def test_separate_documents_do_not_see_each_other(source: Path, decoupled: Path, layout: str) -> None:
    model = load_model(source if layout == "gqa" else decoupled, device="cpu")
    batch = torch.randint(2, 42, (3, 20))
    batch[0, 7] = batch[0, 12] = batch[1, 19] = batch[2, 0] = 1
    positions = document_positions(batch, 1)
    assert positions[0].tolist() == [*range(8), *range(5), *range(7)]
    assert positions[1].tolist() == list(range(20))
    assert positions[2].tolist() == [0, *range(19)]
    with torch.no_grad():
        packed = model_states(model, batch, positions).last
        for row, start, end in ((0, 0, 8), (0, 8, 13), (0, 13, 20), (1, 0, 20), (2, 0, 1), (2, 1, 20)):
            alone = model_states(model, batch[row : row + 1, start:end]).last[0]
            assert torch.allclose(packed[row, start:end], alone, atol=1e-5)
