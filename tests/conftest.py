"""Set-up shared by all tests: the Triton interpreter where there is no GPU, cases, poison."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not torch.cuda.is_available():
    # Before anything imports triton: kernels then run on CPU tensors, slowly and exactly.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A compiled graph in the on-disk cache outlives a change to an op of ours.
torch.compiler.config.force_disable_caches = True
sys.path.insert(0, str(ROOT / "tests"))

torch.set_num_threads(int(os.environ.get("PRO_KERNELS_TEST_THREADS", "1")))


def pytest_configure(config: pytest.Config) -> None:
    """Fail at once where a backend of ``PRO_KERNELS_REQUIRE`` ("cpu,triton") cannot be tested.

    Without it the tests of a backend that does not run here are left out.
    """
    from pro_kernels import backends

    for name in filter(None, os.environ.get("PRO_KERNELS_REQUIRE", "").split(",")):
        reason = backends.refusal(name, torch.device("cpu"), torch.float32)
        if reason is not None:
            raise pytest.UsageError(f"PRO_KERNELS_REQUIRE: {name} cannot be tested: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and the slow ones unless asked for by ``-m``."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
        if "slow" in item.keywords and not config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, as one table: how many tests, for which reason, where."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[reason.removeprefix("Skipped: ")][report.nodeid.split("::")[0]] += 1
    if not found:
        return
    terminalreporter.section("skipped")
    for reason, files in sorted(found.items(), key=lambda x: -x[1].total()):
        where = ", ".join(Path(name).name for name, _ in files.most_common(3))
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        text = reason if len(reason) <= 110 else f"{reason[:107]}..."
        terminalreporter.write_line(f"{files.total():5}  {text}  ({where}{more})")


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage() -> Iterator[None]:
    """Accelerate and the benchmarks collect garbage often: not among all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (integers: a huge value), so an unwritten output shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def subject(request: pytest.FixtureRequest):
    """One of tests/subjects.py, in use."""
    with request.param.in_use():
        yield request.param


@pytest.fixture
def force_tier(monkeypatch: pytest.MonkeyPatch):
    """Makes calls that want all gradients run in a given tier, in chunks of a few rows."""
    from pro_kernels.fused import call

    plan = call.make_plan

    def force(tier: str, chunk: int = 5, retained: int = 7) -> None:
        def forced(rows, *args, **kwargs):
            chosen = plan(rows, *args, **kwargs)
            if tier == "T1":
                return chosen
            if chosen.tier != "T1":  # less is wanted
                return dataclasses.replace(chosen, chunk=min(chunk, chosen.chunk))
            prompts = len(kwargs.get("prompt_tokens") or ())
            if tier == "T2" and prompts:
                changes = {"retained": 0, "prompt_chunks": (1,) * prompts}
                return dataclasses.replace(chosen, tier="T2", **changes)
            kept = min(retained, rows // 2)
            return dataclasses.replace(chosen, tier="T3", chunk=chunk, retained=kept)

        monkeypatch.setattr(call, "make_plan", forced)

    return force


@pytest.fixture
def own_accelerate_state() -> None:
    """Accelerate's state is one for the process: none before, none left to the next test."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder with the official code's golden outputs and real data, beside a checkout."""
    assert request.node.get_closest_marker("shared"), "mark it: pytest.mark.shared"
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("no folder ../shared beside this checkout (golden files, real data)")
    return folder
