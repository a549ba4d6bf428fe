"""The command: env, check, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from pro_kernels import __main__ as command
from pro_kernels import backends
from pro_kernels.selfcheck import check
from pro_kernels.selfcheck.trust import measure
from pro_kernels.selfcheck.trust.cases import Case, make_problem


def test_env_names_every_backend_and_reason(capsys):
    assert command.main(["env"]) == 0
    text = capsys.readouterr().out
    for name in backends.ORDER:
        assert name in text
    assert "auto picks" in text and "budget" in text
    assert command.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["devices"]["cpu"]["backends"]) == set(backends.ORDER)


FORKS = """
import os, sys
from pro_kernels import __main__, backends
backends.ORDER = "cpu", "torch"  # nothing is interpreted
for name in sys.argv[1:]:
    if not os.fork():
        os.environ[f"PRO_KERNELS_{name}"] = "x"
        os._exit(__main__.main(["env"]) * 10 + __main__.main(["check"]))
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_wrong_setting_is_one_line():
    """Right ones are kept for the rest of a process, so each is tried in another."""
    wrong = {"MATMUL": "one of auto, .*", "BUDGET": "a .*"}
    if not backends.get("cpu").unusable(torch.device("cpu")):
        wrong["CPU_ISA"] = "one of .*generic, got 'x'"
    forks = [sys.executable, "-c", FORKS, *wrong]
    done = subprocess.run(forks, capture_output=True, text=True)
    assert done.stdout.split() == ["22"] * len(wrong), done.stderr
    lines = (f"(error: PRO_KERNELS_{name} must be {said}\n){{2}}" for name, said in wrong.items())
    assert re.fullmatch("".join(lines), done.stderr)


def test_check_passes_and_writes_json(tmp_path, monkeypatch, capsys):
    path = tmp_path / "check.json"
    monkeypatch.setattr(backends, "ORDER", ("cpu", "torch"))  # nothing is interpreted
    assert command.main(["check", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {r["backend"] for r in rows} >= {"torch"}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16", "float16"}
    assert all(r["passed"] for r in rows)
    assert f"{len(rows)} of {len(rows)} comparisons passed" in capsys.readouterr().out


def test_check_fails_when_a_kernel_is_wrong_and_names_what_it_raises(tmp_path, monkeypatch, capsys):
    module, path = backends.get("torch"), tmp_path / "check.json"
    monkeypatch.setattr(backends, "ORDER", ("torch",))
    right = module.residual_

    def wrong(logits, *args, **kwargs):
        logps, lse = right(logits, *args, **kwargs)
        return logps + 1e-3, lse

    def broken(*_, **__):
        raise RuntimeError("no kernel")

    for residual, said in ((wrong, "FAILED |"), (broken, "| FAILED RuntimeError: no kernel |")):
        monkeypatch.setattr(module, "residual_", residual)
        assert command.main(["check", "--json", str(path)]) == 1
        assert said in capsys.readouterr().out
        failed = [r for r in json.loads(path.read_text()) if not r["passed"]]
        assert {(r["backend"], r["path"]) for r in failed} >= {("torch", "hidden")}
    assert {r["note"] for r in failed} == {"RuntimeError: no kernel"}


def test_check_fails_on_nan():
    problem = make_problem(Case("x", 1, 2, 3), "train", torch.device("cpu"), torch.float32)
    good = {"log-probs": torch.ones(2, dtype=torch.float64), "loss": torch.ones(())}
    nan = {name: x * float("nan") for name, x in good.items()}
    rows = measure._rows(problem, "x", "hidden", nan, good, good, {})
    assert len(rows) == 2 and not any(r.passed for r in rows)


def test_wrong_calls_exit_with_2(monkeypatch, capsys):
    assert command.main(["--help"]) == 0 and "pro-kernels" in capsys.readouterr().out
    assert command.main([]) == 2 and "usage: pro-kernels" in capsys.readouterr().err
    misspelt = [sys.executable, "-m", "pro_kernels", "trian"]
    done = subprocess.run(misspelt, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no command 'trian'; did you mean train?\n"
    assert command.main(["train", "--help", "los"]) == 2
    assert "no such group or option of train" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pro_trainer.cli.commands", None)
    monkeypatch.delattr("pro_trainer.cli.commands", raising=False)
    assert command.main(["train"]) == 2
    assert "train needs pro_trainer.cli.commands: pip install" in capsys.readouterr().err


def test_the_short_check_makes_no_allowance():
    """What holds in the trust report because gradients may have more roundings fails here."""
    names = ("cpu", "bfloat16", "torch", "short", "train", "hidden", "gradient of weight")
    held = [
        check._named(measure.Row(*names, error, 1e-3, 1e-4, 3**0.5, True, 1.0, {}))["passed"]
        for error in (1.1e-3, 1.5e-3)
    ]
    assert held == [True, False]
