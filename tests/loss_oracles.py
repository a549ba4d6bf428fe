"""The losses again, as naive formulas in plain loops with 60 digits (mpmath), and random batches.

Nothing here is shared with the package. A prompt is a list of candidates, best to worst; an oracle
returns the loss of one prompt without its SFT term.
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


# Losses of gains, which must not be negative.
OF_GAINS = {"approx_ndcg", "neural_ndcg"}


def random_batch(seed, *, prompts=6, n=6, rewards="distinct", scale=1.0, poison=True, name=""):
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
    values = values.abs() if name in OF_GAINS else values
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


def best_of(prompt):
    """Those that none is better than."""
    return [c for c in prompt if c is prompt[0] or (c.r is not None and c.r == prompt[0].r)]


def softmax(values):
    total = sum(exp(x) for x in values)
    return [exp(x) / total for x in values]


def oracle_pro(
    prompt,
    *,
    length_normalize=True,
    temperature="reward",
    ties="zero",
    eps=0.0,
    top_k=None,
    reward_scale=1.0,
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
            tied = temperature == "reward" and c.r is not None and c.r == prompt[k].r
            if not (tied and ties == "skip"):
                inside += exp(score(c) * tau(prompt[k], c))
        total += log(inside) - own
    return total


def listwise(scores, top_k=None):
    stop = len(scores) - 1 if top_k is None else min(top_k, len(scores) - 1)
    total = mpf(0)
    for k in range(max(stop, 0)):
        total += log(sum(exp(x) for x in scores[k:])) - scores[k]
    return total


def oracle_plackett_luce(prompt, *, length_normalize=True, top_k=None):
    return listwise([c.s if length_normalize else c.S for c in prompt], top_k)


def oracle_dpo_pl(prompt, *, beta=0.1):
    return listwise([mpf(beta) * c.d for c in prompt])


def oracle_s_dpo(prompt, *, beta=1.0):
    negatives = [exp(mpf(beta) * (b.d - a.d)) for a, b in pairs_of(prompt, "best")]
    return -log_sigmoid(-log(sum(negatives))) if negatives else mpf(0)


def oracle_orpo(prompt, *, beta=0.1, pairs="all"):
    def log_odds(c):
        p = exp(c.s)
        return log(p / (1 - p))

    margins = [log_odds(a) - log_odds(b) for a, b in pairs_of(prompt, pairs)]
    return average(-mpf(beta) * log_sigmoid(x) for x in margins)


def sigmoid(x):
    return 1 / (1 + exp(-x))


def smoothed(x, e=0.0):
    return -(1 - mpf(e)) * log_sigmoid(x) - mpf(e) * log_sigmoid(-x)


def f_slope(d, divergence="reverse_kl", alpha=0.5):
    """f'(u) of u = exp(d)."""
    cut = lambda x: exp(min(x, mpf(80)))  # noqa: E731
    return {
        "reverse_kl": lambda: d,
        "forward_kl": lambda: 1 - cut(-d),
        "js_divergence": lambda: log(2 / (1 + exp(-d))),
        "alpha_divergence": lambda: (1 - cut(-mpf(alpha) * d)) / mpf(alpha),
    }[divergence]()


def discopop(x, tau=0.05):
    m = sigmoid(x / mpf(tau))
    return -(1 - m) * log_sigmoid(x) + m * exp(-x)


# Means over the pairs (a better than b) of a prompt: name -> formula of a, b and options.
PAIRWISE = {
    "dpo": lambda a, b, beta=0.1, label_smoothing=0.0, alpha=0.0: smoothed(
        beta * (a.d - b.d) + mpf(alpha) * (a.m - b.m), label_smoothing
    ),
    "ipo": lambda a, b, beta=0.1, length_normalize=True: (
        ((a.d / a.m - b.d / b.m if length_normalize else a.d - b.d) - 1 / (2 * mpf(beta))) ** 2
    ),
    "simpo": lambda a, b, beta=2.0, gamma=0.5, label_smoothing=0.0: smoothed(
        mpf(beta) * (a.s - b.s) - mpf(gamma), label_smoothing
    ),
    "cpo": lambda a, b, beta=0.1, label_smoothing=0.0: smoothed(
        beta * (a.S - b.S), label_smoothing
    ),
    "slic": lambda a, b, delta=1.0, length_normalize=False: hinge(
        mpf(delta) - ((a.s - b.s) if length_normalize else (a.S - b.S))
    ),
    "apo_zero": lambda a, b, beta=0.1: (1 - sigmoid(beta * a.d)) + sigmoid(beta * b.d),
    "apo_down": lambda a, b, beta=0.1: sigmoid(beta * a.d) + 1 - sigmoid(beta * (a.d - b.d)),
    "bco": lambda a, b, beta=0.1, delta=0.0: (
        -log_sigmoid(beta * a.d - delta) - log_sigmoid(-(beta * b.d - delta))
    ),
    "sppo_hard": lambda a, b, beta=0.1: (
        (a.d - 1 / (2 * mpf(beta))) ** 2 + (b.d + 1 / (2 * mpf(beta))) ** 2
    ),
    "robust": lambda a, b, beta=0.1, label_smoothing=0.1: (
        (
            -(1 - mpf(label_smoothing)) * log_sigmoid(beta * (a.d - b.d))
            + mpf(label_smoothing) * log_sigmoid(-beta * (a.d - b.d))
        )
        / (1 - 2 * mpf(label_smoothing))
    ),
    "discopop": lambda a, b, beta=0.1, tau=0.05: discopop(beta * (a.d - b.d), tau),
    "sigmoid_norm": lambda a, b, beta=0.1: smoothed(beta * (a.d / a.m - b.d / b.m)),
    "f_dpo": lambda a, b, beta=0.1, **f: smoothed(beta * (f_slope(a.d, **f) - f_slope(b.d, **f))),
}


