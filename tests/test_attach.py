"""``attach``: the model's own numbers through the fused path, and loud refusals."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from types import MethodType

import pytest
import torch
import transformers
from torch import nn

import pro_kernels as pk
import tiny_models
from pro_kernels.models.lazy import LazyLogits
from tiny_models import V, assert_close, assert_same_grads, grads, make, next_logps

REWARDS = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
LINEAR = nn.functional.linear


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (4, 9), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = labels[1, 6:] = -100
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def llama() -> nn.Module:
    return make()


@pytest.fixture
def attached() -> nn.Module:
    return pk.attach(make())


def assert_as_before(model: nn.Module, inputs: dict, attach=pk.attach, **more):
    """The loss and gradients are those of the plain model; gives both outputs."""
    plain = model(**inputs)
    want = grads(model, plain.loss)
    assert attach(model) is model
    out = model(**inputs)
    assert isinstance(out.logits, LazyLogits) and isinstance(out, type(plain))
    assert_close(out.loss, plain.loss)
    assert_same_grads(grads(model, out.loss), want)
    return out, plain


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_cross_entropy_is_the_models_own(name, inputs):
    out, plain = assert_as_before(make(name), inputs)
    assert_close(out.token_logps[:, :-1], next_logps(plain.logits, inputs["labels"]), 1e-4)
    assert not out.token_logps[:, -1].any()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Mixtral", "OPT"])
def test_ranking_loss_is_that_of_the_logits(name, inputs):
    model = make(name)
    plain = model(**inputs)
    of_logits = plain.logits.view(2, 2, 9, -1), inputs["labels"].view(2, 2, 9), REWARDS
    reference = pk.reference.pro_loss(*of_logits, shift=True, ties="skip")
    loss = reference.loss + (0.5 * plain.aux_loss if name == "Mixtral" else 0.0)
    want = grads(model, loss)
    out = pk.attach(model, ties="skip")(**inputs, rewards=REWARDS)
    assert_close(out.loss, loss)
    assert_same_grads(grads(model, out.loss), want)
    for field in ("scores", "logps", "rank_losses", "sft_loss"):
        assert_close(getattr(out, field), getattr(reference, field), 1e-4)
    assert out.lengths.equal(reference.lengths) and isinstance(out.logits, LazyLogits)


def test_order_only_and_layout_and_masked_candidates(attached, inputs):
    labels = inputs.pop("labels")
    layout = pk.Layout.from_padded(labels.view(2, 2, 9), shift=True)
    mask = torch.tensor([[True, False], [True, True]])
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        ordered = attached(**inputs, labels=labels, num_candidates=2)
        by_layout = attached(**inputs, layout=layout)
        masked = attached(**inputs, labels=labels, num_candidates=2, candidate_mask=mask)
        by_shifted = attached(**inputs, shift_labels=shifted, num_candidates=2)
    assert ordered.loss == by_layout.loss == by_shifted.loss and masked.loss != ordered.loss
    assert ordered.scores.shape == (2, 2) and masked.rank_losses != ordered.rank_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_with_nothing_scored_has_loss_zero(llama, inputs, dtype):
    """Where transformers' mean over no tokens is NaN."""
    model = llama.to(dtype)
    inputs["labels"].fill_(-100)
    assert model(**inputs).loss.isnan()
    pk.attach(model)
    counts = [{"num_items_in_batch": x} for x in (0, 5, torch.tensor(0), torch.tensor(5))]
    for more in ({}, *counts, {"num_candidates": 2}, {"rewards": REWARDS}):
        out = model(**inputs, **more)
        assert out.loss == 0 and not out.loss.signbit()
        found = grads(model, out.loss)
        assert len(found) == len(list(model.parameters()))
        assert not any(gradient.any() for gradient in found.values())


def test_positional_arguments_tuples_and_other_outputs(attached, inputs):
    ids, mask, labels = inputs.values()
    want = attached(**inputs)
    out = attached(ids, mask, labels=labels, return_dict=False, output_hidden_states=True)
    assert isinstance(out, tuple) and out[0] == want.loss
    with_hidden = attached(**inputs, output_hidden_states=True, use_cache=True)
    assert len(with_hidden.hidden_states) == 2 and with_hidden.past_key_values is not None


