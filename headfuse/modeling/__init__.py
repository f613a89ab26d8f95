"""Models of layouts with code of their own: importing this package teaches them to transformers' Auto classes."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from headfuse.modeling import (
    configuration_family,
    configuration_headfuse,
    configuration_latent,
    configuration_layerwise,
    modeling_cross_layer,
    modeling_decode_step,
    modeling_headfuse,
    modeling_latent,
    modeling_layerwise,
    modeling_one_head,
    modeling_shared_states,
    modeling_stock,
)
from headfuse.modeling.configuration_headfuse import AUTO_MAP, HeadfuseConfig
from headfuse.modeling.configuration_latent import LatentConfig
from headfuse.modeling.configuration_layerwise import LayerwiseConfig
from headfuse.modeling.modeling_headfuse import HeadfuseForCausalLM, HeadfuseModel
from headfuse.modeling.modeling_latent import LatentForCausalLM, LatentModel
from headfuse.modeling.modeling_layerwise import DeciLMForCausalLM, DeciLMModel

MODELING_FILES = (
    Path(configuration_family.__file__),
    Path(configuration_headfuse.__file__),
    Path(modeling_decode_step.__file__),
    Path(modeling_headfuse.__file__),
    Path(modeling_one_head.__file__),
    Path(modeling_stock.__file__),
)
"""The files to put beside decoupled weights, under their own names, for `trust_remote_code`."""
LAYERWISE_FILES = (Path(configuration_layerwise.__file__), Path(modeling_layerwise.__file__))
"""The same for layerwise weights."""
LATENT_FILES = (
    *MODELING_FILES,
    Path(configuration_latent.__file__),
    Path(modeling_cross_layer.__file__),
    Path(modeling_latent.__file__),
    Path(modeling_shared_states.__file__),
)
"""The same for latent weights."""
CODE = {
    HeadfuseConfig.model_type: MODELING_FILES,
    LatentConfig.model_type: LATENT_FILES,
    LayerwiseConfig.model_type: LAYERWISE_FILES,
}
"""By model type."""

for _config, _model, _causal in (
    (HeadfuseConfig, HeadfuseModel, HeadfuseForCausalLM),
    (LatentConfig, LatentModel, LatentForCausalLM),
    (LayerwiseConfig, DeciLMModel, DeciLMForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal)
    # save_pretrained then copies the code beside the weights again
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "AUTO_MAP",
    "CODE",
    "LATENT_FILES",
    "LAYERWISE_FILES",
    "MODELING_FILES",
    "DeciLMForCausalLM",
    "DeciLMModel",
    "HeadfuseConfig",
    "HeadfuseForCausalLM",
    "HeadfuseModel",
    "LatentConfig",
    "LatentForCausalLM",
    "LatentModel",
    "LayerwiseConfig",
]
