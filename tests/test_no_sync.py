"""Nothing in forward or backward waits for a device.

Without one: the source of the hot path is searched for calls that wait, and the public functions
run on CPU tensors that pass for a GPU's, watched for what would wait there. On a card:
tests/test_gpu.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pro_kernels as pk
from cases import CPU, Case, fp32_sums
from pro_kernels import api
from pro_kernels.fused import registry, shards

ROOT = Path(pk.__file__).parent
HOT = [
    ROOT / f"{name}.py" for name in ("api", "layout", "options", "policy", "ranking", "validate")
]
HOT += [path for room in ("fused", "losses", "models") for path in (ROOT / room).glob("*.py")]
HOT += sorted(set((ROOT / "backends").rglob("*.py")) - {ROOT / "backends/triton/aot.py"})

METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "synchronize"}
METHODS |= {"argwhere", "unique_consecutive", "is_nonzero", "equal", "allclose", "bincount"}
REDUCTIONS = {"any", "all", "sum", "max", "min", "amax", "amin"}  # in an ``if`` or int(...)

# Why what these functions call does not make a training step wait -> the functions.
REASONS = {
    "the dense form: sizes are unknown until the data is looked at": (
        "fused/ops._compact fused/ops.linear_pro"
    ),
    "only of CPU tensors": (
        "backends/torch._blank fused/ops.check_range layout.Layout._padded_on_host "
        "layout._scored_on_cpu layout.Layout.present validate.check_all validate.check_of_prompts "
        "validate.check_total validate.check_gaps fused/rank_order._sort_by_rewards "
        "fused/shards.described fused/shards._ranks_of backends/cpu.tree_attention_backward "
        "losses/gains.gains losses/ranked.ranked_batch"
    ),
    "of CPU tensors, and once a model of a GPU's": "models/forward._check_labels",
    "when a layout is made": "layout.Layout.from_rows",
    "when a layout is made: one copy to the host, as its docstring says": "layout._scored",
    "an error": "layout.raise_bad_target",
    "when a model is attached": (
        "models/tryout._check_loss models/tryout._log_probs models/probe.probe models/probe.rms "
        "models/probe._largest models/probe.example_inputs"
    ),
    # Logits that are not made: what they answer depends on data.
    "ids out of range are an error at once, as on a CPU": "models/lazy.logits_of",
    "of distinct rows, whose number is data": "models/lazy._run",
    "which rows have a gradient, once a backward": "models/lazy._Late.backward",
    "whether a pass of before was for the same ids": "models/lazy._known",
    "whether row numbers are those of all rows": "models/answers._columns",
    "temperatures of rows, of which none may be 0": "models/answers._cooled",
    "text of /proc/meminfo, once a process": "fused/planner._meminfo",
    "only of CPU tensors, and only with a process_group": "fused/ranks._checksum",
    "once a call of several ranks, as its docstring says": "fused/shards.agree",
    "once a chunk, only with grad_filter: how many columns stay is data": ("fused/columns.choose"),
    "of counts that are on the host": (
        "fused/column_groups.Groups.widest fused/column_groups.Groups.__iter__ "
        "fused/columns.Kept.of"
    ),
}
ALLOWED = " ".join(REASONS.values()).split()


def waits(source: str, module: str = "m") -> list[tuple[str, int, str]]:
    """The places in a module that make the host wait, by the function they are in."""
    found = []

    def look(node: ast.AST, scope: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope += f".{node.name}"
        found.extend((scope, node.lineno, what) for what in _waiting(node))
        for child in ast.iter_child_nodes(node):
            look(child, scope)

    look(ast.parse(source), module)
    return found


def _waiting(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr=name)):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = [x for x in map(ast.unparse, node.args) if "device" in x]
            if name in METHODS:
                yield name
            if name == "repeat_interleave" and "output_size" not in keywords:
                yield "repeat_interleave without output_size"
            if name == "to" and where and "non_blocking" not in keywords:
                yield "copy between devices that waits"
            if name == "cuda" and not isinstance(value, ast.Name):
                yield "cuda()"
            if name in ("tensor", "as_tensor") and keywords.get("device", "'cpu'") != "'cpu'":
                yield "a host number copied to a device"
        case ast.Call(func=ast.Name(id="int" | "float" | "bool" as name), args=args):
            if any(isinstance(a, ast.Subscript) or _reads_a_tensor(a) for a in args):
                yield f"{name}() of a tensor"
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if _reads_a_tensor(test):
                yield "a branch on a tensor"
        case ast.Subscript(slice=ast.Compare() | ast.UnaryOp(op=ast.Invert() | ast.Not())):
            yield "index by a mask"


def _reads_a_tensor(node: ast.expr) -> bool:
    """``x.any()`` and the like, negated or joined, that only tensors have."""
    return any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in REDUCTIONS
        for n in ast.walk(node)
    )


def test_the_hot_path_has_no_call_that_waits():
    found, used = [], set()
    for path in HOT:
        module = path.relative_to(ROOT).with_suffix("").as_posix()
        for scope, line, what in waits(path.read_text(), module):
            allowed = next((a for a in ALLOWED if f"{scope}.".startswith(f"{a}.")), None)
            used.add(allowed)
            if allowed is None:
                found.append(f"{path.name}:{line} ({scope}): {what}")
    assert not found, "\n".join(found)
    assert used >= set(ALLOWED), f"no longer needed: {set(ALLOWED) - used}"


@pytest.mark.parametrize(
    "line",
    [
        "x.item()",
        "x.sum().tolist()",
        "torch.nonzero(x)",
        "x[x > 0]",
        "x[~mask]",
        "int(x.max())",
        "if x.any(): pass",
        "y = 1 if (x > 0).all() else 2",
        "torch.cuda.synchronize()",
        "torch.repeat_interleave(x, y)",
        "x.to(device)",
        "torch.tensor([1], device=x.device)",
    ],
)
def test_the_search_finds(line):
    assert waits(f"def f(x):\n    {line}")


CUDA = torch.device("cuda", 0)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")


def on_host(x: torch.Tensor) -> torch.Tensor:
    """Mark a tensor that stays on the CPU while the others pass for ones on a GPU."""
    x.stays_on_host = True
    return x


def _host(x: torch.Tensor) -> bool:
    return getattr(x, "stays_on_host", False)


class Gpu(TorchFunctionMode):
    """CPU tensors say that they are on a GPU; what the host would wait for there fails.

    Tensors made without a device, or marked by ``on_host``, are the host's, and so is what is
    computed from them alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host = False
        self.calls = NoWait(self)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return CPU if _host(args[0]) else CUDA
        if func == torch.Tensor.is_cuda.__get__:
            return not _host(args[0])
        if func is torch.Tensor.backward:
            with self:
                return torch.autograd.backward(args[0])
        if getattr(func, "namespace", "") == "pro_kernels":
            with self:  # inside the op everything is watched too
                return registry.BODIES[func](*args[:-3], registry.decode(*args[-3:]))
        leaves = tree_leaves((args, kwargs))
        made_for = [x for x in leaves if isinstance(x, torch.device)]
        made_for += [CPU for x in leaves if isinstance(x, str) and x == "cpu"]
        host = [_host(x) for x in tensors]
        if name == "cpu" and self.calls.numbers_allowed and not all(host):
            self.calls.numbers_allowed -= 1
            return on_host(args[0].detach().clone())
        assert all(host) or name not in METHODS, f"{name} waits"
        if made_for and tensors and (made_for[0] == CUDA) == all(host):
            assert kwargs.get("non_blocking"), f"{name} between devices waits"
        elif name == "copy_" and host[0] != host[1]:
            assert kwargs.get("non_blocking"), "copy_ between devices waits"
        else:
            shaped = {_host(x) for x in tensors if x.dim()}
            assert len(shaped) < 2, f"{name} of tensors on two devices"
        args, kwargs = tree_map(lambda x: CPU if isinstance(x, torch.device) else x, (args, kwargs))
        stays = made_for[0] != CUDA if made_for else all(host)
        self.host = stays
        try:
            with self.calls:
                out = func(*args, **kwargs)
        finally:
            self.host = False
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _host(x) != stays:
                if any(x is given for given in tensors):
                    out = x = x.detach().clone()  # ``to`` another device never gives the same
                x.stays_on_host = stays
        return out


