"""Other projects' switches (``pro_kernels.integrations``), against these projects' own code."""

from __future__ import annotations

import functools
import importlib
import runpy
import sys
import types

import pytest
import torch

import pro_kernels as pk
from pro_kernels.integrations.switch import Switch
from pro_kernels.models.forward import STATE
from pro_kernels.models.trl import accelerate_trl
from stubs import stub, stub_verl
from tiny_models import SIZES, V, assert_same_grads, grads, make

H, T = SIZES["hidden_size"], 9
liger_switch, verl_switch = pk.integrations.liger, pk.integrations.verl


def test_names_are_exchanged_in_modules_loaded_before_and_since(monkeypatch):
    old, new, other = object(), object(), object()
    before, since = types.ModuleType("before"), types.ModuleType("since")
    before.a, before.b, before.c = old, other, old
    monkeypatch.setitem(sys.modules, "before", before)
    switch = Switch("", "", "")
    switch.exchange([(old, new)])
    assert (before.a, before.b, before.c) == (new, other, new)
    monkeypatch.setitem(sys.modules, "since", since)
    since.a = before.a
    switch.restore()
    assert (before.a, before.b, before.c, since.a) == (old, other, old, old)


@pytest.mark.parametrize(
    ("package", "apply", "needs"),
    [
        ("liger_kernel", liger_switch.apply, "integrations.liger needs liger-kernel"),
        ("verl", verl_switch.apply, "integrations.verl needs verl"),
        ("swift", pk.integrations.swift.apply, "integrations.swift needs ms-swift"),
        ("trl", accelerate_trl, "accelerate_trl needs TRL "),
    ],
)
def test_a_missing_package_is_named(package, apply, needs, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=needs):
        apply()


# ---- Liger


@pytest.fixture
def liger():
    pytest.importorskip("liger_kernel", reason="needs liger-kernel==0.8.*")
    yield importlib.import_module("liger_kernel.chunked_loss")
    liger_switch.restore()


