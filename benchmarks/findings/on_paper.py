"""What a sparse run of 1 B and of 8 B parameters would cost per step on 8 and on 64 H100s, computed
from measured constants: memory, traffic and time, by top-k under FSDP2 and by RCD.

Nothing here was run at these sizes. Every constant is a measurement of this repository or a
published figure, and says which; the rate of computing comes from one measured step, and is held
against another.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..experiment import Experiment, table

DENSITY = 1 / 64
CONTEXT = 4096
STEP_TOKENS = 2**21
"""Tokens of all ranks per step."""
PIECE_TOKENS = 2 * CONTEXT
"""Tokens of a rank per forward pass; layers are recomputed in the backward pass."""
LOGIT_TOKENS = 1024
"""Logits are made for so many tokens at a time."""
GPUS, NODE = (8, 64), 8

MODELS = {
    "1 B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "8 B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""The shapes of Llama 3.2 1B and Llama 3.1 8B."""


@dataclass(frozen=True)
class Constant:
    """A number, its unit, and where it is from."""

    value: float
    unit: str
    source: str


_STEP = Constant(51.9e-3, "s", "gpu.md, training step, d_model 2048, bfloat16, compiled")
_ENTRIES = 411_713_536
_WIDTH, _LAYERS, _STEP_TOKENS, _STEP_CONTEXT = 2048, 8, 4096, 256
# The same at half the width: what the formula says of it is a check.
_CHECK_STEP, _CHECK_ENTRIES = 22.6e-3, 105_193_472
PROJECTION = Constant(
    5.715e-3 / _ENTRIES, "s per entry", "gpu.md, launches of the projection, d_model 2048"
)
COPY = Constant(2.97e12, "bytes/s, read and written", "gpu.md, copy of 1,024 MB")
ADAMW_BYTES = Constant(
    28, "bytes per entry", "weight, gradient and two moments, float32: 4 r + 3 w"
)
RCD_BYTES = Constant(
    4 * (3.9 + 9.3 + 9.3) / 118.1, "bytes per entry", "rcd_memory.md: weights, moments, gradients"
)
RCD_TRAFFIC = Constant(
    2 * 1_086_154 / (DENSITY * (75_721_216 - 16_796_160) / 4),
    "bytes per nonzero",
    "rcd_workers.md: what both ranks hand over, density 1/64",
)
NVLINK = Constant(0.8 * 450e9, "bytes/s, each way", "published 450 GB/s, of which 0.8 is assumed")
NETWORK = Constant(
    0.8 * 50e9, "bytes/s and GPU, each way", "published 400 Gb/s per GPU, of which 0.8 is assumed"
)


def parameters(config: LlamaConfig) -> int:
    """All weights."""
    return sum(p.numel() for p in _model(config).parameters())


def multiplied(config: LlamaConfig) -> int:
    """Weights that every token is multiplied by: all of linear layers, the unembedding too."""
    linear = (m for m in _model(config).modules() if isinstance(m, nn.Linear))
    return sum(module.weight.numel() for module in linear)


def operations(weights: int, layers: int, width: int, context: int) -> float:
    """Floating point operations of a training step per token: three products with every weight, and
    causal attention over half of the context on average."""
    return 6 * weights + 6 * layers * width * context


def rate() -> Constant:
    """Operations per second of the measured step, less its projection and AdamW."""
    rest = _STEP.value - _ENTRIES * (PROJECTION.value + ADAMW_BYTES.value / COPY.value)
    per_token = operations(_ENTRIES, _LAYERS, _WIDTH, _STEP_CONTEXT)
    return Constant(
        _STEP_TOKENS * per_token / rest, "operations/s", f"{_STEP.source}, less its optimizer"
    )


@dataclass(frozen=True)
class Cost:
    """Of one GPU: bytes, and seconds per step."""

    state: float
    working: float
    traffic: float
    compute: float
    communication: float
    optimizer: float

    @property
    def step(self) -> float:
        """Communication runs beside the computing, as far as it fits."""
        return max(self.compute, self.communication) + self.optimizer


def cost(config: LlamaConfig, method: str, gpus: int) -> Cost:
    """What a step costs; `method` is "top-k, FSDP2" or "RCD"."""
    entries, block = parameters(config), _block(config)
    per_token = operations(
        multiplied(config), config.num_hidden_layers, config.hidden_size, CONTEXT
    )
    # Layers are recomputed: a fourth forward pass to three that count.
    compute = 4 / 3 * per_token * STEP_TOKENS / gpus / rate().value
    bandwidth = (NVLINK if gpus <= NODE else NETWORK).value
    pieces, others = STEP_TOKENS // (gpus * PIECE_TOKENS), (gpus - 1) / gpus
    # Two layers at a time as bfloat16 matrices and one layer's gradients.
    working = 3 * 2 * block + _activations(config)
    if method == "RCD":
        nonzeros = DENSITY * entries
        traffic = RCD_TRAFFIC.value * nonzeros * others
        return Cost(
            RCD_BYTES.value * entries, working, traffic, compute, traffic / bandwidth,
            RCD_BYTES.value * entries * 2 / COPY.value,
        )  # fmt: skip
    # Per piece: weights gathered in bfloat16 for both passes, gradients scattered in float32.
    traffic = pieces * (2 + 2 + 4) * entries * others
    own = entries / gpus
    optimizer = own * (PROJECTION.value + ADAMW_BYTES.value / COPY.value)
    return Cost(16 * own, working, traffic, compute, traffic / bandwidth, optimizer)