def oracle_kto(prompt, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, z):
    """``z``: (KL for desirable candidates, for the others)."""
    good = best_of(prompt)
    return average(
        desirable_weight * (1 - sigmoid(beta * (c.d - z[0])))
        if any(c is g for g in good)
        else undesirable_weight * (1 - sigmoid(beta * (z[1] - c.d)))
        for c in prompt
    )


def reward_shares(prompt, alpha):
    if alpha:
        return softmax([c.r / mpf(alpha) for c in prompt])
    good = best_of(prompt)
    return [mpf(any(c is g for g in good)) / len(good) for c in prompt]


def oracle_infonca(prompt, *, beta=0.01, alpha=0.01):
    shares = softmax([beta * c.d for c in prompt])
    return -sum(p * log(q) for p, q in zip(reward_shares(prompt, alpha), shares, strict=True))


def oracle_nca(prompt, *, beta=0.01, alpha=0.01):
    return -sum(
        p * log_sigmoid(beta * c.d) + log_sigmoid(-beta * c.d) / len(prompt)
        for p, c in zip(reward_shares(prompt, alpha), prompt, strict=True)
    )


def oracle_exo(prompt, *, beta=0.1, alpha=0.0, label_smoothing=1e-3):
    shares = reward_shares(prompt, alpha)
    good, n, e = len(best_of(prompt)), len(prompt), mpf(label_smoothing)
    if not alpha and good < n:
        shares = [p * (1 - e) if p else e / (n - good) for p in shares]
    model = softmax([beta * c.d for c in prompt])
    return sum(q * (log(q) - log(p)) for p, q in zip(shares, model, strict=True))


def all_pairs(prompt):
    return [(a, b) for i, a in enumerate(prompt) for b in prompt[i + 1 :]]


def oracle_rpo(prompt, *, beta=0.1, eta=1.0, divergence="forward"):
    def kl(a, b):
        x, y = eta * (a.r - b.r), beta * (a.d - b.d)
        x, y = (x, y) if divergence == "forward" else (y, x)
        return sum(sigmoid(u) * (log_sigmoid(u) - log_sigmoid(v)) for u, v in ((x, y), (-x, -y)))

    return average(kl(a, b) for a, b in all_pairs(prompt))


def oracle_dpo_ties(prompt, *, beta=0.1, alpha=1.0986122886681098, pairs="all"):
    alpha, found = mpf(alpha), []
    for a, b in all_pairs(prompt):
        x = beta * (a.d - b.d)
        if pairs == "best" and a is not prompt[0]:
            continue
        tie = (exp(2 * alpha) - 1) / ((1 + exp(alpha + x)) * (1 + exp(alpha - x)))
        found.append(-log_sigmoid(x - alpha) if is_better(a, b) else -log(tie))
    return average(found)


def gains_of(prompt, gain):
    n, found = len(prompt), []
    for k, c in enumerate(prompt):
        r = mpf(n - 1 - k) / max(n - 1, 1) if c.r is None or gain == "rank" else c.r
        found.append(r if gain == "linear" else 2**r - 1)
    return found


def ndcg(prompt, gain, gains_at):
    """``gains_at``: gains and the rank that each is taken at."""
    ideal = sum(g / log(1 + i, 2) for i, g in enumerate(gains_of(prompt, gain), 1))
    return 1 - sum(g / log(1 + rank, 2) for g, rank in gains_at) / ideal if ideal else mpf(0)


def oracle_approx_ndcg(prompt, *, temperature=0.1, gain="exp2", length_normalize=True):
    s = [c.s if length_normalize else c.S for c in prompt]
    ranks = [
        1 + sum(sigmoid((y - x) / mpf(temperature)) for j, y in enumerate(s) if j != i)
        for i, x in enumerate(s)
    ]
    return ndcg(prompt, gain, zip(gains_of(prompt, gain), ranks, strict=True))