class NoWait(TorchDispatchMode):
    """Fails on ops whose result the host waits for; sees those inside of other ops too."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.numbers_allowed = 0  # how often numbers may still be waited for

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.gpu.host:
            name = func.name().removeprefix("aten::").split(".")[0]
            if name == "_local_scalar_dense" and self.numbers_allowed:
                self.numbers_allowed -= 1
                return func(*args, **kwargs)
            assert name not in WAITING, f"{func} waits"
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
                assert not masks, f"{func} with a mask waits"
            if name == "repeat_interleave":
                assert kwargs.get("output_size") is not None, f"{func} without a size waits"
        return func(*args, **kwargs)


class Tier:
    """One way through the gradients: its leaves, and what it gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, force_tier, name: str) -> None:
        self.learns = name != "T0"
        self.weighs = name in ("T1", "T2", "T3")
        monkeypatch.setattr("pro_kernels.fused.planner.default_budget", lambda device: 1 << 30)
        force_tier(name)

    def leaves(self, hidden: torch.Tensor, *head: torch.Tensor) -> list[torch.Tensor]:
        """Copies, of which those have a gradient that it gives one to."""
        return [
            hidden.clone().requires_grad_(self.learns),
            *(x.clone().requires_grad_(self.weighs) for x in head),
        ]

    def results(self, out: pk.PROOutput, *leaves: torch.Tensor) -> list[torch.Tensor]:
        if self.learns:
            (2 * out.loss).backward()
        return [*out[:-1], *(x.grad for x in leaves if x.grad is not None)]