def leaves(seed: int, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def targets(rows: int, seed: int = 1) -> torch.Tensor:
    """Of unequal lengths: some positions at the front and the end are not scored."""
    found = torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    at, row = torch.arange(T), torch.arange(rows)[:, None]
    return found.masked_fill((at <= row % 3) | (at >= T - row % 4), -100)


def assert_ligers(run, *tensors):
    """Outputs and gradients of ``run()`` are Liger's, and ours never ask Liger."""
    theirs, ours = found = [], []
    kinds = torch.autograd.Function.__mro__  # torch 2.14 has it in the base, in C++
    apply = next(kind.__dict__["apply"] for kind in kinds if "apply" in kind.__dict__)

    @classmethod
    def checked(cls, *args, **kwargs):
        assert not cls.__module__.startswith("liger_kernel"), cls
        return apply.__get__(None, cls)(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for results in found:
            loss, more = run()
            (0.7 * loss).backward()
            results += [loss, *more, *(t.grad for t in tensors)]
            for t in tensors:
                t.grad = None
            if results is theirs:
                liger_switch.apply()
                patch.setattr(torch.autograd.Function, "apply", checked)
    assert len(theirs) == len(ours) and not any(x.requires_grad for x in ours[1 : -len(tensors)])
    for a, b in zip(theirs, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            size = a.detach().abs().max().clamp(min=1).item()
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6 * size)


DPO = ["sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]
PAIRS = [
    *(("DPO", {"loss_type": kind}) for kind in DPO),
    ("DPO", {"loss_type": "robust", "label_smoothing": 0.2, "average_log_prob": True}),
    ("DPO", {"loss_type": "exo_pair", "label_smoothing": 0.1, "chunk_size": 3}),
    ("DPO", {"compute_nll_loss": True, "alpha": 0.3, "beta": 0.5}),
    ("DPO", {"use_ref_model": False}),
    ("DPO", {"ignore_index": 5}),
    ("ORPO", {"beta": 0.3}),
    ("ORPO", {"compute_nll_loss": False}),
    ("CPO", {"label_smoothing": 0.1, "alpha": 0.5}),
    ("CPO", {"average_log_prob": True}),
    ("SimPO", {"gamma": 0.7, "compute_nll_loss": True}),
    ("SimPO", {"beta": 2.0, "label_smoothing": 0.1}),
]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("kind", "options"), PAIRS, ids=str)
def test_pairwise_losses_are_ligers(liger, kind, options, bias):
    hidden, weight, b, *reference = leaves(2, (8, T, H), (V, H), V, (8, T, H), (V, H), V)
    b, reference[2] = (b, reference[2]) if bias else (None, None)
    target = targets(8)
    if "ignore_index" in options:
        target = torch.where(target == -100, 5, target)
    loss_of = getattr(liger, f"LigerFusedLinear{kind}Loss")(compiled=False, **options)
    more = [x if x is None else x.detach() for x in reference] if kind == "DPO" else []
    tensors = [x for x in (hidden, weight, b) if x is not None]
    assert_ligers(lambda: loss_of(weight, hidden, target, b, *more), *tensors)


def test_orpo_takes_other_targets_for_its_nll(liger):
    hidden, weight = leaves(3, (4, T, H), (V, H))
    loss_of, whole = liger.LigerFusedLinearORPOLoss(compiled=False), targets(4).clamp(min=0)
    assert_ligers(lambda: loss_of(weight, hidden, targets(4), nll_target=whole), hidden, weight)


@pytest.mark.parametrize("kl", [None, 0.3])
@pytest.mark.parametrize("options", [{"use_ref_model": True}, {"average_log_prob": True}], ids=str)
def test_kto_is_ligers(liger, options, kl):
    hidden, weight, bias, *reference = leaves(4, (5, T, H), (V, H), V, (5, T, H), (V, H))
    wanted = torch.tensor([True, False, True, True, False])
    loss_of = liger.LigerFusedLinearKTOLoss(compiled=False, **options)
    kl = None if kl is None else torch.tensor(kl)
    more = (bias, wanted, *(x.detach() for x in reference), None, kl)
    assert_ligers(lambda: loss_of(hidden, weight, targets(5), *more), hidden, weight, bias)


@pytest.mark.parametrize("reference", ["logps", "model", None])
@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": x} for x in ("grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo")),
        {"loss_type": "dr_grpo", "max_completion_length": 12, "temperature": 0.7},
        {"importance_sampling_level": "sequence", "delta": 1.5, "use_bias_correction_kl": True},
    ],
    ids=str,
)
def test_grpo_is_ligers(liger, options, reference):
    hidden, weight, *more = leaves(5, (4, T, H), (V, H), (4, T), 4, (4, T), (4, T, H), (V, H), 4)
    old, ratio, ref, ref_hidden, ref_weight, good = (x.detach() for x in more)
    mask = targets(4) != -100
    if options.get("loss_type") != "luspo":  # which counts every position
        old = torch.where(mask, old, -200.0)  # the ratio overflows where nothing is kept
    old = old - 4
    given = {"old_per_token_logps": old, "vllm_is_ratio": ratio.abs()}
    given |= {
        "logps": {"ref_per_token_logps": ref - 4},
        "model": {"ref_input": ref_hidden, "ref_weight": ref_weight},
    }.get(reference, {})
    loss_of = liger.LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=reference is not None, **options
    )
    ids, mask, safe = targets(4).clamp(min=0), mask.float(), old.clamp(min=-20)

    def run():
        if not liger_switch._switch.pairs:  # Liger itself, which would give NaN there
            return loss_of(hidden, weight, ids, mask, good, **given | {"old_per_token_logps": safe})
        return loss_of(hidden, weight, ids, mask, good, **given)

    assert_ligers(run, hidden, weight)