def test_detach_restores_and_copies_are_attached(llama, inputs):
    before = dict(llama.__dict__)
    other = copy.deepcopy(pk.attach(llama))
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other(**inputs).loss != llama(**inputs).loss
    assert pk.detach(llama) is llama
    assert llama.__dict__.keys() == before.keys() and llama(**inputs).logits is not None
    assert isinstance(other(**inputs).logits, LazyLogits)
    assert not llama._forward_hooks and not llama._forward_pre_hooks
    with pytest.raises(ValueError, match="LlamaForCausalLM is not attached"):
        pk.detach(llama)
    pk.attach(llama)
    with pytest.raises(TypeError, match="detach\\(model\\) before, or save its state_dict"):
        pickle.dumps(llama)
    with pytest.raises(ValueError, match="LlamaForCausalLM is attached already; detach"):
        pk.attach(llama)


def test_forwards_wrapped_before_are_kept_and_later_ones_not_torn_off(llama, inputs):
    calls, inner = [], llama.forward
    llama.forward = wrapper = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    pk.attach(llama)
    calls.clear()
    assert isinstance(llama(**inputs).logits, LazyLogits) and calls
    ours = llama.forward
    llama.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="was wrapped after attach"):
        pk.detach(llama)
    llama.forward = ours
    assert pk.detach(llama).forward is wrapper


def test_signature_is_the_models_with_the_ranking_arguments(llama):
    own = inspect.signature(llama.forward).parameters
    ours = inspect.signature(pk.attach(llama).forward).parameters
    assert [name for name in ours if name in own] == list(own)
    more = "rewards num_candidates candidate_mask prompt_weights sft_index layout "
    more += "ref_logps desirable"
    assert set(ours) - set(own) == set(more.split())
    assert [p.kind for p in ours.values()][-1] is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(llama, inputs, reentrant):
    def attach(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return pk.attach(model)

    assert_as_before(llama.train(), inputs, attach)


def test_logits_are_never_built(inputs, monkeypatch):
    def watched(x, weight, bias=None):
        assert weight.shape[0] != V, "the head's matmul ran outside of the fused path"
        return LINEAR(x, weight, bias)

    model = pk.attach(make("Gemma2"))
    monkeypatch.setattr(nn.functional, "linear", watched)
    model(**inputs).loss.backward()


# ---- PEFT


def adapted(model: nn.Module, *target: str, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(target), **options))


PEFT_CASES = {
    "layers": ("q_proj", "v_proj", {}),
    "head": ("lm_head", "q_proj", {}),
    "head with bias of B": ("lm_head", {"lora_bias": True}),
    "head, DoRA": ("lm_head", {"use_dora": True}),
    "layers, DoRA": ("q_proj", {"use_dora": True}),
    "whole head": ("q_proj", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PEFT_CASES)
def test_peft_before_and_after(name, when, llama, inputs):
    *target, options = PEFT_CASES[name]
    if "lora_bias" in options:
        llama.lm_head = nn.Linear(16, V)
    if when == "after":
        pk.attach(llama)
    peft = adapted(llama, *target, **options)
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "magnitude" in key:
                p.mul_(1.5)
    if when == "before":
        pk.attach(peft)
    fused = peft(**inputs)
    ours = grads(peft, fused.loss)
    plain = pk.detach(peft)(**inputs)
    assert_close(fused.loss, plain.loss)
    assert_same_grads(ours, grads(peft, plain.loss))
    with peft.disable_adapter():
        base = peft(**inputs).loss
        assert_close(pk.attach(peft)(**inputs).loss, base)


def test_merged_lora_and_dropout(llama, inputs):
    peft = pk.attach(adapted(llama, "lm_head", lora_dropout=0.5)).eval()
    with torch.no_grad():
        want = peft(**inputs).loss
        peft.merge_adapter()
        assert_close(peft(**inputs).loss, want)
        peft.unmerge_adapter()
        peft.train()
        torch.manual_seed(5)
        fused = peft(**inputs).loss
        assert fused != want
        torch.manual_seed(5)
        assert_close(pk.detach(peft)(**inputs).loss, fused)


def test_adapters_that_cannot_be_served_are_refused(llama, inputs):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="learns a prompt"):
        pk.attach(peft.get_peft_model(make(), config))
    dora = pk.attach(adapted(llama, "lm_head", use_dora=True, lora_dropout=0.5))
    with pytest.raises(ValueError, match="DoRA adapter 'default' has dropout"):
        dora.train()(**inputs)
    hooked = pk.attach(adapted(make(), "lm_head"))
    assert hooked(**inputs).loss.isfinite()
    base = hooked.get_base_model().lm_head.base_layer
    base.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="got a forward hook"):
        hooked(**inputs)


