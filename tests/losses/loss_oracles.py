"""The losses again, as naive formulas in plain loops with 60 digits (mpmath), and random batches.

Nothing here is shared with the package. A prompt is a list of candidates, best to worst; every
oracle returns (ranking part, SFT part) of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mpmath import exp, log, mp, mpf

mp.dps = 60


@dataclass
class Candidate:
    S: mpf
    m: mpf
    r: mpf | None
    ref: mpf | None
    column: int

    @property
    def s(self):
        return self.S / self.m

    @property
    def d(self):
        return self.S if self.ref is None else self.S - self.ref


@dataclass
class Batch:
    logps: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor | None
    ref_logps: torch.Tensor
    mask: torch.Tensor

    def inputs(self, **changes):
        names = ("rewards", "ref_logps", "mask")
        return {name: getattr(self, name) for name in names} | changes

    def prompts(self, use_ref=True):
        """Each prompt's valid candidates, best to worst (insertion sort: stable)."""
        found = []
        for b in range(self.logps.shape[0]):
            ordered = []
            for i in range(self.logps.shape[1]):
                if not bool(self.mask[b, i]) or float(self.lengths[b, i]) == 0:
                    continue
                candidate = Candidate(
                    mpf(self.logps[b, i].item()),
                    mpf(self.lengths[b, i].item()),
                    None if self.rewards is None else mpf(self.rewards[b, i].item()),
                    mpf(self.ref_logps[b, i].item()) if use_ref else None,
                    i,
                )
                place = len(ordered)
                if candidate.r is not None:
                    while place > 0 and ordered[place - 1].r < candidate.r:
                        place -= 1
                ordered.insert(place, candidate)
            found.append(ordered)
        return found


def random_batch(seed, *, prompts=6, n=6, rewards="distinct", scale=1.0, poison=True):
    """Ragged batch: prompt 0 is full, 1 has one candidate, 2 has none, the others at random."""
    gen = torch.Generator().manual_seed(seed)
    shape = (prompts, n)
    lengths = torch.randint(1, 30, shape, generator=gen)
    per_token = -scale * (0.05 + 3 * torch.rand(shape, generator=gen, dtype=torch.float64))
    logps = per_token * lengths
    ref = logps + 4 * torch.randn(shape, generator=gen, dtype=torch.float64)
    mask = torch.rand(shape, generator=gen) < 0.8
    lengths[torch.rand(shape, generator=gen) < 0.15] = 0
    mask[0], lengths[0] = True, lengths[0].clamp(min=1)
    mask[1], mask[2] = False, False
    mask[1, n // 2], lengths[1, n // 2] = True, 7
    if rewards == "tied":
        values = torch.randint(0, 3, shape, generator=gen).double()
        values[:, 0], values[0, 1:3] = 2.5, 1.0  # not all equal where column 0 is valid
    else:
        values = torch.randn(shape, generator=gen, dtype=torch.float64)
    absent = ~mask | (lengths == 0)
    if poison:
        logps[absent], ref[absent], values[absent] = torch.nan, torch.inf, torch.nan
    return Batch(logps, lengths, None if rewards is None else values, ref, mask)


def log_sigmoid(x):
    return -log(1 + exp(-x))


def hinge(x):
    return x if x > 0 else mpf(0)


def is_better(a, b):
    return a.r is None or a.r > b.r


def pairs_of(prompt, which="all"):
    found = []
    for i in range(len(prompt)):
        for j in range(i + 1, len(prompt)):
            if is_better(prompt[i], prompt[j]) and (which == "all" or i == 0):
                found.append((prompt[i], prompt[j]))
    return found


def average(values):
    values = list(values)
    return sum(values, mpf(0)) / len(values) if values else mpf(0)


def nll(prompt, reduction):
    return -prompt[0].S if reduction == "sum" else -prompt[0].s


def oracle_pro(
    prompt,
    *,
    sft_weight=0.05,
    sft_reduction="mean",
    length_normalize=True,
    temperature="reward",
    ties="zero",
    eps=0.0,
    top_k=None,
    reward_scale=1.0,
    sft_column=None,
):
    def score(c):
        return c.s if length_normalize else c.S

    def tau(a, b):
        if temperature != "reward":
            return 1 / mpf(temperature)
        return mpf(1) if a.r is None else mpf(reward_scale) * (a.r - b.r)

    total = mpf(0)
    for k in range(len(prompt) - 1):
        if top_k is not None and k >= top_k:
            break
        rest = prompt[k + 1 :]
        own = max(tau(prompt[k], c) for c in rest) * score(prompt[k])
        inside = mpf(eps) + exp(own)
        for c in rest:
            if (
                ties == "skip"
                and temperature == "reward"
                and c.r is not None
                and c.r == prompt[k].r
            ):
                continue
            inside += exp(score(c) * tau(prompt[k], c))
        total += log(inside) - own
    chosen = [c for c in prompt if c.column == sft_column] if sft_column is not None else prompt[:1]
    weight = mpf(sft_weight) * max(1, (len(prompt) - 1) ** 2)
    sft = sum((-(c.S if sft_reduction == "sum" else c.s) for c in chosen), mpf(0))
    return total, weight * sft


def listwise(scores, top_k=None):
    stop = len(scores) - 1 if top_k is None else min(top_k, len(scores) - 1)
    total = mpf(0)
    for k in range(max(stop, 0)):
        total += log(sum(exp(x) for x in scores[k:])) - scores[k]
    return total


def oracle_plackett_luce(prompt, *, length_normalize=True, top_k=None):
    return listwise([c.s if length_normalize else c.S for c in prompt], top_k), 0


def oracle_dpo_pl(prompt, *, beta=0.1):
    return listwise([mpf(beta) * c.d for c in prompt]), 0


def oracle_s_dpo(prompt, *, beta=1.0):
    negatives = [exp(mpf(beta) * (b.d - a.d)) for a, b in pairs_of(prompt, "best")]
    return (-log_sigmoid(-log(sum(negatives))) if negatives else mpf(0)), 0


def oracle_dpo(prompt, *, beta=0.1, label_smoothing=0.0, pairs="all"):
    e = mpf(label_smoothing)
    margins = [mpf(beta) * (a.d - b.d) for a, b in pairs_of(prompt, pairs)]
    return average(-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x) for x in margins), 0