CLASSES = {"ce_weight": torch.linspace(0.1, 2.0, V)}
CROSS_ENTROPIES = {
    "plain": {},
    "softcap": {"softcap": 3.0, "lse_square_scale": 1e-2},
    "classes": CLASSES,
    "smoothed": {"label_smoothing": 0.2, "lse_square_scale": 1e-2, "return_z_loss": True},
    "classes, smoothed": {**CLASSES, "label_smoothing": 0.2, "lse_square_scale": 1e-2},
    "scaled": {**CLASSES, "use_token_scaling": True, "lse_square_scale": 1e-2},
    "accuracy": {"return_token_accuracy": True},
    "all": {"return_token_accuracy": True, "return_predicted_tokens": True, "return_z_loss": True},
    "empty": {"lse_square_scale": 1e-2},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CROSS_ENTROPIES)
def test_cross_entropy_is_that_of_plain_torch(liger, reduction, case):
    """Liger's own needs a GPU; its formula is written out here."""
    functional = importlib.import_module("liger_kernel.transformers.functional")
    modules = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    hidden, weight, bias, upstream = tensors = leaves(6, (4 * T, H), (V, H), V, 4 * T)
    target, options = targets(4).reshape(-1), CROSS_ENTROPIES[case]
    if case == "empty":
        target = torch.full_like(target, -100)
    upstream = upstream.detach() if reduction == "none" else torch.tensor(0.7)
    kept, classes = target != -100, options.get("ce_weight", torch.ones(V))
    logits = hidden @ weight.t() + bias
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    entropy = torch.nn.functional.cross_entropy
    smoothing = options.get("label_smoothing", 0.0)
    want = entropy(logits, target, classes, reduction="none", label_smoothing=smoothing)
    z_loss = options.get("lse_square_scale", 0.0) * logits.logsumexp(-1).square() * kept
    if case == "scaled":
        certainty = torch.where(kept, (-entropy(logits, target, reduction="none")).exp(), 0)
        want, z_loss = want * certainty.detach(), z_loss * certainty.detach()
    predicted = torch.where(kept, logits.argmax(-1), -1)
    right = ((predicted == target) & kept).float()
    if reduction != "none":
        right = right.sum() / kept.sum()
        mean = reduction == "mean"
        want = want.sum() / (classes[target[kept]].sum().clamp(min=1) if mean else 1)
        z_loss = z_loss.sum() / (kept.sum().clamp(min=1) if mean else 1)
    want = want + z_loss

    def gradients(loss):
        return torch.autograd.grad((loss * upstream).sum(), tensors[:3])

    expected = gradients(want)
    liger_switch.apply()
    loss_of = modules.LigerFusedLinearCrossEntropyLoss(reduction=reduction, **options)
    function = functools.partial(
        functional.liger_fused_linear_cross_entropy, reduction=reduction, **options
    )
    more = {"z_loss": z_loss, "token_accuracy": right, "predicted_tokens": predicted}
    asked = {name for name in more if options.get(f"return_{name}")}
    for got in (loss_of(weight, hidden, target, bias), function(hidden, weight, target, bias)):
        for name in more if asked else ():
            found = getattr(got, name)
            assert (found is not None) is (name in asked)
            if found is not None:
                torch.testing.assert_close(found, more[name].detach(), rtol=1e-5, atol=1e-6)
        got = got.loss if asked else got
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients(got), expected, rtol=1e-4, atol=1e-6)


