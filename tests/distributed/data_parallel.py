"""Attached models under DDP, FSDP2 and with split heads: as plain PyTorch in one process."""

from __future__ import annotations

import copy
import importlib.util

import judged
import torch
import torch.distributed as dist
import transformers
from judged import collectives, few_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pro_kernels as pk
from bench.suites.ranks import wire
from cases import assert_no_worse
from pro_kernels.fused import shards
from pro_kernels.models import COUNTS

BUDGETS = (None, 1 << 13)  # everything retained; most computed again
OPTIONS = {"loss": "ranking", "temperature": 2.0}
COMMON = 100  # the step whose rows begin alike


def make(tied: bool):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_size=16,
        intermediate_size=32, vocab_size=67, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(rank: int, step: int = 0) -> dict:
    """Ranks differ in candidates, length and scored tokens; the last but one scores none."""
    g = torch.Generator().manual_seed(10 + rank + 100 * step)
    n, length = 2 + rank % 2, 16 + rank
    ids = torch.randint(3, 67, (6 * n, length), generator=g)
    if step == COMMON:
        ids.view(6, n, length)[:, :, :9] = ids.view(6, n, length)[:, :1, :9].clone()
    labels = ids.clone()
    labels[:, : 2 + rank] = -100
    if rank == (dist.get_world_size() - 2 + step) % dist.get_world_size():
        labels[:] = -100
    return {"input_ids": ids, "labels": labels, "rewards": torch.randn(6, n, generator=g)}


def gradients(model) -> dict:
    named = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            named[name.removeprefix("module.").removeprefix("lm.")] = grad.detach().clone()
    return named


class Head(nn.Module):
    """The loss with the head's weight as the only parameter."""

    def __init__(self, vocab: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, width).to(dtype))

    def forward(self, hidden, targets, rewards):
        return pk.linear_pro_loss(hidden, self.weight, targets, rewards).loss


def check_bytes(mesh) -> None:
    """``wire`` knows every byte FSDP2 and DDP send for the head, with two micro-batches."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for vocab, width, dtype in ((67, 16, torch.float32), (66, 24, torch.bfloat16)):
        sizes = vocab, width, dtype.itemsize
        for kind, predicted in (
            ("FSDP2", wire.sharded_weight(world, *sizes, steps=2)),
            ("DDP", wire.replicated_weight(world, *sizes)),
        ):
            head = Head(vocab, width, dtype)
            if kind == "DDP":
                head = DistributedDataParallel(head)
                # DDP sums in C++; the hook does the same through torch.distributed.
                head.register_comm_hook(None, allreduce_hook)
            else:
                fully_shard(head, mesh=mesh)
            g = torch.Generator().manual_seed(rank)
            hidden = torch.randn(2, 2, 5 + rank, width, generator=g).to(dtype)
            targets = torch.randint(0, vocab, hidden.shape[:-1], generator=g)
            with collectives() as sent:
                for last in (False, True):
                    if kind == "DDP":
                        head.require_backward_grad_sync = last
                    head(hidden, targets, torch.tensor([[2.0, 1.0]] * 2)).backward()
            found = {kind: [x[2] for x in sent if x[0] == kind] for kind, *_ in sent}
            assert {c.kind: (c.calls, c.size) for c in predicted} == {
                kind: (len(sent), sum(sent)) for kind, sent in found.items()
            }


def loss_of_logits(model, input_ids, labels, rewards):
    """The reference, of the model's own logits."""
    n = rewards.shape[1]
    logits = model(input_ids).logits[:, :-1]
    logits = logits.reshape(-1, n, *logits.shape[1:])
    targets = labels[:, 1:].reshape(logits.shape[:-1])
    return pk.reference.pro_loss(logits, targets, rewards, temperature=2.0).loss


def loss_of_masked_logits(model, input_ids, labels, rewards):
    """As trainers write it: log-probs of all tokens, then a mask."""
    logits, targets = model(input_ids=input_ids, use_cache=False).logits[:, :-1], labels[:, 1:]
    ids = targets.clamp_min(0)[..., None]
    logps = logits.log_softmax(-1).gather(-1, ids)[..., 0]
    return -(logps * (targets >= 0)).sum() / 100


def in_one_process(
    model, steps: tuple[int, ...] = (0,), world: int = 0, loss=loss_of_logits
) -> tuple[list, list[dict]]:
    """Plain PyTorch in fp32, then in fp64: each rank's loss and the mean of their gradients."""
    losses, grads = [], []
    world = world or dist.get_world_size()
    for dtype in (torch.float32, torch.float64):
        alone = copy.deepcopy(model).to(dtype)
        every = [loss(alone, **batch(r, s)) for s in steps for r in range(world)]
        (sum(every) / world).backward()
        losses.append([x.detach() for x in every[:world]])
        grads.append(gradients(alone))
    return losses, grads


