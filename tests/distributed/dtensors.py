"""DTensor heads: sharded and replicated ones are gathered, split ones are not; as on one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from judged import CROSS_ENTROPY, FROZEN, LOG_PROBS, PRO, close, held, judge, references, refused
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import pro_kernels as pk
from cases import Case, run

V, H = 67, 16
BUDGETS = (None, 1 << 12)  # everything retained; most computed again
# The function, its options, which leaves are frozen.
CALLS = [
    (PRO, {}, FROZEN[:3]),
    (LOG_PROBS, {}, FROZEN[:1]),
    (LOG_PROBS, {"return_entropy": True}, FROZEN[:1]),
    (CROSS_ENTROPY, {"softcap": None, "label_smoothing": 0.2, "z_loss": 0.1}, FROZEN[:1]),
]


class OneHead(Case):
    """The head is the same for every seed."""

    def tensors(self):
        _, weight, bias, *_ = Case("", T=self.T, H=H, V=V, bias=True).tensors()
        hidden, _, _, *rest = super().tensors()
        return hidden, weight, bias, *rest


def batch(seed: int = 0, masked: float = 0.5, n: int = 3) -> Case:
    options = {"softcap": 5.0}
    return OneHead("", T=40, H=H, V=V, n=n, masked=masked, bias=True, seed=seed, options=options)


def batches(ranks: int) -> list[Case]:
    """Ranks differ in candidates and scored tokens; the last but one scores none."""
    return [batch(r, 1.0 if r == ranks - 2 else 0.3 + 0.1 * r, 2 + r % 2) for r in range(ranks)]


def whole(grads: dict) -> dict:
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in grads.items()}


def averaged(results, mine: int) -> dict:
    """This rank's dHidden, and the mean of the head's gradients."""
    found = {k: x for k, x in results[mine].grads.items() if k == "hidden"}
    for name in ("weight", "bias"):
        parts = [x.grads[name].double() for x in results if name in x.grads]
        if parts:  # a rank that scores nothing has no graph in the reference
            found[name] = sum(parts) / len(results)
    return found


def compare(what, place, data, mine, peers=1, groups=(None, None), **options) -> None:
    """Heads as ``place`` makes them, on the data of rank ``mine``: as the reference, twice alike.

    dHidden is summed over so many ``peers``, the head's gradients averaged over ``data``.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for (fused, reference), more, frozen in CALLS[: 2 if groups[0] else None]:
            for freeze in frozen:
                sides = [references(reference, x, dtype, freeze=freeze, **more) for x in data]
                plain, exact = zip(*sides, strict=True)
                means = [averaged(plain, mine), averaged(exact, mine)]
                known = {}
                if dtype == torch.bfloat16:  # each addition over ranks rounds
                    sums = {"hidden": peers, "weight": len(data), "bias": len(data)}
                    known = {k: (sums[k] - 1) * 2.0**-9 * float(x.norm())
                             for k, x in means[1].items()}  # fmt: skip
                for budget, group in zip(BUDGETS, groups, strict=True):
                    told = f"{what} {dtype} {fused.__name__} {more} {freeze} {budget}"
                    given = {**more, **options, "process_group": group, "budget": budget}
                    case = held(data[mine], place)
                    got, again = (run(fused, case, dtype, freeze=freeze, **given) for _ in range(2))
                    grads, repeated = whole(got.grads), whole(again.grads)
                    assert grads.keys() == {"hidden", "weight", "bias"} - set(freeze), told
                    for name, x in grads.items():
                        assert torch.equal(x, repeated[name]), f"{told}: {name} not repeatable"
                    judge(told, dtype, [got, plain[mine], exact[mine]], [grads, *means], known)


def placed(mesh, *placements):
    """What makes a leaf of a head's weight or bias."""
    return lambda x: distribute_tensor(x, mesh, placements, src_data_rank=None)


