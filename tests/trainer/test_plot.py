"""What the plots show, read off the figures before they are written."""

from __future__ import annotations

import math
import sys

import pytest
import torch

pytest.importorskip("matplotlib", reason="plots need the 'train' extra")

from matplotlib.figure import Figure

from pro_trainer.evaluate.plots import draw_curves, draw_evaluation, draw_runs

PNG = b"\x89PNG\r\n\x1a\n"


def history(steps: int = 40, every: int = 5, offset: float = 0.0) -> list[dict[str, float]]:
    """A log as ``Trainer`` keeps it, with its last line that is about the whole run."""
    entries: list[dict[str, float]] = []
    for step in range(every, steps + 1, every):
        loss = math.exp(-step / steps) + offset
        terms = {"loss": loss, "rank_loss_1": loss / 2, "rank_loss_2": loss / 3}
        known = {"epoch": step / steps, "sft_loss": 10 * loss, "rewards/margins": 1 - loss}
        entries.append({"step": step, **known, **terms})
        if step % (2 * every) == 0:
            held_out = {f"eval_{name}": value + 0.1 for name, value in terms.items()}
            accuracy, tau = 0.5 + 0.4 * step / steps, 0.8 * step / steps
            held_out |= {"eval_pairwise_accuracy": accuracy, "eval_kendall_tau": tau}
            entries.append({"step": step, **held_out})
    return [*entries, {"step": steps, "train_loss": 0.5, "train_runtime": 1.0}]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written."""
    written: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        written.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return written


def panels(figure: Figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes}


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def test_curves_hold_what_was_logged_without_a_display(tmp_path, figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    log = history()
    assert draw_curves(tmp_path / "curves.png", log)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    (figure,) = figures
    found = panels(figure)
    by_rank = "Loss of each rank (dashed: held out)"
    assert list(found) == ["Loss", by_rank, "SFT loss", "Held-out ranking", "Margin"]
    for axes in found.values():
        assert axes.get_xlabel() == "optimizer step" and axes.get_ylabel()
    steps = list(range(5, 41, 5))
    loss = lines(found["Loss"])
    assert loss["training"] == (steps, [e["loss"] for e in log if "loss" in e])
    assert loss["held out"] == (steps[1::2], [e["eval_loss"] for e in log if "eval_loss" in e])
    ranks = lines(found[by_rank])
    assert ranks["rank 2"][1] == [e["rank_loss_2"] for e in log if "loss" in e]
    assert len(ranks) == 4
    assert list(lines(found["Margin"])) == ["training"]
    tau = lines(found["Held-out ranking"])["Kendall's tau-b"]
    assert tau == (steps[1::2], [e["eval_kendall_tau"] for e in log if "eval_kendall_tau" in e])


@pytest.mark.parametrize("log", [[], [{"step": 1, "train_runtime": 1.0, "loss": math.nan}]])
def test_nothing_is_drawn_without_numbers(tmp_path, figures, log):
    assert not draw_curves(tmp_path / "curves.png", log)
    assert not figures and not list(tmp_path.iterdir())


def test_only_panels_with_finite_numbers(tmp_path, figures):
    log = [
        {"step": 2, "loss": math.nan, "eval_kendall_tau": math.nan},
        {"step": 1, "loss": 2.0, "eval_kendall_tau": math.nan, "learning_rate": 1e-3},
        {"step": 3, "loss": math.inf, "rewards/margins": "none"},
        {"step": 4, "loss": 1.0},
    ]
    assert draw_curves(tmp_path / "curves.png", log)
    found = panels(figures[0])
    assert list(found) == ["Loss"] and lines(found["Loss"])["training"] == ([1, 4], [2.0, 1.0])


def test_runs_share_their_panels(tmp_path, figures):
    runs = {"fused": history(), "reference": history(offset=0.01)}
    draw_runs(tmp_path / "runs.png", runs)
    found = panels(figures[0])
    assert list(found) == ["Training loss", "Held-out pairwise accuracy"]
    loss = lines(found["Training loss"])
    assert list(loss) == ["fused", "reference"]
    gap = [b - a for a, b in zip(loss["fused"][1], loss["reference"][1], strict=True)]
    assert gap == pytest.approx([0.01] * 8)
    styles = {line.get_linestyle() for line in found["Training loss"].lines}
    assert len(styles) == 2  # runs that agree stay visible under each other
    assert {"fused", "reference", "chance"} == set(lines(found["Held-out pairwise accuracy"]))


def test_evaluation_shows_gaps_ranks_and_taus(tmp_path, figures):
    gaps = [
        {"gap_from": 0.1, "gap_to": 0.4, "pairs": 1200, "pairwise_accuracy": 0.5},
        {"gap_from": 0.5, "gap_to": 2.0, "pairs": 1201, "pairwise_accuracy": 0.75},
    ]
    ranks = [
        {"candidates": n, "rank": k, "score": -k / n, "standard_error": 0.1, "count": 5 + n}
        for n in range(2, 10)
        for k in range(1, n + 1)
    ]
    ranks[-1]["standard_error"] = math.nan
    taus = torch.tensor([1.0, -1.0, math.nan, 0.3, 0.3])
    path = tmp_path / "eval.png"
    draw_evaluation(path, gaps, ranks, taus, title="one", score_label="nats", gap_label="gap")
    assert figures[0].get_suptitle() == "one"
    found = panels(figures[0])
    by_gap = found["Accuracy by reward gap"]
    assert [bar.get_height() for bar in by_gap.patches] == [0.5, 0.75]
    assert "1,201 pairs" in by_gap.get_xticklabels()[1].get_text()
    assert by_gap.get_xlabel() == "gap"
    by_rank = found["Mean score by rank (± standard error)"]
    labels = by_rank.get_legend_handles_labels()[1]
    assert labels == [f"{n} candidates" for n in range(4, 10)]  # the six sizes with most lists
    assert by_rank.get_ylabel().startswith("nats")
    histogram = found["Rank correlation"]
    assert sum(bar.get_height() for bar in histogram.patches) == 4
    assert histogram.get_legend_handles_labels()[1] == ["mean 0.150"]


def test_sizes_of_a_few_lists_get_no_line_and_what_has_no_numbers_no_panel(tmp_path, figures):
    path, none = tmp_path / "eval.png", torch.tensor([math.nan])
    rank = {"rank": 1, "score": 0.0, "standard_error": 0.1}
    ranks = [rank | {"candidates": n, "count": count} for n, count in ((2, 3), (3, 40), (4, 400))]
    draw_evaluation(path, [], ranks, none)
    (axes,) = figures[0].axes
    assert axes.get_legend_handles_labels()[1] == ["3 candidates", "4 candidates"]
    path.unlink()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_evaluation(path, [], [], none)
    with pytest.raises(ValueError, match=r"nothing to draw: no run of \['a'\] has logged loss or"):
        draw_runs(path, {"a": [{"step": 1}]})
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"before")

    def fail(self: Figure, target: object, **_: object) -> None:
        target.write(PNG)
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves(path, history())
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
