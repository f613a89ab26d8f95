"""The laws that every method, allocator, grouper, layout and family obeys: the tests iterate over the tables."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_decoding_equals_forward, by_head, edit_heads, fuse, logits, plant, run, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import headfuse
from headfuse.errors import BudgetError, UnsupportedModelError
from headfuse.fusion import FUSION_METHODS
from headfuse.layouts import LAYOUTS
from headfuse.plan import ONE_COUNT, SHARED_PARTITION, FusionPlan, HeadLayout, check_partition
from headfuse.planning.allocators import ALLOCATORS, least_cost
from headfuse.planning.budget import BudgetRules, CostTable
from headfuse.planning.grouping import GROUPERS
from headfuse.planning.importance import HEAD_IMPORTANCE
from headfuse.planning.similarity import aligned_similarity, linear_cka, redundancy

FAMILIES = ("llama", "mistral", "qwen2")
"""The other families obey the same laws in tests/test_families.py."""
families = pytest.mark.parametrize("model_type", FAMILIES)
closed_form = [name for name, method in FUSION_METHODS.items() if not method.trained]  # the others: test_dha.py
methods = pytest.mark.parametrize("method", sorted(closed_form))
layouts = pytest.mark.parametrize("layout", sorted(LAYOUTS))
allocators = pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
query_heads = pytest.mark.parametrize("query_heads", [4, 8], ids=["mha", "gqa"])
lossless = [name for name, method in FUSION_METHODS.items() if method.lossless]


def skip_misfit(layout: str, model: Path) -> None:
    """Skip where a layout refuses the model."""
    check = LAYOUTS[layout].check
    try:
        if check is not None:
            check(AutoConfig.from_pretrained(model))
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))


def read_plan(folder: Path) -> FusionPlan:
    return FusionPlan.from_json((folder / "plan.json").read_text())


# 1
@layouts
@pytest.mark.parametrize(
    ("model_type", "query_heads", "method"),
    [(family, count, "subspace") for family in FAMILIES for count in (4, 8)]
    + [("qwen2", 8, method) for method in sorted(closed_form) if method != "subspace"],
)
def test_full_budget_copies_bit_for_bit(
    tmp_path: Path, model_type: str, query_heads: int, method: str, layout: str
) -> None:
    model = tiny_model(tmp_path / "model", model_type, query_heads=query_heads)
    skip_misfit(layout, model)
    quick = ("--samples", 2, "--allocator", "uniform")
    fuse(model, tmp_path / "out", "--budget", 1, "--method", method, "--layout", layout, *quick)
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert source.keys() == fused.keys()
    assert all(torch.equal(source[name], fused[name]) for name in source)
    assert torch.equal(logits(model), logits(tmp_path / "out"))


@methods
def test_heads_that_stay_alone_are_copied_bit_for_bit(tmp_path: Path, method: str) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    layers = [{"layer_idx": 0, "key_groups": [[0, 1, 2, 3]], "value_groups": [[0], [1, 2], [3]]}]
    layers += [{"layer_idx": 1, "key_groups": [[0], [1], [2], [3]], "value_groups": [[0], [1], [2], [3]]}]
    fuse(model, tmp_path / "first", "--budget", 1, "--method", method)
    plan = {**json.loads((tmp_path / "first/plan.json").read_text()), "layers": layers}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    document = fuse(model, tmp_path / "out", "--plan", tmp_path / "plan.json", "--preset", "fast")
    assert (document["key_heads"], document["value_heads"]) == ([1, 4], [3, 4])
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in source if not torch.equal(source[name], fused[name])}
    assert all(name.startswith("model.layers.0.self_attn.") for name in changed)
    for kind in ("weight", "bias"):
        name = f"model.layers.0.self_attn.v_proj.{kind}"
        assert torch.equal(fused[name][:8], source[name][:8])
        assert torch.equal(fused[name][16:], source[name][24:])


# 2
@pytest.mark.parametrize("allocator", sorted(ALLOCATORS.keys() - HEAD_IMPORTANCE.keys() - {"dha-greedy"}))
@layouts
@query_heads
@families
@pytest.mark.parametrize("method", lossless)
def test_planted_groups_are_found_and_lossless(
    tmp_path: Path, model_type: str, query_heads: int, method: str, layout: str, allocator: str
) -> None:
    model = tiny_model(tmp_path / "model", model_type, query_heads=query_heads)
    skip_misfit(layout, model)
    plant(model, [[0, 3], [1, 2]])
    document = fuse(
        model, tmp_path / "out", "--budget", "1/2", "--layout", layout, "--method", method, "--allocator", allocator
    )
    assert document["kv_ratio"] == 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", lossless)
@pytest.mark.parametrize(
    ("keys", "values"),
    [([[0, 1, 2, 3]], [[0, 2], [1], [3]]), ([[0, 3], [1], [2]], [[3, 2, 1, 0]]), ([[0, 2, 3], [1]], [[0, 1], [2, 3]])],
)
def test_planted_groups_of_unequal_sizes_are_lossless(
    tmp_path: Path, method: str, keys: list[list[int]], values: list[list[int]]
) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)
    plant(model, keys, values)
    document = fuse(model, tmp_path / "out", "--budget", "1/2", "--method", method)
    assert (document["key_heads"], document["value_heads"]) == ([len(keys)] * 2, [len(values)] * 2)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in lossless if FUSION_METHODS[name].slots is not None])
def test_unrelated_keys_of_half_the_frequencies_share_one_head(tmp_path: Path, method: str) -> None:
    """Two heads that leave half of the rotary planes empty fill the slots of one head, two slots a frequency."""
    model = tiny_model(tmp_path / "model", "qwen2", query_heads=8)

    def change(attention: Any) -> None:
        for heads in by_head(attention.k_proj):
            heads[:2, [0, 2, 4, 6]] = 0  # planes 0 and 2 of heads 0 and 1; plane f is (f, f + 4)

    edit_heads(model, change)
    (tmp_path / "options.yaml").write_text(f"budget: {{key_heads: [3, 3], value_heads: [4, 4]}}\nmethod: {method}\n")
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert [layer.key_groups[0] for layer in read_plan(tmp_path / "out").layers] == [(0, 1)] * 2
    assert json.loads((tmp_path / "out/config.json").read_text())["rotary_slots"][0][0] == [1, 1, 3, 3]
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-5)


# 3
@layouts
@families
def test_mean_is_three_lines(tmp_path: Path, model_type: str, layout: str) -> None:
    model = tiny_model(tmp_path / "model", model_type, query_heads=8)
    skip_misfit(layout, model)
    options = ["--method", "mean", "--grouping", "neighbours", "--allocator", "uniform", "--layout", layout]
    fuse(model, tmp_path / "out", "--budget", "1/2", *options)
    source, fused = load_file(model / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, tensor in source.items():
        if "k_proj" in name or "v_proj" in name:
            tensor = tensor.unflatten(0, (2, 2, 8)).double().mean(1).flatten(0, 1).float()
        torch.testing.assert_close(fused[name], tensor, rtol=1e-6, atol=1e-7)


# 4
@layouts
@pytest.mark.parametrize("method", [name for name in closed_form if not FUSION_METHODS[name].order_dependent])
def test_order_of_heads_does_not_matter(tmp_path: Path, method: str, layout: str) -> None:
    for name in ("plain", "permuted"):
        tiny_model(tmp_path / name, "qwen2", query_heads=8)
    order = [2, 0, 3, 1]
    query_order = [2 * head + i for head in order for i in range(2)]

    def permute(attention: Any) -> None:
        for projection, index in (
            (attention.q_proj, query_order),
            (attention.k_proj, order),
            (attention.v_proj, order),
        ):
            for heads in by_head(projection):
                heads.copy_(heads[index].clone())
        output = attention.o_proj.weight.data.unflatten(1, (8, -1))
        output.copy_(output[:, query_order].clone())

    edit_heads(tmp_path / "permuted", permute)
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(tmp_path / "permuted"), rtol=1e-4, atol=1e-4)
    for name in ("plain", "permuted"):
        fuse(tmp_path / name, tmp_path / f"{name}-out", "-b", "1/2", "--method", method, "--layout", layout)
    torch.testing.assert_close(logits(tmp_path / "plain-out"), logits(tmp_path / "permuted-out"), rtol=1e-4, atol=1e-4)


# 5
SHAPE = HeadLayout(
    model_type="llama", num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8
)


def falling_costs(seed: int) -> CostTable:
    table = torch.rand(2 * SHAPE.num_hidden_layers, 4, generator=torch.Generator().manual_seed(seed))
    table = table.flip(1).cumsum(1).flip(1)
    rows = (table - table[:, -1:]).tolist()
    return CostTable(rows[: SHAPE.num_hidden_layers], rows[SHAPE.num_hidden_layers :])


@allocators
@pytest.mark.parametrize("seed", range(3))
def test_allocators_spend_the_budget_and_no_more(allocator: str, seed: int) -> None:
    costs, before = falling_costs(seed), float("inf")
    for total in range(6, 25):
        rules = BudgetRules(Fraction(total, SHAPE.total_heads))
        budget = rules.allocate(allocator, SHAPE, costs)
        assert budget == rules.allocate(allocator, SHAPE, costs)
        counts = budget.key_heads + budget.value_heads
        assert sum(counts) == total
        assert all(1 <= count <= 4 for count in counts)
        loss = sum(row[count - 1] for row, count in zip(costs.rows, counts, strict=True))
        assert loss <= before + 1e-9
        before = loss


@pytest.mark.parametrize("seed", range(4))
def test_sensitivity_is_optimal(seed: int) -> None:
    costs, choices = falling_costs(seed).rows, [[1, 2, 3, 4], [2, 3], [1], [4], [1, 2, 3], [1, 2, 3, 4]]
    best: dict[int, float] = {}
    for counts in itertools.product(*choices):
        loss = sum(row[count - 1] for row, count in zip(costs, counts, strict=True))
        best[sum(counts)] = min(loss, best.get(sum(counts), loss))
    assert min(best) == 10
    for total, loss in best.items():
        chosen = least_cost(total, choices, costs)
        assert all(count in row for count, row in zip(chosen, choices, strict=True))
        assert sum(row[count - 1] for row, count in zip(costs, chosen, strict=True)) == pytest.approx(loss)


@allocators
def test_rules_of_a_budget_hold(allocator: str) -> None:
    costs = falling_costs(1)
    budget = BudgetRules(Fraction(3, 4), keep_layers=(1,), min_value_heads=2).allocate(allocator, SHAPE, costs)
    assert (budget.key_heads[1], budget.value_heads[1]) == (4, 4)
    assert min(budget.value_heads) >= 2
    assert budget.total == 18
    budget = BudgetRules((Fraction(1, 2), Fraction(1, 4))).allocate(allocator, SHAPE, costs)
    assert (sum(budget.key_heads), sum(budget.value_heads)) == (6, 3)
    budget = BudgetRules(None, key_heads=(1, 2, 3), value_heads=(4, 1, 1)).allocate(allocator, SHAPE, costs)
    assert (budget.key_heads, budget.value_heads) == ((1, 2, 3), (4, 1, 1))
    budget = BudgetRules(Fraction(1, 2), key_heads=(1, 2, 3)).allocate(allocator, SHAPE, costs)
    assert (budget.key_heads, sum(budget.value_heads)) == ((1, 2, 3), 6)


@pytest.mark.parametrize(
    "rules",
    [
        BudgetRules(Fraction(1, 5)),
        BudgetRules(Fraction(1, 2), min_key_heads=4),
        BudgetRules(Fraction(1, 2), min_key_heads=5),
        BudgetRules(Fraction(1, 2), keep_layers=(3,)),
        BudgetRules(Fraction(1, 2), keep_layers=(0, 1)),
        BudgetRules(None, key_heads=(1, 2), value_heads=(1, 1)),
        BudgetRules(None, key_heads=(1, 2, 5), value_heads=(1, 1, 1)),
        BudgetRules((Fraction(1, 2), Fraction(1, 8))),
    ],
)
def test_impossible_rules_are_refused(rules: BudgetRules) -> None:
    with pytest.raises(BudgetError, match=r"\n"):
        rules.allocate("uniform", SHAPE)


@allocators
def test_the_smallest_budget_that_a_refusal_names_works(allocator: str) -> None:
    costs = falling_costs(2)
    with pytest.raises(BudgetError) as refused:
        BudgetRules(Fraction(1, 10), min_key_heads=2).allocate(allocator, SHAPE, costs)
    smallest = Fraction(str(refused.value.fix).split()[-1])
    assert BudgetRules(smallest, min_key_heads=2).allocate(allocator, SHAPE, costs).total == 9


@pytest.mark.parametrize(("budget", "count"), [("1/4", 1), ("1/3", 1), ("0.5", 2), ("0.9", 2), ("1", 4)])
def test_gqa_takes_the_largest_shape_within_the_budget(budget: str, count: int) -> None:
    result = BudgetRules(Fraction(budget), one_count=True).allocate("uniform", SHAPE)
    assert result.key_heads == result.value_heads == (count,) * 3


def test_a_plan_is_checked_by_the_facts_of_its_layout() -> None:
    """plan.py has them without torch."""
    assert {name for name, layout in LAYOUTS.items() if layout.shared_partition} == set(SHARED_PARTITION)
    assert {name for name, layout in LAYOUTS.items() if layout.one_count} == set(ONE_COUNT)


def test_scores_of_heads_exist_for_the_allocators_that_read_them() -> None:
    assert {name for name, entry in ALLOCATORS.items() if entry.costs == "importance"} == HEAD_IMPORTANCE.keys()


def test_a_budget_rounds_within_half_a_head() -> None:
    for total in range(6, 25):
        for part in (Fraction(-49, 100), Fraction(49, 100)):
            share = min(Fraction(1), (total + part) / 24)
            if total + part >= 6 - Fraction(1, 2):
                assert BudgetRules(share).allocate("uniform", SHAPE).total == total


# 6, 7
@pytest.fixture(scope="module", params=[(family, layout) for family in FAMILIES for layout in LAYOUTS])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with half of the cache, and what `fuse` said about it."""
    folder = tmp_path_factory.mktemp("-".join(request.param))
    model = tiny_model(folder / "model", request.param[0], query_heads=8)
    skip_misfit(request.param[1], model)
    return folder / "out", fuse(model, folder / "out", "--budget", "0.5", "--layout", request.param[1])