def test_a_transformers_model_with_ligers_forward_trains_on_it(liger):
    """What ``use_liger_kernel`` calls; Liger's other kernels need a GPU."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model, labels = make().train(), targets(2)
    batch = {"input_ids": labels.clamp(min=0), "labels": labels, "num_items_in_batch": 9}
    want = model(**batch).loss
    expected = grads(model, want)
    kernels = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy"), False)
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True, **kernels)
    liger_switch.apply()
    got = model(**batch).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert_same_grads(grads(model, got), expected)


def test_what_the_kernels_cannot_do_stays_ligers_and_it_is_said(liger, monkeypatch):
    ops = importlib.import_module("liger_kernel.ops")
    modules = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    Loss, asked = modules.LigerFusedLinearCrossEntropyLoss, []  # noqa: N806
    function = ops.LigerFusedLinearCrossEntropyFunction
    monkeypatch.setattr(function, "apply", lambda *args: asked.append(args) or (0,) * 4)
    liger_switch.apply()
    hidden, weight = leaves(7, (T, H), (V, H))
    with pytest.warns(UserWarning, match="with label_smoothing=0.1 and softcap=3.0 is computed by"):
        Loss(label_smoothing=0.1, softcap=3.0)(weight, hidden, targets(1)[0])
    weight.ds_id = 3
    with pytest.warns(UserWarning, match="a weight that ZeRO-3 has split"):
        Loss()(weight, hidden, targets(1)[0])
    assert len(asked) == 2
    hidden, weight = leaves(7, (2, T, H), (V, H))
    kto = liger.LigerFusedLinearKTOLoss(compiled=False)
    with pytest.warns(UserWarning, match="LigerFusedLinearKTOFunction with kl for each row"):
        kto(hidden, weight, targets(2), None, torch.tensor([True, False]), kl=torch.zeros(2))


def test_every_name_is_ligers_again(liger):
    """The functions, the classes' globals, and what others have imported."""

    def held():
        return {
            (module, name): value
            for module, found in list(sys.modules.items())
            if module.startswith("liger_kernel") and isinstance(found, types.ModuleType)
            for name, value in vars(found).items()
            if "used_linear" in name.lower() or "FusedLinear" in name
        }

    importlib.import_module("liger_kernel.chunked_loss.functional")
    importlib.import_module("liger_kernel.transformers")
    before = held()
    liger_switch.apply()
    changed = {name for (_, name), value in held().items() if value is not before[_, name]}
    kinds = ("DPO", "ORPO", "CPO", "SimPO", "KTO", "GRPO", "CrossEntropy")
    assert changed == {f"LigerFusedLinear{x}Function" for x in kinds} | {
        f"liger_fused_linear_{x.lower()}" for x in kinds[:-1]
    }
    with pytest.raises(ValueError, match="computed here already; call restore"):
        liger_switch.apply()
    liger_switch.restore()
    liger_switch.restore()
    assert all(value is before[key] for key, value in held().items())


def test_a_function_with_arguments_of_another_release_stays_ligers(liger, monkeypatch):
    from liger_kernel.chunked_loss import dpo_loss

    class Newer(dpo_loss.LigerFusedLinearDPOFunction):
        @classmethod
        def forward(cls, ctx, _input, weight, target, tree=None):
            return _input

    monkeypatch.setattr(dpo_loss, "LigerFusedLinearDPOFunction", Newer)
    with pytest.warns(UserWarning, match="Newer takes tree, which is not known here"):
        liger_switch.apply()
    assert dpo_loss.LigerFusedLinearDPOFunction is Newer


# ---- verl


def bare_verl(monkeypatch):
    """verl's own two files, without what its packages import (ray, tensordict)."""
    spec = importlib.util.find_spec("verl")
    if spec is None:
        pytest.skip("needs verl==0.9.* (its files are enough: pip install --no-deps)")
    root = spec.submodule_search_locations[0]
    for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel"):
        package = types.ModuleType(name)
        package.__path__ = [f"{root}/{name.removeprefix('verl').replace('.', '/')}"]
        monkeypatch.setitem(sys.modules, name, package)
    return [
        importlib.import_module(f"verl.utils.{name}")
        for name in ("experimental.torch_functional", "kernel.linear_cross_entropy")
    ]


