"""What other converters add to the NLL, by their own code, at equal cache bytes.

`python benchmarks/peers.py transmla --checkout FOLDER --commit ID --model FOLDER --name NAME --kept 1/2 1/4`, run in
the environment of the peer, whose functions are called in its own order; docs/results/peers.md has the environments
and the changes that a CPU needs. `--model` is a folder of peers_windows.py: the model, the calibration windows and the
windows to evaluate on. Rows are appended to `benchmarks/results/peers.jsonl`, and those that are there are not run
again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import itertools
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

BATCH, FISHER_WINDOWS = 8, 32
"""Windows at once (transmla, care), and windows for the Fisher information (palu): the defaults of the peers."""
TOKENIZER = types.SimpleNamespace(pad_token_id=None)
"""The peers get token ids; of the tokenizer they ask for this only."""
Settings = dict[str, Any]
Convert = Callable[[Settings], tuple[Any, float]]
"""A converted model and how many numbers its cache takes for a token, the mean over the layers."""


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the peer's repository")
    parser.add_argument("--commit", required=True, help="of the checkout, for the rows")
    parser.add_argument("--model", type=Path, required=True, help="folder of peers_windows.py")
    parser.add_argument("--name", required=True, help="of the model, for the rows")
    parser.add_argument("--kept", nargs="+", default=["source", "1/2"], help="shares of the cache, or source")
    parser.add_argument("--rope-dim", type=int, nargs="+", default=[], help="transmla, care: --qk-mqa-dim")
    parser.add_argument("--freqfold", type=int, nargs="+", default=[], help="transmla, care: --freqfold")
    parser.add_argument("--balance", type=float, nargs="+", default=[1.0], help="transmla: --balance-kv-ratio")
    parser.add_argument("--method", nargs="+", default=["care"], help="care: a method; +dynamic, +mla after it")
    parser.add_argument("--group", type=int, nargs="+", default=[], help="palu: --head_group_size")
    parser.add_argument("--search", nargs="+", default=["fisher_uniform"], help="palu: --search_method")
    parser.add_argument("--block", type=int, nargs="+", default=[32], help="palu: what ranks are rounded to")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--save", type=Path, help="folder for the models of new rows, one folder a share of the cache")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/peers.jsonl"))
    options = parser.parse_args()
    options.results, options.model = options.results.resolve(), options.model.resolve()
    options.checkout, options.save = options.checkout.resolve(), options.save and options.save.resolve()
    texts = torch.load(options.model / "windows.pt")["texts"]
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    config = json.loads((options.model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    full = 2 * config["num_key_value_heads"] * head_dim
    unconverted = [{"kept": kept} for kept in options.kept if kept == "source"]
    options.kept = [kept for kept in options.kept if kept != "source"]
    convert, settings = PEERS[options.peer](options, full)
    os.chdir(tempfile.mkdtemp())  # for what peers write where they run
    Path("cache").mkdir()
    for setting in [*unconverted, *settings]:
        extra = {key: value for key, value in setting.items() if key != "kept"}
        row: Settings = {"model": options.name, "kept": setting["kept"], "peer": options.peer}
        row |= {"commit": options.commit, "settings": extra}
        if any(all(old[key] == row[key] for key in row) for old in known):
            continue
        try:
            model, numbers = (load(options.model), full) if setting["kept"] == "source" else convert(setting)
        except LookupError as error:  # the peer cannot take so little
            print(row, error, flush=True)
            continue
        row |= {"cache": round(numbers / full, 4), "nll": {name: nll(model, text) for name, text in texts.items()}}
        row["samples"] = options.samples
        if options.save is not None:
            model.save_pretrained(options.save / setting["kept"].replace("/", "-"))
        with options.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(row, flush=True)


def load(folder: Path) -> Any:
    """The source model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="sdpa").eval()


