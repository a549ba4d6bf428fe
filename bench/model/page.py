"""The generated block of docs/performance.md: every number in it is predicted or compiled."""

from __future__ import annotations

from pathlib import Path

from bench.model import costs
from bench.model.cards import CARDS, Card
from bench.model.occupancy import occupancy
from bench.model.resources import ROOT, dynamic_shared
from bench.tables import table, update_block

BLOCK = "model"
PAGE = ROOT / "docs" / "performance.md"
_ARCHS = ("sm_90", "sm_90a")  # of the cards above

# R positions, N scored (51 of 128 a candidate), H, V, B, n: the first line of the targets.
MAIN = (16384, 6528, 4096, 128256, 32, 4)
_R, _N, _H, _V, _B, _n = MAIN
_TOKENS = (1, 16, 64, 96, 128)
_KEPT = (1.0, 0.5, 0.25, 0.1)
_SCORE = ((512, 4096), (6528, 1024), (6528, 4096), (6528, 8192))


def cases() -> list[costs.Cost]:
    """The cases of the tables."""
    return [
        costs.linear(*MAIN),
        costs.linear(*MAIN, kind="frozen"),
        costs.linear(*MAIN, kind="score"),
        costs.logits_in(_R, _N, _V, _B, _n),
    ]


def block(resources: dict) -> str:
    """Everything between the marks."""
    cards = list(CARDS.values())
    parts = [
        "### Cards",
        table(
            ["", "copy, TB/s", "bf16 matmul, TFLOP/s", "source"],
            [[c.name, f"{c.copy / 1e12:.2f}", f"{c.matmul / 1e12:.0f}", c.source] for c in cards],
        ),
        "### Cases, predicted",
        f"bf16, R = {_R} positions, N = {_N} scored, H = {_H}, V = {_V}, n = {_n}. *Matmuls*: the "
        "predicted time of the head matmuls alone, the floor.",
        _cases(cards),
        "### The first case piece by piece, predicted",
        _pieces(costs.linear(*MAIN), cards[0]),
        "### Logits in, piece by piece, predicted",
        _pieces(costs.logits_in(_R, _N, _V, _B, _n), cards[0]),
        "### Ranking kernel, predicted",
        "n = 64 candidates, 4096 prompts; microseconds by scored tokens a candidate.",
        _ranking(cards),
        "### Scoring: matmul and row kernel, or one kernel, predicted",
        f"V = {_V}. A Triton matmul whose epilogue makes the log-sum-exp wins where it runs at "
        "more than this share of cuBLAS's rate; its own rate is not predicted.",
        _crossover(cards),
        "### `grad_filter`, predicted",
        "The first case with a share of the columns kept: matmul flops 2 + 4 kept/V, and one pass "
        "each to choose the columns, compact dZ, gather W and put dW back. **The code as it stands "
        "takes far more passes and launches to choose them** (above), so this is what fused "
        "kernels could reach, not what it does.",
        _filter(cards),
        "### Kernels as compiled for sm_90",
        f"Shared memory with what a launch adds for rows of V = {_V}.",
        _resources(resources),
    ]
    return "\n\n".join(part.strip("\n") for part in parts)


def update(resources: dict, page: Path = PAGE) -> str:
    """Rewrite the block of ``page``; returns it."""
    text = block(resources)
    update_block(page, text, BLOCK)
    return text


def _cases(cards: list[Card]) -> str:
    head = ["", "tier", "PFLOP", "GB moved", "launches"]
    for card in cards:
        head += [f"{card.name}, ms", "matmuls, ms", "times matmuls"]
    lines = []
    for case in cases():
        line = [case.name, case.tier, f"{case.flops / 1e15:.4f}" if case.flops else "",
                f"{case.moved / 1e9:.2f}", str(case.launches)]  # fmt: skip
        for card in cards:
            total, floor = case.seconds(card), case.matmul_seconds(card)
            line.append(f"{total * 1e3:.2f}")
            line += [f"{floor * 1e3:.2f}", f"{total / floor:.3f}"] if floor else ["", ""]
        lines.append(line)
    full, frozen = cases()[:2]
    ratio = ", ".join(f"{frozen.seconds(c) / full.seconds(c):.3f} ({c.name})" for c in cards)
    return table(head, lines) + f"\n\nFrozen head, share of the full time, predicted: {ratio}."


def _pieces(case: costs.Cost, card: Card) -> str:
    lines = [
        [
            piece.name,
            f"{piece.flops / 1e12:.2f}" if piece.flops else "",
            f"{piece.read / 1e6:.1f}",
            f"{piece.written / 1e6:.1f}",
            str(piece.launches),
            f"{piece.seconds(card) * 1e6:.1f}",
            piece.bound(card),
        ]
        for piece in case.pieces
    ]
    head = ["", "TFLOP", "MB read", "MB written", "launches", f"{card.name}, us", "bound"]
    return table(head, lines)


def _ranking(cards: list[Card]) -> str:
    kernels = [costs.ranking_kernel(4096, 64, tokens) for tokens in _TOKENS]
    lines = [[c.name, *(f"{k.seconds(c) * 1e6:.1f}" for k in kernels)] for c in cards]
    return table(["", *map(str, _TOKENS)], lines)


def _crossover(cards: list[Card]) -> str:
    head = ["", *(f"N={N} H={H}" for N, H in _SCORE)]
    lines = [[c.name, *(f"{costs.crossover(N, H, _V, c):.2f}" for N, H in _SCORE)] for c in cards]
    return table(head, lines)


def _filter(cards: list[Card]) -> str:
    exact = costs.linear(*MAIN)
    lines = []
    for kept in _KEPT:
        case = costs.grad_filter(*MAIN, kept=kept)
        line = [f"{kept:.0%}", f"{2 + 4 * kept:.1f}"]
        for card in cards:
            seconds = case.seconds(card)
            floor = exact.matmul_seconds(card)
            line += [f"{seconds * 1e3:.2f}", f"{seconds / floor:.2f}"]
        lines.append(line)
    head = ["columns kept", "flops / (N H V)"]
    for card in cards:
        head += [f"{card.name}, ms", "of the three matmuls"]
    return table(head, lines)


def _resources(data: dict) -> str:
    parts = []
    for name, found in data["backends"].items():
        version = data["versions"].get(name) or "compiler not recorded"
        if found["reason"] is not None:
            parts.append(f"**{name}**: no figures: {found['reason']}.")
            continue
        rows = [row for row in found["kernels"] if row["arch"] in _ARCHS]
        head = ["kernel", "configuration", "threads", "registers", "shared, B", "spilled, B",
                "CTAs an SM", "occupancy", "limit"]  # fmt: skip
        parts += [f"**{name}** ({version})", table(head, [_resource_line(row) for row in rows])]
    return "\n\n".join(parts)


def _resource_line(row: dict) -> list[str]:
    shared = row["shared"] + dynamic_shared(row, _V)
    line = [row["kernel"], row["config"], str(row["threads"] or "unknown"), str(row["registers"]),
            str(shared), str(row["spills"])]  # fmt: skip
    if row["threads"] is None:
        return [*line, "", "", ""]
    found = occupancy(row["arch"], row["registers"], row["threads"], shared)
    return [*line, str(found.ctas), f"{found.share:.0%}", found.limit]