def test_saved_folder_reloads_and_its_cache_is_the_promised_one(fused: tuple[Path, dict[str, Any]]) -> None:
    out, document = fused
    import headfuse.modeling  # noqa: F401  registers decoupled models

    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(300, (1, 12))
    with torch.no_grad():
        cache = loaded(tokens, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == document["key_heads"]
    assert [layer.values.shape[1] for layer in cache.layers] == document["value_heads"]
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    plan = read_plan(out)
    assert nbytes == 12 * plan.kv_bytes_per_token(4) == 12 * document["kv_bytes_per_token"]["after"]
    assert document["kv_bytes_per_token"]["after"] / document["kv_bytes_per_token"]["before"] == document["kv_ratio"]


def left_padded(tokens: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last tokens of each row, zeros before them; with the attention mask."""
    width = tokens.shape[1]
    mask = torch.tensor([[int(i >= width - length) for i in range(width)] for length in lengths])
    return tokens * mask, mask


def test_cached_decoding_equals_the_full_pass(fused: tuple[Path, dict[str, Any]]) -> None:
    loaded, lengths = headfuse.load(fused[0]), [24, 19, 3]
    tokens, mask = left_padded(torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0)), lengths)
    assert_decoding_equals_forward(loaded, tokens, mask, lengths)


GENERATE: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def test_generate_with_cache_padding_and_beams(fused: tuple[Path, dict[str, Any]]) -> None:
    loaded = headfuse.load(fused[0])
    tokens, mask = left_padded(torch.randint(1, 300, (2, 18), generator=torch.Generator().manual_seed(0)), [18, 7])
    for beams in (1, 3):
        options = {**GENERATE, "num_beams": beams}
        with torch.no_grad():
            both = loaded.generate(tokens, attention_mask=mask, **options)
            alone = loaded.generate(tokens[1:, -7:], attention_mask=mask[1:, -7:], **options)
            uncached = loaded.generate(tokens, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(both[1, -5:], alone[0, -5:])
        assert torch.equal(both, uncached)


def test_folders_work_where_headfuse_is_not_installed(tmp_path: Path) -> None:
    model, expected = tiny_model(tmp_path / "model", "qwen2", query_heads=8), {}
    tokens, mask = left_padded(torch.randint(1, 300, (2, 18), generator=torch.Generator().manual_seed(0)), [18, 7])
    for layout in LAYOUTS:
        fuse(model, tmp_path / layout, "--budget", "0.25", "--layout", layout)
        loaded = headfuse.load(tmp_path / layout)
        generated = loaded.generate(tokens, attention_mask=mask, num_beams=2, **GENERATE)
        expected[layout] = logits(tmp_path / layout), generated
    torch.save({"expected": expected, "tokens": tokens, "mask": mask, "options": GENERATE}, tmp_path / "expected.pt")
    script = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *args):
        if name.split(".")[0] == "headfuse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
saved = torch.load("expected.pt")
fixed = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
for layout, (logits, generated) in saved["expected"].items():
    model = AutoModelForCausalLM.from_pretrained(layout, trust_remote_code=layout != "gqa")
    stock = type(model).__module__ == "transformers.models.qwen2.modeling_qwen2"
    assert stock == (layout == "gqa"), type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(fixed).logits, logits)
    beams = model.generate(saved["tokens"], attention_mask=saved["mask"], num_beams=2, **saved["options"])
    assert torch.equal(beams, generated), layout
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


# 8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sharded_source_gives_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    model = tiny_model(tmp_path / "model", dtype=dtype)
    sharded = tiny_model(tmp_path / "sharded", dtype=dtype)
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(sharded, max_shard_size="20KB")
    (sharded / "model.safetensors").unlink()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for source in (model, sharded):
        fuse(source, tmp_path / f"{source.name}-out", "--budget", "0.5")
    one, many = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("model", "sharded"))
    assert one.keys() == many.keys()
    assert all(one[name].dtype == many[name].dtype and torch.equal(one[name], many[name]) for name in one)
    assert one["model.norm.weight"].dtype == getattr(torch, dtype)


# 9, 10
@layouts
def test_runs_are_reproducible_from_seed_plan_and_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    fuse(model, out, "--budget", "0.5", "--layout", layout)
    plan = read_plan(out)
    assert FusionPlan.from_json(plan.to_json()) == plan
    fuse(model, tmp_path / "seed", "--budget", "0.5", "--layout", layout)
    fuse(model, tmp_path / "plan", "--budget", "0.5", "--plan", out / "plan.json")
    monkeypatch.chdir(tmp_path)  # headfuse.yaml names the text without its folder
    run("fuse", model, "-o", tmp_path / "yaml", "--config", out / "headfuse.yaml", "-q")
    weights = (out / "model.safetensors").read_bytes()
    for name in ("seed", "plan", "yaml"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == weights, name
    assert (tmp_path / "seed/plan.json").read_bytes() == (out / "plan.json").read_bytes()


def test_outputs_hold_no_absolute_path(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--budget", "0.5")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_written_plan_knows_the_checksums(tmp_path: Path) -> None:
    import hashlib

    model = tiny_model(tmp_path / "model")
    fuse(model, tmp_path / "out", "--budget", "0.5")
    files = json.loads((tmp_path / "out/plan.json").read_text())["files"]
    assert files.keys() == {file.name for file in (tmp_path / "out").iterdir()} - {"plan.json"}
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


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
    document = json.loads(run("analyze", model, "--budget", "5/8", *text, "--json").splitlines()[-1])
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
