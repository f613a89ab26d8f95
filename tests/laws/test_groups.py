"""Laws of groups: what every grouper returns and finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headfuse.plan import check_partition
from headfuse.planning.grouping import GROUPERS
from headfuse.planning.similarity import aligned_similarity, linear_cka, redundancy
from tests.support.commands import run
from tests.support.planted_heads import plant
from tests.support.tiny_models import tiny_model


# groupers and similarity
@pytest.mark.parametrize("grouper", sorted(GROUPERS))
def test_groupers_return_partitions(grouper: str) -> None:
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    pairs = (cost + cost.T).fill_diagonal_(0).tolist()
    for count in range(1, 9):
        groups = GROUPERS[grouper](pairs, count, False)
        check_partition(groups, 8, grouper)
        assert len(groups) == count
        if 8 % count == 0:
            assert {len(group) for group in GROUPERS[grouper](pairs, count, True)} == {8 // count}


def test_analyze_sees_planted_pairs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, [[0, 3], [1], [2]], [[0], [1, 2, 3]])
    text = ["--data", tmp_path / "text.txt", "--samples", 8, "--sequence-length", 32]
    options = ("--layout", "decoupled", "--budget", "5/8")
    document = json.loads(run("analyze", model, *options, *text, "--json").splitlines()[-1])
    for layer in document["layers"]:
        assert layer["key"]["groups"] == [[0, 3], [1], [2]]
        assert layer["value"]["groups"] == [[0], [1, 2, 3]]
        key, value = torch.tensor(layer["key"]["aligned"]), torch.tensor(layer["value"]["aligned"])
        for matrix in (key, value, torch.tensor(layer["key"]["cka"]), torch.tensor(layer["value"]["cka"])):
            assert torch.equal(matrix, matrix.T)
            assert matrix.min() >= 0
            assert matrix.max() <= 1 + 1e-6
            torch.testing.assert_close(matrix.diagonal(), torch.ones(4))
        pairs = key[0, 3], value[1, 2], value[1, 3], value[2, 3]
        torch.testing.assert_close(torch.stack(pairs), torch.ones(4), rtol=0, atol=1e-6)
        others = (key[0, 1], key[0, 2], key[1, 2], key[1, 3], key[2, 3], value[0, 1], value[0, 2], value[0, 3])
        assert max(others) < 1 - 1e-4  # close: attention averages random values to nearly one vector


@pytest.mark.parametrize("equal", [True, False])
def test_cluster_finds_planted_groups(equal: bool) -> None:
    wanted = ((0, 5, 7), (1, 2, 8), (3, 4, 6))
    owner = {head: index for index, group in enumerate(wanted) for head in group}
    noise = torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    cost = [
        [0.0 if owner[i] == owner[j] else 1 + float(noise[min(i, j), max(i, j)]) for j in range(9)] for i in range(9)
    ]
    assert GROUPERS["cluster"](cost, 3, equal) == wanted


def test_similarity_is_one_for_equal_heads_and_zero_for_unrelated_ones() -> None:
    weight = torch.randn(1, 4, 16).repeat(3, 1, 1)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    weight[1] = rotation @ weight[0]
    weight[2] = 0
    weight[2, :, :4], weight[:2, :, :4] = torch.eye(4), 0
    cka = linear_cka(weight)
    torch.testing.assert_close(cka[0, 1], torch.tensor(1.0, dtype=cka.dtype))
    torch.testing.assert_close(cka[0, 2], torch.tensor(0.0, dtype=cka.dtype))
    assert redundancy(cka) == pytest.approx(1 / 3)
    energy = torch.tensor([1.0, 1.0, 2.0])
    lost = torch.tensor([[0.0, 0.0, 1.5], [0.0, 0.0, 0.75], [1.5, 0.75, 0.0]])
    assert aligned_similarity(lost, energy)[0].tolist() == [1, 1, 0]
    assert aligned_similarity(lost, energy)[1, 2] == pytest.approx(0.5)
