"""docs/extending.md: a backend from outside the package, by registration (a loss:
tests/losses/test_registered.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import pro_kernels as pk
from cases import Case
from pro_kernels import backends
from pro_kernels.backends.protocol import OPTIONAL, REQUIRED, Backend

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"


def snippet(heading: str, language: str = "python") -> str:
    """The first block of code under a heading of the page."""
    text = PAGE.read_text().split(f"## {heading}")[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


@pytest.fixture
def toy():
    names: dict = {}
    exec(snippet("A backend"), names)
    yield names["Toy"]
    backends.unregister("toy")


def test_the_lines_that_the_pages_option_replaces_are_there():
    for change in snippet("An option of the ranking loss", "diff").split("# ")[1:]:
        path, *lines = change.splitlines()
        source = (PAGE.parent.parent / path).read_text().splitlines()
        assert [x for x in lines if x.startswith("+")]
        assert not {x[1:] for x in lines if x.startswith("-")} - set(source), path


def test_the_pages_backend_serves_every_function(toy):
    hidden, weight, bias, targets, rewards = Case("toy", bias=True).tensors()

    def run(backend):
        leaves = [x.float().requires_grad_() for x in (hidden, weight, bias)]
        out = pk.linear_pro_loss(
            *leaves[:2], targets, rewards, bias=leaves[2], backend=backend, budget=1
        )
        logps, entropy = pk.linear_token_logps(
            *leaves[:2], targets, backend=backend, return_entropy=True
        )
        (out.loss + (logps * entropy).sum()).backward()
        return [out.loss.detach(), *(x.grad for x in leaves)]

    calls = toy.calls
    before = calls.copy()
    torch.testing.assert_close(run("toy"), run("torch"), rtol=0, atol=0)
    assert all(calls[name] > before[name] for name in ("logp", "residual_", "ranking"))


def test_auto_takes_it_where_it_stands(toy):
    assert backends.resolve("auto", torch.device("cpu"), torch.float32) == "toy"
    assert backends.resolve("auto", torch.device("cpu"), torch.bfloat16) != "toy"
    with pytest.raises(ValueError, match="cannot serve this call: logits are bfloat16"):
        backends.resolve("toy", torch.device("cpu"), torch.bfloat16)


def test_lists_that_are_too_long_for_it_are_ranked_by_another(toy, monkeypatch):
    """Also in a compiled call, whose number of candidates may be symbolic."""
    monkeypatch.setattr(toy, "MAX_CANDIDATES", 3)
    run = torch.compile(pk.linear_pro_loss, fullgraph=True, backend="eager", dynamic=True)
    for n in (3, 4):
        hidden, weight, _, targets, rewards = Case("toy", n=n).tensors()
        args = (hidden.float(), weight.float(), targets, rewards)
        before = toy.calls.copy()
        for call in (pk.linear_pro_loss, run):
            assert torch.isfinite(call(*args).loss)
        assert (toy.calls["ranking"] > before["ranking"]) == (n == 3)
        assert toy.calls["logp"] > before["logp"]
    with pytest.raises(ValueError, match="toy.*4 candidates a prompt; it takes at most 3"):
        pk.linear_pro_loss(*args, backend="toy")


def test_what_is_no_backend_is_refused(toy):
    with pytest.raises(TypeError, match=r"without \['DTYPES'"):
        backends.register(type("Half", (), {"NAME": "half"}))
    with pytest.raises(ValueError, match="is there already"):
        backends.register(toy)
    other = type("Other", (toy,), {"NAME": "other"})
    with pytest.raises(ValueError, match="before must be None or one of"):
        backends.register(other, before="nothing")
    assert "other" not in backends.ORDER


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton", "torch"])
def test_every_backend_has_what_the_protocol_names(name):
    backend = backends.get(name)
    assert set(REQUIRED) | set(OPTIONAL) == {
        x for x in vars(Backend) | Backend.__annotations__ if not x.startswith("_")
    }
    for member in (*REQUIRED, *OPTIONAL):
        assert hasattr(backend, member), f"{name} lacks {member}"