@torch.no_grad()
def nll(model: Any, windows: torch.Tensor) -> float:
    """NLL per token, as `headfuse eval` takes it."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none").double().mean())
    return round(torch.stack(losses).mean().item(), 5)


def batches(options: argparse.Namespace, size: int) -> list[dict[str, torch.Tensor]]:
    """The calibration windows as the loaders of the peers give them."""
    windows = torch.load(options.model / "windows.pt")["calibration"][: options.samples]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(size)]


def latent_settings(options: argparse.Namespace, methods: list[Settings]) -> Iterator[Settings]:
    """Those of a latent of keys and values together: its RoPE part, its fold, then the rest."""
    for rope, fold, method, kept in itertools.product(options.rope_dim, options.freqfold, methods, options.kept):
        yield {"kept": kept, "qk_mqa_dim": rope, "freqfold": fold, **method}


def latent_options(setting: Settings, full: int, head_dim: int) -> Settings:
    """A setting in the words of TransMLA's converter, as many numbers as the share of the cache."""
    rope, numbers = setting["qk_mqa_dim"], int(full * Fraction(setting["kept"]))
    common = {"q_lora_rank": None, "use_qkv_norm": False, "qk_mqa_dim": rope, "collapse": head_dim // rope}
    return {**common, "kv_lora_rank": numbers - rope, "balance_kv_ratio": setting.get("balance_kv_ratio", 1.0)}


class PartialRopeModels:
    """Models after the first step of TransMLA, which does not depend on the rank: kept for the next setting."""

    def __init__(self, options: argparse.Namespace, partial_rope: Any, utils: Any) -> None:
        self.options, self.partial_rope = options, partial_rope
        self.loader = batches(options, BATCH)
        self.outputs, self.step = functools.cache(self._outputs), functools.cache(self._step)
        self.whole = utils.get_qkv_calibrate_outputs
        partial_rope.get_qkv_calibrate_outputs = lambda model, loader, message: self.outputs("source")

    def _step(self, rope: int, fold: int) -> Any:
        model = load(self.options.model)
        if getattr(model.config, "head_dim", None) is None:
            model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
        words = {"freqfold": fold, "collapse": model.config.head_dim // rope}
        return self.partial_rope.partial_rope(model, TOKENIZER, self.loader, None, **words)

    def _outputs(self, *step: Any) -> Any:
        """Of the projections; batch by batch without those of queries, which no step reads and much memory holds."""
        model = load(self.options.model) if step == ("source",) else self.step(*step)
        result: dict[str, dict[int, list[torch.Tensor]]] = {}
        for batch in self.loader:
            for name, layers in self.whole(model, [batch], "").items():
                for index, parts in layers.items():
                    empty = [part[:, :, :0] for part in parts]
                    result.setdefault(name, {}).setdefault(index, []).extend(empty if name == "query" else parts)
        return result


def transmla(options: argparse.Namespace, full: int) -> tuple[Convert, Iterator[Settings]]:
    """TransMLA: RoPE in one head, the rest of keys with the values in one latent (transmla/converter.py)."""
    sys.path.insert(0, str(options.checkout / "TransMLA_NeurIPS_2025" / "transmla"))
    lora_qkv: Any = importlib.import_module("lora_qkv")
    models = PartialRopeModels(options, importlib.import_module("partial_rope"), importlib.import_module("utils"))

    def convert(setting: Settings) -> tuple[Any, float]:
        rope, fold = setting["qk_mqa_dim"], setting["freqfold"]
        outputs = models.outputs(rope, fold)
        model = copy.deepcopy(models.step(rope, fold))
        lora_qkv.get_qkv_calibrate_outputs = lambda model, loader, message: outputs
        words = latent_options(setting, full, model.config.head_dim)
        lora_qkv.low_rank_qkv(model, TOKENIZER, models.loader, None, **words)
        return model, words["kv_lora_rank"] + rope

    return convert, latent_settings(options, [{"balance_kv_ratio": ratio} for ratio in options.balance])


def care(options: argparse.Namespace, full: int) -> tuple[Convert, Iterator[Settings]]:
    """CARE: keys and values each of low rank (zeroshot/convert.py), or, +mla, TransMLA's steps with its own second."""
    sys.path.insert(0, str(options.checkout / "src"))
    lora_qkv: Any = importlib.import_module("lora_qkv")
    zeroshot: Any = importlib.import_module("zeroshot.convert")
    models = PartialRopeModels(options, importlib.import_module("partial_rope"), importlib.import_module("utils"))
    zeroshot._get_calibration_loader = lambda *_: [batch["input_ids"] for batch in batches(options, 1)]
    lacking = {"cal_dataset": None, "cal_nsamples": 0, "cal_max_seqlen": 0, "seed": 0, "min_rank": None}

    @functools.cache
    def covariances() -> Any:
        return zeroshot.collect_calibration_covariances(load(options.model), TOKENIZER, argparse.Namespace(**lacking))

    def convert(setting: Settings) -> tuple[Any, float]:
        method, *flags = setting["method"].split("+")
        if "mla" in flags:
            model = copy.deepcopy(models.step(setting["qk_mqa_dim"], setting["freqfold"]))
            words = latent_options(setting, full, model.config.head_dim)
            words |= {"kv_decomp_method": method, "cwsvd_percdamp": 0.01, "dynamic_rank": "dynamic" in flags}
            outputs = functools.partial(models.outputs, setting["qk_mqa_dim"], setting["freqfold"])
            lora_qkv.get_qkv_calibrate_outputs = lambda model, loader, message: outputs()
            lora_qkv.low_rank_qkv(model, TOKENIZER, models.loader, None, **words)
            ranks = [layer.self_attn.kv_lora_rank for layer in model.model.layers]
            return model, sum(ranks) / len(ranks) + words["qk_mqa_dim"]
        model, rank = load(options.model), int(full * Fraction(setting["kept"])) // 2
        more = {"method": method, "rank": rank, "percdamp": 0.01, "dynamic_rank": "dynamic" in flags, "max_rank": None}
        options_of_it = argparse.Namespace(**lacking, **more)
        keys, values = zeroshot.build_kv_rank_lists(model, options_of_it, covariances())
        zeroshot.decompose_kv_weights(model, options_of_it, covariances(), k_rank_list=keys, v_rank_list=values)
        return model, (sum(keys) + sum(values)) / len(keys)

    methods = [{"method": method} for method in options.method]
    low_rank = [method for method in methods if "+mla" not in method["method"]]
    plain = ({"kept": kept, **method} for method in low_rank for kept in options.kept)
    return convert, itertools.chain(plain, latent_settings(options, [m for m in methods if m not in low_rank]))


def palu(options: argparse.Namespace, full: int) -> tuple[Convert, Iterator[Settings]]:
    """Palu: keys and values of low rank, by groups of heads (compress.py); the cache holds both latents."""
    sys.modules["fast_hadamard_transform"] = types.ModuleType("fast_hadamard_transform")  # only for quantised latents
    sys.path.insert(0, str(options.checkout))
    search: Any = importlib.import_module("palu.rank_search")
    decomposition: Any = importlib.import_module("palu.decomposition")
    search.get_calib_data = decomposition.get_calib_data = lambda *_, **__: batches(options, 1)
    fisher, rounded = search.calib_fisher_info, search.rounding_search_result
    setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # noqa: B010

    words = argparse.Namespace(calib_dataset="", calib_seqlen=0, model_id="", device="cpu", use_cache=False)
    words.decompose_method = "whiten"

    @functools.cache
    def measured() -> Any:
        """The source with what does not depend on a setting: Fisher information and the whitening of inputs."""
        model = load(options.model)
        model.half = lambda: model
        if any(name.startswith("fisher") for name in options.search):
            fisher(model, batches(options, 1)[:FISHER_WINDOWS], torch.device("cpu"), False)
            model.zero_grad(set_to_none=True)
        decomposition.get_whiten_scale_matrix(model, TOKENIZER, words, "cpu")
        decomposition.get_whiten_scale_matrix = search.calib_fisher_info = lambda *_: None
        for name, module in model.named_modules():
            if name.split(".")[-1] not in ("k_proj", "v_proj"):
                vars(module).pop("scaling_diag_matrix", None)
        return model

    def convert(setting: Settings) -> tuple[Any, float]:
        model = copy.deepcopy(measured())
        words.head_group_size, words.search_method = setting["head_group_size"], setting["search_method"]
        search.rounding_search_result = functools.partial(rounded, block_size=setting["block"])
        wanted = full * Fraction(setting["kept"]) * model.config.num_hidden_layers
        low, high, found = 0.0, 1.0, None
        for _ in range(24):  # what the rounding leaves of a share is not the share that was asked for
            words.param_ratio_target = (low + high) / 2
            try:
                ranks, total, _ = search.rank_search(model, TOKENIZER, words)
            except (ZeroDivisionError, ValueError):
                total = wanted + 1
            if total <= wanted:
                low, found = words.param_ratio_target, (copy.deepcopy(ranks), total)
            else:
                high = words.param_ratio_target
        if found is None:
            raise LookupError("even the smallest ranks take more")
        decomposition.compress_model(model, TOKENIZER, words, "cpu", found[0])
        return model, found[1] / model.config.num_hidden_layers

    product = itertools.product(options.group, options.search, options.block, options.kept)
    return convert, (
        {"kept": kept, "head_group_size": group, "search_method": search_method, "block": block}
        for group, search_method, block, kept in product
    )


PEERS: dict[str, Callable[[argparse.Namespace, int], tuple[Convert, Iterator[Settings]]]] = {
    "transmla": transmla,
    "care": care,
    "palu": palu,
}

if __name__ == "__main__":
    main()
