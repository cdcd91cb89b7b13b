"""Both optimizers in torch's own machinery for optimizers, `OptimizerInfo`.

What a wheel of torch holds of its suite is used: the description of an optimizer, the inputs that
every optimizer must refuse, the schedulers, and the parametrization. The checks are those of
`test_optim.py`, which is in no package, by their names there.

Those that are missing, and why:

- `test_grads_are_never_inplaced_into`: [`TopKAdamW`] normalizes gradients in place, as it says.
- foreach, capturable, maximize, differentiable and sparse gradients: neither has these options.
- several devices: this machine has none.
"""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW

pytestmark = pytest.mark.slow

FALLING = {"target_density": 0.5, "total_steps": 100, "min_nonzeros": 1}
TOPK = {
    "falling density": FALLING,
    "sparse from the start": {**FALLING, "anneal_start": 0.0, "anneal_end": 0.0},
    "dense": {"target_density": 1.0},
    "some settings": {**FALLING, "lr": 1e-3, "weight_decay": 0.9, "normalize_gradients": "off"},
    "not sparse": {**FALLING, "sparse": False, "normalize_gradients": "clip"},
}
RCD = {
    "default": {},
    "whole blocks": {"block_fraction": 1.0},
    "plain": {"update": "plain", "lr": 1e-3, "block": "columns", "normalize_gradients": "always"},
    "budget": {"target_density": 0.5, "min_nonzeros": 1, "block_steps": 3, "l1": 1e-4},
    "stale": {"staleness": 2, "selection": "magnitude"},
    "not sparse": {"sparse": False, "weight_decay": 0.9},
}


def info(optimizer, table):
    inputs = [OptimizerInput(None, kwargs, name) for name, kwargs in table.items()]
    return OptimizerInfo(
        optimizer,
        optim_inputs_func=lambda device, dtype=None: copy.deepcopy(inputs),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
        supported_impls=(),
    )


each = optims([info(TopKAdamW, TOPK), info(RCDSparseOptimizer, RCD)], dtypes=[torch.float32])


