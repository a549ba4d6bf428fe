"""``LazyLogits``: what trainers make of logits is right to rounding, and made without logits."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import pro_kernels as pk
from bench.engine.memory import peak_extra_bytes
from bench.engine.timing import Step
from cases import CPU
from pro_kernels.fused import matmul
from pro_kernels.models import COUNTS, lazy
from pro_kernels.models.lazy import LazyLogits
from tiny_models import V, make

B, T = 4, 9
g = torch.Generator().manual_seed(0)
IDS = torch.randint(0, V, (B, T), generator=g)
NEXT = torch.randint(0, V, (B, T - 1), generator=g)
UP = torch.randn(B, T - 1, generator=g, dtype=torch.float64)
HOT = UP.abs().unsqueeze(-1) + 0.5
MASK = UP > 0
IGNORED = NEXT.where(MASK, -100).flatten()


# ---- how trainers compute log-probs and entropies, in our own words


def row_by_row(z, ids):
    """TRL's ``selective_log_softmax`` for fp32, verl's v2."""
    chosen = torch.gather(z, dim=-1, index=ids.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


def softmax_by_row(z, ids):
    """The same for 16 bits."""
    rows = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=i.unsqueeze(-1)).squeeze(-1)
        for row, i in zip(z, ids, strict=True)
    ]
    return torch.stack(rows)


def whole(z, ids):
    """LLaMA-Factory, ms-swift, TRL before 0.12."""
    return torch.gather(z.log_softmax(-1), dim=2, index=ids.unsqueeze(2)).squeeze(2)


def by_chunks(z, ids):
    """OpenRLHF: the log-sum-exp a few rows at a time."""
    flat = z.reshape(-1, z.size(-1))
    sums = torch.cat([torch.logsumexp(part, dim=-1) for part in flat.split(5)])
    return z.gather(dim=-1, index=ids.unsqueeze(-1)).squeeze(-1) - sums.view(ids.shape)


def by_loss(z, ids):
    """Torchtune, transformers: cross-entropy of flattened rows."""
    flat = z.reshape(-1, z.shape[-1])
    return -F.cross_entropy(flat, ids.reshape(-1), reduction="none").view(ids.shape)


def by_index(z, ids):
    flat = F.log_softmax(z.reshape(-1, z.shape[-1]), dim=-1)
    return flat[torch.arange(ids.numel()), ids.flatten()].view(ids.shape)


def entropy_by_chunks(z):
    """TRL."""
    parts = []
    for part in z.reshape(-1, z.shape[-1]).split(5, dim=0):
        logps = F.log_softmax(part, dim=-1)
        parts.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(parts).reshape(z.shape[:-1])


def entropy(z):
    """OpenRLHF, verl."""
    probs = torch.softmax(z, dim=-1)
    return torch.logsumexp(z, dim=-1) - torch.sum(probs * z, dim=-1)


LOGPS = [row_by_row, softmax_by_row, whole, by_chunks, by_loss, by_index]


# ---- losses on logits z


def chosen(z, ids=NEXT, up=UP, way=row_by_row):
    """A weighted sum of log-probs."""
    return (way(z, ids) * up.to(z.dtype)).sum()


def loss(z, targets=IGNORED, **options):
    return F.cross_entropy(z[:, :-1].flatten(0, 1), targets, **options)


def sums(z):
    return z.logsumexp(-1).square().sum()


def changed(z, how):
    how(z)
    return z


def cooled(z):
    return changed(z, lambda z: z.div_(0.7))


def under_no_grad(z, how):
    with torch.no_grad():
        return how(z)


def softmaxed(z):
    return z[:, :2].softmax(-1).square().sum()


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


WAYS = {way.__name__: lambda z, way=way: chosen(z[:, :-1], way=way) for way in LOGPS}
WAYS |= {
    "entropy": lambda z: (entropy(z[:, :-1]) * UP).sum(),
    "entropy by chunks": lambda z: (entropy_by_chunks(z[:, :-1]) * UP).sum(),
    "entropy beside log-probs": lambda z: chosen(z[:, :-1]) + entropy(z[:, :-1]).sum(),
    "halves": lambda z: sum(
        chosen(half[:, :-1], ids, up)
        for half, ids, up in zip(z.split(2), NEXT.split(2), UP.split(2), strict=True)
    ),
    "mask": lambda z: (
        z[:, :-1][MASK].log_softmax(-1).gather(-1, NEXT[MASK][:, None])[:, 0] * UP[MASK]
    ).sum(),
    "rows twice": lambda z: chosen(z[torch.tensor([2, 0, 1, 1])][:, :-1], way=whole),
    "cat": lambda z: chosen(torch.cat([z[2:, :-1], z[:2, :-1]])),
    "stack": lambda z: chosen(torch.stack([*z])[:, :-1]),
    "temperature": lambda z: chosen(z[:, :-1] / 0.7),
    "temperature in place": lambda z: chosen(cooled(z.squeeze(0))[:, :-1]),
    "temperature of a part in place": lambda z: (
        chosen(cooled(z[:, :-1][:, 2:]), NEXT[:, 2:], UP[:, 2:]) + sums(z[:, :4])
    ),
    "temperature of rows": lambda z: chosen(z[:, :-1] / HOT.to(z.dtype)),
    "times 2": lambda z: chosen(2 * z[:, :-1]),
    "some labels": loss,
    "sum of losses": lambda z: loss(z, NEXT.flatten(), reduction="sum"),
    "weights of classes": lambda z: loss(z, weight=torch.linspace(0.1, 1, V, dtype=z.dtype)),
    "nll_loss": lambda z: F.nll_loss(z[:, :-1].flatten(0, 1).log_softmax(-1), IGNORED),
    "gather twice": lambda z: (
        sums(z)
        + 2 * z.gather(-1, IDS[..., None]).square().sum()
        + z.gather(-1, IDS[..., None].expand(-1, -1, 3)).sum()
    ),
    "most likely": lambda z: (
        (z.max(-1).values + z.topk(3).values.sum(-1)).sum() + (z.argmax(-1) == IDS).sum()
    ),
    "columns": lambda z: z[..., 5].square().sum() + z[:, -1, -7].sum(),
    "rows in another order": lambda z: chosen(
        z[:, :-1].transpose(0, 1).reshape(-1, V), NEXT.t().flatten(), UP.t().flatten(), by_index
    ),
}
# Under a softcap these are no temperatures of hidden states.
LINEAR_ROWS = ("temperature of rows", "temperature of a part in place")
# A mean over the vocabulary is one of the weight's, where no softcap is between.
LINEAR = {
    "means": lambda z: z.mean() + z[:, :2].mean(-1).square().sum() + z[:, :-1][MASK].mean(),
    "label smoothing": lambda z: loss(z, label_smoothing=0.1),
    "weights of classes, smoothed": lambda z: loss(
        z, weight=torch.linspace(0.1, 1, V, dtype=z.dtype), label_smoothing=0.1
    ),
    "z-loss": lambda z: loss(z) + 1e-2 * z[:, :-1][MASK].logsumexp(-1).square().mean(),
}


MADE = {
    "softmax": softmaxed,
    "in place": lambda z: softmaxed(changed(z, lambda x: x.mul_(2).tanh_())),
    "written to": lambda z: chosen(changed(z, lambda x: x.__setitem__((..., 3), -5.0))[:, :-1]),
    "by a part in place": lambda z: chosen(changed(z, lambda x: x[:2].mul_(2.0))[:, :-1]),
    "class in the middle": lambda z: F.cross_entropy(z[:, :-1].transpose(1, 2), NEXT),
    "hook": lambda z: (
        changed(z, lambda x: x.register_hook(lambda g: 2 * g)).log_softmax(-1)[..., 1].sum()
    ),
    "Function": lambda z: whole(_Tripled.apply(z)[:, :-1], NEXT).sum(),
}


# Programs in which lazy logits once differed from plain ones.
FOUND = {
    "a detached factor": lambda z: (z.log_softmax(-1) * z.softmax(-1).detach()).sum(-1)[0].sum(),
    "a factor under no_grad": lambda z: (
        (under_no_grad(z, lambda z: z.softmax(-1)) * z).sum(-1).square().sum()
    ),
    "a view in place": lambda z: sums(changed(z, lambda z: cooled(z[:, 1:]))),
    "rows in place": lambda z: sums(changed(z, lambda z: z.view(-1, V)[::2].mul_(2))),
    "detached in place": lambda z: sums(changed(z, lambda z: cooled(z.detach()))),
    "in place under no_grad": lambda z: sums(
        under_no_grad(z, lambda z: changed(z, lambda z: cooled(z.squeeze(0))))
    ),
    "a contiguous copy in place": lambda z: sums(z) + sums(
        changed(z[:, 1:].contiguous(), lambda y: cooled(y.view(-1, V)))
    ),
    "a clone in place": lambda z: sums(z) + sums(
        changed(z[:, :-1].clone(), lambda y: cooled(y.reshape(-1, V)))
    ),
    "tuples as rows": lambda z: z[(0, 0),].gather(-1, IDS[:2][..., None]).sum(),
    "a new dimension": lambda z: (z.unsqueeze(-2).logsumexp(-1) * torch.arange(9.0)[:, None]).sum(),
    "a mean under no_grad first": lambda z: under_no_grad(z, torch.mean) * 0 + z.mean(),
    "a hook of a part": lambda z: sums(
        changed(z[:, :-1], lambda v: v.register_hook(lambda g: 2 * g))
    ),
    "max with a tensor": lambda z: torch.max(z, torch.tensor(-1.0, dtype=z.dtype)).sum(),
    "nothing counts, smoothed": lambda z: z.mean() + loss(
        z, torch.full_like(IGNORED, -100), label_smoothing=0.1, reduction="sum"
    ),
    "two copies divided": lambda z: (
        changed(z[:, :-1].clone(), lambda a: a.div_(HOT)).softmax(-1)
        * changed(z[:, :-1].clone(), lambda b: b.div_(2 * HOT)).log_softmax(-1)
    ).sum(-1).sum(),
    "dtype by position": lambda z: torch.log_softmax(z, -1, torch.float64)[..., 0].sum(),
    "no rows": lambda z: z[torch.empty(0, dtype=torch.int64)].logsumexp(-1).sum() + z.mean(),
    "a row": lambda z: z[0, 0].gather(0, torch.tensor(3)) + sum(p.sum() for p in z[0, 0].chunk(2)),
    "a negative divisor": lambda z: sums(z / -2) + sums(z * -2),
}  # fmt: skip


def logits_of(model, on: bool = True, ids=IDS, **more):
    """Lazy ones or plain ones; the model then makes lazy ones again."""
    model._pro_kernels.lazy = on
    try:
        z = model(input_ids=ids, use_cache=False, **more).logits
    finally:
        model._pro_kernels.lazy = True
    assert isinstance(z, LazyLogits) is on
    return z


def with_loss(model, way, *args, **more) -> list[Tensor]:
    """The loss and its gradients."""
    model.zero_grad()
    found = way(logits_of(model, *args, **more))
    assert type(found) is Tensor
    found.backward()
    return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(model, way, rtol: float, **more) -> int:
    """How many rows of logits were made."""
    plain = with_loss(model, way, False, **more)
    before = COUNTS["made_rows"]
    for a, b in zip(plain, with_loss(model, way, True, **more), strict=True):
        assert (a - b).norm() <= rtol * (a.norm() + 1e-3 * plain[1].norm())
    return COUNTS["made_rows"] - before


@functools.cache
def attached(name: str):
    return pk.attach(make(name).double())


@pytest.fixture
def llama():
    return attached("Llama")


ALL = WAYS | LINEAR | MADE | FOUND
UNDER_A_CAP = [x for x in WAYS | FOUND if x not in LINEAR_ROWS]
SOME = ("row_by_row", "entropy by chunks")
# What models do to their logits; a scale, a divisor and a bias are read off them, to fp32's last
# bits.
MODELS = {"Llama": (ALL, 1e-9), "Gemma2": (UNDER_A_CAP, 1e-9)}
MODELS |= dict.fromkeys(("Cohere", "Granite", "GPTJ"), (SOME, 1e-6))


@pytest.mark.filterwarnings("ignore:.*were made for")
@pytest.mark.parametrize(
    ("name", "way"), [(x, way) for x, (ways, _) in MODELS.items() for way in ways]
)
def test_as_plain_logits(name, way):
    made = assert_alike(attached(name), ALL[way], 1e-12 if way in MADE else MODELS[name][1])
    if way not in FOUND:
        assert bool(made) == (way in MADE)


@pytest.mark.parametrize("way", [
    "row_by_row", "by_index", "entropy", "halves", "mask", "rows twice", "temperature in place",
    "temperature of rows", "some labels", "most likely", "means",
])  # fmt: skip
def test_of_distinct_rows(way):
    """The head multiplies each distinct hidden state once, with each of its targets."""
    model = pk.attach(make().double())
    ids = IDS.clone()
    ids[:2, :4], ids[3] = ids[0, :4], ids[2]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"ids": ids, "attention_mask": mask}
    with pk.distinct_rows(model):
        states = logits_of(model, **batch).source.head.hidden
        assert states.shape[0] == 4 * T - 4 - 9 - 3 + 1
        assert assert_alike(model, (WAYS | LINEAR)[way], 1e-9, **batch) == 0


@pytest.mark.parametrize("way", [*(way.__name__ for way in LOGPS), *LINEAR_ROWS])
def test_in_16_bits(way):
    """As exact as fp32 until the result is rounded; plain logits are rounded before."""
    model = pk.attach(make())
    exact = with_loss(model, WAYS[way], False)[0]
    model.bfloat16()
    before = COUNTS["made_rows"]
    found = [with_loss(model, WAYS[way], on)[0] for on in (False, True)]
    plain, ours = ((x.double() - exact).abs() for x in found)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert ours <= plain + 2**-7 * exact.abs() and COUNTS["made_rows"] == before


@pytest.mark.parametrize("way", [softmax_by_row, row_by_row])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_rows_without_a_gradient_are_multiplied_once(way, share, monkeypatch):
    """1 + 3 s matmuls of rows, or 3 where it was told that most of them have a gradient."""
    model, rows, late = pk.attach(make()), [], []
    multiply, run = matmul.logits_into, lazy._run
    monkeypatch.setattr(
        matmul, "logits_into", lambda out, *args: rows.append(len(out)) or multiply(out, *args)
    )
    monkeypatch.setattr(lazy, "_run", lambda *args: late.append(args[-1]) or run(*args))
    mask = torch.arange(T - 1) < share * (T - 1)
    for step in range(2):
        rows.clear()
        late.clear()
        chosen(logits_of(model)[:, :-1], up=mask, way=way).backward()
        assert model._pro_kernels.habits["live"] == pytest.approx(share)
        first = step == 0 or share < 2 / 3
        assert set(late) == {first}
        assert sum(rows) == B * (T - 1) * (1 + share if first else 1)


def test_only_rows_asked_for_are_made_and_it_is_said_once(llama, monkeypatch, capsys):
    monkeypatch.setattr(lazy, "_said", set())
    with pytest.warns(UserWarning, match=r"probs of shape \(4, 2, 67\) were made for square"):
        assert assert_alike(llama, lambda z: softmaxed(z) + chosen(z[:, :-1]), 1e-9) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_loss(llama, softmaxed)
    monkeypatch.setenv("PRO_KERNELS_EXPLAIN", "1")
    with_loss(llama, softmaxed)
    assert "in softmaxed" in capsys.readouterr().err


def test_a_tensor_to_whoever_looks(llama):
    out = llama(input_ids=IDS)
    z, plain = out.logits, logits_of(llama, False)
    assert z.shape == (B, T, V) and z.dtype == torch.float64 and z.requires_grad
    assert len(z) == B and z.size(-1) == V and z.dim() == z.ndim == 3 and z.numel() == B * T * V
    assert "shape=(4, 9, 67)" in f"{z}" and "LazyLogits" in str(out)
    assert llama(input_ids=IDS, return_dict=False)[0].shape == z.shape
    assert type(pickle.loads(pickle.dumps(z.detach()))) is Tensor
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    assert torch.load(file).equal(plain) and z.detach().equal(plain.detach())
    assert z.tolist() == plain.tolist()
    assert copy.deepcopy(z.detach()).equal(plain)


def test_a_call_with_labels_has_them_too(llama):
    out = llama(input_ids=IDS, labels=IDS)
    assert isinstance(out.logits, LazyLogits)
    logps = row_by_row(out.logits[:, :-1], IDS[:, 1:])
    torch.testing.assert_close(logps, out.token_logps[:, :-1])
    assert llama(input_ids=IDS, labels=IDS, return_dict=False)[1].shape == (B, T, V)


def test_asked_after_the_optimizers_step(llama):
    model = copy.deepcopy(llama)
    z = logits_of(model)
    chosen(z[:, :-1]).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for ask in (softmaxed, lambda z: z.argmax(-1), lambda z: z.gather(-1, IDS[..., None])):
        with pytest.raises(RuntimeError, match="ask before that"):
            ask(z)


def test_under_no_grad(llama, monkeypatch):
    with torch.no_grad():
        assert type(llama(input_ids=IDS).logits) is Tensor  # few rows
        monkeypatch.setattr(lazy, "_FEW", 0)
        assert not chosen(logits_of(llama)[:, :-1]).requires_grad
    z = logits_of(llama)
    for ask in (entropy, lambda z: chosen(z[:, :-1])):
        assert not under_no_grad(z, ask).requires_grad
    assert chosen(z[:, :-1]).requires_grad
    assert not chosen(z.detach()[:, :-1]).requires_grad


def test_plain_where_it_is_compiled_generates_or_is_told_to(llama):
    kinds = []
    handle = llama.register_forward_hook(lambda m, a, out: kinds.append(type(out.logits)))
    try:
        found = llama.generate(IDS[:, :3], max_new_tokens=3, do_sample=False)
    finally:
        handle.remove()
    assert found.equal(make().double().generate(IDS[:, :3], max_new_tokens=3, do_sample=False))
    hooked = pk.attach(make())
    hooked.lm_head.register_forward_hook(lambda m, a, out: out + 1)
    off = pk.attach(make(), lazy_logits=False)
    for model in (torch.compile(llama, backend="eager"), off, hooked):
        kinds.append(type(model(input_ids=IDS).logits))
    assert set(kinds) == {Tensor}


def test_a_model_that_looks_at_its_logits_itself():
    """Its first call without labels is run again, and the others have plain logits."""
    model = make()

    class Looking(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.best = out.logits.argmax(-1)  # of width 0 it fails
            return out

    model.__class__ = Looking
    pk.attach(model)
    for _ in range(2):
        out = model(input_ids=IDS)
        assert type(out.logits) is Tensor and out.best.equal(out.logits.argmax(-1))
    assert not model._pro_kernels.lazy
    with pytest.raises(IndexError):  # one of its own stays one
        pk.attach(make())(input_ids=IDS + V)


def test_a_compiled_loss(llama):
    compiled = torch.compile(WAYS["row_by_row"], backend="eager")
    assert assert_alike(llama, compiled, 1e-9) == 0


def test_autocast_and_accelerate():
    from accelerate.utils import convert_outputs_to_fp32

    model = pk.attach(make())
    cast = torch.autocast("cpu", torch.bfloat16)
    with cast:
        labelled, plain = (m(input_ids=IDS, labels=IDS).logits for m in (model, make()))
    assert isinstance(labelled, LazyLogits) and labelled.dtype == plain.dtype
    model.forward, forward = cast(convert_outputs_to_fp32(model.forward)), model.forward
    off, on = (with_loss(model, WAYS["row_by_row"], lazy) for lazy in (False, True))
    model.forward = forward
    assert on[0].dtype == off[0].dtype == torch.float32  # made outside of autocast
    for a, b in zip(off, on, strict=True):
        assert (a - b).norm() <= 0.02 * a.norm()


def test_lora_on_the_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    base = pk.attach(peft.get_peft_model(make().double(), config)).get_base_model()
    base.requires_grad_(True)
    assert assert_alike(base, WAYS["row_by_row"], 1e-9) == 0
    base.gradient_checkpointing_enable()
    base.train()
    assert assert_alike(base, WAYS["row_by_row"], 1e-9) == 0


@pytest.mark.filterwarnings("error")
def test_peak_memory():
    """Far below the logits, and no tensor [rows, V] was made."""
    model = pk.attach(make(vocab_size=1 << 15), budget=16 << 20)
    ids = torch.randint(0, V, (4, 256))  # 128 MB of logits, and as much for their gradient
    for way in (row_by_row, softmax_by_row, lambda z, ids: entropy_by_chunks(z)):

        def run(ids=ids, way: Callable = way) -> None:
            way(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).sum().backward()

        run(ids[:, :9])
        assert peak_extra_bytes(Step(run), CPU)[0] < 64 << 20


@pytest.mark.parametrize(
    "columns",
    [
        lambda z: z[..., 3],
        lambda z: z[..., :7],
        lambda z: z.select(-1, 3),
        lambda z: z.narrow(-1, 0, 7),
    ],
)
def test_a_write_to_columns_is_not_lost_in_silence(llama, columns):
    for given in (logits_of, lambda model: logits_of(model).detach()):
        z = given(llama)
        read = columns(z).clone()
        z.log_softmax(-1).gather(-1, IDS[..., None])  # reading takes nothing away
        columns(z).fill_(-5)
        for ask in (softmaxed, lambda z: z.gather(-1, IDS[..., None])):
            with pytest.raises(RuntimeError, match="columns of the logits .* changed in place"):
                ask(z)
        z = given(llama)
        z.tanh_()  # real from now on: columns are views of them
        columns(z).fill_(-5)
        assert (columns(z) == -5).all() and read.shape == columns(z).shape


def test_errors_of_plain_logits_are_errors(llama):
    z = logits_of(llama)
    for ids in (IDS - V, IDS + V, torch.full_like(IDS, -100)):
        for k in (1, 2):
            with pytest.raises((IndexError, ValueError, RuntimeError)):
                z.gather(-1, ids[..., None].expand(-1, -1, k))
    with pytest.raises(ValueError, match="got -100"):  # and not a score of 0
        z.gather(-1, torch.full((B, T, 1), -100))
    with pytest.raises(RuntimeError, match="cannot be done in place"):
        z[:1].squeeze_(0)
    with pytest.raises(RuntimeError, match=r"out=\.\.\.\) cannot be done in place"):
        torch.div(z.detach(), 2, out=z.detach())
    for ask in (sums, lambda z: z.log_softmax(-1).gather(-1, IDS[..., None])):
        with pytest.raises(RuntimeError, match="first order only"):
            torch.autograd.grad(ask(z).sum(), llama.lm_head.weight, create_graph=True)
    with pk.distinct_rows(llama):
        same = logits_of(llama, ids=IDS[:1].expand(3, -1))
        with pytest.raises(IndexError, match="must lie in"):
            same.gather(-1, IDS[:1, :, None].expand(3, -1, -1) - V)


def test_a_gradient_of_the_logits_themselves(llama):
    z = logits_of(llama)
    z.retain_grad()
    z.logsumexp(-1).sum().backward()
    assert z.grad.shape == z.shape and z.grad.sum().item() == pytest.approx(B * T)
