"""Heads that are DTensors, run by ``tensor_parallel``: gathered, split, and both on a mesh."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import pro_kernels as pk
from cases import Case, assert_no_worse

V, REAL = 67, 60
OPTIONS = {"softcap": 5.0}
BUDGETS = (None, 1 << 12)  # everything retained; most computed again


def inputs(seed: int, masked: float = 0.5, n: int = 3) -> tuple:
    """As of ``Case.tensors``; the head is the same for every seed."""
    _, weight, bias, *_ = Case("", T=40, V=V, bias=True).tensors()
    hidden, _, _, targets, rewards = Case("", T=40, V=V, n=n, masked=masked, seed=seed).tensors()
    return hidden, weight, bias, targets, rewards


def of_rank(rank: int, ranks: int) -> tuple:
    """Ranks differ in candidates and scored tokens; the last but one scores none."""
    return inputs(rank, 1.0 if rank == ranks - 2 else 0.3 + 0.1 * rank, 2 + rank % 2)


def run(function, tensors, dtype, place=None, freeze=(), **options) -> tuple:
    """Values and gradients by name; ``place`` makes a leaf of the head's weight and bias."""
    hidden, weight, bias, targets, rewards = tensors
    leaves = {"hidden": hidden.to(dtype)}
    for name, x in (("weight", weight.to(dtype)), ("bias", bias.to(dtype))):
        leaves[name] = x.clone() if place is None else place(x)
    for name, x in leaves.items():
        x.requires_grad_(name not in freeze)
    args = (leaves["hidden"], leaves["weight"], targets)
    options = {**OPTIONS, "bias": leaves["bias"], **options}
    if "pro_loss" in function.__name__:
        values = (function(*args, rewards, **options).loss,)
        scalar = 1.7 * values[0]
    else:
        values = function(*args, **options)
        values = values if isinstance(values, tuple) else (values,)
        g = torch.Generator().manual_seed(5)
        scalar = sum((x * torch.randn(x.shape, generator=g)).sum() for x in values)
    if scalar.requires_grad:
        scalar.backward()
    grads = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return [x.detach() for x in values], grads


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def rounded(tensors, dtype) -> tuple:
    return *(x.to(dtype).double() for x in tensors[:3]), *tensors[3:]


FUNCTIONS = (
    (pk.linear_pro_loss, pk.reference.linear_pro_loss, {}),
    (pk.linear_token_logps, pk.reference.linear_token_logps, {}),
    (pk.linear_token_logps, pk.reference.linear_token_logps, {"return_entropy": True}),
)


def compare(what, place, data, mine, peers=1, group=None, **options) -> int:
    """Against the reference: values of this rank, its dHidden, the mean of the head's gradients.

    Args:
        what: for messages.
        place: makes the head's DTensors.
        data: inputs of each rank whose gradients are averaged.
        mine: which of them are this rank's.
        peers: over how many ranks dHidden is summed.
        group: for ``process_group``.
        options: of the fused function.
    """
    done = 0
    for dtype in (torch.float32, torch.bfloat16):
        for fused, exact, more in FUNCTIONS[: 2 if group is not None else 3]:
            for freeze in ((), ("weight", "bias"), ("hidden",)):
                want = [run(exact, rounded(x, dtype), torch.float64, None, freeze, **more)
                        for x in data]  # fmt: skip
                plain = [run(exact, x, dtype, None, freeze, **more) for x in data]
                for budget in BUDGETS:
                    told = f"{what} {dtype} {fused.__name__} {more} {freeze} {budget}"
                    call = {**more, **options, "budget": budget}
                    if group is not None:
                        call["process_group"] = group
                    got = run(fused, data[mine], dtype, place, freeze, **call)
                    again = run(fused, data[mine], dtype, place, freeze, **call)
                    for a, b, c, d in zip(
                        got[0], plain[mine][0], want[mine][0], again[0], strict=True
                    ):
                        assert torch.equal(a, d), f"{told}: not repeatable"
                        assert_no_worse(a, b, c, dtype, told, norm=False)
                    assert got[1].keys() == {"hidden", "weight", "bias"} - set(freeze), told
                    for name, grad in got[1].items():
                        assert torch.equal(whole(grad), whole(again[1][name])), told
                        if name == "hidden":
                            sides = [x[mine][1].get(name) for x in (plain, want)]
                            sums = peers
                        else:  # a rank that scores nothing has no graph in the reference
                            zero = torch.zeros(whole(grad).shape, dtype=torch.float64)
                            sides = [
                                sum(x[1].get(name, zero).double() for x in side) / len(data)
                                for side in (plain, want)
                            ]
                            sums = len(data)
                        if sides[1] is None:
                            assert not grad.any(), told
                            continue
                        known = 0.0
                        if dtype == torch.bfloat16:  # each addition over ranks rounds
                            known = (sums - 1) * 2.0**-9 * float(sides[1].norm())
                        assert_no_worse(
                            whole(grad), *sides, dtype, f"{told}: {name}", norm=True, known=known
                        )
                    done += 1
    return done