def test_adapters_are_switched_and_not_mixed(llama, inputs):
    peft = adapted(llama, "lm_head").eval()
    peft.add_adapter("other", peft.peft_config["default"])
    names = ["default", "other"]

    def losses() -> torch.Tensor:
        return torch.stack([peft.set_adapter(x) or peft(**inputs).loss for x in names])

    want = losses()
    pk.attach(peft)
    for _ in range(2):
        assert_close(losses(), want)
    assert abs(want[0] - want[1]) > 1e-3
    with pytest.raises(ValueError, match="called with more than its input .*adapter_names"):
        peft(**inputs, adapter_names=names * 2)


# ---- refusals


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


def headed(head: nn.Module) -> nn.Module:
    model = make()
    model.lm_head = head
    return model


def own(logits, labels, mask=None):
    flat = logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten())


def own_without_padding(logits, labels, mask):
    """As of some speech models: it is the same until there is an attention mask."""
    return own(logits, labels if mask is None else labels.masked_fill(mask == 0, -100))


def patched(after=lambda logits: logits, loss=own, dtype=torch.float32) -> nn.Module:
    """A model with something done to its logits (or loss) that attach knows nothing of."""
    model = make().to(dtype)
    cls = type(model)

    class Patched(cls):
        def forward(self, *args, labels=None, attention_mask=None, **kwargs):
            out = super().forward(*args, attention_mask=attention_mask, **kwargs)
            out["logits"] = after(out.logits)
            if labels is not None:
                out["loss"] = loss(out.logits, labels, attention_mask)
            return out

    Patched.__name__ = cls.__name__
    model.__class__ = Patched
    return model


def with_a_term_beside_the_loss() -> nn.Module:
    model = make().bfloat16()
    plain = model.loss_function
    model.loss_function = lambda *args, **kwargs: plain(*args, **kwargs) + 0.04
    return model


def empty() -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(make().config)


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