def assert_same(what: str, got: dict, loss, expected, factor: float = 1.0) -> None:
    """Loss and gradients by the rule of ``cases``."""
    losses, grads = expected
    if loss is not None:
        plain, exact = (x[dist.get_rank()] for x in losses)
        assert_no_worse(loss.detach(), plain, exact, torch.float32, what, norm=False)
    assert got.keys() == grads[1].keys() and got, (what, got.keys() ^ grads[1].keys())
    for name, grad in got.items():
        sides = [factor * x[name] for x in grads]
        assert_no_worse(grad, *sides, torch.float32, f"{what}: {name}", norm=True)


def wrap(kind: str, model, mesh, **options):
    """DDP, or FSDP2 with the head in the root, apart, or in one unit with the embedding."""
    if kind.startswith("DDP"):
        return DistributedDataParallel(model, **options)
    lm = model.lm if isinstance(model, WithLoss) else model
    lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    for layer in lm.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if kind == "FSDP2, head apart":
        fully_shard(lm.lm_head, mesh=mesh, **options)
    elif kind == "FSDP2, head with embedding":
        fully_shard([lm.model.embed_tokens, lm.lm_head], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def kinds(tied: bool) -> tuple[str, ...]:
    return "DDP", "FSDP2", "FSDP2, head with embedding" if tied else "FSDP2, head apart"


def compare(what: str, model, expected, again: bool = True, step: int = 0) -> None:
    """A step against one process and, bit by bit, against itself.

    From the second step on: DDP lays out its buckets anew after the first, which reorders its sums.
    """
    mine, found = batch(dist.get_rank(), step), []
    for _ in range(3 if again else 1):
        model.zero_grad()
        loss = model(**mine).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    if again:
        assert torch.equal(found[1][0], found[2][0]), f"{what}: loss not repeatable"
        for name, grad in found[1][1].items():
            assert torch.equal(grad, found[2][1][name]), f"{what}: {name} not repeatable"
    assert_same(what, found[-1][1], loss, expected)


def check_attached(mesh) -> None:
    """Two tiers, tied and not, frozen heads and bodies, adapters: in every way of sharding."""
    models = {f"tied={tied}": make(tied) for tied in (False, True)}
    if few_ranks():
        models["frozen head"], models["frozen body"] = make(False), make(False)
        models["frozen head"].lm_head.requires_grad_(False)
        models["frozen body"].model.requires_grad_(False)
    if few_ranks() and importlib.util.find_spec("peft"):
        import peft

        torch.manual_seed(2)
        for name, target in (("LoRA", "v_proj"), ("LoRA on the head", "lm_head")):
            lora = peft.LoraConfig(target_modules=["q_proj", target], init_lora_weights=False)
            models[name] = peft.get_peft_model(make(False), lora)
    for i, (name, alone) in enumerate(models.items(), start=1):
        expected = in_one_process(alone)
        for budget in BUDGETS if name.startswith("tied") else BUDGETS[i % 2 :][:1]:
            for kind in kinds(name == "tied=True"):
                model = pk.attach(copy.deepcopy(alone), budget=budget, **OPTIONS)
                what = f"{kind}, {name}, budget={budget}"
                again = few_ranks() and name.startswith("tied") and budget is not None
                compare(what, wrap(kind, model, mesh), expected, again)


def check_distinct_and_accumulated(mesh) -> None:
    """On distinct rows; two micro-batches, gradients reduced with the second only."""
    rank = dist.get_rank()
    for tied in (False, True)[: few_ranks() + 1]:
        alone = make(tied)
        on_distinct = in_one_process(alone, (COMMON,))
        of_two = in_one_process(alone, (0, 1))
        for kind in kinds(tied):
            what = f"{kind}, tied={tied}"
            model = pk.attach(copy.deepcopy(alone), rows="distinct", **OPTIONS)
            compare(what, wrap(kind, model, mesh), on_distinct, few_ranks() and tied, COMMON)
            assert pk.distinct_rows(model).saved > 0.2

            model = wrap(kind, pk.attach(copy.deepcopy(alone), **OPTIONS), mesh)
            for step in (0, 1):
                if kind == "DDP":
                    model.require_backward_grad_sync = step == 1
                else:
                    model.set_requires_gradient_sync(step == 1)
                model(**batch(rank, step)).loss.backward()
            assert_same(f"{what}, accumulated", gradients(model), None, of_two)


def check_logits(mesh) -> None:
    """Trainers that work on logits; only for a static graph of DDP are their rows made after all.

    It has to see a gradient of DDP's outputs.
    """
    for tied in (False, True)[: few_ranks() + 1]:
        alone = make(tied)
        expected = in_one_process(alone, loss=loss_of_masked_logits)
        ways: dict[str, dict] = dict.fromkeys(kinds(tied), {})
        ways["DDP, unused"] = {"find_unused_parameters": True}
        ways["DDP, static"] = {"static_graph": True}
        for kind, options in ways.items():
            model = wrap(kind, pk.attach(copy.deepcopy(alone)), mesh, **options)
            what, before = f"{kind}, tied={tied}", COUNTS["made_rows"]
            for _ in range(2):  # DDP learns the graph in the first
                model.zero_grad()
                loss = loss_of_masked_logits(model, **batch(dist.get_rank()))
                loss.backward()
                assert_same(what, gradients(model), loss, expected)
            assert COUNTS["made_rows"] == before or "static" in kind, what


def check_policies(mesh) -> None:
    """What FSDP2 is told holds for a head apart: sums for means, 16-bit parameters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = make(False)
    expected = in_one_process(alone)
    model = wrap("FSDP2, head apart", pk.attach(copy.deepcopy(alone), **OPTIONS), mesh)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor
    model(**batch(rank)).loss.backward()
    assert_same("summed", gradients(model), None, expected, factor=world)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for budget in BUDGETS:
        model = pk.attach(copy.deepcopy(alone), budget=budget, **OPTIONS)
        model = wrap("FSDP2, head apart", model, mesh, mp_policy=policy)
        seen = []
        model.lm_head.register_forward_pre_hook(
            lambda head, _, seen=seen: seen.append(head.weight.dtype)
        )
        functional = wrap(
            "FSDP2, head apart", WithLoss(copy.deepcopy(alone), budget), mesh, mp_policy=policy
        )
        for wrapped in (model, functional):
            loss = wrapped(**batch(rank)).loss
            loss.backward()
            torch.testing.assert_close(loss, expected[0][0][rank], rtol=0.02, atol=0.02)
            grad, want = gradients(wrapped)["lm_head.weight"], expected[1][1]["lm_head.weight"]
            assert grad.dtype == torch.float32 and (grad - want).norm() < 0.03 * want.norm()
        assert seen == [torch.bfloat16]  # called once, gathered in the policy's dtype


class WithLoss(nn.Module):
    """The loss from the hidden states and a head that is a unit nobody calls."""

    sharded = "full_tensor"  # an attribute of such a weight

    def __init__(self, lm, budget):
        super().__init__()
        self.lm, self.budget = lm, budget

    def forward(self, input_ids, labels, rewards):
        weight = self.lm.lm_head.weight
        assert hasattr(weight, self.sharded)
        hidden = self.lm.model(input_ids).last_hidden_state
        weight = weight.to(hidden.dtype)  # which a MixedPrecisionPolicy makes another
        hidden, labels = (x.reshape(-1, rewards.shape[1], *x.shape[1:]) for x in (hidden, labels))
        return pk.linear_pro_loss(
            hidden, weight, labels, rewards, shift=True, temperature=2.0, budget=self.budget
        )


def check_functional(mesh) -> None:
    """``linear_pro_loss`` with the DTensor weight of a unit of its own."""
    alone = make(False)
    expected = in_one_process(alone)
    for budget in BUDGETS:
        model = wrap("FSDP2, head apart", WithLoss(copy.deepcopy(alone), budget), mesh)
        compare(f"functional, budget={budget}", model, expected)


def check_tensor_parallel() -> None:
    """A head split over two ranks with one batch, among two such pairs FSDP2; then gathered."""
    world, pair = dist.get_world_size(), dist.get_rank() // 2
    square = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    mine, alone = batch(pair, 1), make(False)
    losses, grads = in_one_process(alone, (1,), world // 2)
    expected = [[x[pair]] * world for x in losses], grads
    plain = alone(input_ids=mine["input_ids"], labels=mine["labels"])
    split = {"lm_head": ColwiseParallel()}
    agreed, original = [], shards.agree
    shards.agree = lambda *args: agreed.append(1) or original(*args)
    for group in (square["tp"], square["tp"].get_group(), None):
        for budget in BUDGETS:
            agreed.clear()
            model = pk.attach(copy.deepcopy(alone), budget=budget, temperature=2.0,
                              process_group=group)  # fmt: skip
            model = copy.deepcopy(model)  # the group is not copied
            parallelize_module(model, square["tp"], split)
            if world > 2:
                model = wrap("FSDP2", model, square["dp"])
            out = model(input_ids=mine["input_ids"], labels=mine["labels"])
            torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-5)
            loss = model(**mine).loss
            loss.backward()
            assert len(agreed) == (0 if group is None else 2)  # each call split its head
            assert_same(f"{group}, budget={budget}", gradients(model), loss, expected)
    shards.agree = original
    model = pk.attach(copy.deepcopy(alone), process_group=square["tp"], **OPTIONS)
    judged.refused("its head is no DTensor", model, **mine)
    parallelize_module(model, square["tp"], split)
    wrap("FSDP2, head apart", model, square["dp"])
    judged.refused("tensor parallel and a unit of FSDP2 of its own", model, **mine)


def check(group) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    judged.plans.clear()
    check_bytes(mesh)
    check_attached(mesh)
    check_distinct_and_accumulated(mesh)
    check_logits(mesh)
    check_functional(mesh)
    check_tensor_parallel()
    check_policies(mesh)
    # All rows retained, and some of them computed again; a frozen head.
    met = {
        (tier, kept == "all") for x in judged.gathered(judged.plans, group) for tier, kept, _ in x
    }
    assert met >= {("T1", True), ("T3", False)}
    assert ("T1f", False) in met or not few_ranks()
