"""Training on the nonzeros gives what training on the dense matrices gives."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_circuit_sparsity import CircuitGPTForCausalLM, TopKAdamW
from hf_circuit_sparsity.modeling.csr import CSR
from hf_circuit_sparsity.modeling.functional import abs_topk
from hf_circuit_sparsity.optim import sparse_compute
from hf_circuit_sparsity.optim.projection import project_topk_
from hf_circuit_sparsity.optim.sparse_compute import NonzeroForward, on_nonzeros

pytestmark = pytest.mark.usefixtures("either_path")


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    monkeypatch.setattr(sparse_compute, "_MIN_WORK", 1)
    monkeypatch.setattr(sparse_compute, "_MIN_WORK_WITHOUT_KERNELS", 1)


@pytest.fixture
def sparse_calls(monkeypatch):
    """Shapes of the inputs that were multiplied by nonzeros."""
    calls = []
    linear = CSR.linear

    def counted(self, x, *args):
        calls.append(tuple(x.shape))
        return linear(self, x, *args)

    monkeypatch.setattr(CSR, "linear", counted)
    return calls


def _graph(y):
    """The names of what computed `y`."""
    names, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [n for n, _ in node.next_functions if n is not None]
    return " ".join(names)


CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def layer(density, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = Conv1D(36, 24) if bias == "conv1d" else nn.Linear(24, 36, bias=bias)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        module.weight *= torch.rand(module.weight.shape, generator=generator) < density
    return module


@pytest.mark.parametrize("bias", [True, False, "conv1d"])
@pytest.mark.parametrize("active", [{}, {"x": 6}, {"up": 9}, {"x": 6, "up": 9}], ids=str)
@pytest.mark.parametrize(
    ("density", "dtype"),
    [(0.0, torch.float64), (0.05, torch.float64), (0.05, torch.float32), (1.0, torch.float32)],
)
def test_layer_gives_the_same_output_and_gradients(
    density, dtype, active, bias, sparse_calls, either_path
):
    module = layer(density, bias).to(dtype)
    x, up = torch.randn(2, 40, 24, dtype=dtype), torch.randn(2, 40, 36, dtype=dtype)
    x, up = abs_topk(x, active.get("x", 24)), abs_topk(up, active.get("up", 36))
    inputs = [x.requires_grad_(), *module.parameters()]
    wanted = [module(x), *torch.autograd.grad((module(x) * up).sum(), inputs)]
    with on_nonzeros(module):
        y = module(x)
        got = [y, *torch.autograd.grad((y * up).sum(), inputs)]
    # Forward, and the gradient of the input.
    assert sparse_calls == ([(80, 24), (80, 36)] if density < 1 else [])
    assert ("_LinearFunction" in _graph(y)) == (density < 1 or either_path == "kernels")
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **({} if dtype.itemsize == 8 else CLOSE))
    # Dense: zeros may grow back.
    assert active or torch.count_nonzero(got[2]) == got[2].numel()


@pytest.mark.parametrize("bias", [True, "conv1d"])
def test_second_derivatives_of_a_layer(bias):
    module = layer(0.05, bias)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)

    def twice():
        inputs = [x, module.weight]
        gradients = torch.autograd.grad(module(x).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    expected = twice()
    with on_nonzeros(module):
        torch.testing.assert_close(twice(), expected)


def test_dense_layers_and_half_precision_are_computed_as_ever(sparse_calls):
    dense, half = layer(0.5), layer(0.05).to(torch.bfloat16)
    x = torch.randn(3, 24, dtype=torch.float64)
    with on_nonzeros(dense), on_nonzeros(half):
        assert isinstance(dense.forward, NonzeroForward)
        dense(x)
        half(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            layer(0.05).float()(x.float())
    assert not sparse_calls
    assert "forward" not in dense.__dict__


def test_every_way_to_change_a_weight_is_noticed():
    module = layer(0.05).float()
    x = torch.randn(5, 24)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)

    def step():
        module.weight.grad = module.weight.detach().clone()
        optimizer.step()

    def assign():
        module.weight = nn.Parameter(layer(0.05, seed=7).weight.detach().float())

    changes = [
        step,
        lambda: project_topk_(module.weight, 10, min_nonzeros=0),
        lambda: project_topk_(module.weight.data, 5, min_nonzeros=0),
        lambda: module.load_state_dict(layer(0.05, seed=3).float().state_dict()),
        assign,
        lambda: module.weight.data.mul_(2.0),
    ]
    with on_nonzeros(module):
        for change in changes:
            before = module(x)
            change()
            after = module(x)
            expected = nn.functional.linear(x, module.weight, module.bias)
            torch.testing.assert_close(after, expected)
            assert not torch.equal(before, after)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_their_own_forward_pass(copied):
    """As those of an exponential moving average: they outlive the training."""
    module = nn.Sequential(layer(0.05))
    with pytest.raises(RuntimeError, match="stop"), on_nonzeros(module):
        twin = copied(module)
        again = copied(twin)
        assert isinstance(module[0].forward, NonzeroForward)
        raise RuntimeError("stop")
    for model in (module, twin, again):
        assert not {"forward", "__reduce_ex__"} & model[0].__dict__.keys()
        assert torch.equal(model[0].weight, module[0].weight)


def test_losses_are_those_of_the_reference_over_50_steps(sparse_calls, tiny_config):
    torch.manual_seed(0)
    tiny_config.d_mlp = 128
    model = CircuitGPTForCausalLM(tiny_config).train()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(64, (50, 4, 16), generator=generator)

    def train(model):
        # The row minimum would keep so small a model too dense to be run on its nonzeros.
        matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "bigram" not in n]
        optimizer = TopKAdamW(
            matrices, lr=3e-3, target_density=1 / 16, total_steps=50, min_nonzeros=0
        )
        losses = []
        for batch in batches:
            loss = model(batch, labels=batch).loss
            model.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    reference = train(copy.deepcopy(model))
    assert not sparse_calls
    with on_nonzeros(model):
        losses = train(model)
    assert len(sparse_calls) > 25 * 9 * 2 * 0.9  # the second half of the run, every linear layer
    torch.testing.assert_close(losses, reference, atol=2e-5, rtol=0)
    assert reference[-1] < reference[0]


@pytest.mark.parametrize("model_init", [False, True])
def test_trainer_computes_on_nonzeros_and_says_so_in_its_arguments(
    make_trainer, make_llama, sparse_calls, model_init
):
    runs = []
    for compute in (True, False):
        sparse_calls.clear()
        model = {"model_init": lambda: make_llama()} if model_init else {"model": make_llama()}
        trainer = make_trainer(
            **{"model": None, **model},
            target_density=0.05, min_nonzeros=0, compute_on_nonzeros=compute,
        )  # fmt: skip
        trainer.train()
        assert bool(sparse_calls) == compute
        assert not any("forward" in m.__dict__ for m in trainer.model.modules())
        runs.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert runs[0] == pytest.approx(runs[1], abs=2e-4)