def oracle_ipo(prompt, *, beta=0.1, length_normalize=True, pairs="all"):
    def d(c):
        return c.d / c.m if length_normalize else c.d

    return average((d(a) - d(b) - 1 / (2 * mpf(beta))) ** 2 for a, b in pairs_of(prompt, pairs)), 0


def oracle_simpo(prompt, *, beta=2.0, gamma=0.5, pairs="all"):
    margins = [mpf(beta) * (a.s - b.s) - mpf(gamma) for a, b in pairs_of(prompt, pairs)]
    return average(-log_sigmoid(x) for x in margins), 0


def oracle_cpo(prompt, *, beta=0.1, cpo_alpha=1.0, sft_reduction="mean", pairs="all"):
    rank = average(-log_sigmoid(mpf(beta) * (a.S - b.S)) for a, b in pairs_of(prompt, pairs))
    return rank, mpf(cpo_alpha) * nll(prompt, sft_reduction)


def oracle_orpo(prompt, *, beta=0.1, sft_reduction="mean", pairs="all"):
    def log_odds(c):
        p = exp(c.s)
        return log(p / (1 - p))

    rank = average(
        -mpf(beta) * log_sigmoid(log_odds(a) - log_odds(b)) for a, b in pairs_of(prompt, pairs)
    )
    return rank, nll(prompt, sft_reduction)


def oracle_rrhf(prompt, *, sft_weight=1.0, sft_reduction="sum"):
    rank = sum((hinge(b.s - a.s) for a, b in pairs_of(prompt)), mpf(0))
    return rank, mpf(sft_weight) * nll(prompt, sft_reduction)


def oracle_slic(
    prompt,
    *,
    delta=1.0,
    sft_weight=0.5,
    sft_reduction="sum",
    length_normalize=False,
    pairs="all",
):
    def score(c):
        return c.s if length_normalize else c.S

    rank = average(hinge(mpf(delta) - score(a) + score(b)) for a, b in pairs_of(prompt, pairs))
    return rank, mpf(sft_weight) * nll(prompt, sft_reduction)


def oracle_listnet(prompt, *, length_normalize=True, reward_temperature=1.0):
    scores = [c.s if length_normalize else c.S for c in prompt]
    rewards = [exp(c.r / mpf(reward_temperature)) for c in prompt]
    normalizer = log(sum(exp(x) for x in scores))
    return sum(
        -r / sum(rewards) * (x - normalizer) for r, x in zip(rewards, scores, strict=True)
    ), 0


def oracle_lipo_lambda(prompt, *, beta=0.05, gain="exp2"):
    n = len(prompt)

    def label(k):
        return mpf(n - 1 - k) / (n - 1) if prompt[k].r is None else prompt[k].r

    def rank(k):  # place by score from 1; equal scores keep their order
        ahead = sum(prompt[o].d > prompt[k].d for o in range(n))
        return 1 + ahead + sum(prompt[o].d == prompt[k].d for o in range(k))

    total = mpf(0)
    for i in range(n):
        for j in range(i + 1, n):
            if not is_better(prompt[i], prompt[j]):
                continue
            gains = [2 ** label(k) - 1 if gain == "exp2" else label(k) for k in (i, j)]
            discounts = [log(1 + rank(k)) for k in (i, j)]
            weight = abs(gains[0] - gains[1]) * abs(1 / discounts[0] - 1 / discounts[1])
            total += weight * log(1 + exp(-mpf(beta) * (prompt[i].d - prompt[j].d)))
    return total, 0


ORACLES = {name[7:]: value for name, value in list(globals().items()) if name[:7] == "oracle_"}
NEEDS_REF = {"dpo", "dpo_pl", "s_dpo", "ipo"}


def expected(name, batch, *, use_ref=True, sft_index=None, weights=None, **options):
    """(loss, SFT part) of the whole batch as floats."""
    loss = sft = total = mpf(0)
    for b, prompt in enumerate(batch.prompts(use_ref)):
        if not prompt:
            continue
        if sft_index is not None:
            options["sft_column"] = int(sft_index[b])
        w = mpf(1) if weights is None else mpf(float(weights[b]))
        rank_part, sft_part = ORACLES[name](prompt, **options)
        loss, sft, total = loss + w * (rank_part + sft_part), sft + w * sft_part, total + w
    return (float(loss / total), float(sft / total)) if total else (0.0, 0.0)
