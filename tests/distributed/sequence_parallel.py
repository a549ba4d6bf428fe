"""What each rank of ``test_sequence_parallel`` runs: its tokens of a batch against all of it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TRITON_INTERPRET"] = "1"
import one_rank
import torch
import torch.distributed as dist
from counting import collectives
from tensor_parallel import bounds, plans, rounded, same_everywhere, watch_plans
from torch.nn.parallel import DistributedDataParallel

import pro_kernels as pk
from cases import Case, assert_no_worse, usable_backends

BY_CANDIDATE = {
    "candidate_mask": torch.tensor([[True, True, False], [True, True, True]]),
    "prompt_weights": torch.tensor([1.0, 3.0]),
    "sft_index": torch.tensor([1, 2]),
}
CASES = [
    Case("plain", T=9),
    Case("nothing masked", masked=0.0, options={"compat": "official"}),
    Case("all masked", masked=1.0),
    Case("two candidates", n=2, masked=0.8),
    Case("ties", ties=True),
    Case("ties skipped", ties=True, options={"ties": "skip"}),
    Case("order only", options={"rewards": None, "eps": 1e-3}),
    Case("sums, top 2", n=5, options={"length_normalize": False, "top_k": 2}),
    Case("fixed temperature", options={"temperature": 2.0, "sft_reduction": "mean"}),
    Case("candidates masked", options=BY_CANDIDATE),
    Case("bias, softcap", T=9, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}),
]
LONG = Case("several chunks", V=1009, T=160, bias=True)


def owners(targets, world: int) -> dict[str, torch.Tensor]:
    """Which rank holds each token (B, n, T), by the name of the split."""
    b, n, t = targets.shape
    position = torch.arange(t)
    ends = torch.tensor(bounds(t, world)[1:])  # uneven: the last rank has most
    part = torch.searchsorted(ends, position, right=True)
    zigzag = position * 2 * world // t
    by_part = {"parts": part, "zigzag": torch.minimum(zigzag, 2 * world - 1 - zigzag)}
    by_part["one has none"] = 1 + position % (world - 1)
    found = {name: x.expand(b, n, t) for name, x in by_part.items()}
    by_candidate = (torch.arange(b * n) % world).view(b, n, 1).expand(b, n, t)
    found["candidates"] = by_candidate
    # The first prompt's candidates are split over all ranks, the others lie on one each.
    found["mixed"] = torch.where(torch.arange(b)[:, None, None] == 0, part, by_candidate)
    return found


class Part:
    """This rank's tokens: leaves that need a gradient, and what ``linear_pro_loss`` takes."""

    def __init__(self, case: Case, dtype, mine, freeze=(), form="packed", rows=slice(None)):
        hidden, weight, bias, targets, rewards = case.tensors()
        self.mine, self.options = mine, dict(case.options)
        self.rewards = self.options.pop("rewards", rewards)
        columns = mine[0, 0]
        if form == "padded":
            hidden, self.targets = hidden[:, :, columns], targets[:, :, columns]
        else:
            ends = mine.sum(-1).flatten().cumsum(0)
            ends = torch.nn.functional.pad(ends, (1, 0))
            layout = pk.Layout.from_packed(targets[mine], ends, case.n)
            hidden, self.targets = hidden[mine], None
            self.options["layout"] = layout
        self.leaves = {"hidden": hidden, "weight": weight[rows]}
        if bias is not None:
            self.leaves["bias"] = bias[rows]
        for name, x in self.leaves.items():
            self.leaves[name] = x.to(dtype, copy=True).requires_grad_(name not in freeze)

    def run(self, **options):
        """The output and the gradients by name; hidden's as (tokens of this rank, H)."""
        leaves, options = self.leaves, {**self.options, **options}
        for x in leaves.values():
            x.grad = None
        out = pk.linear_pro_loss(
            leaves["hidden"], leaves["weight"], self.targets, self.rewards,
            bias=leaves.get("bias"), **options,
        )  # fmt: skip
        if out.loss.requires_grad:
            (1.7 * out.loss).backward()
        grads = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        if "hidden" in grads and grads["hidden"].dim() == 4:
            grads["hidden"] = grads["hidden"].permute(2, 0, 1, 3).flatten(0, 2)
        return out, grads


