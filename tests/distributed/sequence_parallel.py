"""Tokens split over the ranks: as on one, 8 bytes a candidate."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import torch
import torch.distributed as dist
from judged import (
    FROZEN,
    PRO,
    bounds,
    close,
    collectives,
    few_ranks,
    gathered,
    held,
    judge,
    plans,
    references,
    refused,
    same_everywhere,
)
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

import pro_kernels as pk
from bench.suites.ranks import wire
from cases import Case, run, usable_backends

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
LONG = Case("several chunks", V=1009, T=80, bias=True)
BUDGETS = 450 * LONG.V, 1 << 14  # some rows retained; none
SPLITS = "parts", "zigzag", "one has none", "candidates", "mixed"
FUSED, REFERENCE = PRO


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


def held_by_this_rank(case: Case, split: str, group) -> torch.Tensor:
    owner = owners(case.tensors()[3], dist.get_world_size(group))[split]
    return owner == dist.get_rank(group)


def part(case: Case, mine, padded: bool = False) -> Case:
    """The case of these of its tokens, packed or as columns of the padded batch."""
    hidden, weight, bias, targets, rewards = case.tensors()
    found = dataclasses.replace(case)
    if padded:
        hidden, targets = hidden[:, :, mine[0, 0]], targets[:, :, mine[0, 0]]
    else:
        ends = pad(mine.sum(-1).flatten().cumsum(0), (1, 0))
        found.options = {
            **case.options,
            "layout": pk.Layout.from_packed(targets[mine], ends, case.n),
        }
        hidden, targets = hidden[mine], None
    found.tensors = lambda: (hidden, weight, bias, targets, rewards)
    return found


def judge_part(what, dtype, got, sides, mine, group, rows=slice(None)) -> None:
    """Outputs are whole and the same on all ranks; gradients are parts of the whole's."""
    names = ("loss", "rank_losses", "sft_loss", "scores", "logps", "lengths")
    outputs = [getattr(got.output, name).detach().double().flatten() for name in names]
    ranks = gathered((torch.cat(outputs), got.grads, mine), group)
    assert all(torch.equal(x, ranks[0][0]) for x, *_ in ranks), f"{what}: ranks differ"
    assert torch.equal(got.output.lengths, sides[1].output.lengths), what
    ours, known = {}, {}
    theirs = [dict(x.grads) for x in sides]
    for name, grad in got.grads.items():
        parts = [grads[name] for _, grads, _ in ranks]
        if name == "hidden":
            ours[name] = torch.cat([x.reshape(-1, grad.shape[-1]) for x in parts])
            for side in theirs:
                if name in side:
                    side[name] = torch.cat([side[name][x] for *_, x in ranks])
        else:  # each rank's part is rounded by itself
            ours[name] = sum(x.double() for x in parts)
            known[name] = torch.finfo(dtype).eps / 2 * float(sum(x.norm() for x in parts))
            for side in theirs:
                if name in side:
                    side[name] = side[name][rows]
    judge(what, dtype, [got, *sides], [ours, *theirs], known)


def check_values(group) -> None:
    """The mixed split of each case and two others in turn, padded where one is of columns.

    On two ranks every frozen set and budget of the longest case, and every backend, too.
    """
    calls = []  # case, split, dtype, whether padded, options of both sides, options of ours
    for k, case in enumerate(CASES):
        for dtype, chosen in ((torch.float32, (k % 4, (k + 2) % 4, 4)), (torch.bfloat16, (k % 5,))):
            for i in chosen:
                calls.append((case, SPLITS[i], dtype, i < 3 and dtype == torch.float32, {}, {}))
    if few_ranks():
        every = itertools.product((torch.float32, torch.bfloat16), FROZEN, (None, *BUDGETS))
        calls += [
            (LONG, "mixed", dtype, False, {"freeze": freeze}, {"budget": budget})
            for dtype, freeze, budget in every
        ]
        case = Case("backends", T=9, bias=True, ties=True)
        for name in usable_backends():
            calls.append((case, "mixed", torch.float32, False, {}, {"backend": name}))
    for case, split, dtype, padded, both, own in calls:
        sides = references(REFERENCE, case, dtype, **both)
        mine = held_by_this_rank(case, split, group)
        got = run(FUSED, part(case, mine, padded), dtype, sequence_group=group, **both, **own)
        what = f"{case.name} {dtype} {split} padded={padded} {both} {own}"
        judge_part(what, dtype, got, sides, mine, group)
    if few_ranks():
        met = set().union(*gathered(plans, group))
        assert met >= {("T1", "all", False), ("T3", "some", True), ("T3", "none", True)}
        assert met >= {("T1f", "none", True), ("T0", "none", True)}


