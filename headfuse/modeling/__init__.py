"""Models of layout `decoupled`: importing this package teaches transformers' Auto classes to load them."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from headfuse.modeling import configuration_headfuse, modeling_headfuse
from headfuse.modeling.configuration_headfuse import AUTO_MAP, HeadfuseConfig
from headfuse.modeling.modeling_headfuse import HeadfuseForCausalLM, HeadfuseModel

MODELING_FILES = (Path(configuration_headfuse.__file__), Path(modeling_headfuse.__file__))
"""The files to put beside the weights, under their own names, for `trust_remote_code`."""

AutoConfig.register("headfuse", HeadfuseConfig)
AutoModel.register(HeadfuseConfig, HeadfuseModel)
AutoModelForCausalLM.register(HeadfuseConfig, HeadfuseForCausalLM)
# save_pretrained then copies the code beside the weights again
HeadfuseConfig.register_for_auto_class()
HeadfuseModel.register_for_auto_class("AutoModel")
HeadfuseForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["AUTO_MAP", "MODELING_FILES", "HeadfuseConfig", "HeadfuseForCausalLM", "HeadfuseModel"]