def placed(mesh, *placements):
    """What makes a leaf of a head's weight or bias."""
    return lambda x: distribute_tensor(x, mesh, placements, src_data_rank=None)


def compare_gathered(mesh, square) -> int:
    """Other data on every rank; sharded, replicated, and both on two dimensions."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = [of_rank(r, world) for r in range(world)]
    layouts = {"sharded": (mesh, Shard(0)), "replicated": (mesh, Replicate())}
    if square is not None:
        layouts = {"HSDP": (square, Replicate(), Shard(0))}
    return sum(
        compare(what, placed(*layout), data, rank, logits_dtype=torch.float32)
        for what, layout in layouts.items()
    )


def compare_split(mesh, square) -> int:
    """The same data on every rank of the vocabulary's dimension, other data on the other."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = placed(mesh, Shard(0))
    done = 0
    for group in (mesh, mesh.get_group()):
        done += compare("split", place, [inputs(0)], 0, peers=world, group=group)
    if square is None:
        return done

    def two(x):  # as a ColwiseParallel head is placed that is then sharded
        head = nn.Linear(x.shape[-1], V) if x.dim() == 2 else nn.Linear(2, V)
        getattr(head, "weight" if x.dim() == 2 else "bias").data.copy_(x)
        head = head.to(x.dtype)
        parallelize_module(head, square["tp"], ColwiseParallel())
        fully_shard(head, mesh=square["dp"])
        leaf = head.weight if x.dim() == 2 else head.bias
        assert leaf.device_mesh.ndim == 2 and leaf.placements[1] == Shard(0)
        return leaf

    data = [of_rank(r, 2) for r in range(2)]
    group = square["tp"]
    done += compare("FSDP x TP", two, data, rank // 2, peers=2, group=group)
    in_forward(square, data, rank // 2)
    return done


class Head(nn.Linear):
    """A head that is sharded and split, in whose forward the loss is computed."""

    def forward(self, hidden, targets, rewards, group):
        return pk.linear_pro_loss(
            hidden, self.weight, targets, rewards, bias=self.bias, process_group=group, **OPTIONS
        ).loss


def in_forward(square, data, mine) -> None:
    """There FSDP2 has gathered its dimension: the weight is a DTensor of the other alone."""
    want = [run(pk.reference.linear_pro_loss, x, torch.float32) for x in data]
    head = Head(16, V)
    for name, x in (("weight", data[0][1]), ("bias", data[0][2])):
        setattr(head, name, nn.Parameter(placed(square["tp"], Shard(0))(x.float())))
    fully_shard(head, mesh=square["dp"])
    hidden, _, _, targets, rewards = data[mine]
    loss = head(hidden.float().requires_grad_(), targets, rewards, square["tp"])
    torch.testing.assert_close(loss, want[mine][0][0], rtol=1e-5, atol=1e-5)
    (1.7 * loss).backward()
    for name in ("weight", "bias"):
        mean = sum(x[1].get(name, 0.0) for x in want) / 2
        torch.testing.assert_close(
            getattr(head, name).grad.full_tensor(), mean, rtol=1e-4, atol=1e-5
        )


def compare_padded(mesh) -> None:
    """Rows beyond the real vocabulary: left out by a slice, or by a bias of -inf."""
    rank, world = dist.get_rank(), dist.get_world_size()
    padded = -(-REAL // (8 * world)) * 8 * world  # to a multiple, as for the ranks' sake
    hidden, weight, bias, targets, rewards = inputs(0)
    targets = targets.clamp_max(REAL - 1)
    real = hidden, weight[:REAL], bias[:REAL], targets, rewards
    want = run(pk.reference.linear_pro_loss, real, torch.float32)
    more = padded - REAL  # rows that would take most of the probability
    weight = torch.cat([weight[:REAL], 9.0 + 0 * weight[:1].expand(more, -1)])
    bias = torch.cat([bias[:REAL], torch.full((more,), 9.0).double()])
    rows = padded // world
    mine = slice(rows * rank, rows * (rank + 1))
    w, b = (x[mine].float().requires_grad_() for x in (weight, bias))
    here = max(0, min(rows, REAL - rows * rank))
    h = hidden.float().requires_grad_()
    out = pk.linear_pro_loss(
        h, w[:here], targets, rewards, bias=b[:here], process_group=mesh, **OPTIONS
    )
    (1.7 * out.loss).backward()
    torch.testing.assert_close(out.loss, want[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad, want[1]["hidden"], rtol=1e-4, atol=1e-5)
    at = slice(rows * rank, rows * rank + here)
    for name, x in (("weight", w), ("bias", b)):
        torch.testing.assert_close(x.grad[:here], want[1][name][at], rtol=1e-4, atol=1e-5)
        assert not x.grad[here:].any()

    # Without a softcap a bias of -inf says the same, to whoever holds the rows.
    bias = torch.cat([bias[:REAL], torch.full((more,), -torch.inf).double()])
    plain = run(pk.reference.linear_pro_loss, real, torch.float32, softcap=None)
    for group in (None, mesh):
        got = run(
            pk.linear_pro_loss, (hidden, weight, bias, targets, rewards), torch.float32,
            placed(mesh, Shard(0)), ("bias",), softcap=None, process_group=group,
        )  # fmt: skip
        torch.testing.assert_close(got[0], plain[0], rtol=1e-5, atol=1e-5)
        grad = got[1]["weight"].full_tensor()
        torch.testing.assert_close(grad[:REAL], plain[1]["weight"], rtol=1e-4, atol=1e-5)
        assert not grad[REAL:].any()


def compare_compiled(mesh) -> None:
    """Gathered within one graph."""
    tensors, place = inputs(0), placed(mesh, Shard(0))
    compiled = torch.compile(pk.linear_pro_loss, backend="aot_eager", fullgraph=True)

    def linear_pro_loss(*args, **options):
        return compiled(*args, **options)

    got = run(linear_pro_loss, tensors, torch.float32, place)
    want = run(pk.linear_pro_loss, tensors, torch.float32, place)
    torch.testing.assert_close(got[0], want[0])
    for name, grad in want[1].items():
        torch.testing.assert_close(whole(got[1][name]), whole(grad))


def held(mesh) -> dict[str, bool]:
    """Whether the backward holds the whole weight, by what the budget retains."""
    tensors, found = inputs(0), {}
    for budget in BUDGETS:
        shapes = set()

        def pack(x, shapes=shapes):
            shapes.add((type(x), tuple(x.shape)))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(pk.linear_pro_loss, tensors, torch.float32, placed(mesh, Shard(0)), budget=budget)
        found["some" if budget else "all"] = (torch.Tensor, (V, 16)) in shapes
    return found


def refusals(mesh) -> list[str]:
    """What is said to heads and groups that cannot be."""
    hidden, weight, bias, targets, rewards = (
        x.float() if x.is_floating_point() else x for x in inputs(0)
    )
    replicated, split = placed(mesh, Replicate())(weight), placed(mesh, Shard(0))(weight)
    world = dist.get_world_size()
    line = DeviceMesh("cpu", torch.arange(world).flip(0))
    two = DeviceMesh("cpu", torch.arange(world).view(1, -1), mesh_dim_names=("dp", "tp"))
    messages = []
    for w, options in (
        (DTensor.from_local(weight, mesh, [Partial()]), {}),
        (replicated, {"process_group": mesh}),
        (placed(mesh, Shard(1))(weight), {"process_group": mesh}),
        (split, {"process_group": two}),
        (placed(line, Shard(0))(weight), {"process_group": line}),
        (split, {"process_group": mesh, "bias": bias}),
        (split, {"process_group": "tp"}),
    ):
        try:
            pk.linear_pro_loss(hidden, w, targets, rewards, **options)
            messages.append("")
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    try:
        pk.linear_pro_loss(placed(mesh, Replicate())(hidden), split, targets, rewards)
    except TypeError as error:
        messages.append(str(error))
    return messages


def check() -> dict:
    """All of the above."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    square = None
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    else:
        compare_compiled(mesh)
    compare_padded(mesh)
    return {
        "gathered": compare_gathered(mesh, square),
        "split": compare_split(mesh, square),
        "held": held(mesh),
        "messages": refusals(mesh),
    }