def on_one_rank(function, case: Case, dtype, freeze=()):
    """Output and gradients of the whole batch."""
    hidden, weight, bias, targets, rewards = case.tensors()
    options = dict(case.options)
    rewards = options.pop("rewards", rewards)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        name: x.to(dtype, copy=True).requires_grad_(name not in freeze)
        for name, x in leaves.items()
        if x is not None
    }
    out = function(
        leaves["hidden"], leaves["weight"], targets, rewards, bias=leaves.get("bias"), **options
    )
    if out.loss.requires_grad:
        (1.7 * out.loss).backward()
    return out, {name: x.grad for name, x in leaves.items() if x.grad is not None}


def gathered(x, group) -> list:
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x, group=group)
    return parts


def check_part(got, want, plain, mine, dtype, what, group, form="packed", tp=None) -> None:
    """Outputs are whole and the same on all ranks; gradients are parts of the whole's."""
    (out, grads), (exact, exact_grads), (_, plain_grads) = got, want, plain
    for name in ("loss", "rank_losses", "sft_loss", "scores", "logps", "lengths"):
        same_everywhere(getattr(out, name).detach(), group)
    assert torch.equal(out.lengths, exact.lengths), what
    for name in ("loss", "scores", "logps"):
        values = (getattr(x, name).detach() for x in (out, plain[0], exact))
        assert_no_worse(*values, dtype, f"{what}: {name}", norm=False)
    assert grads.keys() >= exact_grads.keys(), what
    for name, grad in grads.items():
        if name not in exact_grads:  # nothing is scored: the reference has no graph
            assert not grad.any(), what
            continue
        sides = [x[name] for x in (plain_grads, exact_grads)]
        if name == "hidden":
            parts = (grad, *sides)
            if form == "padded":
                columns = [x[:, :, mine[0, 0]].permute(2, 0, 1, 3).flatten(0, 2) for x in sides]
            else:
                columns = [x[mine] for x in sides]
            parts = [torch.cat(gathered(x, group)) for x in (grad, *columns)]
            known = 0.0
        else:  # each rank's part is rounded by itself
            held = gathered(grad, group)
            known = torch.finfo(dtype).eps / 2 * float(sum(x.double().norm() for x in held))
            parts = [sum(x.double() for x in held)]
            parts += [x if tp is None else x[tp] for x in sides]
        assert_no_worse(*parts, dtype, f"{what}: {name}", norm=True, known=known)


def compare_all(group) -> int:
    """Every split of every case, padded where a split is one of columns; all tiers on one."""
    rank, world, done = dist.get_rank(group), dist.get_world_size(group), 0
    exact = plain = pk.reference.linear_pro_loss
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            want = on_one_rank(exact, rounded(case, dtype), torch.float64)
            same = on_one_rank(plain, case, dtype)
            for i, (split, owner) in enumerate(owners(case.tensors()[3], world).items()):
                form = "padded" if i < 3 and dtype == torch.float32 else "packed"
                part = Part(case, dtype, owner == rank, form=form)
                what = f"{case.name} {dtype} {split} {form}"
                got = part.run(sequence_group=group)
                check_part(got, want, same, part.mine, dtype, what, group, form)
                done += 1
    owner = owners(LONG.tensors()[3], world)["mixed"]
    for dtype in (torch.float32, torch.bfloat16):
        for freeze in ((), ("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")):
            want = on_one_rank(exact, rounded(LONG, dtype), torch.float64, freeze)
            same = on_one_rank(plain, LONG, dtype, freeze)
            part = Part(LONG, dtype, owner == rank, freeze)
            for budget in (None, 450 * LONG.V, 1 << 14):
                got = part.run(sequence_group=group, budget=budget)
                what = f"{dtype} {freeze} {budget}"
                check_part(got, want, same, part.mine, dtype, what, group)
                done += 1
    return done


