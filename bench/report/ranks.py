"""The measured block of docs/scaling.md."""

from __future__ import annotations

from bench.report.tables import header, table

BLOCK = "scaling-measured"


def load_line(data: dict) -> str:
    """What else ran on the machine, and whether the run may be called clean."""
    if data["others"] is None:
        return "**Not a clean run**: what else ran on the machine is not known."
    said = (
        f"other processes took {data['others']:.2f} cores and the host {data['stolen']:.2f} "
        f"(load before the run {data['load_before']:.2f})"
    )
    return f"Clean run: {said}." if data["clean"] else f"**Not a clean run**: {said}."


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
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
    text = "\n\n".join(
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
    return {BLOCK: text}


def _met(yes: bool) -> str:
    return "yes" if yes else "**no**"
