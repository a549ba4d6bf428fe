"""DeepSpeed ZeRO-2 and ZeRO-3 on the CPU, over gloo."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers
from data_parallel import (
    BUDGETS,
    COMMON,
    OPTIONS,
    WithLoss,
    assert_same,
    batch,
    in_one_process,
    loss_of_logits,
    make,
)
from deepspeed.utils import safe_get_full_grad
from judged import few_ranks, refused
from transformers.integrations import HfDeepSpeedConfig

import pro_kernels as pk

RATE = 0.1
# An op of inference, which would be compiled when DeepSpeed first runs on a CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 12,
        # No parameter is too small to be partitioned.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_allow_untested_optimizer": True,
    }


def engine(model, stage: int):
    trained = [x for x in model.parameters() if x.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config(stage))[0]


def gradients(model) -> dict:
    return {
        name.removeprefix("lm."): safe_get_full_grad(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def compare(what: str, model, stage: int, expected, step: int = 0) -> None:
    """Loss and gradients of one step."""
    wrapped = engine(model, stage)
    loss = wrapped(**batch(dist.get_rank(), step)).loss
    wrapped.backward(loss)
    assert_same(what, gradients(model), loss, expected)


def check_attached() -> None:
    """Two tiers, tied and not; on distinct rows; LoRA on the body and on the head."""
    for tied in (False, True):
        alone = make(tied)
        expected = in_one_process(alone)
        for stage in (2, 3):
            budget = BUDGETS[(stage + tied) % 2]
            model = pk.attach(copy.deepcopy(alone), budget=budget, **OPTIONS)
            compare(f"stage {stage}, tied={tied}, budget={budget}", model, stage, expected)
    alone = make(False)
    expected = in_one_process(alone, (COMMON,))
    for stage in (2, 3):
        model = pk.attach(copy.deepcopy(alone), rows="distinct", **OPTIONS)
        rows = pk.distinct_rows(model)
        compare(f"distinct, stage {stage}", model, stage, expected, COMMON)
        assert rows.saved > 0.2
    import peft

    torch.manual_seed(2)
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    alone = peft.get_peft_model(make(False), lora)
    compare("LoRA", pk.attach(copy.deepcopy(alone), **OPTIONS), 3, in_one_process(alone))


def check_steps() -> None:
    """Several steps: from the second on ZeRO-3 gathers ahead, in the order that it noted."""
    world, alone, losses = dist.get_world_size(), make(False), []
    plain = copy.deepcopy(alone)
    for step in range(3):
        every = [loss_of_logits(plain, **batch(rank, step)) for rank in range(world)]
        losses.append(every[dist.get_rank()].item())
        plain.zero_grad()
        (sum(every) / world).backward()
        with torch.no_grad():
            for x in plain.parameters():
                x -= RATE * x.grad
    for stage in (2, 3):
        wrapped = engine(pk.attach(copy.deepcopy(alone), **OPTIONS), stage)
        found = []
        for step in range(3):
            loss = wrapped(**batch(dist.get_rank(), step)).loss
            wrapped.backward(loss)
            wrapped.step()
            found.append(loss.item())
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)


def check_functional() -> None:
    """With the weight inside a module's forward, and held around forward and backward."""
    alone = make(False)
    expected = in_one_process(alone)
    for budget in BUDGETS:
        model = PartitionedWithLoss(copy.deepcopy(alone), budget)
        compare(f"in a forward, budget={budget}", model, 3, expected)

        model = copy.deepcopy(alone)
        wrapped = engine(model, 3)
        given = batch(dist.get_rank())
        hidden = wrapped(input_ids=given["input_ids"], output_hidden_states=True).hidden_states[-1]
        n = given["rewards"].shape[1]
        hidden, labels = (x.reshape(-1, n, *x.shape[1:]) for x in (hidden, given["labels"]))

        def loss(model=model, args=(hidden, labels, given["rewards"]), budget=budget):
            return pk.linear_pro_loss(
                args[0], model.lm_head.weight, *args[1:], shift=True, temperature=2.0, budget=budget
            ).loss

        with deepspeed.zero.GatheredParameters(model.lm_head.weight):
            value = loss()
            wrapped.backward(value)
        assert_same(f"held, budget={budget}", gradients(model), value, expected)
        refused("hold it for forward and backward", loss)


class PartitionedWithLoss(WithLoss):
    """DeepSpeed gathers what a forward asks of another module, and again for the backward."""

    sharded = "ds_id"


def check_loaded(folder: Path) -> None:
    """A model that transformers loads partitioned."""
    alone = make(False)
    if dist.get_rank() == 0:
        alone.save_pretrained(folder / "model")
    dist.barrier()
    known = HfDeepSpeedConfig(config(3))  # as long as it lives, models are partitioned
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    assert known.is_zero3() and not model.lm_head.weight.numel()
    refused("attach within deepspeed.zero.GatheredParameters", pk.attach, model=model, **OPTIONS)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        pk.attach(model, **OPTIONS)
    compare("loaded", model, 3, in_one_process(alone))


def check(_) -> None:
    logging.disable(logging.WARNING)
    check_attached()
    check_steps()
    if few_ranks():
        check_functional()
        check_loaded(Path(sys.argv[1]))