@pytest.fixture(params=[stub_verl, bare_verl], ids=["stub", "verl"])
def verl(request, monkeypatch):
    yield request.param(monkeypatch)
    verl_switch.restore()
    for name in [x for x in sys.modules if x.startswith("verl")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_verls_backends_all_give_its_log_probs_and_entropies(verl, monkeypatch, temperature):
    functional, kernel = verl
    hidden, weight, *upstream = leaves(8, (2, T, H), (V, H), (2, T), (2, T))
    ids = targets(2).clamp(min=0).int()

    def run(score, *args, shape=(2, T)):
        got = score(hidden, weight, *args)
        assert got[0].shape == got[1].shape == shape
        got = [x.view(2, T) for x in got]
        weighted = sum((x * up.detach()).sum() for x, up in zip(got, upstream, strict=True))
        return [*got, *torch.autograd.grad(weighted, (hidden, weight))]

    want = run(functional.FusedLinearForPPO(), ids.long(), temperature)
    holder = types.ModuleType("model_forward_fused")  # Megatron's, which imports the name
    holder.linear_cross_entropy = theirs = kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, "model_forward_fused", holder)
    verl_switch.apply()
    monkeypatch.setattr(torch.nn.functional, "log_softmax", None)
    found = [
        run(functional.FusedLinearForPPO(impl_backend=backend), ids, temperature)
        for backend in ("torch", "liger")
    ]
    found += [  # flat, as verl's is
        run(module.linear_cross_entropy, ids, temperature, "none", shape=(2 * T,))
        for module in (kernel, holder)
    ]
    for got in found:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    verl_switch.restore()
    assert kernel.linear_cross_entropy is holder.linear_cross_entropy is theirs
    assert functional.FusedLinearForPPO.forward is not verl_switch.fused_linear_for_ppo


def test_a_head_over_ranks_and_a_reduction_stay_verls_own(monkeypatch):
    _, kernel = stub_verl(monkeypatch)
    verl_switch.apply()
    sizes = {"one": 1, "two": 2}
    monkeypatch.setattr(torch.distributed, "get_world_size", sizes.get)
    hidden, weight = leaves(8, (T, H), (V, H))
    args = (hidden, weight, targets(1)[0].clamp(min=0), 1.0)
    assert kernel.linear_cross_entropy(*args, "none", "one")[0].shape == (T,)
    with pytest.warns(UserWarning, match="with a head over 2 ranks is computed by verl itself"):
        assert kernel.linear_cross_entropy(*args, "none", "two") == ("theirs", *args, "none", "two")
    with pytest.warns(UserWarning, match="with reduction='mean' is computed by verl itself"):
        assert kernel.linear_cross_entropy(*args, "mean")[0] == "theirs"
    with pytest.raises(ValueError, match="computed here already; call restore"):
        verl_switch.apply()
    verl_switch.restore()
    verl_switch.restore()


def test_verls_workers_switch_is_an_import(monkeypatch):
    _, kernel = stub_verl(monkeypatch)
    monkeypatch.delitem(sys.modules, "pro_kernels.integrations.verl_workers", raising=False)
    importlib.import_module("pro_kernels.integrations.verl_workers")
    assert kernel.linear_cross_entropy.func is verl_switch.linear_cross_entropy
    verl_switch.restore()


def test_another_verl_is_named(monkeypatch):
    functional, _ = stub_verl(monkeypatch)
    functional.FusedLinearForPPO.forward = lambda self, hidden_states, mask: None
    with pytest.raises(ValueError, match=r"takes \['self', 'hidden_states', 'mask'\], and what"):
        verl_switch.apply()


# ---- plugins


@pytest.fixture
def model():
    return make()


def is_attached(model) -> bool:
    return type(model(torch.arange(2 * T).view(2, T)).logits) is not torch.Tensor