NOT_LINEAR, OFF = (
    "must be a torch.nn.Linear.*got ",
    "LlamaForCausalLM: logits after the head are up",
)
OFFSET, PARAMETER = torch.arange(float(V)), nn.Parameter(torch.zeros(V))
MORE_THAN_ROUNDING = {
    "bent": lambda x: x + 0.1 * x.abs(),
    "clamped": lambda x: x.clamp(max=5),
    "positions are mixed": lambda x: x + 0.1 * x.roll(1, 1),
    "centred": lambda x: x - 0.1 * x.mean(-1, keepdim=True),
}
UNFIT = {
    "Sequential": (
        lambda: headed(nn.Sequential(nn.Linear(16, V))),
        NOT_LINEAR + "Sequential; call",
    ),
    "Quantised": (lambda: headed(Quantised(16, V)), NOT_LINEAR + "Quantised"),
    "sine": (lambda: patched(torch.sin), OFF),
    "scale of 0": (lambda: patched(lambda x: 0 * x), OFF),
    "offset": (lambda: patched(lambda x: x + OFFSET), OFF),
    "columns": (lambda: patched(lambda x: x[..., :50]), "returns logits .* from a head of"),
    "parameter": (lambda: patched(lambda x: x + PARAMETER), "parameters of its own to its logits"),
    "another loss": (
        lambda: patched(loss=lambda *args: own(*args) + 0.1),
        "the loss of labels is .* the fused one",
    ),
    "padding": (
        lambda: patched(loss=own_without_padding),
        "the loss of padded and partly ignored labels is",
    ),
    "a term in 16 bits": (with_a_term_beside_the_loss, "the loss of labels is"),
    "meta": (empty, "is on the meta device"),
    "compiled": (lambda: torch.compile(make()), "is wrapped in .*; expected the model inside it"),
    "parallel": (lambda: nn.DataParallel(make()), "is wrapped in .*; expected the model inside it"),
    "Linear": (lambda: nn.Linear(2, 2), "must be a causal LM of transformers, got Linear"),
    "no head": (lambda: make().model, "LlamaModel has no LM head"),
    "T5": (t5, "is an encoder-decoder"),
}
UNFIT |= {
    f"{name}, {dtype}": (functools.partial(patched, after, dtype=dtype), OFF)
    for name, after in MORE_THAN_ROUNDING.items()
    for dtype in (torch.float32, torch.bfloat16)
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_fused_path_would_not_repeat_is_refused(name):
    build, message = UNFIT[name]
    model = build()
    before = set(vars(model))
    with pytest.raises(ValueError, match=message):
        pk.attach(model)
    assert set(vars(model)) == before


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (None, {}, TypeError, "model must be a torch.nn.Module, got dict"),
        (
            "Llama",
            {"temprature": 1.0},
            TypeError,
            r"attach got options \['temprature'\]; there are",
        ),
        ("Llama", {"loss": "ranking", "z_loss": 0.1}, TypeError, "attach got options"),
        ("Llama", {"ties": "no"}, ValueError, "ties"),
        ("Llama", {"loss": "sft"}, ValueError, "loss must be one of .*, got 'sft'"),
        ("Llama", {"example": {"extra": 1}}, ValueError, "must hold input_ids, got .'extra'."),
        ("Llama", {"class_weight": torch.ones(V - 1)}, ValueError, r"must have shape \(V,\)"),
        ("Llama", {"z_loss": -1.0}, ValueError, "z_loss must be >= 0"),
        ("Gemma2", {"label_smoothing": 0.1}, ValueError, "cannot be had with a softcap"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        pk.attach(make(name) if name else {}, **options)


def test_arguments_by_position_are_given_once(llama, inputs):
    ids = inputs["input_ids"]
    pk.attach(llama, example={"input_ids": ids, "labels": ids})
    with pytest.raises(TypeError, match="by position, each once, got 1"):
        llama(ids, input_ids=ids, labels=ids)
    with pytest.raises(TypeError, match="by position, each once, got 40"):
        llama(*[ids] * 40)


def test_a_model_that_cannot_be_tried_out_is_refused(llama):
    class Needs(type(llama)):
        def forward(self, *args, extra=None, **kwargs):
            return super().forward(*args, **kwargs) if extra is None else 1 / 0

    llama.__class__ = Needs
    example = {"input_ids": torch.tensor([[3, 4, 5]])}
    with pytest.raises(ValueError, match=r"tried out on \['extra', 'input_ids'\] \(div"):
        pk.attach(llama, example={**example, "extra": 1})
    pk.attach(llama, example=example)


# ---- what counts as rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noisy_arithmetic_is_not_refused(dtype, llama, inputs):
    """Large activations that the head's bias takes away again: the logits are mostly rounding."""
    model = make("Phi")
    norm, head, large = model.model.final_layernorm, model.lm_head, 1e4
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 0.0, large
        head.weight[:, 0], head.bias[:] = 1.0, -large
        llama.model.norm.weight.mul_(large)
    model.to(dtype)
    plain = model(**inputs)
    out = pk.attach(model)(**inputs)
    assert (out.loss - plain.loss).abs() < 2 * large * torch.finfo(dtype).eps
    pk.attach(llama.to(dtype))
    pk.OpenModel(make("Mixtral").to(dtype))


def test_a_short_example_is_enough(inputs):
    """Of three labels one counts beside those ignored, four are as many as num_items_in_batch."""
    want = make()(**inputs, num_items_in_batch=torch.tensor(7)).loss
    for length in (3, 4, 5):
        ids = torch.arange(3, 3 + length)[None]
        for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
            model = pk.attach(make(), example={"input_ids": ids, **mask})
            for items in (torch.tensor(7), 7):
                assert_close(model(**inputs, num_items_in_batch=items).loss, want)


def test_an_own_cross_entropy_is_replaced(inputs):
    """One that knows no num_items_in_batch, and still does not."""
    model = patched(lambda x: 0.5 * x)
    want = model(**inputs).loss
    pk.attach(model)
    for items in ({}, {"num_items_in_batch": torch.tensor(3)}):
        assert_close(model(**inputs, **items).loss, want)


CLASSES = {"class_weight": torch.linspace(0.1, 2.0, V), "label_smoothing": 0.1}


def of_classes(logits, labels, vocab_size, num_items_in_batch=None, **_):
    """A loss function as people give their models one."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), CLASSES["class_weight"],
        label_smoothing=0.1, reduction=reduction,
    )  # fmt: skip
    return loss / (num_items_in_batch or 1)


@pytest.mark.parametrize("own", [True, False], ids=["the model's own", "of attach"])
@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": torch.tensor(7)}], ids=["", "items"])
def test_classes_of_a_labels_cross_entropy(own, items, inputs):
    model = make()
    model.loss_function = of_classes
    want = model(**inputs, **items).loss
    expected = grads(model, want)
    if own:
        with pytest.raises(ValueError, match="the model's is not the mean cross-entropy"):
            pk.attach(model)
    else:
        model = make()
    pk.attach(model, **CLASSES, z_loss=0.0)
    out = model(**inputs, **items)
    assert_close(out.loss, want)
    assert_same_grads(grads(model, out.loss), expected)
    assert out.token_logps.shape == inputs["labels"].shape


# ---- what is noticed in a call


def test_what_changes_after_attaching_is_noticed(inputs):
    model = pk.attach(make("Gemma2"))
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="config.final_logit_softcapping is None, was 2.0"):
        model(**inputs)
    model.config.final_logit_softcapping = 2.0
    assert model(**inputs).loss.isfinite()
    model.loss_function = lambda *args, **kwargs: 0
    with pytest.raises(ValueError, match="loss_function is another"):
        model(**inputs)


@pytest.mark.parametrize("opened", [False, True], ids=["attached", "OpenModel"])
def test_what_the_head_gets_after_attaching_is_noticed(opened, llama, inputs):
    head, run = llama.lm_head, llama
    head.register_forward_hook(lambda *_: None)  # tried out, and harmless
    if opened:
        score = lambda head: (head.hidden.sum(), {"scores": head.hidden})  # noqa: E731
        run = functools.partial(pk.OpenModel(llama).run, score)
    else:
        assert copy.deepcopy(pk.attach(llama))(**inputs).loss.isfinite()
    double = head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="LM head of LlamaForCausalLM got a forward hook .*remove"):
        run(**inputs)
    double.remove()
    head.forward = lambda x: 2 * nn.Linear.forward(head, x)
    with pytest.raises(ValueError, match="got another forward .*after attach"):
        run(**inputs)
    del head.forward
    plain = run(**inputs).loss
    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))  # what it returns is read
    assert (run(**inputs).loss - plain).abs() > 1e-3


def test_a_forward_put_over_the_attached_one_is_noticed(attached, inputs):
    """As ``Trainer(use_liger_kernel=True)`` does: it takes the rewards and says nothing."""
    attached.forward = MethodType(type(attached).forward, attached)
    assert attached(**inputs).logits is not None
    with pytest.raises(RuntimeError, match="replaced after attach.*use_liger_kernel"):
        attached(**inputs, rewards=REWARDS)


def test_a_call_within_a_call_is_refused_and_leaves_nothing_behind(attached, inputs):
    layer = attached.model.layers[0]
    handle = layer.register_forward_hook(lambda *_: attached(**inputs) and None)
    with pytest.raises(RuntimeError, match="within a call of its own or from two threads"):
        attached(**inputs)
    handle.remove()
    assert isinstance(attached(**inputs).logits, LazyLogits)
    assert attached(inputs["input_ids"]).logits.shape[-1] == V


def test_a_vision_language_model():
    sizes = {
        x: tiny_models.SIZES[x] for x in ("hidden_size", "intermediate_size", "num_attention_heads")
    }
    vision = transformers.CLIPVisionConfig(
        num_hidden_layers=2, image_size=8, patch_size=4, projection_dim=16, **sizes
    )
    text = transformers.LlamaConfig(**tiny_models.SIZES, **tiny_models.SPECIAL)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=66, image_token_id=66
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 60, (2, 12))
    ids[:, 1:5] = 66  # the 2 x 2 patches of an image
    labels = ids.clone()
    labels[:, :6] = -100
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": labels}
    assert_as_before(model, inputs)
    assert model(**inputs, num_candidates=2).scores.shape == (1, 2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards must be a tensor of shape \(B, n\), got \(4,\)"),
        ({"rewards": torch.zeros(1, 2)}, "labels must have 2 rows, one for each candidate, got 4"),
        ({"num_candidates": 3}, "labels must have a multiple of num_candidates=3 rows"),
        ({"num_candidates": 0}, "num_candidates must be an integer >= 1, got 0"),
        ({"candidate_mask": torch.ones(2, 2)}, "needs to know the candidates of each prompt"),
        ({"num_candidates": 4, "rewards": torch.zeros(2, 2)}, "num_candidates=4 but rewards have"),
        ({"num_candidates": 2, "num_items_in_batch": 7}, "divided by num_items_in_batch, got 7"),
        ({"logits_to_keep": 2, "num_candidates": 2}, "targets"),
        ({"num_candidates": 2, "sft_weight": 0.1}, r"got \['sft_weight'\]; options are given to"),
        ({"sequence_group": None}, r"got \['sequence_group'\]"),
        ({"labels": None, "rewards": torch.zeros(2, 2)}, r"\['rewards'\] need labels"),
    ],
)
def test_batches_that_do_not_fit(extra, message, attached, inputs):
    with pytest.raises(ValueError, match=message):
        attached(**inputs | extra)


def test_labels_shifted_twice_are_noticed(attached, inputs):
    inputs["labels"] = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    with pytest.raises(ValueError, match="labels are shifted already"):
        attached(**inputs)


def test_the_loss_that_was_asked_for(llama, inputs):
    pk.attach(llama, loss="ranking")
    assert llama.accepts_loss_kwargs is False
    with pytest.raises(ValueError, match="loss='ranking', and the batch does not say which rows"):
        llama(**inputs)
    assert llama(**inputs, num_candidates=2).scores.shape == (2, 2)
    pk.detach(llama)
    assert not hasattr(llama, "accepts_loss_kwargs")
    pk.attach(llama, loss="cross_entropy")
    with pytest.raises(ValueError, match=r"loss='cross_entropy', which has no \['num_cand"):
        llama(**inputs, num_candidates=2)


# ---- Trainer, accelerate, compile


def ranked_rows(prompts: int = 8, n: int = 2, length: int = 9) -> list[dict]:
    """One item a prompt: n rows of ids, labels and their rewards."""
    ids = torch.randint(3, V, (prompts, n, length))
    labels = ids.masked_fill(torch.arange(length) < 3, -100)
    items = zip(ids, labels, torch.randn(prompts, n), strict=True)
    return [dict(zip(("input_ids", "labels", "rewards"), x, strict=True)) for x in items]


def trained(model, collator, folder, batch_size: int, accumulation: int):
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, max_steps=3,
        gradient_accumulation_steps=accumulation, learning_rate=0.05, optim="sgd", report_to=[],
        logging_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
        lr_scheduler_type="constant", dataloader_drop_last=True, seed=3,
    )  # fmt: skip
    torch.manual_seed(7)
    data = {"train_dataset": ranked_rows()}
    data["eval_dataset"] = data["train_dataset"]
    trainer = transformers.Trainer(model, args, **data, data_collator=collator)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return [*losses, trainer.evaluate()["eval_loss"]], list(model.parameters())


def assert_trained_alike(ours, theirs, rel: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    for x, y in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(x, y, rtol=rel, atol=1e-5)


def collated(items):
    return {k: torch.cat([x[k] for x in items]) for k in ("input_ids", "labels")}


def test_trainer_accumulates_cross_entropy_as_before(tmp_path):
    def collate(items):
        rows = collated(items)
        rows["labels"][0, :6] = -100  # micro-batches of different numbers of tokens
        return rows

    plain = trained(make(), collate, tmp_path, 1, 2)
    model = pk.attach(make(), loss="cross_entropy")
    assert_trained_alike(trained(model, collate, tmp_path, 1, 2), plain, 1e-4)


def test_trainer_accumulates_the_ranking_loss_as_one_batch(tmp_path):
    def collate(items):
        return collated(items) | {"rewards": torch.stack([x["rewards"] for x in items])}

    whole, *parts = (
        trained(pk.attach(make(), loss="ranking"), collate, tmp_path, 4 // steps, steps)
        for steps in (1, 2, 4)
    )
    for run in parts:
        assert_trained_alike(run, whole, 1e-3)


def test_accelerate_before_and_after(own_accelerate_state, inputs):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    losses, plain = [], accelerator.prepare(make())(**inputs)
    for ways in ((pk.attach, accelerator.prepare), (accelerator.prepare, pk.attach)):
        model = prepared = make()
        for way in ways:
            prepared = way(prepared)
        out = prepared(**inputs, rewards=REWARDS)
        assert isinstance(out.logits, LazyLogits)
        accelerator.backward(out.loss)
        losses.append(out.loss.detach())
        assert all(p.grad is not None for p in model.parameters())
        assert_close(prepared(**inputs).loss, plain.loss, 0.01)
    assert_close(*losses, 1e-6)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.10 makes several graphs of an attached model"
)
def test_compiled_without_a_graph_break(llama, inputs):
    pk.attach(llama, loss="ranking")
    want = grads(llama, llama(**inputs, rewards=REWARDS).loss)
    torch._dynamo.reset()
    compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        out = compiled(**inputs, rewards=REWARDS)
        assert_same_grads(grads(llama, out.loss), want)
    assert out.logits is None and out.scores.shape == (2, 2)
    twin = copy.deepcopy(llama)
    assert_same_grads(grads(twin, twin(**inputs, rewards=REWARDS).loss), want)
    pk.detach(llama)
    assert "forward" not in llama.__dict__ and "forward" not in llama.lm_head.__dict__
    assert llama(**inputs).logits is not None


def test_functional_call_uses_the_parameters_given(attached, inputs):
    other = {k: p * 1.1 for k, p in attached.named_parameters()}
    moved = torch.func.functional_call(attached, other, kwargs=inputs)
    assert isinstance(moved.logits, LazyLogits) and moved.loss != attached(**inputs).loss
    leaves = {k: p.detach().clone().requires_grad_() for k, p in attached.named_parameters()}
    torch.func.functional_call(attached, leaves, kwargs=inputs).loss.backward()
    want = grads(attached, attached(**inputs).loss)
    assert_same_grads({k: p.grad for k, p in leaves.items()}, want)


def test_score_only_path_exports():
    class Scorer(nn.Linear):
        def forward(self, hidden, targets):
            return pk.linear_token_logps(hidden, self.weight, targets)

    scorer, hidden = Scorer(16, V), torch.randn(2, 5, 16)
    targets = torch.randint(0, V, (2, 5))
    targets[0, 2:] = -100
    with torch.no_grad():
        program = torch.export.export(scorer, (hidden, targets))
        got = program.module()(hidden, targets)
    assert any("pro_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(got, scorer(hidden, targets).detach())