def check_gathered(mesh, square) -> None:
    """Other data on every rank; sharded, replicated, and both on two dimensions."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts = {"sharded": (mesh, Shard(0)), "replicated": (mesh, Replicate())}
    if square is not None:
        layouts = {"HSDP": (square, Replicate(), Shard(0))}
    for what, layout in layouts.items():
        compare(what, placed(*layout), batches(world), rank, head_dtype="float32")


def check_split(mesh, square) -> None:
    """The same data on every rank of the vocabulary's dimension, other data on the other."""
    groups = mesh, mesh.get_group()
    compare("split", placed(mesh, Shard(0)), [batch()], 0, dist.get_world_size(), groups)
    if square is None:
        return

    def two(x):  # as a ColwiseParallel head is placed that is then sharded
        name = "weight" if x.dim() == 2 else "bias"
        head = nn.Linear(H, V, dtype=x.dtype)
        getattr(head, name).data.copy_(x)
        parallelize_module(head, square["tp"], ColwiseParallel())
        fully_shard(head, mesh=square["dp"])
        leaf = getattr(head, name).detach()
        assert leaf.device_mesh.ndim == 2 and leaf.placements[1] == Shard(0)
        return leaf

    groups = square["tp"], square["tp"].get_group()
    compare("FSDP x TP", two, batches(2), dist.get_rank() // 2, 2, groups)
    check_in_forward(square, batches(2), dist.get_rank() // 2)


class Head(nn.Linear):
    """A head that is sharded and split, in whose forward the loss is computed."""

    def forward(self, hidden, targets, rewards, group):
        return pk.linear_pro_loss(
            hidden, self.weight, targets, rewards, bias=self.bias, process_group=group, softcap=5.0
        ).loss


def check_in_forward(square, data, mine) -> None:
    """There FSDP2 has gathered its dimension: the weight is a DTensor of the other alone."""
    want = [run(pk.reference.linear_pro_loss, x, torch.float32) for x in data]
    hidden, weight, bias, targets, rewards = data[mine].tensors()
    head = Head(H, V)
    for name, x in (("weight", weight), ("bias", bias)):
        setattr(head, name, nn.Parameter(placed(square["tp"], Shard(0))(x.float())))
    fully_shard(head, mesh=square["dp"])
    loss = head(hidden.float().requires_grad_(), targets, rewards, square["tp"])
    torch.testing.assert_close(loss, want[mine].output.loss, rtol=1e-5, atol=1e-5)
    (1.7 * loss).backward()
    grads = {k: p.grad.full_tensor().double() for k, p in head.named_parameters()}
    means = averaged(want, mine)
    close("in a forward", grads, {k: means[k] for k in grads})


def check_padded(mesh) -> None:
    """A bias of -inf leaves out the rows beyond the real vocabulary, whoever holds them."""
    real = Case("padded", T=40, V=60, bias=True)

    def padded(x):  # by rows that would take most of the probability
        more = x.new_full((4, *x.shape[1:]), 9.0 if x.dim() == 2 else -torch.inf)
        return placed(mesh, Shard(0))(torch.cat([x, more]))

    want = run(pk.reference.linear_pro_loss, real, torch.float32, freeze=("bias",))
    for group in (None, mesh):
        got = run(pk.linear_pro_loss, held(real, padded), torch.float32, freeze=("bias",),
                  process_group=group)  # fmt: skip
        torch.testing.assert_close(got.output.loss, want.output.loss, rtol=1e-5, atol=1e-5)
        grads = whole(got.grads)
        assert not grads["weight"][60:].any()
        close("padded", {**grads, "weight": grads["weight"][:60]}, want.grads)


def check_compiled(mesh) -> None:
    """Gathered within one graph."""
    compiled = torch.compile(pk.linear_pro_loss, backend="aot_eager", fullgraph=True)
    case = held(batch(), placed(mesh, Shard(0)))
    got, want = (run(f, case, torch.float32) for f in (compiled, pk.linear_pro_loss))
    torch.testing.assert_close(got.output.loss, want.output.loss)
    close("compiled", whole(got.grads), whole(want.grads))


def check_what_waits_for_the_backward(mesh) -> None:
    """The whole weight does only where rows are computed again there."""
    for budget in BUDGETS:
        shapes = set()

        def pack(x, shapes=shapes):
            shapes.add((type(x), tuple(x.shape)))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(pk.linear_pro_loss, held(batch(), placed(mesh, Shard(0))), torch.float32,
                budget=budget)  # fmt: skip
        assert ((torch.Tensor, (V, H)) in shapes) == (budget is not None)


def check_refusals(mesh) -> None:
    """What is said to heads and groups that cannot be."""
    hidden, weight, bias, targets, rewards = (
        x.float() if x.is_floating_point() else x for x in batch().tensors()
    )
    replicated, split = placed(mesh, Replicate())(weight), placed(mesh, Shard(0))(weight)
    ranks = torch.arange(dist.get_world_size())
    line = DeviceMesh("cpu", ranks.flip(0))
    two = DeviceMesh("cpu", ranks.view(1, -1), mesh_dim_names=("dp", "tp"))

    def loss(w=split, h=hidden, group=mesh, **options):
        pk.linear_pro_loss(h, w, targets, rewards, process_group=group, **options)

    partial = DTensor.from_local(weight, mesh, [Partial()])
    by_column = placed(mesh, Shard(1))(weight)
    for expected, options in (
        ("must be sharded or replicated, got a DTensor placed (Par", {"w": partial, "group": None}),
        ("got a DTensor placed (Replicate(),)", {"w": replicated}),
        ("got a DTensor placed (Shard(dim=1),)", {"w": by_column}),
        ("got a mesh of 2 with names ('dp', 'tp')", {"group": two}),
        # Ranks in another order.
        ("be split over process_group", {"w": placed(line, Shard(0))(weight), "group": line}),
        ("rank 0: ValueError: bias must have shape", {"bias": bias}),
        ("ProcessGroup or a DeviceMesh of one dimension, got str", {"group": "tp"}),
        (
            "hidden must be a plain tensor, got a DTensor",
            {"h": placed(mesh, Replicate())(hidden), "group": None},
        ),
    ):
        refused(expected, loss, **options)


def check(_) -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    square = None
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    else:
        check_compiled(mesh)
    check_padded(mesh)
    check_gathered(mesh, square)
    check_split(mesh, square)
    check_what_waits_for_the_backward(mesh)
    check_refusals(mesh)