@pytest.fixture(params=["stub", "axolotl"])
def axolotl(request, monkeypatch):
    pytest.importorskip("pydantic")
    if request.param == "axolotl":
        pytest.importorskip("axolotl", reason="needs axolotl==0.19.*")
    else:
        base = stub(monkeypatch, "axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {})
    monkeypatch.delitem(sys.modules, "pro_kernels.integrations.axolotl", raising=False)
    yield importlib.import_module("pro_kernels.integrations.axolotl")
    sys.modules.pop("pro_kernels.integrations.axolotl")


@pytest.mark.parametrize("rows", ["padded", "distinct"])
def test_axolotls_plugin_attaches_what_axolotl_loads(axolotl, model, capsys, rows):
    plugin = axolotl.ProKernelsPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    args = getattr(importlib.import_module(module), name)
    plugin.post_model_load(args(pro_kernels_rows=rows), model)
    assert capsys.readouterr().out == "pro_kernels: LlamaForCausalLM is attached.\n"
    assert is_attached(model)
    assert (getattr(model, STATE).rows is not None) == (rows == "distinct")
    assert args().pro_kernels_rows == "padded"
    with pytest.raises(ValueError, match="pro_kernels_rows"):
        args(pro_kernels_rows="packed")


def test_axolotls_plugin_takes_adapters_and_says_why_a_model_is_left(axolotl, model, capsys):
    peft = pytest.importorskip("peft")
    plugin, cfg = axolotl.ProKernelsPlugin(), axolotl.ProKernelsArgs()
    plugin.post_model_load(cfg, torch.nn.Linear(2, 2))  # a model without a head is passed over
    assert not capsys.readouterr().out
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    plugin.post_model_load(cfg, wrapped)
    assert is_attached(wrapped)
    pk.detach(wrapped)
    model.to("meta")
    plugin.post_model_load(cfg, wrapped)
    assert "LlamaForCausalLM was not attached: " in capsys.readouterr().out


@pytest.fixture(params=["stub", "swift"])
def swift(request, monkeypatch):
    if request.param == "swift":
        pytest.importorskip("swift.model", reason="needs ms-swift==4.6.*")
        yield importlib.import_module("swift.model.register")
    else:

        class ModelLoader:
            def __init__(self, model, dummy):
                self.model, self.return_dummy_model = model, dummy

            def load(self):
                return self.model, "processor"

        register = stub(monkeypatch, "swift.model.register")
        register.ModelLoader = ModelLoader
        yield register
    pk.integrations.swift.restore()


def test_ms_swifts_plugin_is_a_file_that_attaches_what_ms_swift_loads(
    swift, model, capsys, monkeypatch
):
    runpy.run_module("pro_kernels.integrations.swift", run_name="__main__")
    theirs = swift.ModelLoader.load
    spec = importlib.util.spec_from_file_location("_external", capsys.readouterr().out.strip())
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # as ms-swift imports it
    assert swift.ModelLoader.load is not theirs
    monkeypatch.setenv("PRO_KERNELS_RUN_ROWS", "distinct")
    if theirs.__module__ == __name__:
        loader = swift.ModelLoader(model, dummy=True)
        assert loader.load() == (model, "processor") and not is_attached(model)
        loader.return_dummy_model = False
        assert loader.load() == (model, "processor") and is_attached(model)
        assert getattr(model, STATE).rows is not None
        assert capsys.readouterr().out == "pro_kernels: LlamaForCausalLM is attached.\n"
        loader.model = None  # only the tokenizer is asked for
        assert loader.load() == (None, "processor")
    with pytest.raises(ValueError, match="attached already; call restore"):
        pk.integrations.swift.apply()
    pk.integrations.swift.restore()
    pk.integrations.swift.restore()
    assert swift.ModelLoader.load is theirs


def test_the_plugins_folder_hides_no_package():
    """ms-swift puts it first on the path of every import."""
    files = {x.stem for x in pk.integrations.swift.PLUGIN.parent.glob("*.py")}
    assert files == {"__init__", "__main__", "pro_kernels_plugin"}
