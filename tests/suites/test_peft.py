"""PEFT's common tests, against CircuitGPT with LoRA, the circuit method and learned prompts."""

import inspect

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from hf_circuit_sparsity.adapters import CircuitPeftConfig
from hf_circuit_sparsity.adapters.circuit.layer import CircuitLayer
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from tests.conftest import random_model
from tests.suites.sdist import load

pytestmark = pytest.mark.slow

common = load("peft", "testing_common", {"diffusers": {"StableDiffusionPipeline": type(None)}})
METHODS = {
    "LoRA": (LoraConfig, {"r": 8, "target_modules": ["c_attn", "c_proj"]}),
    "circuit": (
        CircuitPeftConfig,
        {"edges": {"transformer.h.0.attn.c_attn": [[0, 1], [5, 3]],
                   "transformer.h.1.mlp.c_proj": [[2, 7]], "lm_head": [[4, 4]]}},
    ),
    "prompt": (PromptTuningConfig, {"num_virtual_tokens": 10}),
    "p-tuning": (PromptEncoderConfig, {"num_virtual_tokens": 10, "encoder_hidden_size": 32}),
    "prefix": (PrefixTuningConfig, {"num_virtual_tokens": 10}),
}  # fmt: skip
PROMPTS = ("prompt", "p-tuning")  # which prepend embeddings that belong to no token
# Tests that run a model on its prompt.
WITH_PROMPT = (
    "disable_adapter", "generate", "generate_half_prec", "generate_pos_args",
    "inference_safetensors", "training", "training_gradient_checkpointing",
    "training_prompt_learning_tasks",
)  # fmt: skip
MODELS = {"paper": {}, "dense": {"afrac": None, "enable_bigram_table": False}}
# Arguments of some tests beyond the model and the method.
EXTRA = {
    "add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "generate_pos_args": {"raises_err": False},
    "passing_input_embeds_works": {"test_name": ""},
}
NAMES = sorted(
    name.removeprefix("_test_")
    for name, test in vars(common.PeftCommonTester).items()
    if name.startswith("_test_") and "config_cls" in inspect.signature(test).parameters
)


class Tester(common.PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self):
        ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_common(name, method, model, tiny_config, tmp_path, monkeypatch, request):
    config = CircuitGPTConfig(**{**tiny_config.to_dict(), **MODELS[model]})
    small = random_model(config)
    if name == "safe_merge":  # which compares logits within 1e-6
        small.lm_head.weight.data *= 0.1
    small.save_pretrained(tmp_path)
    config_class, settings = METHODS[method]
    settings = {"task_type": "CAUSAL_LM", **settings}
    if any(word in name for word in ("merge", "mixed", "unload", "weighted")):
        # The suite wants adapters that change something from the start.
        settings |= {"init_lora_weights": False} if method == "LoRA" else {}
        add = CircuitLayer.add

        def add_random(layer, adapter_name, *args):
            add(layer, adapter_name, *args)
            torch.nn.init.normal_(layer.circuit_values[adapter_name])

        monkeypatch.setattr(CircuitLayer, "add", add_random)
    reason = None
    if model == "paper" and (
        name == "passing_input_embeds_works" or (method in PROMPTS and name in WITH_PROMPT)
    ):
        reason = "a bigram table needs ids"
    elif name == "load_model_low_cpu_mem_usage" and method in (*PROMPTS, "prefix"):
        reason = "the suite injects the method into layers, which PEFT's prompts know nothing of"
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    test = getattr(Tester(), f"_test_{name}")
    test(
        model_id=str(tmp_path), config_cls=config_class, config_kwargs=settings,
        **EXTRA.get(name, {}),
    )  # fmt: skip