def compare_backends(group) -> list[str]:
    case, names = Case("backends", T=9, bias=True, ties=True), usable_backends()
    owner = owners(case.tensors()[3], dist.get_world_size(group))["mixed"]
    mine = owner == dist.get_rank(group)
    want = on_one_rank(pk.reference.linear_pro_loss, case, torch.float32)
    for name in names:
        out, grads = Part(case, torch.float32, mine).run(sequence_group=group, backend=name)
        torch.testing.assert_close(out.loss, want[0].loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.scores, want[0].scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads["hidden"], want[1]["hidden"][mine], rtol=1e-4, atol=1e-5)
        whole = sum(gathered(grads["weight"], group))
        torch.testing.assert_close(whole, want[1]["weight"], rtol=1e-4, atol=1e-5)
    return names


def compare_from_logits(group) -> None:
    """``pro_loss`` of fp32 and fp64, its gradient over the logits and beside them."""
    rank, case = dist.get_rank(group), Case("logits", T=9)
    hidden, weight, _, targets, rewards = case.tensors()
    everything = (hidden @ weight.T).requires_grad_()
    want = pk.reference.pro_loss(everything, targets, rewards)
    want.loss.backward()
    splits = owners(targets, dist.get_world_size(group))
    for split in ("parts", "zigzag", "one has none"):
        columns = splits[split][0, 0] == rank
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            for inplace in (False, True):
                logits = everything.detach()[:, :, columns].to(dtype).requires_grad_()
                out = pk.pro_loss(
                    logits * 1.0, targets[:, :, columns], rewards, sequence_group=group,
                    inplace_backward=inplace,
                )  # fmt: skip
                out.loss.backward()
                close = {"rtol": tolerance, "atol": tolerance}
                torch.testing.assert_close(out.loss.double(), want.loss, **close)
                torch.testing.assert_close(out.scores.double(), want.scores, **close)
                expected = everything.grad[:, :, columns]
                torch.testing.assert_close(logits.grad.double(), expected, **close)


def compare_with_a_filter(group) -> None:
    """The same loss; what is lost of this rank's gradients is within the bounds it tells."""
    case = Case("filter", V=1009, T=9, scale=12.0)
    owner = owners(case.tensors()[3], dist.get_world_size(group))["parts"]
    part = Part(case, torch.float32, owner == dist.get_rank(group))
    dense, grads = part.run(sequence_group=group)
    out, filtered = part.run(sequence_group=group, grad_filter=0.2)
    assert torch.equal(out.loss, dense.loss) and dense.grad_filter is None
    bounds = out.grad_filter.error_bounds(part.leaves["hidden"])
    assert (out.grad_filter.dropped_mass > 0).any()
    for name, bound in zip(("hidden", "weight"), bounds, strict=True):
        lost = float((filtered[name] - grads[name]).norm())
        assert 0 < lost <= 1.7 * float(bound) + 1e-6 * float(grads[name].norm()), name


def compare_training(group) -> None:
    """Through DDP, which averages: the loss times the ranks gives one process's gradients."""
    rank, world, case = dist.get_rank(group), dist.get_world_size(group), Case("training", T=9)
    hidden, weight, _, targets, rewards = case.tensors()
    x, weight = hidden.float(), weight.float()
    torch.manual_seed(3)
    layer = torch.nn.Linear(case.H, case.H)
    whole = pk.reference.linear_pro_loss(layer(x).tanh(), weight, targets, rewards)
    want = torch.autograd.grad(whole.loss, list(layer.parameters()))
    wrapped = DistributedDataParallel(layer)
    columns = owners(targets, world)["zigzag"][0, 0] == rank
    out = pk.linear_pro_loss(
        wrapped(x[:, :, columns]).tanh(), weight, targets[:, :, columns], rewards,
        sequence_group=group,
    )  # fmt: skip
    (world * out.loss).backward()
    for parameter, grad in zip(layer.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


def compare_shared_rows(group) -> None:
    """Three candidates that share their prompt's last row, and one alone; rows lie anywhere."""
    rows = torch.tensor([1, 2, 3, 1, 4, 5, 6, 1, 7, 9, 10, 11])
    ends, counts = torch.tensor([0, 3, 7, 9, 12]), [3, 1]
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(13, 16, generator=generator, requires_grad=True)
    weight = torch.randn(37, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 37, rows.shape, generator=generator)
    rewards = torch.randn(2, 3, generator=generator)
    layout = pk.Layout.from_rows(rows, targets, ends, counts, num_rows=13)
    want = pk.reference.linear_pro_loss(hidden, weight, None, rewards, layout=layout)
    expected = torch.autograd.grad(want.loss, (hidden, weight))
    held = torch.arange(13) % dist.get_world_size(group) == dist.get_rank(group)
    mine = held[rows]
    part = pk.Layout.from_rows(
        (held.cumsum(0) - 1)[rows[mine]],
        targets[mine],
        torch.nn.functional.pad(mine.cumsum(0), (1, 0))[ends],
        counts,
        num_rows=int(held.sum()),
    )
    own = hidden.detach()[held].requires_grad_()
    out = pk.linear_pro_loss(own, weight, None, rewards, layout=part, sequence_group=group)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.scores, want.scores, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.loss, (own, weight))
    torch.testing.assert_close(grads[0], expected[0][held], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(gathered(grads[1], group)), expected[1], rtol=1e-4, atol=1e-5)