def oracle_neural_ndcg(prompt, *, temperature=1.0, gain="exp2", length_normalize=True):
    s, n = [c.s if length_normalize else c.S for c in prompt], len(prompt)
    rows = [
        softmax([((n - 1 - 2 * k) * x - sum(abs(x - y) for y in s)) / temperature for x in s])
        for k in range(n)
    ]
    for _ in range(30):
        sums = [sum(row[i] for row in rows) for i in range(n)]
        rows = [[x / total for x, total in zip(row, sums, strict=True)] for row in rows]
        rows = [[x / sum(row) for x in row] for row in rows]
    sorted_gains = [
        sum(p * g for p, g in zip(row, gains_of(prompt, gain), strict=True)) for row in rows
    ]
    return ndcg(prompt, gain, zip(sorted_gains, range(1, n + 1), strict=True))


def oracle_lire(prompt, *, temperature=1.0, length_normalize=False):
    shares = softmax([(c.s if length_normalize else c.S) / temperature for c in prompt])
    return -sum(p * c.r for p, c in zip(shares, prompt, strict=True))


def oracle_swepo(prompt, *, beta=0.1, alpha=1.0):
    mean = average(c.r for c in prompt)
    weighted = [(c, exp(beta * c.d + alpha * abs(c.r - mean))) for c in prompt]
    above = [x for c, x in weighted if c.r > mean]
    return -log(sum(above) / sum(x for _, x in weighted)) if above else mpf(0)


def oracle_rrhf(prompt):
    return sum((hinge(b.s - a.s) for a, b in pairs_of(prompt)), mpf(0))


def oracle_listnet(prompt, *, length_normalize=True, temperature=1.0):
    shares = softmax([c.s if length_normalize else c.S for c in prompt])
    rewards = softmax([c.r / mpf(temperature) for c in prompt])
    return -sum(r * log(x) for r, x in zip(rewards, shares, strict=True))


def oracle_lipo_lambda(prompt, *, beta=0.05, gain="exp2"):
    n, gain_of = len(prompt), gains_of(prompt, gain)

    def rank(k):  # place by score from 1; equal scores keep their order
        ahead = sum(prompt[o].d > prompt[k].d for o in range(n))
        return 1 + ahead + sum(prompt[o].d == prompt[k].d for o in range(k))

    total = mpf(0)
    for i in range(n):
        for j in range(i + 1, n):
            if not is_better(prompt[i], prompt[j]):
                continue
            discounts = [log(1 + rank(k)) for k in (i, j)]
            weight = abs(gain_of[i] - gain_of[j]) * abs(1 / discounts[0] - 1 / discounts[1])
            total += weight * log(1 + exp(-mpf(beta) * (prompt[i].d - prompt[j].d)))
    return total


ORACLES = {name[7:]: value for name, value in list(globals().items()) if name[:7] == "oracle_"}
# What the published losses have of an SFT term, as weight and reduction.
SFT = {"cpo": (1.0, "mean"), "orpo": (1.0, "mean"), "rrhf": (1.0, "sum"), "slic": (0.5, "sum")}
SFT["pro"] = (0.05, "mean")  # times (n - 1)^2


def of_batch(name, prompts, beta=0.1):
    """What a loss takes from the whole batch."""
    if name == "bco":
        return {"delta": average(beta * c.d for prompt in prompts for c in prompt)}
    if name == "kto":
        good = [c for prompt in prompts for c in best_of(prompt)] if prompts else []
        bad = [c for prompt in prompts for c in prompt if not any(c is g for g in good)]
        return {"z": [max(mpf(0), average(c.d for c in side)) for side in (bad, good)]}
    return {}


def expected(name, batch, *, use_ref=True, sft_index=None, weights=None, **options):
    """(loss, SFT part) of the whole batch as floats."""
    default = SFT.get(name, (0.0, "mean"))
    weight, on = options.pop("sft_weight", default[0]), options.pop("sft_on", "best")
    reduction = options.pop("sft_reduction", default[1])
    taken = []
    for b, prompt in enumerate(batch.prompts(use_ref)):
        those = prompt if on == "all" else prompt[:1]
        if sft_index is not None:
            those = [c for c in prompt if c.column == int(sft_index[b])]
        if prompt:
            taken.append((mpf(1 if weights is None else float(weights[b])), prompt, those))
    total = sum(w for w, *_ in taken)
    if not total:
        return 0.0, 0.0
    if reduction == "tokens":
        tokens = sum(w * c.m for w, _, those in taken for c in those)
        sft = -sum(w * c.S for w, _, those in taken for c in those) / tokens
    else:
        nll = lambda c: -(c.S if reduction == "sum" else c.s)  # noqa: E731
        each = [
            w * average(map(nll, those)) * (max(1, len(prompt) - 1) ** 2 if name == "pro" else 1)
            for w, prompt, those in taken
        ]
        sft = sum(each) / total
    sft *= mpf(weight)
    options = of_batch(name, [p for _, p, _ in taken], options.get("beta", 0.1)) | options
    which = options.pop("pairs", "all") if name in PAIRWISE else None
    loss = mpf(0)
    for w, prompt, _ in taken:
        if which:
            pairs = pairs_of(prompt, which)
            loss += w * average(PAIRWISE[name](a, b, **options) for a, b in pairs) / total
        else:
            loss += w * ORACLES[name](prompt, **options) / total
    return float(loss + sft), float(sft)
