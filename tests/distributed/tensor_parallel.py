"""A head split over the ranks: as on one, and cheap on the wire."""

from __future__ import annotations

import torch
import torch.distributed as dist
from judged import (
    FROZEN,
    LOG_PROBS,
    LSE,
    PRO,
    bounds,
    collectives,
    few_ranks,
    gathered,
    held,
    judge,
    made,
    plans,
    references,
    refused,
    same_everywhere,
    values,
)

import pro_kernels as pk
from bench.suites.ranks import wire
from cases import Case, run, usable_backends
from pro_kernels.fused.head import chunks_of

CASES = [
    Case("plain", T=9),
    Case("nothing masked", masked=0.0),
    Case("all masked", masked=1.0),
    Case("two candidates", n=2, masked=0.8),
    Case("ties", ties=True),
    Case("logits of 50", T=9, scale=25.0),
    Case("odd vocabulary", V=1009, T=4),
    Case("small vocabulary", V=7),
    Case("bias, softcap", T=9, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}),
    Case("scales of rows", T=9, options={"logit_scale": torch.linspace(0.5, 2, 54).view(2, 3, 9)}),
]
LONG = Case("several chunks", V=1009, T=40, bias=True)


def budgets(group) -> tuple[int | None, ...]:
    """The default, one that keeps some of the longest case's rows, and one that keeps none."""
    at = bounds(LONG.V, dist.get_world_size(group))
    return None, 450 * (at[-1] - at[-2]), 1 << 14


def rows_of(vocab: int, group) -> slice:
    at, rank = bounds(vocab, dist.get_world_size(group)), dist.get_rank(group)
    return slice(at[rank], at[rank + 1])


def part(case: Case, group) -> Case:
    """The case with this rank's rows of its head."""
    return held(case, lambda x: x[rows_of(case.V, group)])


def whole(grads: dict, group) -> dict:
    """dHidden, the same on all ranks; of the head the rows of all ranks."""
    parts = gathered(grads, group)
    assert all(torch.equal(x["hidden"], grads["hidden"]) for x in parts if "hidden" in x)
    return {k: x if k == "hidden" else torch.cat([p[k] for p in parts]) for k, x in grads.items()}


def check_values(group) -> None:
    """The longest case with every frozen set and budget, the others with some of each.

    On two ranks every backend, too.
    """
    dtypes = torch.float32, torch.bfloat16
    calls = [(*both, dtype) for both in (PRO, LOG_PROBS, LSE) for dtype in dtypes]
    pairs = [[calls[i] for i in some] for some in ((0, 3, 4), (1, 2, 5))]
    limits = [{"budget": budget} for budget in budgets(group)]
    every = [(LONG, freeze, limits, pairs[i % 2]) for i, freeze in enumerate(FROZEN)]
    for i, case in enumerate(CASES):
        every.append((case, (), [{}], pairs[i % 2]))
        every.append((case, FROZEN[1 + i % 3], limits[-1:], [calls[i % 2]]))
    if few_ranks():
        backends = [{"backend": name} for name in usable_backends()]
        every.append((Case("backends", T=9, bias=True), (), backends, calls[:1]))
    for case, freeze, options, chosen in every:
        for fused, reference, dtype in chosen:
            sides = references(reference, case, dtype, freeze=freeze)
            known = {}
            if dtype == torch.bfloat16 and "hidden" in sides[1].grads:
                # Summed over ranks in bf16: each addition rounds.
                rounding = (dist.get_world_size(group) - 1) * 2.0**-9
                known["hidden"] = rounding * float(sides[1].grads["hidden"].norm())
            for own in options:
                what = f"{case.name} {dtype} {fused.__name__} {freeze} {own}"
                got = run(
                    fused, part(case, group), dtype, freeze=freeze, process_group=group, **own
                )
                same_everywhere(values(got)[0], group)
                grads = [whole(got.grads, group), *(x.grads for x in sides)]
                judge(what, dtype, [got, *sides], grads, known)


def check_autocast(group) -> None:
    """An fp32 weight that each call casts, for the rank with most rows."""
    want = run(pk.reference.linear_pro_loss, LONG, torch.float32)
    for budget in budgets(group):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(pk.linear_pro_loss, part(LONG, group), torch.float32, budget=budget,
                      process_group=group)  # fmt: skip
        torch.testing.assert_close(got.output.loss, want.output.loss, rtol=0.02, atol=0.02)
        for key, grad in whole(got.grads, group).items():
            assert (grad - want.grads[key]).norm() < 0.03 * want.grads[key].norm(), (key, budget)