class TestOurOptimizers(TestCase):
    def cases(self, optim_info, device, dtype):
        """(class, settings, weight, bias, closure without the optimizer) of every input."""
        for case in optim_info.optim_inputs_func(device=device, dtype=dtype):
            torch.manual_seed(0)
            weight = Parameter(torch.randn(10, 5, device=device, dtype=dtype))
            bias = Parameter(torch.randn(10, device=device, dtype=dtype))
            x = torch.randn(5, device=device, dtype=dtype)

            def loss(weight, bias, x=x):
                return (weight.mv(x) + bias).pow(2).sum()

            yield functools.partial(optim_info.optim_cls, **case.kwargs), weight, bias, loss

    def run_steps(self, optimizer, params, loss, n):
        for _ in range(n):
            optimizer.zero_grad()
            value = loss(*params)
            value.backward()
            optimizer.step()
        return value

    @each
    def test_errors(self, device, dtype, optim_info):
        settings = FALLING if optim_info.optim_cls is TopKAdamW else {}
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            case = error.optimizer_error_input
            params = [Parameter(torch.ones(2))] if case.params is None else case.params

            def make(params=params, case=case):
                return optim_info.optim_cls(params, **{**settings, **case.kwargs})

            if issubclass(error.error_type, Warning):
                with self.assertWarnsRegex(error.error_type, error.error_regex):
                    make()
            else:
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    make()

    @each
    def test_forloop_goes_right_direction(self, device, dtype, optim_info):
        for make, weight, bias, loss in self.cases(optim_info, device, dtype):
            before = loss(weight, bias).item()
            self.run_steps(make([weight, bias]), (weight, bias), loss, 20)
            self.assertLess(loss(weight, bias).item(), before)

    @each
    def test_forloop_goes_right_direction_with_lrsched(self, device, dtype, optim_info):
        for schedulers in optim_info.scheduler_inputs:
            for make, weight, bias, loss in self.cases(optim_info, device, dtype):
                optimizer = make([{"params": [weight]}, {"params": [bias], "lr": 1e-2}])
                made = [scheduler(optimizer) for scheduler in schedulers]
                before = loss(weight, bias).item()
                for _ in range(20):
                    value = self.run_steps(optimizer, (weight, bias), loss, 1)
                    for s in made:
                        s.step(value) if isinstance(s, ReduceLROnPlateau) else s.step()
                self.assertLess(loss(weight, bias).item(), before)

    @each
    def test_tensor_lr(self, device, dtype, optim_info):
        for make, *params, loss in self.cases(optim_info, device, dtype):
            copies = [Parameter(p.detach().clone()) for p in params]
            self.run_steps(make(params, lr=1e-2), params, loss, 3)
            optimizer = make(copies, lr=torch.tensor(1e-2))
            self.run_steps(optimizer, copies, loss, 3)
            self.assertEqual(params, copies)

    @each
    def test_complex(self, device, dtype, optim_info):
        settings = {"sparse": False, "target_density": 1.0, "normalize_gradients": "off"}
        whole = Parameter(torch.randn(5, 5, device=device, dtype=torch.complex64))
        parts = Parameter(torch.view_as_real(whole).detach().clone())
        made = [optim_info.optim_cls([p], **settings) for p in (whole, parts)]
        for _ in range(3):
            whole.grad = torch.randn_like(whole)
            parts.grad = torch.view_as_real(whole.grad)
            for optimizer in made:
                optimizer.step()
            self.assertEqual(torch.view_as_real(whole), parts)

    @each
    def test_param_groups_lr(self, device, dtype, optim_info):
        for make, weight, bias, loss in self.cases(optim_info, device, dtype):
            start = bias.detach().clone()
            optimizer = make([{"params": [weight]}, {"params": [bias], "lr": 0.0}])
            self.run_steps(optimizer, (weight, bias), loss, 5)
            kept = bias != 0
            self.assertEqual(bias[kept], start[kept])

    @each
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for make, weight, _, _ in self.cases(optim_info, device, dtype):
            before = weight.detach().clone()
            make([weight]).step()
            kept = weight != 0  # which the projection leaves alone
            self.assertEqual(weight[kept], before[kept])

    @each
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for make, weight, _, _ in self.cases(optim_info, device, dtype):
            before = weight.detach().clone()
            optimizer = make([{"params": [weight], "weight_decay": 0.0}])
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            kept = weight != 0
            shrunk = 2e-5 if optimizer.param_groups[0].get("l1") else 0.0  # by the penalty
            self.assertEqual(weight[kept], before[kept], atol=shrunk, rtol=0)

    @each
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for make, weight, bias, loss in self.cases(optim_info, device, dtype):
            optimizer = make([weight, bias])
            self.run_steps(optimizer, (weight, bias), loss, 1)
            self.assertIn("Parameter Group 0", repr(optimizer))

    def resumed(self, make, optimizer, params, through=copy.deepcopy):
        copies = [Parameter(p.detach().clone()) for p in params]
        again = make(copies)
        saved = optimizer.state_dict()
        untouched = copy.deepcopy(saved)
        again.load_state_dict(through(saved))
        self.assertEqual(saved, untouched)
        return again, copies

    @each
    def test_state_dict_deterministic(self, device, dtype, optim_info):
        for make, *params, loss in self.cases(optim_info, device, dtype):
            optimizer = make(params)
            self.run_steps(optimizer, params, loss, 5)
            again, copies = self.resumed(make, optimizer, params)
            self.assertEqual(again.state_dict(), optimizer.state_dict())
            if not optimizer.__dict__.get("_staleness"):  # what is in flight is not saved
                for _ in range(5):
                    self.run_steps(optimizer, params, loss, 1)
                    self.run_steps(again, copies, loss, 1)
                    self.assertEqual(params, copies)
                self.assertEqual(again.state_dict(), optimizer.state_dict())

    @each
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        def through_a_file(state):
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            return torch.load(file, weights_only=True)

        for make, *params, loss in self.cases(optim_info, device, dtype):
            optimizer = make(params)
            self.run_steps(optimizer, params, loss, 3)
            again, _ = self.resumed(make, optimizer, params, through_a_file)
            self.assertEqual(again.state_dict(), optimizer.state_dict())

    @each
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info):
        for make, *params, loss in self.cases(optim_info, device, dtype):
            named = [(f"p{i}", Parameter(p.detach().clone())) for i, p in enumerate(params)]
            for first, second in ((params, named), (named, params)):
                optimizer, other = make(first), make(second)
                of_first = [p[1] if isinstance(p, tuple) else p for p in first]
                of_second = [p[1] if isinstance(p, tuple) else p for p in second]
                self.run_steps(optimizer, of_first, loss, 3)
                other.load_state_dict(optimizer.state_dict())
                for p, q in zip(of_first, of_second, strict=True):
                    q.data.copy_(p)
                self.run_steps(other, of_second, loss, 3)

    @each
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(optimizer):
            return {name for name in optimizer.__dict__ if not name.startswith("_")}

        for make, *params, _ in self.cases(optim_info, device, dtype):
            optimizer = make(params)
            self.assertEqual(public(copy.deepcopy(optimizer)), public(optimizer))

    @each
    def test_hooks(self, device, dtype, optim_info):
        """Those of steps, `state_dict` and `load_state_dict`, in the order they are to run."""
        for make, *params, loss in self.cases(optim_info, device, dtype):
            optimizer, seen = make(params), []
            for kind in ("step_pre", "step_post", "state_dict_pre", "state_dict_post",
                         "load_state_dict_pre", "load_state_dict_post"):  # fmt: skip
                register = getattr(optimizer, f"register_{kind}_hook")
                register(lambda *_, kind=kind, seen=seen: seen.append(kind))
            self.run_steps(optimizer, params, loss, 1)
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(
                seen,
                ["step_pre", "step_post", "state_dict_pre", "state_dict_post",
                 "load_state_dict_pre", "load_state_dict_post"],
            )  # fmt: skip

    @each
    def test_non_empty_state(self, device, dtype, optim_info):
        for make, *params, loss in self.cases(optim_info, device, dtype):
            optimizer = make(params)
            self.run_steps(optimizer, params, loss, 1)
            self.assertEqual(set(optimizer.state), set(params))
            self.assertTrue(all(isinstance(p, nn.Parameter) for p in optimizer.state))


instantiate_device_type_tests(TestOurOptimizers, globals(), only_for="cpu")
