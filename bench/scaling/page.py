"""The generated blocks of docs/scaling.md: what is predicted, and what was measured here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench.model.cards import Card
from bench.scaling import measure, predict, wire
from bench.scaling.predict import GPUS, MODELS, Batch, Layout, Model, Step
from bench.tables import header, table, update_block

BLOCK, MEASURED = "scaling", "scaling-measured"
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "scaling.md"
IMAGES = ("efficiency.png", "tensor-parallel.png", "memory.png")
_MAIN = MODELS["Llama 3 70B"]
_FSDP = ((8, 1), (64, 1), (1024, 1), (8, 8), (128, 8))  # ranks that share the weight, tp
_LAYOUTS = (
    Layout(dp=256, candidates=4), Layout(cp=8, dp=128), Layout(tp=2, candidates=2, dp=256),
    Layout(tp=4, dp=256), Layout(tp=8, dp=128), Layout(tp=8, candidates=4, dp=32),
)  # fmt: skip


def update(page: Path = PAGE, folder: Path = measure.FOLDER) -> str:
    """Rewrite both blocks of ``page`` and the plots in ``folder``; returns the first block.

    Raises:
        ValueError: the page does not hold the marks, or a results file cannot be read.
    """
    plots = _plots()
    images = [name for name in IMAGES if plots or (folder / name).exists()]
    text = block(images, folder, page)
    update_block(page, text, BLOCK)
    if plots is not None:
        folder.mkdir(parents=True, exist_ok=True)
        plots.draw_all(predict.card()[0], folder)
    results = folder / "results.json"
    if results.exists():
        update_block(page, measured_block(measure.read(results)), MEASURED)
    return text


def _plots() -> ModuleType | None:
    """The module that draws; None without matplotlib."""
    try:
        from bench.scaling import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return plots


def block(images: Sequence[str] = IMAGES, folder: Path = measure.FOLDER, page: Path = PAGE) -> str:
    """Everything predicted, with these plots of ``folder``."""
    card, measured = predict.card()
    link = os.path.relpath(folder, page.resolve().parent).replace(os.sep, "/")
    batch, one = Batch(), predict.ONE
    parts = [
        "### What the predictions are made from",
        _sources(card, measured),
        "### Bytes of a step",
        f"{_MAIN.name} (H = {_MAIN.H}, V = {_MAIN.V}), bf16, 1024 GPUs: tensor parallel over 4, "
        "positions over 2, candidates over 2, prompts over 64; the batch is the one of the next "
        "section. *Bytes*: of the tensors summed, gathered or scattered on a rank, all calls "
        "together; *sent*: what a rank of a ring puts on the wire.",
        _bytes(card),
        "### 1 to 1024 GPUs, one global batch",
        f"{batch.prompts} prompts of n = {batch.n} candidates, {batch.positions} positions each, "
        f"{batch.scored} scored; micro-batches of at most {predict.MICRO} positions a rank; the "
        "head alone, its weight under FSDP, in the fastest layout. *Efficiency*: time of one GPU "
        "over the time of all together. *Hidden*: the same if the head weight's transfers ran "
        "beside the decoder, as long as that computes (2 and 4 flops a parameter and position, "
        "forward and backward). It can exceed 1, because one GPU also adds up dW over its "
        "micro-batches.",
    ]
    for model in MODELS.values():
        steps = [predict.best(model, batch, gpus, card) for gpus in GPUS]
        parts += [
            f"**{model.name}** (H = {model.H}, V = {model.V}): transfers take longer than "
            f"computing {_where(steps)}.",
            growth(model, batch, GPUS, card),
        ]
    parts += [
        "### The same 1024 GPUs in other layouts",
        f"{_MAIN.name}. Log-prob and tokens of a candidate are 8 bytes: what "
        "they cost is latency. Neither makes the weight's transfers smaller, as tensor "
        "parallelism does.",
        _layouts(card),
        "### Where it stops",
        "**Tensor parallel**: the micro-batch of two prompts "
        f"(R = {one.prompts * one.n * one.positions}, N = {one.prompts * one.n * one.scored}), V "
        "over more and more GPUs. Beyond 8 a group spans nodes. dHidden stays as large as it is, "
        "while each rank's matmuls shrink.",
        _tensor_parallel(card),
        _stops(card),
        "**FSDP**: the fewest scored rows a rank and step at which computing takes as long as "
        "gathering the weight and reducing dW, so that half the time is lost where nothing hides "
        "them. Without latency that is 4·rate / (6·bandwidth), whatever H and V.",
        _fsdp(card),
        "### Memory of a rank",
        "GB at the height of a step of the same two prompts, replicated weight, bf16 gradients; "
        "*the loss* is what the planner counts on, dZ0 of all rows among it. The optimizer is not "
        "in it.",
        _memory(card),
        *(f"![{name.removesuffix('.png')}]({link}/{name})" for name in images),
    ]
    return "\n\n".join(parts)


def _sources(card: Card, measured: bool) -> str:
    said = "measured by this project, bench/results/gpu/gpu.json" if measured else card.source
    cluster = wire.DGX
    lines = [
        ["copy", f"{card.copy / 1e12:.3g} TB/s", card.name, said],
        ["bf16 matmul", f"{card.matmul / 1e12:.0f} TFLOP/s", card.name, said],
        ["NVLink, one direction", f"{cluster.nvlink / 1e9:.0f} GB/s", cluster.name,
         f"stated ceiling, not measured: {cluster.source}"],
        ["InfiniBand, one direction", f"{cluster.network / 1e9:.0f} GB/s a GPU", cluster.name,
         "the same"],
        ["latency of rings", "3.6 or 8.4 us a call, 0.47 or 3.4 us a step, 2.7 or 9.6 us between "
         "nodes", cluster.name, f"stated, not measured: {wire.LATENCY_SOURCE}"],
    ]  # fmt: skip
    return table(["", "", "of", "source"], lines)


def _bytes(card: Card) -> str:
    made = predict.step(_MAIN, Batch(), Layout(4, 2, 2, 64), card)
    lines = [
        [each.name, each.kind, str(each.ranks), str(each.calls), f"{each.size:,}",
         f"{each.sent:,.0f}", f"{seconds * 1e6:.0f}", each.when]
        for each, seconds in made.transfers
    ]  # fmt: skip
    head = ["", "kind", "ranks", "calls", "bytes", "sent", "us", "when, and what runs beside it"]
    computing = f"Computing takes {made.compute * 1e3:.2f} ms in {made.micros} micro-batch."
    return f"{table(head, lines)}\n\n{computing}"


def growth(model: Model, batch: Batch, gpus: tuple[int, ...], card: Card) -> str:
    """A line a number of GPUs, in the fastest layout.

    Raises:
        ValueError: the batch cannot be put on so many.
    """
    one = predict.best(model, batch, 1, card)
    lines = [_line(one, predict.best(model, batch, count, card)) for count in gpus]
    head = ["GPUs", "tp x cp x candidates x prompts", "micro-batches", "computing, ms",
            "transfers, ms", "efficiency", "hidden", "GB a rank"]  # fmt: skip
    if not model.decoder:  # nothing is known of what could hide them
        head, *lines = [x[:6] + x[7:] for x in (head, *lines)]
    return table(head, lines)


def _line(one: Step, made: Step) -> list[str]:
    at = made.layout
    return [
        str(at.gpus), f"{at.tp} x {at.cp} x {at.candidates} x {at.dp}", str(made.micros),
        f"{made.compute * 1e3:.2f}", f"{made.communication * 1e3:.2f}",
        f"{predict.efficiency(one, made):.2f}", f"{predict.efficiency(one, made, True):.2f}",
        f"{sum(made.memory.values()) / 1e9:.1f}",
    ]  # fmt: skip


def _layouts(card: Card) -> str:
    one = predict.best(_MAIN, Batch(), 1, card)
    lines = []
    for at in _LAYOUTS:
        made = predict.step(_MAIN, Batch(), at, card)
        scores = [s for c, s in made.transfers if c.name in ("agreement on parts",
                                                             "parts of candidates")]  # fmt: skip
        line = _line(one, made)[1:]
        lines.append([*line[:4], f"{sum(scores) * 1e6:.0f}", *line[4:]])
    head = ["tp x cp x candidates x prompts", "micro-batches", "computing, ms", "transfers, ms",
            "of it scores, us", "efficiency", "hidden", "GB a rank"]  # fmt: skip
    return table(head, lines)


def _tensor_parallel(card: Card) -> str:
    lines = []
    for model in MODELS.values():
        steps = predict.tensor_parallel(model, card)
        cells = [
            f"{s.compute * 1e3:.2f} + {s.communication * 1e3:.2f} "
            f"({predict.efficiency(steps[0], s):.2f})"
            for s in steps
        ]
        lines.append([model.name, *cells])
    head = ["computing + transfers, ms (efficiency)", *map(str, predict.TP)]
    return table(head, lines)


def _stops(card: Card) -> str:
    parts = []
    for model in MODELS.values():
        steps = predict.tensor_parallel(model, card)
        good = [s for s in steps if predict.efficiency(steps[0], s) >= 0.8]
        parts.append(f"{model.name} {_where(steps)}, efficiency 0.8 up to {good[-1].layout.tp}")
    return f"Transfers take longer than computing: {'; '.join(parts)}."


def _where(steps: list[Step]) -> str:
    """The first number of GPUs at which transfers take longer than computing."""
    more = next((s.layout.gpus for s in steps if s.communication > s.compute), None)
    return f"from {more} on" if more else f"not up to {steps[-1].layout.gpus}"


def _fsdp(card: Card) -> str:
    lines = [
        [model.name, *(str(predict.rows_to_hide(model, ranks, tp, card)) for ranks, tp in _FSDP)]
        for model in MODELS.values()
    ]
    names = [f"{ranks} ranks" + (f", tp {tp}" if tp > 1 else "") for ranks, tp in _FSDP]
    return table(["scored rows", *names], lines)


def _memory(card: Card) -> str:
    lines = []
    for model in MODELS.values():
        for tp in (1, 2, 4, 8):
            made = predict.step(model, predict.ONE, Layout(tp=tp), card)
            sizes = [*made.memory.values(), sum(made.memory.values())]
            lines.append([model.name, str(tp), *(f"{x / 1e9:.2f}" for x in sizes)])
    return table(["", "tp", *made.memory, "together"], lines)


def load_line(data: dict) -> str:
    """What else ran on the machine, and whether the run may be called clean."""
    if data["others"] is None:
        return "**Not a clean run**: what else ran on the machine is not known."
    said = (
        f"other processes took {data['others']:.2f} cores and the host {data['stolen']:.2f} "
        f"(load before the run {data['load_before']:.2f})"
    )
    return f"Clean run: {said}." if data["clean"] else f"**Not a clean run**: {said}."


def measured_block(data: dict) -> str:
    """Everything measured on this machine."""
    split, *weak = data["results"]
    B, n, T, H, V = data["settings"]["split"]
    b, m, t, h, v = data["settings"]["weak"]
    whole, parts = split["whole_bytes"], split["part_bytes"]
    share = 1 / len(parts)
    lines = [
        ["largest rank's memory of the head, of one process's", f"{share:.2f} +- 10 %",
         f"{split['share']:.4f} ({max(parts) / 1e6:.1f} of {whole / 1e6:.1f} MB)",
         _met(abs(split["share"] - share) <= 0.1 * share)],
        ["loss, relative difference", "<= 1e-6", f"{split['loss_difference']:.1e}",
         _met(split["loss_difference"] <= 1e-6)],
    ]  # fmt: skip
    for name in ("hidden", "weight"):
        error, allowed = split[f"{name}_error"], split[f"{name}_allowed"]
        lines.append(
            [f"gradient of {name}, error against fp64", f"<= {allowed:.1e}",
             f"{error:.1e} (one process {split[f'{name}_error_alone']:.1e}, plain PyTorch "
             f"{split[f'{name}_plain_error']:.1e})", _met(error <= allowed)]
        )  # fmt: skip
    for row in weak[1:]:
        lines.append(
            [f"weak scaling, {row['name']}", ">= 0.9", f"{row['efficiency']:.3f}",
             _met(row["efficiency"] >= 0.9)]
        )  # fmt: skip
    times = [
        [row["name"], f"{row['alone'] * 1e3:.0f}", f"{row['both'] * 1e3:.0f}",
         f"{row['efficiency']:.3f}", f"{row['q1']:.3f} ... {row['q3']:.3f}",
         f"{row['by_processor']:.3f}", str(row["rounds"])]
        for row in weak
    ]  # fmt: skip
    predicted = split["predicted_bytes"]
    return "\n\n".join(
        [
            header(data), load_line(data),
            table(["", "target", "measured", "met"], lines),
            f"Memory: fp32, B = {B}, n = {n}, T = {T}, 60 % not scored, H = {H}, V = {V}; the "
            "weight and what a forward and backward take at most beyond it, in processes that "
            f"return freed memory at once. The planner counts {predicted[0] / 1e6:.1f} and "
            f"{predicted[1] / 1e6:.1f} MB.",
            table(["weak scaling", "one rank, ms", "two ranks, ms", "efficiency", "quartiles",
                   "by processor time", "rounds"], times),
            f"bf16, B = {b}, n = {m}, T = {t}, 60 % not scored, H = {h}, V = {v} a rank, a thread "
            "a rank. *Head matmuls alone* is `torch.mm` and no communication: what two cores of "
            "this machine give. *By processor time*: the same of the seconds that the ranks' "
            "threads ran, which other processes disturb less; waiting is not in it.",
        ]
    )  # fmt: skip


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"