def run(experiment: Experiment) -> str:
    """The report."""
    costs = {
        (name, method, gpus): cost(config, method, gpus)
        for name, config in MODELS.items()
        for gpus in GPUS
        for method in ("top-k, FSDP2", "RCD")
    }
    rows = [
        {
            "model": name, "GPUs": gpus, "method": method,
            "weights and state (GB per GPU)": f"{of.state / 1e9:.1f}",
            "beside them (GB)": f"{of.working / 1e9:.1f}",
            "traffic (GB per GPU and step)": f"{of.traffic / 1e9:.2f}",
            "compute (s)": f"{of.compute:.2f}",
            "traffic (s)": f"{of.communication:.3f}",
            "optimizer (ms)": f"{1000 * of.optimizer:.1f}",
            "step (s)": f"{of.step:.2f}",
            "tokens/s": f"{STEP_TOKENS / of.step:,.0f}",
        }
        for (name, method, gpus), of in costs.items()
    ]  # fmt: skip
    sizes = [
        {
            "model": name, "parameters": f"{parameters(config):,}",
            "nonzeros at 1/64": f"{DENSITY * parameters(config) / 1e6:.0f} M",
            "days for 20 tokens per parameter, 64 GPUs, top-k": f"{days:.1f}",
        }
        for name, config in MODELS.items()
        for seconds in [costs[name, "top-k, FSDP2", 64].step / STEP_TOKENS]
        for days in [20 * parameters(config) * seconds / 86400]
    ]  # fmt: skip
    return "\n\n".join([
        "# Large sparse runs, on paper", EXPLANATION, table(sizes), table(rows),
        "What the figures rest on:", table(_sources()), f"{READING}\n{_check()}",
    ])  # fmt: skip


EXPLANATION = f"""\
Computed, not run. Shapes of Llama 3.2 1B and Llama 3.1 8B, all matrices at density 1/64, embeddings
too. {STEP_TOKENS:,} tokens per step, context {CONTEXT:,}, {PIECE_TOKENS:,} tokens per GPU at a
time, layers recomputed in the backward pass, logits for {LOGIT_TOKENS:,} tokens at a time.

- **top-k, FSDP2**: weights, gradients and AdamW's moments in float32, sharded; matrices are
  gathered in bfloat16. The projection's sums of counts, some KB per matrix, are left out.
- **RCD**: every GPU holds all nonzeros, their moments and the block's, and makes of each layer the
  dense matrices that it multiplies with (no products of nonzeros on a GPU are measured here, so
  computing is counted as dense for both). Ranks own coordinates, hand over what changed, and a
  coordinate sees the data of its rank alone."""

READING = """\
- The computing is the same dense products for both: on H100s neither method saves time until
  products of nonzeros are faster there than dense ones. The optimizer's step is nothing beside it.
- What RCD saves is traffic, by hundreds to thousands of times, and on few GPUs memory: it can
  run where they are badly connected. On 64 GPUs the sharded state is the smaller one. Whether
  RCD comes to as low a loss in as many tokens is not said here; at small sizes it does not.
- Top-k's traffic between nodes is most of the time of its computing, so that it hides behind it
  only if both overlap as well as is assumed."""


def _check() -> str:
    work = _STEP_TOKENS * operations(_CHECK_ENTRIES, _LAYERS, _WIDTH // 2, _STEP_CONTEXT)
    optimizer = _CHECK_ENTRIES * (PROJECTION.value + ADAMW_BYTES.value / COPY.value)
    said = work / rate().value + optimizer
    return (
        f"- A check: of the step measured at half that width the same constants say "
        f"{1000 * said:.1f} ms, and it took {1000 * _CHECK_STEP:.1f}. Wider matrices are "
        "multiplied at a higher rate, so the widths above may be faster than said.\n"
        "- A hostile reviewer would say: one shape on one GPU is extrapolated to another "
        "architecture, at a context 16 times as long."
    )


def _sources() -> list[dict[str, str]]:
    named = {
        "rate of computing": rate(), "projection": PROJECTION, "copy": COPY,
        "AdamW": ADAMW_BYTES, "RCD's state": RCD_BYTES, "RCD's traffic": RCD_TRAFFIC,
        "within a node": NVLINK, "between nodes": NETWORK,
    }  # fmt: skip
    return [
        {"constant": n, "value": f"{c.value:.3g} {c.unit}", "from": c.source}
        for n, c in named.items()
    ]


def _model(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _block(config: LlamaConfig) -> int:
    """Entries of one layer."""
    return sum(p.numel() for p in _model(config).model.layers[0].parameters())


def _activations(config: LlamaConfig) -> float:
    """Bytes: each layer's input, what one layer keeps when it is computed again, and logits with
    their gradients."""
    width, mlp = config.hidden_size, config.intermediate_size
    inputs = 2 * PIECE_TOKENS * width * config.num_hidden_layers
    # Norms, q, k, v, attention's output, the MLP's gate, up and product.
    one_layer = 2 * PIECE_TOKENS * (8 * width + 4 * mlp)
    return inputs + one_layer + 2 * 4 * LOGIT_TOKENS * config.vocab_size


def main() -> None:
    """The command line."""
    Experiment.main(run, __doc__, "on_paper", "runs")


if __name__ == "__main__":
    main()