def check_from_logits(group) -> None:
    """``pro_loss`` of fp32 and fp64, its gradient over the logits and beside them."""
    case = Case("logits", T=9)
    hidden, weight, _, targets, rewards = case.tensors()
    everything = (hidden @ weight.T).requires_grad_()
    want = pk.reference.pro_loss(everything, targets, rewards)
    want.loss.backward()
    for split in ("parts", "zigzag", "one has none"):
        columns = held_by_this_rank(case, split, group)[0, 0]
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            for inplace in (False, True):
                logits = everything.detach()[:, :, columns].to(dtype).requires_grad_()
                out = pk.pro_loss(
                    logits * 1.0, targets[:, :, columns], rewards, sequence_group=group,
                    inplace_backward=inplace,
                )  # fmt: skip
                out.loss.backward()
                for got, exact in (
                    (out.loss, want.loss),
                    (out.scores, want.scores),
                    (logits.grad, everything.grad[:, :, columns]),
                ):
                    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def check_with_a_filter(group) -> None:
    """The same loss; what is lost of this rank's gradients is within the bounds it tells."""
    case = Case("filter", V=1009, T=9, scale=12.0)
    case = part(case, held_by_this_rank(case, "parts", group))
    dense = run(FUSED, case, torch.float32, sequence_group=group)
    filtered = run(FUSED, case, torch.float32, sequence_group=group, grad_filter=0.2)
    found = filtered.output.grad_filter
    assert torch.equal(filtered.output.loss, dense.output.loss)
    assert dense.output.grad_filter is None and (found.dropped_mass > 0).any()
    bounds = found.error_bounds()
    for name, bound in zip(("hidden", "weight"), bounds, strict=True):
        lost = float((filtered.grads[name] - dense.grads[name]).norm())
        assert 0 < lost <= 1.7 * float(bound) + 1e-6 * float(dense.grads[name].norm()), name


def check_shared_rows(group) -> None:
    """Three candidates that share their prompt's last row, and one alone; rows lie anywhere."""
    rows = torch.tensor([1, 2, 3, 1, 4, 5, 6, 1, 7, 9, 10, 11])
    ends, counts = torch.tensor([0, 3, 7, 9, 12]), [3, 1]
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(13, 16, generator=generator, requires_grad=True)
    weight = torch.randn(37, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 37, rows.shape, generator=generator)
    rewards = torch.randn(2, 3, generator=generator)
    layout = pk.Layout.from_rows(rows, targets, ends, counts, num_rows=13)
    want = REFERENCE(hidden, weight, None, rewards, layout=layout)
    expected = torch.autograd.grad(want.loss, (hidden, weight))
    held = torch.arange(13) % dist.get_world_size(group) == dist.get_rank(group)
    mine = held[rows]
    layout = pk.Layout.from_rows(
        (held.cumsum(0) - 1)[rows[mine]], targets[mine], pad(mine.cumsum(0), (1, 0))[ends], counts,
        num_rows=int(held.sum()),
    )  # fmt: skip
    own = hidden.detach()[held].requires_grad_()
    out = FUSED(own, weight, None, rewards, layout=layout, sequence_group=group)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.scores, want.scores, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.loss, (own, weight))
    got = {"hidden": grads[0], "weight": sum(gathered(grads[1], group))}
    close("shared rows", got, {"hidden": expected[0][held], "weight": expected[1]})


