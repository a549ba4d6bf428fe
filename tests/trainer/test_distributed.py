"""Our forward inside a wrapper's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from pro_trainer.train.distributed import call_through
from pro_trainer.train.usage import Activations


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


def test_runs_through_the_wrapper_once_and_restores_forward_also_after_an_error():
    module = nn.Linear(2, 2)
    wrapper, x = Wrapper(module), torch.ones(1, 2)
    plain = module(x)
    # The module's own forward is back inside.
    assert call_through(wrapper, module, lambda: module(x) * 2).equal(plain * 2)
    assert wrapper.calls == 1 and "forward" not in vars(module)
    assert call_through(module, module, lambda: 7) == 7  # without a wrapper, a plain call
    module.forward = own = lambda x: x + 1
    with pytest.raises(ZeroDivisionError):
        call_through(wrapper, module, lambda: 1 / 0)
    assert module.forward is own


def test_runs_inside_the_hooks_of_fsdp2_and_what_it_keeps_is_measured(tmp_path):
    """fully_shard wraps nothing: the module's own hooks gather its parameters."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = nn.Linear(4, 4)
        weight, x = module.weight.detach().clone(), torch.randn(2, 4)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        made = call_through(module, module, lambda: x @ module.weight.t())
        torch.testing.assert_close(made, x @ weight.t())
        made.sum().backward()
        assert module.weight.grad.full_tensor().shape == (4, 4)

        model = tiny_models.make()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
        with Activations(torch.device("cpu"), True).measured(model, batch):
            model(**batch).logits.sum().backward()
    finally:
        dist.destroy_process_group()
