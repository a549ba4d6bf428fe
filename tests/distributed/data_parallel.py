"""What each rank of ``test_data_parallel`` runs: attached models under DDP and FSDP2."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import one_rank
import torch
import torch.distributed as dist
import transformers
from counting import collectives
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pro_kernels as pk
from cases import assert_no_worse
from pro_kernels.fused import call, shards
from pro_kernels.models.counts import COUNTS

BUDGETS = (None, 1 << 13)  # everything retained; most computed again
OPTIONS = {"loss": "ranking", "temperature": 2.0}
COMMON = 100  # the step whose rows begin alike
plans: set[tuple] = set()


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


def bytes_sent(mesh, rank: int) -> list[dict]:
    """What FSDP2 and DDP send for the head, with two micro-batches, and the shapes."""
    found = []
    for kind in ("FSDP2", "DDP"):
        for vocab, width, dtype in ((67, 16, torch.float32), (66, 24, torch.bfloat16)):
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
            shape = {"V": vocab, "H": width, "b": dtype.itemsize}
            found.append({"kind": kind, "sent": sent, **shape})
    return found


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


def assert_same(what: str, got: dict, loss, expected, factor: float = 1.0) -> int:
    """Loss and gradients by the rule of ``cases``; how many gradients there are."""
    losses, grads = expected
    if loss is not None:
        plain, exact = (x[dist.get_rank()] for x in losses)
        assert_no_worse(loss.detach(), plain, exact, torch.float32, what, norm=False)
    assert got.keys() == grads[1].keys(), (what, got.keys() ^ grads[1].keys())
    for name, grad in got.items():
        sides = [factor * x[name] for x in grads]
        assert_no_worse(grad, *sides, torch.float32, f"{what}: {name}", norm=True)
    return len(got)


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


def compare(what: str, model, expected, again: bool = True, step: int = 0) -> int:
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
    return assert_same(what, gradients(model), loss, expected)


def compare_kinds(mesh) -> dict:
    """Tied and not, two tiers, every way of sharding."""
    found = {}
    for tied in (False, True):
        alone = make(tied)
        expected = in_one_process(alone)
        for budget in BUDGETS:
            for kind in kinds(tied):
                model = pk.attach(copy.deepcopy(alone), budget=budget, **OPTIONS)
                what = f"{kind}, tied={tied}, budget={budget}"
                found[what] = compare(what, wrap(kind, model, mesh), expected)
    return found


def compare_distinct(mesh) -> dict:
    """On distinct rows, tied and not, every way of sharding; what share was not run."""
    found = {}
    for tied in (False, True):
        alone = make(tied)
        expected = in_one_process(alone, (COMMON,))
        for kind in kinds(tied):
            model = pk.attach(copy.deepcopy(alone), rows="distinct", **OPTIONS)
            what = f"{kind}, tied={tied}"
            compare(what, wrap(kind, model, mesh), expected, step=COMMON)
            found[what] = pk.distinct_rows(model).saved
    return found


def compare_logits(mesh) -> dict:
    """Trainers that work on logits; of how many rows the logits were made after all."""
    found = {}
    for tied in (False, True):
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
            found[what] = COUNTS["made_rows"] - before
    return found


def compare_frozen(mesh) -> dict:
    """A frozen head, a frozen body, and adapters on the body and on the head."""
    found = {}
    head, body = make(False), make(False)
    head.lm_head.requires_grad_(False)
    body.model.requires_grad_(False)
    cases = {"frozen head": head, "frozen body": body}
    with contextlib.suppress(ImportError):
        import peft

        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        cases["LoRA"] = peft.get_peft_model(make(False), config)
        config.target_modules = {"q_proj", "lm_head"}
        cases["LoRA on the head"] = peft.get_peft_model(make(False), config)
    for name, alone in cases.items():
        expected = in_one_process(alone)
        for kind in kinds(False):
            for budget in BUDGETS:
                model = pk.attach(copy.deepcopy(alone), budget=budget, **OPTIONS)
                what = f"{kind}, {name}, budget={budget}"
                found[what] = compare(what, wrap(kind, model, mesh), expected, again=False)
    return found


def compare_accumulated(mesh) -> dict:
    """Two micro-batches, gradients reduced with the second only."""
    found = {}
    rank = dist.get_rank()
    for tied in (False, True):
        alone = make(tied)
        expected = in_one_process(alone, steps=(0, 1))
        for kind in kinds(tied):
            model = wrap(kind, pk.attach(copy.deepcopy(alone), **OPTIONS), mesh)
            if kind == "DDP":
                with model.no_sync():
                    model(**batch(rank)).loss.backward()
            else:
                model.set_requires_gradient_sync(False)
                model(**batch(rank)).loss.backward()
                model.set_requires_gradient_sync(True)
            model(**batch(rank, 1)).loss.backward()
            found[f"{kind}, tied={tied}"] = assert_same(kind, gradients(model), None, expected)
    return found


def compare_policies(mesh) -> None:
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


def compare_functional(mesh) -> dict:
    """``linear_pro_loss`` with the DTensor weight of a unit of its own."""
    found = {}
    alone = make(False)
    expected = in_one_process(alone)
    for budget in BUDGETS:
        model = wrap("FSDP2, head apart", WithLoss(copy.deepcopy(alone), budget), mesh)
        what = f"functional, budget={budget}"
        found[what] = compare(what, model, expected)
    return found


def compare_tensor_parallel() -> dict:
    """A head split over two ranks with one batch, among two such pairs FSDP2; then gathered."""
    found, world = {}, dist.get_world_size()
    pairs = world // 2
    square = init_device_mesh("cpu", (pairs, 2), mesh_dim_names=("dp", "tp"))
    mine, alone = batch(dist.get_rank() // 2, 1), make(False)
    expected = in_one_process(alone, (1,), pairs)
    plain = alone(input_ids=mine["input_ids"], labels=mine["labels"])
    groups = {"mesh": square["tp"], "its group": square["tp"].get_group(), "gathered": None}
    agreed, original = [], shards.agree
    shards.agree = lambda *args: agreed.append(1) or original(*args)
    for name, group in groups.items():
        for budget in BUDGETS:
            agreed.clear()
            model = pk.attach(copy.deepcopy(alone), budget=budget, temperature=2.0,
                              process_group=group)  # fmt: skip
            model = copy.deepcopy(model)  # the group is not copied
            parallelize_module(model, square["tp"], {"lm_head": ColwiseParallel()})
            if pairs > 1:
                model = wrap("FSDP2", model, square["dp"])
            out = model(input_ids=mine["input_ids"], labels=mine["labels"])
            torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-5)
            loss = model(**mine).loss
            loss.backward()
            assert len(agreed) == (0 if group is None else 2)  # each call split its head
            what = f"{name}, budget={budget}"
            losses = [[x[dist.get_rank() // 2]] * world for x in expected[0]]
            found[what] = assert_same(what, gradients(model), loss, (losses, expected[1]))
    shards.agree = original
    model = pk.attach(copy.deepcopy(alone), process_group=square["tp"], **OPTIONS)
    try:
        model(**mine)
    except ValueError as error:
        found["whole"] = str(error)
    parallelize_module(model, square["tp"], {"lm_head": ColwiseParallel()})
    wrap("FSDP2, head apart", model, square["dp"])
    try:
        model(**mine)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def watch_plans() -> None:
    """Note which tiers run, and whether they retain all rows."""
    original = call.make_plan

    def noted(rows, *args, **kwargs):
        plan = original(rows, *args, **kwargs)
        plans.add((plan.tier, plan.retained >= rows))
        return plan

    call.make_plan = noted


def find(_: Path) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    watch_plans()
    found = {
        "bytes": bytes_sent(mesh, dist.get_rank()),
        "kinds": compare_kinds(mesh),
        "distinct": compare_distinct(mesh),
        "logits": compare_logits(mesh),
        "frozen": compare_frozen(mesh),
        "accumulated": compare_accumulated(mesh),
        "functional": compare_functional(mesh),
        "tensor parallel": compare_tensor_parallel(),
    }
    compare_policies(mesh)
    found["plans"] = sorted(plans)
    return found


if __name__ == "__main__":
    one_rank.run(find)
