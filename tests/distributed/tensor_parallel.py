"""What each rank of ``test_tensor_parallel`` runs: its part of the head against all of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TRITON_INTERPRET"] = "1"
import dtensors
import one_rank
import torch
import torch.distributed as dist
from counting import collectives

import pro_kernels as pk
from cases import Case, assert_no_worse, usable_backends
from pro_kernels.fused import call
from pro_kernels.fused.head import chunks_of
from pro_kernels.fused.planner import Plan

CASES = [
    Case("plain", T=9),
    Case("nothing masked", masked=0.0),
    Case("all masked", masked=1.0),
    Case("two candidates", n=2, masked=0.8),
    Case("ties", ties=True),
    Case("bias, softcap", T=9, bias=True, options={"softcap": 5.0, "logit_scale": 0.5}),
    Case("logits of 50", T=9, scale=25.0),
    Case("odd vocabulary", V=1009, T=4),
    Case("small vocabulary", V=7),
    Case("several chunks", V=1009, T=40, bias=True),
]
plans: set[tuple] = set()
made: list[Plan] = []


def budgets(group) -> tuple[int | None, ...]:
    """The default, one that keeps some of the longest case's rows, and one that keeps none."""
    at = bounds(1009, dist.get_world_size(group))
    return None, 450 * (at[-1] - at[-2]), 1 << 14


def bounds(vocab: int, world: int) -> list[int]:
    """Uneven parts: the last rank has most."""
    step = vocab // (world + 1)
    return [step * i for i in range(world)] + [vocab]


def leaves(case: Case, dtype, part: slice | None, freeze: tuple[str, ...]):
    hidden, weight, bias, targets, rewards = case.tensors()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    made = {}
    for name, x in named.items():
        if x is not None:
            x = x if part is None or name == "hidden" else x[part]
            made[name] = x.to(dtype, copy=True).requires_grad_(name not in freeze)
    return made, targets, rewards


def run(function, case: Case, dtype, part, freeze=(), **options):
    """Loss (or log-probs) and gradients by name."""
    made, targets, rewards = leaves(case, dtype, part, freeze)
    args = (made["hidden"], made["weight"], targets)
    if function in (pk.linear_pro_loss, pk.reference.linear_pro_loss):
        value = function(
            *args, rewards, bias=made.get("bias"), **{**case.options, **options}
        ).loss  # fmt: skip
        scalar = 1.7 * value
    else:
        value = function(*args, bias=made.get("bias"), **{**case.options, **options})
        up = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
        scalar = (value * up).sum()
    if scalar.requires_grad:
        scalar.backward()
    return value.detach(), {k: x.grad for k, x in made.items() if x.grad is not None}


def compare_all(group) -> int:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    done = 0
    for case in CASES:
        at = bounds(case.V, world)
        part = slice(at[rank], at[rank + 1])
        for dtype in (torch.float32, torch.bfloat16):
            for fused, exact in (
                (pk.linear_pro_loss, pk.reference.linear_pro_loss),
                (pk.linear_token_logps, pk.reference.linear_token_logps),
            ):
                for freeze in ((), ("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")):
                    want = run(exact, rounded(case, dtype), torch.float64, None, freeze)
                    plain = run(exact, case, dtype, None, freeze)
                    for budget in budgets(group):
                        got = run(fused, case, dtype, part, freeze, budget=budget,
                                  process_group=group)  # fmt: skip
                        same_everywhere(got[0], group)
                        what = f"{case.name} {dtype} {fused.__name__} {freeze} {budget}"
                        assert_no_worse(got[0], plain[0], want[0], dtype, what, norm=False)
                        assert got[1].keys() >= want[1].keys(), what
                        for name, grad in got[1].items():
                            if name not in want[1]:  # nothing is scored: the reference has no graph
                                assert not grad.any(), what
                                continue
                            if name == "hidden":
                                same_everywhere(grad, group)
                            else:
                                grad = whole(grad, group)
                            sides = plain[1][name], want[1][name]
                            known = 0.0
                            if name == "hidden" and dtype == torch.bfloat16:
                                # Summed over ranks in bf16: each addition rounds.
                                known = (world - 1) * 2.0**-9 * float(want[1][name].norm())
                            assert_no_worse(
                                grad, *sides, dtype, f"{what}: {name}", norm=True, known=known
                            )
                        done += 1
    return done


