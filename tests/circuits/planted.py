"""A model written by hand: known nodes carry the answer, all the rest is noise."""

from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.findings.planted import builder
from hf_circuit_sparsity import BinaryTask, Circuit, CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.circuits.task_scores import Calibration
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint

WORDS = ["<pad>", "yes", "no", "on", "off", *(f"w{i}" for i in range(11))]
YES, NO, ON, OFF = (WORDS.index(w) for w in ("yes", "no", "on", "off"))

# "on" anywhere in the prompt is answered by "yes", "off" by "no". Head 1 of layer 0 averages the
# on/off channel over the prompt into channel 3; neuron 7 of layer 1 thresholds it and writes
# channel 4, which the unembedding reads.
PLANTED_NODES = {
    "h.0.attn.act_in": [0],
    "h.0.attn.v": [5],
    "h.0.attn.resid_delta": [3],
    "h.1.mlp.act_in": [3],
    "h.1.mlp.post_act": [7],
    "h.1.mlp.resid_delta": [4],
}
PLANTED_EDGES = {
    ("h.0.attn.act_in", 0, "h.0.attn.v", 5): 2.0,
    ("h.0.attn.v", 5, "h.0.attn.resid_delta", 3): 3.0,
    ("h.1.mlp.act_in", 3, "h.1.mlp.post_act", 7): 1.5,
    ("h.1.mlp.post_act", 7, "h.1.mlp.resid_delta", 4): 2.0,
}


def planted_model(noise: float = 0.01, seed: int = 0) -> CircuitGPTForCausalLM:
    config = CircuitGPTConfig(
        n_layer=2, n_head=2, d_head=4, d_model=16, d_mlp=16, block_size=16, vocab_size=16,
        afrac=None, sink=False, enable_bigram_table=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CircuitGPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ln_" not in name:
                p.copy_(noise * torch.randn_like(p))
        t = model.transformer
        t.wte.weight[:, 2] = 1.0  # every token has something, so that the norm has something to do
        t.wte.weight[ON, 0], t.wte.weight[OFF, 0] = 1.5, -1.5
        v_row = 2 * config.n_head * config.d_head + 5
        t.h[0].attn.c_attn.weight[v_row, 0] = 2.0
        t.h[0].attn.c_proj.weight[3, 5] = 3.0
        t.h[1].mlp.c_fc.weight[7, 3] = 1.5
        t.h[1].mlp.c_proj.weight[4, 7] = 2.0
        model.lm_head.weight[YES, 4], model.lm_head.weight[NO, 4] = 3.0, -3.0
        model.final_logits_bias[YES], model.final_logits_bias[NO] = -3.0, 3.0
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    return builder.word_tokenizer(WORDS)


@cache
def on_off_task(seed: int = 0, answers: tuple[str, str] = ("yes", "no")) -> BinaryTask:
    generator = torch.Generator().manual_seed(seed)

    def pairs(count, fillers):
        for _ in range(count):
            length = int(torch.randint(2, 9, (), generator=generator))
            words = [f"w{int(i)}" for i in torch.randint(*fillers, (length,), generator=generator)]
            place = int(torch.randint(0, length, (), generator=generator))
            sides = []
            for switch, answer in zip(("on", "off"), answers, strict=True):
                sides.append((" ".join([*words[:place], switch, *words[place:]]), " " + answer))
            yield tuple(sides)

    return BinaryTask.from_pairs(
        "on_off", word_tokenizer(), list(pairs(150, (0, 6))), list(pairs(60, (6, 11)))
    )


def reference_ids(seed: int = 0) -> torch.Tensor:
    """Sequences of every kind of word, as the model's pretraining distribution."""
    return torch.randint(1, 16, (64, 12), generator=torch.Generator().manual_seed(seed))


def planted_circuit(model: CircuitGPTForCausalLM, **fields: Any) -> Circuit:
    """The circuit of a planted model, with an example and nothing measured."""
    row = on_off_task().test[0]
    names = ("prompt", "target", "counterfactual_target", "target_id", "counterfactual_target_id")
    example = {
        **{name: row[name] for name in names},
        "token_ids": row["input_ids"],
        "counterfactual_token_ids": row["counterfactual_input_ids"],
    }
    given = {
        "nodes": {site: list(ids) for site, ids in PLANTED_NODES.items()},
        "means": mean_activations(model, reference_ids()),
        "task": "on_off",
        "model_fingerprint": model_fingerprint(model),
        "example": example,
    }
    return Circuit(**{**given, **fields})


def full_circuit(model: CircuitGPTForCausalLM, **fields: Any) -> Circuit:
    """A circuit of a planted model that has every field."""
    given = {
        "scores": {site: torch.ones(n.width) for site, n in model.node_sites().items()},
        "calibration": Calibration(1.5, {1: 0.25, 2: -0.25}),
        "model_name": "me/planted",
        "model_revision": "0123456789" * 4,
        "metrics": {"circuit_loss": 0.01, "ablated_loss": 0.7, "calibrated_model_loss": 0.005},
        "config": {"seed": 0, "nested": {"steps": [1, 2]}},
        "kept_edges": list(PLANTED_EDGES),
        "edge_offsets": {"h.0.attn.v": {5: 0.5}},
        "tokens": [ON, OFF],
        "token_mean": torch.zeros(16),
        "verification": {"sufficiency": {"value": 0.1, "control": 0.5, "passed": 1.0}},
    }
    return planted_circuit(model, **{**given, **fields})


def unable_model() -> CircuitGPTForCausalLM:
    """The planted model without a way to tell the two answers apart."""
    model = planted_model()
    with torch.no_grad():
        model.lm_head.weight[YES] = model.lm_head.weight[NO]
        model.final_logits_bias[YES] = model.final_logits_bias[NO]
    return model