def compare_recipe(group) -> None:
    """The function of docs/integrations/context-parallel.md, gradients averaged as DDP does."""
    page = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "context-parallel.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 37, (2, 3, 16), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    rewards = torch.randn(2, 3, generator=generator)
    shapes = ((37, 16), (16, 16), (37, 16))
    table, places, head = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in shapes
    )

    def model(ids, positions):
        return (table[ids] + places[positions]).tanh()

    hidden = model(ids, torch.arange(16))
    want = pk.reference.linear_pro_loss(hidden, head, labels, rewards, shift=True)
    expected = torch.autograd.grad(want.loss, (table, places, head))
    out = names["split_loss"](model, head, ids, labels, rewards, group)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-5)
    world = dist.get_world_size(group)
    for grad, whole in zip(
        torch.autograd.grad(world * out.loss, (table, places, head)), expected, strict=True
    ):
        dist.all_reduce(grad, group=group)
        torch.testing.assert_close(grad / world, whole, rtol=1e-4, atol=1e-5)


def check_repeats(group) -> None:
    """The same bits twice."""
    case = Case("repeats", V=1009, T=9)
    owner = owners(case.tensors()[3], dist.get_world_size(group))["zigzag"]
    part = Part(case, torch.bfloat16, owner == dist.get_rank(group))
    for budget in (None, 1 << 14):
        (out, grads), (again, more) = (
            part.run(sequence_group=group, budget=budget) for _ in range(2)
        )
        assert torch.equal(out.loss, again.loss) and torch.equal(out.scores, again.scores)
        assert all(torch.equal(grads[name], more[name]) for name in grads)


def traffic(group) -> dict:
    """Bytes of every collective of a call, in its forward and in its backward."""
    case = Case("wire", V=1009, T=9)
    owner = owners(case.tensors()[3], dist.get_world_size(group))["parts"]
    part = Part(case, torch.bfloat16, owner == dist.get_rank(group))
    with collectives() as sent:
        out = pk.linear_pro_loss(
            part.leaves["hidden"], part.leaves["weight"], None, part.rewards, sequence_group=group,
            **part.options,
        )  # fmt: skip
        forward = list(sent)
        out.loss.backward()
    return {"forward": forward, "backward": sent[len(forward) :], "candidates": case.B * case.n}


