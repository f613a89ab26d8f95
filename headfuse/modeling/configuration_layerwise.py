"""Configuration of a Llama-like model whose layers have their own numbers of KV heads, as DeciLM `block_configs`.

This file is shipped beside the weights, so it imports only transformers and the standard library.
"""

from typing import Any

from transformers import LlamaConfig

FORMAT = 1
CODE_VERSION = 3  # of the files beside the weights: a release that changes them raises it
AUTO_MAP = {
    "AutoConfig": "configuration_layerwise.LayerwiseConfig",
    "AutoModel": "modeling_layerwise.DeciLMModel",
    "AutoModelForCausalLM": "modeling_layerwise.DeciLMForCausalLM",
}


class Block(dict):
    """A JSON object whose keys are attributes as well: vLLM and TensorRT-LLM read them so."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class LayerwiseConfig(LlamaConfig):
    """A Llama config with the heads of every layer.

    Args:
        headfuse_format: version of these fields.
        block_configs: for each layer `{"attention": {"n_heads_in_group": query heads of one KV head}, "ffn": {..}}`;
            by default every layer has `num_key_value_heads`.
        qkv_bias: whether the query, key and value projections have biases; `attention_bias` is that of the output
            projection.
        source_model_type: the family of the source model.

    Raises:
        ValueError: naming the layer that does not fit.
    """

    model_type = "nemotron-nas"

    headfuse_format: int = FORMAT
    block_configs: Any = None
    qkv_bias: bool = False
    source_model_type: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check every layer; `num_key_value_heads` becomes the largest count."""
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.headfuse_format != FORMAT:
            raise ValueError(
                f"headfuse_format: {self.headfuse_format} is not supported, only {FORMAT}; use a matching headfuse"
            )
        blocks = self.block_configs
        if blocks is None:  # tools build a config without arguments to see the defaults
            num_kv_heads: int = self.__dict__["num_key_value_heads"]
            group = self.num_attention_heads // num_kv_heads
            blocks = [{"attention": {"n_heads_in_group": group}, "ffn": {}}] * self.num_hidden_layers
        if not isinstance(blocks, list | tuple) or len(blocks) != self.num_hidden_layers:
            raise ValueError(f"block_configs: must be a list of {self.num_hidden_layers} entries, one per layer")
        self.block_configs = [self._block(layer_idx, block) for layer_idx, block in enumerate(blocks)]
        self.num_key_value_heads = max(self.num_key_value_heads_per_layer)

    @property
    def num_key_value_heads_per_layer(self) -> list[int]:
        """Key heads of each layer, which are as many as its value heads."""
        return [self.num_attention_heads // block.attention.n_heads_in_group for block in self.block_configs]

    def _block(self, layer_idx: int, block: Any) -> Block:
        where = f"block_configs[{layer_idx}]"
        if not isinstance(block, dict) or not all(isinstance(block.get(part), dict) for part in ("attention", "ffn")):
            raise ValueError(f"{where}: must have the objects attention and ffn")
        attention, ffn = Block(block["attention"]), Block(block["ffn"])
        group = attention.get("n_heads_in_group")
        if type(group) is not int or group < 1 or self.num_attention_heads % group:
            raise ValueError(
                f"{where}.attention.n_heads_in_group: is {group}, which does not divide {self.num_attention_heads}"
            )
        other = [name for part in (attention, ffn) for name in ("no_op", "replace_with_linear") if part.get(name)]
        if other:
            raise ValueError(f"{where}: {other[0]} is not supported; this is no model of headfuse")
        return Block(block, attention=attention, ffn=ffn)
