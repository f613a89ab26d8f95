"""Files of well-known repositories, and which of them go with a model."""

from __future__ import annotations

LISTINGS = """
meta-llama/Llama-2-7b-chat-hf
 kept LICENSE.txt USE_POLICY.md generation_config.json special_tokens_map.json tokenizer.json tokenizer.model
 kept tokenizer_config.json
 read README.md config.json
 left .gitattributes model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model-00001-of-00002.bin
 left pytorch_model.bin.index.json
meta-llama/Llama-3.1-8B-Instruct
 kept LICENSE USE_POLICY.md generation_config.json special_tokens_map.json tokenizer.json tokenizer_config.json
 left original/consolidated.00.pth original/params.json original/tokenizer.model
mistralai/Mistral-7B-Instruct-v0.3
 kept generation_config.json special_tokens_map.json tokenizer.json tokenizer.model tokenizer.model.v3
 kept tokenizer_config.json
 left consolidated.safetensors params.json model-00003-of-00003.safetensors
mistralai/Mistral-Nemo-Instruct-2407
 kept tekken.json tokenizer.json
 left consolidated.safetensors params.json
Qwen/Qwen2.5-7B-Instruct
 kept LICENSE generation_config.json merges.txt tokenizer.json tokenizer_config.json vocab.json
Qwen/Qwen-7B
 kept LICENSE NOTICE assets/logo.jpg assets/wechat.png qwen.tiktoken generation_config.json tokenizer_config.json
 read configuration_qwen.py modeling_qwen.py qwen_generation_utils.py tokenization_qwen.py cpp_kernels.py
 left cache_autogptq_cuda_256.cpp cache_autogptq_cuda_kernel_256.cu
microsoft/Phi-3-mini-4k-instruct
 kept CODE_OF_CONDUCT.md LICENSE NOTICE.md SECURITY.md added_tokens.json generation_config.json special_tokens_map.json
 kept tokenizer.json tokenizer.model tokenizer_config.json
 read configuration_phi3.py modeling_phi3.py sample_finetune.py config.json
google/gemma-2b
 kept generation_config.json special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json
 left gemma-2b.gguf
google/gemma-3-4b-it
 kept added_tokens.json chat_template.json preprocessor_config.json processor_config.json tokenizer.model
allenai/OLMo-1B-hf
 kept generation_config.json special_tokens_map.json tokenizer.json tokenizer_config.json
 left model.safetensors
HuggingFaceTB/SmolLM2-1.7B-Instruct
 kept generation_config.json merges.txt special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json
 kept instructions_function_calling.md
 left all_results.json eval_results.json train_results.json trainer_state.json training_args.bin onnx/model_q4f16.onnx
 left onnx/model.onnx_data runs/Oct31_10-00-00/events.out.tfevents.1730340000.0
EleutherAI/pythia-1.4b
 kept special_tokens_map.json tokenizer.json tokenizer_config.json
 left pytorch_model.bin
EleutherAI/gpt-neox-20b
 kept merges.txt special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json
 left model-00046-of-00046.safetensors pytorch_model-00001-of-00046.bin
bigscience/bloom-560m
 kept special_tokens_map.json tokenizer.json tokenizer_config.json
 left flax_model.msgpack model.safetensors onnx/decoder_model.onnx onnx/tokenizer.json onnx/config.json
tiiuae/falcon-7b
 kept generation_config.json special_tokens_map.json tokenizer.json tokenizer_config.json
 read configuration_falcon.py handler.py modeling_falcon.py
 left coreml/text-generation/falcon-7b-64-float32.mlpackage/Manifest.json
 left coreml/text-generation/falcon-7b-64-float32.mlpackage/Data/com.apple.CoreML/weights/weight.bin
facebook/opt-1.3b
 kept LICENSE.md generation_config.json merges.txt special_tokens_map.json tokenizer_config.json vocab.json
 left flax_model.msgpack pytorch_model.bin tf_model.h5 rust_model.ot
openai-community/gpt2
 kept generation_config.json merges.txt tokenizer.json tokenizer_config.json vocab.json
 left 64-8bits.tflite 64-fp16.tflite 64.tflite rust_model.ot tf_model.h5 onnx/decoder_model_merged.onnx
 left onnx/generation_config.json onnx/merges.txt onnx/vocab.json
stabilityai/stablelm-2-1_6b
 kept LICENSE.md arcade100k.tiktoken merges.txt special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json
 read configuration_stablelm.py modeling_stablelm.py tokenization_arcade100k.py
 left stablelm-2-1_6b.gguf
openbmb/MiniCPM-2B-sft-bf16
 kept generation_config.json special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json
 read configuration_minicpm.py modeling_minicpm.py
internlm/internlm2-chat-7b
 kept generation_config.json special_tokens_map.json tokenizer.model tokenizer_config.json
 read tokenization_internlm2.py tokenization_internlm2_fast.py configuration_internlm2.py
baichuan-inc/Baichuan2-7B-Base
 kept COMMUNITY_LICENSE_for_Baichuan2_Model.pdf media/checkpoints.jpeg generation_config.json special_tokens_map.json
 kept tokenizer.model tokenizer_config.json
 read tokenization_baichuan.py generation_utils.py quantizer.py
THUDM/chatglm3-6b
 kept MODEL_LICENSE tokenizer.model tokenizer_config.json
 left pytorch_model-00001-of-00007.bin
microsoft/phi-2
 kept CODE_OF_CONDUCT.md LICENSE NOTICE.md SECURITY.md added_tokens.json merges.txt vocab.json tokenizer.json
deepseek-ai/DeepSeek-V3
 kept LICENSE-CODE LICENSE-MODEL figures/benchmark.png figures/niah.png README_WEIGHTS.md tokenizer.json
 left inference/configs/config_671B.json inference/requirements.txt inference/model.py
CohereForAI/c4ai-command-r7b-12-2024
 kept chat_template.jinja additional_chat_templates/rag.jinja additional_chat_templates/tool_use.jinja
 kept generation_config.json tokenizer.json
 left additional_chat_templates/notes.bin
the folder of a training
 kept chat_template.jinja tokenizer.json added_tokens.json
 left optimizer.pt scheduler.pt rng_state.pth rng_state_0.pth scaler.pt trainer_state.json training_args.bin latest
 left zero_to_fp32.py.bak checkpoint-500/model.safetensors checkpoint-500/tokenizer.json checkpoint-500/vocab.json
 left global_step500/mp_rank_00_model_states.pt pytorch_model_fsdp_0/__0_0.distcp
 left adapter_config.json adapter_model.safetensors adapter_model.bin runs/a/image.png
twins of the weights
 left model.fp16.safetensors model-int8.safetensors quantize_config.json quant_config.json hf_quant_config.json
 left openvino/openvino_model.xml openvino_model.bin model.onnx model.tar.gz weights.zip tokenizer.tgz model.keras
 left pytorch_model.bin.index.json model.safetensors.index.fp16.json consolidated.00.pth .cache/license.txt
"""


def entries() -> list[tuple[str, str, str]]:
    """Repository, mark, and path of every file of the listings."""
    found, repository = [], ""
    for line in LISTINGS.strip().splitlines():
        if line.startswith(" "):
            mark, *names = line.split()
            found += [(repository, mark, name) for name in names]
        else:
            repository = line
    return found
