"""pytest-benchmark over the cases of the loss: ``pytest --benchmark-only bench``.

One provider at a time, the floor timed before each of its rounds: ``extra_info["of_floor"]`` is
the median of floor / provider within a round, which ``python -m bench compare`` reads.
"""

from __future__ import annotations

import gc

import pytest
import torch

from bench.engine.case import Case
from bench.engine.timing import Refused, Timer, paired, wait
from bench.engine.truth import make_inputs, make_truth
from bench.providers.base import Provider, all_providers, select
from bench.suites import loss

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    preset = metafunc.config.getoption("--bench-preset")
    cases = loss.SUITE.cases(preset, on_gpu=_DEVICE.type == "cuda")
    table = all_providers(_DEVICE)
    pairs = [(c, p) for c in cases if c.kind != "memory" for p in select(table, c.only)]
    metafunc.parametrize(("case", "provider"), pairs, ids=[f"{c.name}-{p.name}" for c, p in pairs])


def test_bench(benchmark, case: Case, provider: Provider) -> None:
    benchmark.group = case.name
    if reason := provider.refusal_of_size(case):
        pytest.skip(reason)
    torch._dynamo.reset()
    try:
        inputs = make_inputs(case, _DEVICE)
        step = provider.build(inputs)
    except Refused as refused:
        pytest.skip(str(refused))
    floor, timer, floors = all_providers(_DEVICE)["floor"].build(inputs), Timer(_DEVICE), []

    def run() -> object:
        value = step.run()
        wait(_DEVICE)
        return value

    def setup() -> None:
        step.clear()
        gc.collect()
        floors.append(timer(floor))

    value = benchmark.pedantic(run, setup=setup, rounds=case.repeats, warmup_rounds=1)
    taken = benchmark.stats.stats.data if benchmark.stats else []  # none with --benchmark-disable
    ratio = paired(floors[-len(taken) :], taken) if taken else None
    benchmark.extra_info |= {"provider": provider.name, "of_floor": ratio}
    if not provider.is_floor:
        row = loss.SUITE.blank(case, provider)
        loss.check(row, make_truth(inputs), float(value), step)
        benchmark.extra_info |= {k: v for k, v in row.items() if k.endswith("_error")}
        assert not row["wrong"], row
