"""pytest-benchmark over the case table: ``pytest bench/ --benchmark-only``.

One provider at a time, the floor timed before each of its rounds: ``extra_info["of_floor"]`` is
the median of floor / provider within a round, and ``python -m bench --compare OLD.json NEW.json``
sets two saved runs (``--benchmark-json=FILE``) against each other by it. The report's ratios to
peers come from ``python -m bench``, which interleaves all.
"""

from __future__ import annotations

import gc

import pytest
import torch

from bench.case_run import flag_wrong
from bench.cases import Case
from bench.inputs import make_inputs, make_truth
from bench.presets import cases_of
from bench.providers import Provider, all_providers, select
from bench.record import empty_row
from bench.step import Refused, Step
from bench.timing import Timer, paired

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    preset = metafunc.config.getoption("--bench-preset")
    cases = cases_of(preset, on_gpu=_DEVICE.type == "cuda")
    table = all_providers(_DEVICE)
    pairs = [(c, p) for c in cases if c.kind != "memory" for p in select(table, c.only)]
    metafunc.parametrize(("case", "provider"), pairs, ids=[f"{c.name}-{p.name}" for c, p in pairs])


def test_bench(benchmark, case: Case, provider: Provider) -> None:
    benchmark.group = case.name
    if reason := provider.refusal_of_size(case):
        pytest.skip(reason)
    torch._dynamo.reset()
    inputs = make_inputs(case, _DEVICE)
    try:
        step = provider.build(inputs)
    except Refused as refused:
        pytest.skip(str(refused))
    floor = all_providers(_DEVICE)["floor"].build(inputs)
    loss, ratios = _measure(benchmark, step, floor, case.repeats)
    benchmark.extra_info |= {"provider": provider.name, "of_floor": ratios}
    if not provider.is_floor:
        row = empty_row(case, provider.name, provider.label) | make_truth(inputs).errors(loss, step)
        flag_wrong(row)
        benchmark.extra_info |= {k: v for k, v in row.items() if k.endswith("_error")}
        assert not row["wrong"], row


def _measure(benchmark, step: Step, floor: Step, repeats: int) -> tuple[float, float | None]:
    """The loss, and the median of floor / provider over the rounds."""
    timer, floors = Timer(_DEVICE), []

    def run() -> object:
        value = step.run()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return value

    def setup() -> None:
        step.clear()
        gc.collect()
        floors.append(timer(floor))

    loss = benchmark.pedantic(run, setup=setup, rounds=repeats, warmup_rounds=1)
    taken = benchmark.stats.stats.data if benchmark.stats else []  # none with --benchmark-disable
    loss = float(loss) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else 0.0
    return loss, paired(floors[-len(taken) :], taken) if taken else None
