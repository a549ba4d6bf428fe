"""Layers that carry a state along the row, on a tree: as on each of its sequences by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from test_distinct_rows import SIZES, assert_same, batch, check_same, make, refused, run
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import pro_kernels as pk
import trees
from pro_kernels.distinct import states

LAYERS = {"Qwen3Next": Qwen3NextGatedDeltaNet, "Lfm2": Lfm2ShortConv, "Bamba": BambaMixer}


def layer(name: str) -> nn.Module:
    model = make(name, dtype=torch.float64)
    return next(x for x in model.modules() if isinstance(x, LAYERS[name]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(12))
def test_a_layer_gives_what_it_gives_for_each_sequence_alone(name, seed):
    """Small vocabularies: many segments of one token, and parents of one token."""
    module, tree = layer(name), trees.random_tree(seed, longest=12)
    inputs = torch.randn(1, tree.num_tokens, SIZES["hidden_size"], dtype=torch.float64)
    by = torch.randn_like(inputs)

    def measured(forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, dict]:
        module.zero_grad()
        given = inputs.clone().requires_grad_()
        out = forward(given)
        (out * by).sum().backward()
        grads = {k: p.grad for k, p in module.named_parameters()}
        return out.detach(), {"inputs": given.grad, **grads}

    def alone(given: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros_like(inputs)
        for path in tree.places.split(tree.lengths.tolist()):
            whole = whole.index_copy(1, path, module(given[:, path]))
        return whole

    on_tree = states.on_trees(type(module).forward)
    found = measured(lambda given: on_tree(module, given, attention_mask=tree.as_mask()))
    assert_same(found, measured(alone), rtol=1e-5)


def test_branches_of_about_one_length_are_one_call():
    start = list(range(10))
    rows = [[*start, 50 + i, *range(30 + i % 3)] for i in range(8)]
    tree = pk.TokenTree.from_sequences([*rows, [*start, 48], [*start, 49], [60, *range(20)]])
    calls, order = states._plan(tree.as_mask(), torch.device("cpu"))
    # The start, the long branches with one short one, the other, and the row without a parent.
    assert [len(call.starts) for call in calls] == [1, 9, 1, 1]
    assert [call.leaves for call in calls] == [0, None, None, None]
    assert order.sort().values.equal(torch.arange(tree.num_tokens))
    assert calls[1].tokens.numel() <= len(calls[1].kept) / (1 - states._PADDING)


def test_a_model_without_attention():
    model = make("Qwen3_5Text", layer_types=["linear_attention"] * 4)
    check_same(model, batch())
    with pk.distinct_rows(model) as rows:
        assert len(rows.carriers) == 4


def test_generation_copies_and_the_end():
    model, inputs = make("Qwen3Next").eval(), batch()
    full = {k: x[:1, :17] for k, x in inputs.items()}
    text = model.generate(**full, max_new_tokens=4, do_sample=False)
    want = run(model, inputs)
    with pk.distinct_rows(model) as rows:
        assert model.generate(**full, max_new_tokens=4, do_sample=False).equal(text)
        twin = copy.deepcopy(model)
        assert_same(run(model, inputs), want)
        assert rows.saved
    nn.init.zeros_(model.lm_head.weight)
    with pk.distinct_rows(twin):
        assert_same(run(twin, inputs), want)
    for each in (model, twin):
        assert not any("forward" in vars(x) for x in each.modules())


def test_what_is_refused(monkeypatch):
    jamba = transformers.JambaConfig(
        **SIZES, mamba_d_state=4, mamba_expand=2, mamba_dt_rank=4, num_experts=2,
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
    )  # fmt: skip
    # Its layers read no state where a row goes on by more than one token.
    refused(transformers.JambaForCausalLM(jamba), "differ from those of the padded batch")
    model = make("Qwen3Next")
    mixer = model.model.layers[0].linear_attn
    mixer.forward = mixer.forward
    refused(model, "somebody replaced the forward of its Qwen3NextGatedDeltaNet")
    del mixer.forward
    with monkeypatch.context() as patch:
        patch.setattr(states.States, "of", classmethod(lambda cls, lines: cls()))
        refused(model, "differ from those of the padded batch")
    assert not any("forward" in vars(x) for x in model.modules())
    with monkeypatch.context() as patch:
        patch.setattr(states, "find", lambda *_: [])
        refused(model, "it has layers of type linear_attention")