class Tiny(torch.nn.Module):
    """A model of embeddings, and the loss of a recipe in its forward."""

    def __init__(self, group) -> None:
        super().__init__()
        torch.manual_seed(4)
        page = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "context-parallel.md"
        (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        self.names: dict = {}
        exec(code, self.names)
        self.ids, self.places = torch.nn.Embedding(37, 16), torch.nn.Embedding(16, 16)
        self.group, self.head = group, torch.nn.Parameter(torch.randn(37, 16))

    def hidden(self, ids, positions):
        return (self.ids(ids) + self.places(positions)).tanh()

    def forward(self, ids, labels, rewards):
        given = self.hidden, self.head, ids, labels, rewards, self.group
        return dist.get_world_size(self.group) * self.names["split_loss"](*given).loss


def check_recipe(group) -> None:
    """The function of docs/integrations/context-parallel.md under DDP, which averages."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 37, (2, 3, 16), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    rewards = torch.randn(2, 3, generator=generator)
    model = Tiny(group)
    hidden = model.hidden(ids, torch.arange(16))
    want = REFERENCE(hidden, model.head, labels, rewards, shift=True)
    expected = torch.autograd.grad(want.loss, list(model.parameters()))
    wrapped = DistributedDataParallel(model)
    loss = wrapped(ids, labels, rewards)
    ranks = dist.get_world_size(group)
    torch.testing.assert_close(loss, ranks * want.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    grads = {i: p.grad for i, p in enumerate(model.parameters())}
    close("recipe", grads, dict(enumerate(expected)))


def check_repeats_and_traffic(group) -> None:
    """The same bits twice; on the wire what ``wire`` has, and the backward asks nobody."""
    case = Case("wire", V=1009, T=9)
    mine = part(case, held_by_this_rank(case, "zigzag", group))
    for budget in (None, 1 << 14):
        found = []
        for _ in range(2):
            with collectives() as sent:
                found.append(run(FUSED, mine, torch.bfloat16, sequence_group=group, budget=budget))
            predicted = wire.split_tokens(dist.get_world_size(group), case.B * case.n)
            assert [(kind, size) for kind, _, size in sent] == [(c.kind, c.size) for c in predicted]
        first, again = found
        assert torch.equal(first.output.loss, again.output.loss)
        assert torch.equal(first.output.scores, again.output.scores)
        assert all(torch.equal(x, again.grads[name]) for name, x in first.grads.items())


def check_mesh() -> None:
    """Ranks 0 1 | 2 3 hold the vocabulary, 0 2 | 1 3 the tokens; then what is wrong on one rank.

    The fault of one rank, or of one row of the mesh, reaches all four.
    """
    rank = dist.get_rank()
    heads = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    tokens = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    groups = {"process_group": heads[rank // 2], "sequence_group": tokens[rank % 2]}
    group = groups["sequence_group"]

    def quarter(case, mine, rows):
        return held(part(case, mine), lambda x: x[rows])

    for case in (Case("mesh", T=9, bias=True, ties=True), LONG):
        at = bounds(case.V, 2)
        rows = slice(at[rank % 2], at[rank % 2 + 1])
        sides = references(REFERENCE, case, torch.float32)
        for split in SPLITS:
            mine = held_by_this_rank(case, split, group)
            for budget in (None, 1 << 14):
                got = run(FUSED, quarter(case, mine, rows), torch.float32, **groups, budget=budget)
                same_everywhere(got.output.loss.detach(), dist.group.WORLD)
                what = f"mesh {case.name} {split} {budget}"
                judge_part(what, torch.float32, got, sides, mine, group, rows)

    case = Case("mesh")
    case = quarter(case, held_by_this_rank(case, "mixed", group), slice(18 * (rank % 2), 37))
    rewards = torch.arange(6.0).view(2, 3)

    def loss(**options):
        run(FUSED, case, torch.float32, **groups, **options)

    for expected, options in (
        ("softcap must be > 0, got -1.0", {"softcap": -1.0 if rank == 3 else None}),
        ("the ranks of process_group disagree on softcap", {"softcap": 1.0 + rank % 2}),
        ("the ranks of sequence_group disagree on softcap", {"softcap": 1.0 + rank // 2}),
        ("the ranks of process_group disagree on rewards", {"rewards": rewards + (rank == 2)}),
        ("budget must be > 0 bytes, got 0", {"budget": 0 if rank == 1 else None}),
        ("sft_weight must be a number, got", {"sft_weight": "much" if rank == 0 else 0.05}),
        ("grad_filter cannot be had with a proc", {"grad_filter": 0.1 if rank == 2 else None}),
    ):
        refused(expected, loss, **options)


def check_refusals(group) -> None:
    """Every rank raises, in these words."""
    hidden, weight, _, targets, rewards = Case("bad").tensors()
    h, w = hidden.float(), weight.float()
    rank = dist.get_rank(group)
    some, rows = slice(3 - rank % 2), slice(37 - rank % 2)

    def loss(h=h, w=w, t=targets, r=rewards, **options):
        pk.linear_pro_loss(h, w, t, r, **{"sequence_group": group, **options})

    def from_logits(z=h @ w.T, t=targets, r=rewards, **options):
        pk.pro_loss(z, t, r, sequence_group=group, **options)

    def at_1(**wrong):
        return wrong if rank == 1 else {}

    says = "ValueError: in sequence_group, rank 1: "
    disagree = "ValueError: the ranks of sequence_group disagree on "
    far, low = targets.masked_fill(targets >= 0, 37), targets.clamp_max(35)
    short = pk.Layout.from_padded(targets[:, :, :5])
    by_layout = {"t": None, "layout": pk.Layout.from_padded(targets)}
    nobody = dist.GroupMember.NON_GROUP_MEMBER
    for expected, options in (
        (disagree + "(B, n)", {"h": h[:, some], "t": targets[:, some], "r": rewards[:, some]}),
        (disagree + "loss", {"sft_weight": 0.1 * rank}),
        (disagree + "rewards", {"r": rewards + (rank == 1)}),
        (disagree + "dtypes", at_1(h=h.double(), w=w.double())),
        (disagree + "the shape of the head: [(37, 16), (36", {"w": w[rows], "t": low}),
        (says + "TypeError: sft_weight must be a", at_1(sft_weight="much")),
        (says + "ValueError: targets must lie in [0, 37)", at_1(t=far)),
        (says + "ValueError: targets must be None when layout", at_1(layout=short)),
        (says + "ValueError: budget must be > 0 bytes, got -1", at_1(budget=-1)),
        (says + "ValueError: backend='cuda' cannot", at_1(backend="cuda")),
        (says + "TypeError: candidate_mask must be a bool", at_1(candidate_mask=rewards)),
        (says + "TypeError: hidden must be a tensor, got None", at_1(h=None)),
        (says + "TypeError: layout must be a Layout", by_layout | at_1(layout="none")),
        ("ValueError: rewards are all equal in prompts [0, 1]", {"r": torch.ones(2, 3)}),
        ("ValueError: rewards must be finite, got nan for", {"r": torch.full((2, 3), torch.nan)}),
        ("TypeError: sequence_group must be a torch.distributed.Proc", {"sequence_group": "sp"}),
        ("sequence_group does not contain this process", {"sequence_group": nobody}),
    ):
        refused(expected, loss, **options)
    for expected, options in (
        (disagree + "the shape", {"z": (h @ w.T)[..., rows], "t": low}),
        (disagree + "loss", {"top_k": 1 + rank}),
        (says + "ValueError: targets must lie in [0, 37)", at_1(t=far)),
        (says + "TypeError: targets must be an int", at_1(t=targets.float())),
        (says + "ValueError: targets must be on the device of logit", at_1(t=targets.to("meta"))),
    ):
        refused(expected, from_logits, **options)


def check(group) -> None:
    plans.clear()
    check_refusals(group)
    check_values(group)
    check_from_logits(group)
    check_with_a_filter(group)
    check_shared_rows(group)
    check_recipe(group)
    check_repeats_and_traffic(group)
    if not few_ranks():
        check_mesh()