OPTIONS = [
    {},
    {"softcap": 5.0, "ties": "skip", "eps": 1e-3, "top_k": 1, "sft_reduction": "mean"},
    {"rewards": None, "length_normalize": False, "temperature": 2.0},
    {"compat": "official"},
]


# Each two of a dtype, rows of one token or of several, and rewards' place come together.
@pytest.mark.parametrize("tier", ["T0", "T1", "T1f", "T2", "T3"])
@pytest.mark.parametrize(
    ("dtype", "shared", "host"),
    [
        (torch.float32, False, True),
        (torch.float32, True, False),
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, True),
    ],
)
def test_linear_pro_loss(tier, dtype, shared, host, monkeypatch, force_tier):
    case = Case("gpu", bias=True)
    hidden, weight, bias, targets, rewards = case.tensors()
    layout = pk.Layout.from_padded(targets.masked_fill(targets < 0, 3))
    if shared:
        rows = layout.rows // 2, layout.targets, layout.offsets, case.n
        layout = pk.Layout.from_rows(*rows, num_rows=layout.num_rows)
    fp32_sums(monkeypatch)
    tier = Tier(monkeypatch, force_tier, tier)
    per_candidate = {
        "candidate_mask": torch.arange(case.B * case.n).view(case.B, case.n) > 0,
        "prompt_weights": torch.rand(case.B),
        "sft_index": torch.zeros(case.B, dtype=torch.int64),
    }

    def step() -> list[torch.Tensor]:
        h, w, b = tier.leaves(hidden.flatten(0, 2).to(dtype), weight.to(dtype), bias.to(dtype))
        out = pk.linear_pro_loss(h, w, None, bias=b, layout=layout, backend="torch", **options)
        return tier.results(out, h, w, b)

    for options in OPTIONS:
        given = {"rewards": rewards} | ({} if "compat" in options else per_candidate) | options
        options = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        expected = step()
        for x in options.values():
            if host and isinstance(x, torch.Tensor):
                on_host(x)
        with Gpu():
            found = step()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_pro_loss(inplace):
    logits = torch.randn(2, 3, 5, 37, requires_grad=True)
    targets, rewards = torch.randint(0, 37, (2, 3, 5)), torch.randn(2, 3)
    with Gpu():
        out = pk.pro_loss(logits * 1.0, targets, rewards, backend="torch", inplace_backward=inplace)
        out.loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("tier", ["T0", "T1", "T1f", "T3"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_sequence_group_waits_in_its_agreement_only(tier, ragged, monkeypatch, force_tier):
    """A group of one rank, whose collectives do nothing: the loss is that without a group."""
    hidden, weight = torch.randn(12, 8), torch.randn(37, 8)
    counts, rewards = ([3, 1], torch.randn(2, 3)) if ragged else (2, torch.randn(2, 2))
    layout = pk.Layout.from_packed(
        torch.randint(0, 37, (12,)), torch.tensor([0, 3, 4, 7, 12]), counts
    )
    tier = Tier(monkeypatch, force_tier, tier)
    monkeypatch.setattr(shards, "group_of", lambda _, group: group)
    monkeypatch.setattr(shards, "agree", lambda *_: None)
    monkeypatch.setattr(shards, "sum_", lambda x, _: x)

    def step(**options) -> list[torch.Tensor]:
        leaves = tier.leaves(hidden, weight)
        out = pk.linear_pro_loss(*leaves, None, rewards, layout=layout, backend="torch", **options)
        return tier.results(out, *leaves)

    expected = step()
    with Gpu():
        found = step(sequence_group=object(), budget=1 << 20)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tier", ["T0", "T1", "T1f", "T3"])
def test_token_log_probs_wait_for_their_layout_only(tier, monkeypatch, force_tier):
    """Targets on the device: how many are scored is asked for once, and nothing else."""
    tier, targets = Tier(monkeypatch, force_tier, tier), torch.randint(0, 37, (20,))
    hidden, weight = tier.leaves(torch.randn(20, 8), torch.randn(37, 8))
    classes = {"class_weight": torch.rand(37), "label_smoothing": 0.1, "z_loss": 0.1}
    layout = pk.Layout.from_padded(targets.view(1, 1, -1))
    monkeypatch.setattr(pk.Layout, "of_targets", lambda *_: layout)
    with Gpu():
        scale = torch.ones_like(hidden[..., 0])
        logps = pk.linear_token_logps(hidden, weight, targets, logit_scale=scale, backend="torch")
        stats = api.linear_token_stats(hidden, weight, targets, extra=True, backend="torch")
        options = {"backend": "torch", "return_stats": True, **classes}
        loss = pk.linear_cross_entropy(hidden, weight, targets, **options).loss
        if tier.learns:
            loss.backward()
            (logps * torch.arange(20, device=targets.device)).sum().backward()
            (stats.logps * stats.entropy).sum().backward()
    assert logps.isfinite().all() and stats.entropy.isfinite().all()


@pytest.mark.parametrize(("tier", "chunks"), [("T1", 1), ("T1f", 4), ("T2", 2), ("T3", 5)])
def test_grad_filter_waits_once_a_chunk(tier, chunks, monkeypatch, force_tier):
    """For the number of columns that stay, in the forward; else for nothing."""
    hidden, weight = Tier(monkeypatch, force_tier, tier).leaves(
        torch.randn(20, 8), 3 * torch.randn(301, 8)
    )
    layout = pk.Layout.from_padded(torch.randint(0, 301, (2, 2, 5)))
    options = {"layout": layout, "backend": "torch", "grad_filter": 0.3}
    with Gpu() as gpu:
        gpu.calls.numbers_allowed = chunks
        rewards = on_host(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
        out = pk.linear_pro_loss(hidden, weight, None, rewards, **options)
        assert gpu.calls.numbers_allowed == 0
        out.loss.backward()
    assert (out.grad_filter.dropped_mass > 0).any() and hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: torch.repeat_interleave(x, torch.ones_like(x, dtype=torch.int64)),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0]) + x,
        lambda x: x.to("cpu").sum(),
        lambda x: pk.Layout.from_padded(x.long().view(1, -1)),
    ],
)
def test_the_watch_sees_what_waits(waiting):
    with Gpu(), pytest.raises(AssertionError, match="wait|two devices"):
        waiting(torch.ones(2, device=CUDA))