def watch_plans() -> None:
    """Note which tiers run, whether rows are retained, and in how many chunks."""
    original = call.make_plan

    def noted(rows, *args, **kwargs):
        plan = original(rows, *args, **kwargs)
        kept = "all" if plan.retained >= rows else "some" if plan.retained else "none"
        plans.add((plan.tier, kept, plan.chunk < rows))
        made.append(plan)
        return plan

    call.make_plan = noted


def compare_autocast(group) -> None:
    """An fp32 weight that each call casts: its copy counts, for the rank with most rows on all."""
    case = Case("autocast", V=1009, T=40)
    at = bounds(case.V, dist.get_world_size(group))
    part = slice(at[dist.get_rank(group)], at[dist.get_rank(group) + 1])
    want = run(pk.reference.linear_pro_loss, case, torch.float32, None)
    for budget in budgets(group):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(
                pk.linear_pro_loss, case, torch.float32, part, budget=budget, process_group=group
            )
        torch.testing.assert_close(got[0], want[0], rtol=0.02, atol=0.02)
        for key, grad in got[1].items():
            grad = grad if key == "hidden" else whole(grad, group)
            assert (grad - want[1][key]).norm() < 0.03 * want[1][key].norm(), (key, budget)


def compare_heads_of_other_sizes(group) -> None:
    """One rank has as many rows as in the call before, another has not."""
    rank = dist.get_rank(group)
    case = Case("sizes", V=64)
    hidden, weight, _, targets, _ = case.tensors()
    targets = targets.clamp_max(19)
    for last in (8, 5, 8):
        sizes = [10] * (dist.get_world_size(group) - 1) + [last]
        first = sum(sizes[:rank])
        got = pk.linear_token_logps(
            hidden.float(), weight[first : first + sizes[rank]].float(),
            targets.clamp_max(sum(sizes) - 1), process_group=group,
        )  # fmt: skip
        want = pk.reference.linear_token_logps(
            hidden, weight[: sum(sizes)], targets.clamp_max(sum(sizes) - 1)
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def compare_backends(group) -> list[str]:
    """Each backend on uneven parts against the reference, in fp32."""
    case, names = Case("backends", T=9, bias=True), usable_backends()
    at = bounds(case.V, dist.get_world_size(group))
    part = slice(at[dist.get_rank(group)], at[dist.get_rank(group) + 1])
    want = run(pk.reference.linear_pro_loss, case, torch.float32, None)
    for name in names:
        got = run(pk.linear_pro_loss, case, torch.float32, part, backend=name, process_group=group)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        for key, grad in got[1].items():
            grad = grad if key == "hidden" else whole(grad, group)
            torch.testing.assert_close(grad, want[1][key], rtol=1e-4, atol=1e-5)
    return names


def rounded(case: Case, dtype) -> Case:
    """The case with inputs as ``dtype`` rounds them."""
    made = case.tensors()

    class Rounded(Case):
        def tensors(self):
            return tuple(
                x.to(dtype).double() if x is not None and x.is_floating_point() and i < 3 else x
                for i, x in enumerate(made)
            )

    return Rounded(case.name, options=case.options)


def whole(part, group):
    """The gradient of all rows, from each rank's."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    return torch.cat(parts)


def same_everywhere(x, group) -> None:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    assert all(torch.equal(parts[0], other) for other in parts), "ranks differ"


def bytes_sent(group) -> list[dict]:
    """What each call sends, and the shapes it is made of."""
    found, rank = [], dist.get_rank(group)
    for vocab, T, dtype, freeze, budget in (
        (67, 9, torch.bfloat16, (), None),
        (1009, 9, torch.bfloat16, (), None),
        (1009, 40, torch.float32, (), 1 << 14),
        (1009, 40, torch.bfloat16, ("weight",), 1 << 14),
        (1009, 9, torch.float32, ("hidden",), None),
    ):
        case = Case("wire", V=vocab, H=16, T=T)
        at = bounds(vocab, dist.get_world_size(group))
        part = slice(at[rank], at[rank + 1])
        with collectives() as sent:
            run(pk.linear_pro_loss, case, dtype, part, freeze, budget=budget, process_group=group)
        targets, plan = case.tensors()[3], made[-1]
        scored = int((targets >= 0).sum())
        found.append({
            "sent": sent, "V": vocab, "N": scored, "R": targets.numel(), "H": 16,
            "b": dtype.itemsize, "need_hidden": "hidden" not in freeze,
            "chunks": len(chunks_of(scored, plan.chunk, plan.retained)),
        })  # fmt: skip
    return found


def refusals(group) -> list[str]:
    """Every rank raises, with these messages."""
    rank, messages = dist.get_rank(group), []
    made, targets, rewards = leaves(Case("bad"), torch.float32, slice(0, 20), ())
    h, w = made["hidden"], made["weight"]
    scored = (targets >= 0).nonzero()[0]
    other, fewer = targets.clone(), targets.clone()
    if rank == 1:
        other[tuple(scored)] += 10**6
        fewer[tuple(scored)] = -100
    attempts = [
        lambda: pk.linear_token_logps(h, w, targets, softcap=1.0 + rank, process_group=group),
        lambda: pk.linear_token_logps(h, w[: 20 * rank], targets, process_group=group),
        lambda: pk.linear_token_logps(h.to([torch.float64, torch.float32][rank % 2]),
                                      w.to([torch.float64, torch.float32][rank % 2]), targets,
                                      process_group=group),
        lambda: pk.linear_pro_loss(h[:, : 3 - rank % 2], w, targets[:, : 3 - rank % 2],
                                   rewards[:, : 3 - rank % 2], temperature=2.0,
                                   process_group=group),
        lambda: pk.linear_pro_loss(h, w, targets, rewards, sft_weight=0.1 * rank,
                                   process_group=group),
        lambda: pk.linear_token_logps(h, w, targets, grad_filter=0.1, process_group=group),
        lambda: pk.linear_token_logps(h, w, targets, return_entropy=True, process_group=group),
        lambda: pk.linear_token_logps(h, w, targets + 10**6, process_group=group),
        lambda: pk.linear_token_logps(h, w, targets, process_group="tp"),
        lambda: pk.linear_pro_loss(h, w[: 20 * rank], targets, rewards, process_group=group),
        lambda: pk.linear_token_logps(h, w, targets, bias=torch.zeros(20 + (rank == 1)),
                                      process_group=group),
        lambda: pk.linear_token_logps(h, w if rank else w[0], targets, process_group=group),
        lambda: pk.linear_token_logps(h, w, targets, backend="cuda" if rank == 1 else "auto",
                                      process_group=group),
        lambda: pk.linear_token_logps(h, w, targets,
                                      process_group=dist.GroupMember.NON_GROUP_MEMBER),
        lambda: pk.linear_token_logps(h, w, other, process_group=group),
        lambda: pk.linear_pro_loss(h, w, fewer, rewards, process_group=group),
    ]  # fmt: skip
    for attempt in attempts:
        try:
            attempt()
            messages.append("")
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    return messages


def find(_: Path) -> dict:
    group = dist.group.WORLD
    watch_plans()
    found = {"compared": compare_all(group), "backends": compare_backends(group)}
    found["bytes"] = bytes_sent(group)
    compare_autocast(group)
    compare_heads_of_other_sizes(group)
    found["messages"] = refusals(group)
    found["dtensors"] = dtensors.check()
    found["plans"] = sorted(plans)
    return found


if __name__ == "__main__":
    one_rank.run(find)