def check_heads_of_other_sizes(group) -> None:
    """One rank has as many rows as in the call before, another has not."""
    rank = dist.get_rank(group)
    hidden, weight, _, targets, _ = Case("sizes", V=64).tensors()
    targets = targets.clamp_max(14)
    for last in (8, 5, 8):
        sizes = [10] * (dist.get_world_size(group) - 1) + [last]
        first = sum(sizes[:rank])
        mine = weight[first : first + sizes[rank]].float()
        got = pk.linear_token_logps(hidden.float(), mine, targets, process_group=group)
        want = pk.reference.linear_token_logps(hidden, weight[: sum(sizes)], targets)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def check_bytes(group) -> None:
    """``wire`` knows every byte, of one chunk and several; none grows with the vocabulary."""
    for vocab, T, dtype, freeze, budget in (
        (67, 9, torch.bfloat16, (), None),
        (1009, 9, torch.bfloat16, (), None),
        (1009, 40, torch.float32, (), 1 << 14),
        (1009, 40, torch.bfloat16, ("weight",), 1 << 14),
        (1009, 9, torch.float32, ("hidden",), None),
    ):
        case = Case("wire", V=vocab, T=T)
        with collectives() as sent:
            run(pk.linear_pro_loss, part(case, group), dtype, freeze=freeze, budget=budget,
                process_group=group)  # fmt: skip
        targets = case.tensors()[3]
        scored = int((targets >= 0).sum())
        chunks = len(chunks_of(scored, made[-1].chunk, made[-1].retained))
        assert (chunks > 1) == (budget is not None)
        if budget is None and not freeze:
            # A maximum, a sum and a target logit of 4 bytes; dHidden in bf16.
            *statistics, of_hidden = [x[2] for x in sent if x[0] == "all_reduce"]
            assert sum(statistics) == 12 * scored and of_hidden == targets.numel() * case.H * 2
        predicted = wire.tensor_parallel(
            dist.get_world_size(group), N=scored, R=targets.numel(), H=case.H, b=dtype.itemsize,
            chunks=chunks, need_hidden="hidden" not in freeze,
        )  # fmt: skip
        named = {"agreement": sent[:1]}
        if "hidden" not in freeze:
            sent, named["dHidden"] = sent[:-1], sent[-1:]
        named["maxima"] = [x for x in sent[1:] if x[1] == "max"]
        named["sums and target logits"] = [x for x in sent[1:] if x[1] == "sum"]
        assert len(named["maxima"]) + len(named["sums and target logits"]) == len(sent) - 1
        assert {c.name: (c.kind, c.calls, c.size) for c in predicted} == {
            name: (x[0][0], len(x), sum(size for *_, size in x)) for name, x in named.items()
        }


def check_refusals(group) -> None:
    """Of one rank's fault, or where ranks disagree: every rank raises, in these words."""
    rank = dist.get_rank(group)
    hidden, weight, _, targets, rewards = Case("bad").tensors()
    h, w = hidden.float(), weight[:20].float()
    other, fewer = targets.clone(), targets.clone()
    if rank == 1:
        scored = tuple((targets >= 0).nonzero()[0])
        other[scored] += 10**6
        fewer[scored] = -100

    def log_probs(h=h, w=w, t=targets, **options):
        pk.linear_token_logps(h, w, t, **{"process_group": group, **options})

    def loss(h=h, w=w, t=targets, r=rewards, **options):
        pk.linear_pro_loss(h, w, t, r, process_group=group, **options)

    wide = [torch.float64, torch.float32][rank % 2]

    def cross_entropy(**options):
        pk.linear_cross_entropy(h, w, targets, process_group=group, **options)

    some, half = slice(3 - rank % 2), w[: 20 * rank]
    fewer_of_each = {"h": h[:, some], "t": targets[:, some], "r": rewards[:, some]}
    nobody = dist.GroupMember.NON_GROUP_MEMBER
    at_0 = "in process_group, rank 0: ValueError: weight must"
    for expected, function, options in (
        ("disagree on softcap", log_probs, {"softcap": 1.0 + rank}),
        (f"{at_0} not be empty", log_probs, {"w": half}),
        (f"{at_0} not be empty", loss, {"w": half}),
        ("disagree on dtypes", log_probs, {"h": h.to(wide), "w": w.to(wide)}),
        ("disagree on (B, n)", loss, {**fewer_of_each, "temperature": 2.0}),
        ("disagree on loss", loss, {"sft_weight": 0.1 * rank}),
        ("disagree on targets (checksum)", log_probs, {"t": other}),
        ("disagree on scored tokens", loss, {"t": fewer}),
        ("grad_filter cannot be had with a process_group", log_probs, {"grad_filter": 0.1}),
        ("return_entropy cannot be had with a process_group", log_probs, {"return_entropy": True}),
        ("disagree on loss", cross_entropy, {"z_loss": 0.1 * (1 + rank)}),
        ("label_smoothing cannot be had with a process_g", cross_entropy, {"label_smoothing": 0.1}),
        ("", log_probs, {"t": targets + 10**6}),  # out of range: in words of its own
        ("rank 1: ValueError: bias must", log_probs, {"bias": torch.zeros(20 + (rank == 1))}),
        (at_0, log_probs, {"w": w if rank else w[0]}),
        ("in process_group, rank 1: ", log_probs, {"backend": "cuda" if rank == 1 else "auto"}),
        ("DeviceMesh of one dimension, got str", log_probs, {"process_group": "tp"}),
        ("process_group does not contain this process", log_probs, {"process_group": nobody}),
    ):
        refused(expected, function, **options)


def check(group) -> None:
    plans.clear()
    check_values(group)
    assert plans >= {("T1", "all", False), ("T3", "some", True), ("T3", "none", True)}
    assert plans >= {("T1f", "none", True), ("T0", "none", True)}
    same_everywhere(sorted(plans), group)
    check_autocast(group)
    check_heads_of_other_sizes(group)
    check_bytes(group)
    check_refusals(group)
