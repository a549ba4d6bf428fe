"""pytest-benchmark over the case table: ``pytest bench/ --benchmark-only``.

One provider at a time; the report's ratios come from ``python -m bench``, which interleaves them.
"""

from __future__ import annotations

import gc

import pytest
import torch

from bench.cases import Case, cases_of
from bench.inputs import make_inputs, make_truth
from bench.providers import Provider, all_providers, select
from bench.record import empty_row
from bench.runner import flag_wrong
from bench.step import Refused

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = cases_of(metafunc.config.getoption("--bench-preset"))
    table = all_providers(_DEVICE)
    pairs = [(c, p) for c in cases if c.kind != "memory" for p in select(table, c.only, ())]
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

    def run() -> object:
        value = step.run()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return value

    def setup() -> None:
        step.clear()
        gc.collect()

    loss = benchmark.pedantic(run, setup=setup, rounds=case.repeats, warmup_rounds=1)
    if not provider.is_floor:
        truth = make_truth(inputs)
        row = empty_row(case, provider.name, provider.label)
        row["loss_error"] = truth.loss_error(float(loss))
        row["grad_error"] = truth.grad_error(step.leaves)
        flag_wrong(row)
        benchmark.extra_info.update({k: row[k] for k in ("loss_error", "grad_error")})
        assert not row["wrong"], row
