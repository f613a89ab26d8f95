"""What vLLM generates from model folders, by its own scheduler, paged KV cache and attention, on a CPU.

    python scripts/check_vllm.py FOLDER ...        (in the environment that scripts/check_vllm.sh makes)

Prints one JSON document per folder: the class that vLLM took, the tokens that it generates greedily with the
log-probability of each, and from its own configuration of the KV cache the bytes that a token takes in each layer and
in all its blocks. A folder that vLLM or the model code refuses gives the reason instead. One process runs all folders,
until one is refused.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import traceback
from typing import Any

PROMPTS = (range(5, 25), range(40, 47))
"""Token ids; two prompts of different lengths, which vLLM takes in one batch."""
NEW_TOKENS = 24

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, where its cache can be asked
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    """Generate from every folder of the command line."""
    for done, folder in enumerate(sys.argv[1:], 2):
        try:
            print(json.dumps({"folder": folder, **generate(folder)}), flush=True)
        except Exception as error:  # whatever vLLM or the model code raises is the answer
            traceback.print_exc()
            print(json.dumps({"folder": folder, "refused": reason(error)}), flush=True)
            os.execv(sys.executable, [sys.executable, __file__, *sys.argv[done:]])  # as vLLM leaves pieces behind


def generate(folder: str) -> dict[str, Any]:
    """Class, tokens, log-probabilities and cache bytes of one folder."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = None
    try:
        engine = LLM(
            model=folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=64,
            skip_tokenizer_init=True, max_num_seqs=4, disable_log_stats=True, enable_prefix_caching=False,
        )  # fmt: skip
        wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
        results = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], wanted, use_tqdm=False)
        outputs = [result.outputs[0] for result in results]
        return {
            "architecture": engine.llm_engine.model_config.architecture,
            "prompts": [list(prompt) for prompt in PROMPTS],
            "tokens": [list(output.token_ids) for output in outputs],
            "log_probabilities": [
                [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
                for output in outputs
            ],
            **cache_bytes(engine),
        }
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def cache_bytes(engine: Any) -> dict[str, Any]:
    """Bytes that a token takes in the cache of each layer, and in the blocks that it has, from the memory laid out.

    Layers of several kinds take turns in one memory: each kind fills blocks of its own, and a block that has places for
    more layers than there are leaves them empty.

    Raises:
        ValueError: where a block of one layer does not lie in one piece, or blocks hold more than was allocated.
    """
    config = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    tokens = {name: group.kv_cache_spec.block_size for group in config.kv_cache_groups for name in group.layer_names}
    layers: dict[int, int] = {}
    for tensor in config.kv_cache_tensors:
        if tensor.layer_stride != tensor.block_stride * config.num_blocks:
            raise ValueError(f"the blocks of {tensor.layers} are not in one piece: {tensor}")
        for name in tensor.layers:
            layers[int(re.search(r"\.(\d+)\.", name)[1])] = tensor.block_stride // tokens[name]  # type: ignore[index]
    block = config.kv_cache_tensors[0].size // config.num_blocks
    together = sum(block // group.kv_cache_spec.block_size for group in config.kv_cache_groups)
    if sum(layers.values()) > together:
        raise ValueError(f"the layers take {layers} bytes, and {together} were allocated: {config}")
    return {"cache_bytes": [layers[layer] for layer in sorted(layers)], "cache_bytes_together": together}


def reason(error: BaseException) -> str:
    """What was raised first."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