def compare_in_a_mesh() -> list[str]:
    """Ranks 0 1 | 2 3 hold the vocabulary, 0 2 | 1 3 the tokens; then what is wrong on one rank."""
    rank = dist.get_rank()
    heads = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    tokens = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    groups = {"process_group": heads[rank // 2], "sequence_group": tokens[rank % 2]}
    for case in (Case("mesh", T=9, bias=True, ties=True), LONG):
        at = bounds(case.V, 2)
        rows = slice(at[rank % 2], at[rank % 2 + 1])
        want = on_one_rank(pk.reference.linear_pro_loss, rounded(case, torch.float32),
                           torch.float64)  # fmt: skip
        same = on_one_rank(pk.reference.linear_pro_loss, case, torch.float32)
        for split, owner in owners(case.tensors()[3], 2).items():
            mine = owner == rank // 2
            for budget in (None, 1 << 14):
                part = Part(case, torch.float32, mine, rows=rows)
                got = part.run(**groups, budget=budget)
                what = f"mesh {case.name} {split} {budget}"
                same_everywhere(got[0].loss.detach(), dist.group.WORLD)
                check_part(got, want, same, mine, torch.float32, what, tokens[rank % 2], tp=rows)
    part = Part(Case("mesh"), torch.float32, mine[:, :, :6], rows=slice(18 * (rank % 2), 37))
    wrong = [
        {"softcap": -1.0 if rank == 3 else None},
        {"softcap": 1.0 + rank % 2},  # ranks of a process_group disagree
        {"softcap": 1.0 + rank // 2},  # ranks of a sequence_group do
        {"rewards": torch.arange(6.0).view(2, 3) + (rank == 2)},
        {"budget": 0 if rank == 1 else None},
        {"sft_weight": "much" if rank == 0 else 0.05},
        {"grad_filter": 0.1 if rank == 2 else None},
    ]
    messages = []
    for options in wrong:
        rewards = part.rewards
        part.rewards = options.pop("rewards", rewards)
        messages.append(refusal(lambda options=options: part.run(**groups, **options)))
        part.rewards = rewards
    return messages


def refusal(attempt) -> str:
    try:
        attempt()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(group) -> list[str]:
    """Every rank raises, with these messages."""
    rank = dist.get_rank(group)
    hidden, weight, _, targets, rewards = Case("bad").tensors()
    h, w = hidden.float(), weight.float()
    logits = h @ w.T
    equal = torch.ones(2, 3)

    def call(h=h, w=w, t=targets, r=rewards, group=group, **options):
        return lambda: pk.linear_pro_loss(h, w, t, r, sequence_group=group, **options)

    def from_logits(z=logits, t=targets, r=rewards, group=group, **options):
        return lambda: pk.pro_loss(z, t, r, sequence_group=group, **options)

    other = rank == 1
    some = slice(3 - rank % 2)
    attempts = [
        call(h[:, some], w, targets[:, some], rewards[:, some]),
        call(sft_weight=0.1 * rank),
        call(r=rewards + other),
        call(sft_weight="much" if other else 0.05),
        call(t=targets.masked_fill(targets >= 0, 37) if other else targets),
        call(layout=pk.Layout.from_padded(targets[:, :, :5]) if other else None),
        call(h.double() if other else h, w.double() if other else w),
        call(w=w[: 37 - rank % 2], t=targets.clamp_max(35)),
        call(budget=-1 if other else None),
        call(backend="cuda" if other else "auto"),
        call(candidate_mask=torch.ones(2, 3) if other else torch.ones(2, 3, dtype=torch.bool)),
        call(r=equal),
        call(r=equal * torch.nan),
        call(h=None if other else h),
        call(t=None, layout="none" if other else pk.Layout.from_padded(targets)),
        call(group="sp"),
        call(group=dist.GroupMember.NON_GROUP_MEMBER),
        from_logits(z=logits[..., : 37 - rank % 2], t=targets.clamp_max(35)),
        from_logits(t=targets.masked_fill(targets >= 0, 37) if other else targets),
        from_logits(t=targets.float() if other else targets),
        from_logits(top_k=1 + rank),
        from_logits(t=targets.to("meta") if other else targets),
    ]
    return [refusal(attempt) for attempt in attempts]


def find(_: Path) -> dict:
    group = dist.group.WORLD
    watch_plans()
    found = {"messages": refusals(group), "compared": compare_all(group)}
    found["backends"] = compare_backends(group)
    compare_from_logits(group)
    compare_with_a_filter(group)
    compare_training(group)
    compare_shared_rows(group)
    compare_recipe(group)
    check_repeats(group)
    found["traffic"] = traffic(group)
    if dist.get_world_size() == 4:
        found["mesh"] = compare_in_a_mesh()
    found["plans"] = sorted(plans)
    return found


if __name__ == "__main__":
    one_rank.run(find)
