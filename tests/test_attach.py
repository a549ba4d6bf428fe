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
from pro_kernels.fused import call
from pro_kernels.models.lazy import LazyLogits
from pro_kernels.models.probe import FACTOR, allowed, last_bits_off, rms

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 67, "head_dim": 8}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 67}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
CONFIGS = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {},
    "Phi": {},
    "Phi3": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Gemma3Text": {"final_logit_softcapping": None},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 7.0},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "Falcon": {"num_kv_heads": 2, "ffn_hidden_size": 32},
    "Mixtral": EXPERTS | {"router_aux_loss_coef": 0.5},
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 4},
    "GPTNeoX": {},
}


def make(name: str, **extra) -> nn.Module:
    kind = name.split()[0]
    own = CONFIGS[name] if kind in ("GPT2", "GPTJ") else SIZES | CONFIGS[name]
    if kind == "Falcon":
        own = {k: v for k, v in own.items() if k != "head_dim"}  # a property of it
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**own, **SPECIAL, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)  # logits large enough for scale and softcap to matter
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


def batch(rows: int = 4, length: int = 9, vocab: int = 67) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def grads(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(ours: dict, theirs: dict, rtol: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        off = (ours[name] - want).norm() / want.norm().clamp_min(1e-12)
        assert off < rtol or (ours[name] - want).abs().max() < 1e-7, (name, float(off))


@pytest.mark.parametrize("name", CONFIGS)
def test_cross_entropy_is_the_models_own(name):
    model, inputs = make(name), batch()
    plain = model(**inputs)
    want = grads(model, plain.loss)
    assert pk.attach(model) is model
    out = model(**inputs)
    assert isinstance(out.logits, LazyLogits) and isinstance(out, type(plain))
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same_grads(grads(model, out.loss), want)
    logps = plain.logits[:, :-1].log_softmax(-1)
    targets = inputs["labels"][:, 1:]
    picked = logps.gather(2, targets.clamp_min(0)[..., None])[..., 0] * (targets >= 0)
    torch.testing.assert_close(out.token_logps[:, :-1], picked, rtol=1e-4, atol=1e-4)
    assert not out.token_logps[:, -1].any()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Mixtral", "OPT"])
def test_ranking_loss_is_that_of_the_logits(name):
    model, inputs = make(name), batch()
    rewards = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
    plain = model(**inputs)
    logits = plain.logits.view(2, 2, 9, -1)
    labels = inputs["labels"].view(2, 2, 9)
    reference = pk.reference.pro_loss(logits, labels, rewards, shift=True, ties="skip")
    aux = 0.5 * plain.aux_loss if name == "Mixtral" else 0.0
    want = grads(model, reference.loss + aux)
    pk.attach(model, ties="skip")
    out = model(**inputs, rewards=rewards)
    torch.testing.assert_close(out.loss, reference.loss + aux, rtol=1e-5, atol=1e-6)
    assert_same_grads(grads(model, out.loss), want)
    for field in ("scores", "logps", "rank_losses", "sft_loss"):
        torch.testing.assert_close(getattr(out, field), getattr(reference, field), rtol=1e-4,
                                   atol=1e-4)  # fmt: skip
    assert out.lengths.equal(reference.lengths) and isinstance(out.logits, LazyLogits)


def test_order_only_and_layout_and_masked_candidates():
    model, inputs = pk.attach(make("Llama")), batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        ordered = model(**inputs, labels=labels, num_candidates=2)
        layout = pk.Layout.from_padded(labels.view(2, 2, 9), shift=True)
        by_layout = model(**inputs, layout=layout)
        mask = torch.tensor([[True, False], [True, True]])
        masked = model(**inputs, labels=labels, num_candidates=2, candidate_mask=mask)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        by_shifted = model(**inputs, shift_labels=shifted, num_candidates=2)
    assert ordered.loss == by_layout.loss == by_shifted.loss and masked.loss != ordered.loss
    assert ordered.scores.shape == (2, 2) and masked.rank_losses != ordered.rank_losses


def test_num_items_in_batch():
    model, inputs = make("Llama"), batch()
    want = model(**inputs, num_items_in_batch=torch.tensor(7)).loss
    pk.attach(model)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(7)).loss, want)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=7).loss, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 0, 5, torch.tensor(0), torch.tensor(5)])
def test_a_batch_with_nothing_scored_has_loss_zero(dtype, items):
    """Where transformers' mean over no tokens is NaN."""
    model, inputs = make("Llama").to(dtype), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan()
    pk.attach(model)
    calls = [{} if items is None else {"num_items_in_batch": items}]
    if items is None:  # which the ranking loss does not take
        calls += [{"num_candidates": 2}, {"rewards": torch.tensor([[1.0, 0.0], [0.5, 2.0]])}]
    for call_with in calls:
        out = model(**inputs, **call_with)
        assert out.loss == 0 and not out.loss.signbit()
        found = grads(model, out.loss)
        assert len(found) == len(list(model.parameters()))
        assert not any(gradient.any() for gradient in found.values())


def test_calls_without_labels_and_generate_are_untouched():
    model, inputs = make("Gemma2"), batch()
    del inputs["labels"]
    want, generated = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)
    pk.attach(model)
    assert model(**inputs).logits.equal(want)
    assert model.generate(**inputs, max_new_tokens=3).equal(generated)


def test_positional_arguments_tuples_and_other_outputs():
    model, inputs = make("Llama"), batch()
    pk.attach(model)
    want = model(**inputs)
    out = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"],
                return_dict=False, output_hidden_states=True)  # fmt: skip
    assert isinstance(out, tuple) and out[0] == want.loss
    with_hidden = model(**inputs, output_hidden_states=True, use_cache=True)
    assert len(with_hidden.hidden_states) == 2 and with_hidden.past_key_values is not None


def test_detach_restores_and_copies_are_attached():
    model, inputs = make("Llama"), batch()
    before = dict(model.__dict__)
    pk.attach(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other(**inputs).loss != model(**inputs).loss and isinstance(
        other(**inputs).logits, LazyLogits
    )
    assert pk.detach(model) is model
    assert model.__dict__.keys() == before.keys() and model(**inputs).logits is not None
    assert isinstance(other(**inputs).logits, LazyLogits)
    assert not model._forward_hooks and not model._forward_pre_hooks
    pk.attach(model)
    with pytest.raises(TypeError, match="detach\\(model\\) before, or save its state_dict"):
        pickle.dumps(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is attached already; detach"):
        pk.attach(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not attached"):
        pk.detach(make("Llama"))


def test_a_forward_wrapped_since_is_not_torn_off():
    model = pk.attach(make("Llama"))
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="was wrapped after attach"):
        pk.detach(model)


def test_a_forward_wrapped_before_is_kept():
    model, inputs, calls = make("Llama"), batch(), []
    inner = model.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapper
    pk.attach(model)
    calls.clear()
    assert isinstance(model(**inputs).logits, LazyLogits) and calls
    pk.detach(model)
    assert model.forward is wrapper


def test_signature_is_the_models_with_the_ranking_arguments():
    own = inspect.signature(make("Llama").forward).parameters
    ours = inspect.signature(pk.attach(make("Llama")).forward).parameters
    assert [name for name in ours if name in own] == list(own)
    assert set(ours) - set(own) == {
        *("rewards", "num_candidates", "candidate_mask", "prompt_weights", "sft_index", "layout")
    }
    kinds = [p.kind for p in ours.values()]
    assert kinds[-1] is inspect.Parameter.VAR_KEYWORD


def test_no_grad_does_no_gradient_work(monkeypatch):
    model, inputs = pk.attach(make("Llama")), batch()
    tiers = []
    make_plan = call.make_plan

    def plan(*args, **kwargs):
        made = make_plan(*args, **kwargs)
        tiers.append(made.tier)
        return made

    monkeypatch.setattr(call, "make_plan", plan)
    with torch.no_grad():
        model(**inputs)
        model(**inputs, num_candidates=2)
    assert tiers == ["T0", "T0"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = make("Llama").train(), batch()
    want = grads(model, model(**inputs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_grads(grads(model, pk.attach(model)(**inputs).loss), want)


def test_logits_are_never_built(monkeypatch):
    model, inputs = pk.attach(make("Gemma2")), batch()
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        assert weight.shape[0] != 67, "the head's matmul ran outside of the fused path"
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    model(**inputs).loss.backward()


# ---- PEFT


def lora(target, **extra):
    from peft import LoraConfig

    return LoraConfig(target_modules=target, r=2, lora_alpha=4, init_lora_weights=False, **extra)


PEFT_CASES = {
    "layers": {"target": ["q_proj", "v_proj"]},
    "head": {"target": ["lm_head", "q_proj"]},
    "head with bias of B": {"target": ["lm_head"], "lora_bias": True},
    "head, DoRA": {"target": ["lm_head"], "use_dora": True},
    "layers, DoRA": {"target": ["q_proj"], "use_dora": True},
    "whole head": {"target": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PEFT_CASES)
def test_peft_before_and_after(name, when):
    from peft import get_peft_model

    options = dict(PEFT_CASES[name])
    model, inputs = make("Llama"), batch()
    if options.get("lora_bias"):
        model.lm_head = nn.Linear(16, 67)
    if when == "after":
        pk.attach(model)
    torch.manual_seed(0)
    peft = get_peft_model(model, lora(options.pop("target"), **options))
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "magnitude" in key:
                p.mul_(1.5)
    if when == "before":
        pk.attach(peft)
    fused = peft(**inputs)
    ours = grads(peft, fused.loss)
    pk.detach(peft)
    plain = peft(**inputs)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same_grads(ours, grads(peft, plain.loss))
    with peft.disable_adapter():
        base = peft(**inputs).loss
        torch.testing.assert_close(pk.attach(peft)(**inputs).loss, base, rtol=1e-5, atol=1e-6)


def test_merged_lora_and_dropout():
    from peft import get_peft_model

    peft, inputs = get_peft_model(make("Llama"), lora(["lm_head"], lora_dropout=0.5)), batch()
    pk.attach(peft).eval()
    with torch.no_grad():
        want = peft(**inputs).loss
        peft.merge_adapter()
        torch.testing.assert_close(peft(**inputs).loss, want, rtol=1e-5, atol=1e-6)
        peft.unmerge_adapter()
        peft.train()
        torch.manual_seed(5)
        fused = peft(**inputs).loss
        assert fused != want
        pk.detach(peft)
        torch.manual_seed(5)
        torch.testing.assert_close(peft(**inputs).loss, fused, rtol=1e-5, atol=1e-6)


def test_peft_that_cannot_be_served_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="learns a prompt"):
        pk.attach(get_peft_model(make("Llama"), config))
    dora = lora(["lm_head"], use_dora=True, lora_dropout=0.5)
    peft = pk.attach(get_peft_model(make("Llama"), dora))
    with pytest.raises(ValueError, match="DoRA adapter 'default' has dropout"):
        peft.train()(**batch())


def test_adapters_are_switched_and_not_mixed():
    get_peft_model = pytest.importorskip("peft").get_peft_model
    model, inputs = make("Llama"), batch()
    peft = get_peft_model(model, lora(["lm_head"])).eval()
    peft.add_adapter("other", lora(["lm_head"]))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_()
    want = {}
    for name in ("default", "other"):
        peft.set_adapter(name)
        want[name] = peft(**inputs).loss
    pk.attach(peft)
    for name in ("default", "other", "default"):
        peft.set_adapter(name)
        torch.testing.assert_close(peft(**inputs).loss, want[name], rtol=1e-5, atol=1e-6)
    assert abs(want["default"] - want["other"]) > 1e-3
    with pytest.raises(ValueError, match="called with more than its input .*adapter_names"):
        peft(**inputs, adapter_names=["default", "other"] * 2)


# ---- refusals


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


def test_heads_that_are_not_linear_are_refused():
    model = make("Llama")
    model.lm_head = nn.Sequential(nn.Linear(16, 67))
    with pytest.raises(ValueError, match="must be a torch.nn.Linear.*got Sequential; call pro_k"):
        pk.attach(model)
    model.lm_head = Quantised(16, 67)
    with pytest.raises(ValueError, match="must be a torch.nn.Linear.*got Quantised"):
        pk.attach(model)
    assert "forward" not in model.__dict__ and "_pro_kernels" not in model.__dict__


def patched(model, after=lambda logits: logits, loss=None):
    """The model with something done to its logits (or loss) that attach knows nothing of."""
    cls = type(model)

    class Patched(cls):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out["logits"] = after(out.logits)
            if labels is not None:
                out["loss"] = loss(out.logits, labels)
            return out

    Patched.__name__ = cls.__name__
    model.__class__ = Patched
    return model


def test_an_unknown_step_after_the_head_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM: logits after the head are up to"):
        pk.attach(patched(make("Llama"), torch.sin))
    with pytest.raises(ValueError, match="logits after the head are up to"):
        pk.attach(patched(make("Llama"), lambda x: 0 * x))  # a scale of 0
    with pytest.raises(ValueError, match="returns logits .* from a head of"):
        pk.attach(patched(make("Llama"), lambda x: x[..., :50]))
    offset = torch.arange(67.0)
    with pytest.raises(ValueError, match="logits after the head are up to"):
        pk.attach(patched(make("Llama"), lambda x: x + offset))
    extra = nn.Parameter(torch.zeros(67))
    with pytest.raises(ValueError, match="parameters of its own to its logits"):
        pk.attach(patched(make("Llama"), lambda x: x + extra))


# ---- what counts as rounding


def test_the_rule_is_a_multiple_of_the_noise_and_at_least_the_dtypes():
    bf16, fp32 = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
    assert allowed(0.5, 1.0, torch.float32) == FACTOR * 0.5
    assert allowed(0.0, 3.0, torch.float32) == FACTOR * 3 * fp32
    assert allowed(0.0, 3.0, torch.float32, torch.bfloat16) == FACTOR * 3 * bf16
    embedding, ids = nn.Embedding(67, 16), torch.arange(67)
    plain = embedding(ids)
    with last_bits_off(embedding, torch.float32):
        off = (embedding(ids).double() / plain.double() - 1).abs()
    assert (off >= fp32 / 2).all() and (off <= 2 * fp32).all() and embedding(ids).equal(plain)
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(12.5**0.5) and rms(torch.zeros(0)) == 0


def cancelling(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Large activations that the head's bias takes away again: its logits are mostly rounding."""
    model = make("Phi")
    norm, head, large = model.model.final_layernorm, model.lm_head, 1e4
    with torch.no_grad():
        norm.weight[0], norm.bias[0] = 0.0, large
        head.weight[:, 0], head.bias[:] = 1.0, -large
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noisy_arithmetic_is_not_refused(dtype):
    model, inputs = cancelling(dtype), batch()
    plain = model(**inputs)
    out = pk.attach(model)(**inputs)
    rounding = 1e4 * torch.finfo(dtype).eps
    assert (out.loss - plain.loss).abs() < 2 * rounding
    scaled = make("Llama").to(dtype)
    with torch.no_grad():
        scaled.model.norm.weight.mul_(1e4)
    pk.attach(scaled)
    pk.OpenModel(make("Mixtral").to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "after",
    [
        lambda x: x + 0.1 * x.abs(),
        lambda x: x.clamp(max=5),
        lambda x: x + 0.1 * x.roll(1, 1),  # positions are mixed
        lambda x: x - 0.1 * x.mean(-1, keepdim=True),
    ],
    ids=["bent", "clamped", "mixed", "centred"],
)
def test_what_is_more_than_rounding_is_refused(dtype, after):
    with pytest.raises(ValueError, match="logits after the head are up to"):
        pk.attach(patched(make("Llama").to(dtype), after))


def test_a_short_example_is_enough():
    """Of three labels one counts beside those ignored, four are as many as num_items_in_batch."""
    for length in (3, 4, 5):
        ids = torch.arange(3, 3 + length)[None]
        mask = {"attention_mask": torch.ones_like(ids)}
        for example in ({"input_ids": ids}, {"input_ids": ids} | mask):
            model, inputs = make("Llama"), batch()
            want = model(**inputs, num_items_in_batch=torch.tensor(7)).loss
            pk.attach(model, example=example)
            got = model(**inputs, num_items_in_batch=torch.tensor(7)).loss
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_own_cross_entropy_is_replaced_and_another_loss_refused():
    def own(logits, labels):
        flat = logits[:, :-1].reshape(-1, 67)
        return nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1))

    model, inputs = patched(make("Llama"), lambda x: 0.5 * x, own), batch()
    want = model(**inputs).loss
    fused = pk.attach(model)(**inputs)
    torch.testing.assert_close(fused.loss, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the loss of labels is .* the fused one"):
        pk.attach(patched(make("Llama"), loss=lambda x, y: own(x, y) + 0.1))


def test_a_loss_that_leaves_out_padding_is_refused():
    """As of some speech models: they agree until there is an attention mask."""

    def masked(cls):
        def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
            out = cls.forward(self, input_ids, attention_mask=attention_mask, **kwargs)
            if labels is not None:
                if attention_mask is not None:
                    labels = labels.masked_fill(attention_mask == 0, -100)
                flat = out.logits[:, :-1].flatten(0, 1)
                out["loss"] = nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
            return out

        return type(cls.__name__, (cls,), {"forward": forward})

    model = make("Llama")
    model.__class__ = masked(type(model))
    with pytest.raises(ValueError, match="the loss of padded and partly ignored labels is"):
        pk.attach(model)


def test_a_term_beside_the_cross_entropy_is_refused_in_16_bits_too():
    model = make("Llama").bfloat16()
    plain = model.loss_function
    model.loss_function = lambda *args, **kwargs: plain(*args, **kwargs) + 0.04
    with pytest.raises(ValueError, match="the loss of labels is"):
        pk.attach(model)
    del model._loss_function
    pk.attach(model)


def test_a_loss_that_knows_no_num_items_in_batch_still_does_not():
    def own(logits, labels):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model, inputs = patched(make("Llama"), loss=own), batch()
    want = model(**inputs, num_items_in_batch=torch.tensor(3)).loss
    got = pk.attach(model)(**inputs, num_items_in_batch=torch.tensor(3)).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_what_changes_after_attaching_is_noticed():
    model, inputs = pk.attach(make("Gemma2")), batch()
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="config.final_logit_softcapping is None, was 2.0"):
        model(**inputs)
    model.config.final_logit_softcapping = 2.0
    assert model(**inputs).loss.isfinite()
    model.loss_function = lambda *args, **kwargs: 0
    with pytest.raises(ValueError, match="loss_function is another"):
        model(**inputs)


@pytest.mark.parametrize("opened", [False, True], ids=["attached", "OpenModel"])
def test_what_the_head_gets_after_attaching_is_noticed(opened):
    model, inputs, seen = make("Llama"), batch(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))  # tried out, and harmless
    run = model
    if opened:
        run = functools.partial(
            pk.OpenModel(model).run, lambda head: (head.hidden.sum(), {"scores": head.hidden})
        )
    else:
        pk.attach(model)
        assert copy.deepcopy(model)(**inputs).loss.isfinite()
    head = model.lm_head
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


def test_a_hook_on_a_part_of_an_adapted_head_is_noticed():
    model, inputs = make("Llama"), batch()
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    pk.attach(adapted)
    assert adapted(**inputs).loss.isfinite()
    adapted.get_base_model().lm_head.base_layer.register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(ValueError, match="got a forward hook"):
        adapted(**inputs)


def test_a_forward_put_over_the_attached_one_is_noticed():
    """As ``Trainer(use_liger_kernel=True)`` does: it takes the rewards and says nothing."""
    model, inputs = pk.attach(make("Llama")), batch()
    model.forward = MethodType(type(model).forward, model)
    assert model(**inputs).logits is not None
    with pytest.raises(RuntimeError, match="replaced after attach.*use_liger_kernel"):
        model(**inputs, rewards=torch.tensor([[1.0, 0.0], [0.5, 2.0]]))


def test_a_call_within_a_call_is_refused_and_leaves_nothing_behind():
    model, inputs = pk.attach(make("Llama")), batch()
    handle = model.model.layers[0].register_forward_hook(lambda *_: model(**inputs) and None)
    with pytest.raises(RuntimeError, match="within a call of its own or from two threads"):
        model(**inputs)
    handle.remove()
    assert (
        isinstance(model(**inputs).logits, LazyLogits)
        and model(inputs["input_ids"]).logits.shape[-1] == 67
    )


def test_arguments_that_cannot_be_matched():
    model, inputs = pk.attach(make("Llama")), batch()
    ids = inputs["input_ids"]
    with pytest.raises(TypeError, match="by position, each once, got 1"):
        model(ids, input_ids=ids, labels=ids)
    with pytest.raises(TypeError, match="by position, each once, got 40"):
        model(*[ids] * 40)
    with pytest.raises(ValueError, match="example must hold input_ids, got .'extra'."):
        pk.attach(make("Llama"), example={"extra": 1})
    pk.attach(make("Llama"), example={"input_ids": ids, "labels": ids})
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(make("Llama").config)
    with pytest.raises(ValueError, match="is on the meta device"):
        pk.attach(empty)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_wrapped_models_are_refused(wrap):
    with pytest.raises(ValueError, match="is wrapped in .*; expected the model inside it"):
        pk.attach(wrap(make("Llama")))


def test_a_model_that_cannot_be_tried_out_is_refused():
    class Needs(type(make("Llama"))):
        def forward(self, *args, extra=None, **kwargs):
            return super().forward(*args, **kwargs) if extra is None else 1 / 0

    model = make("Llama")
    model.__class__ = Needs
    with pytest.raises(
        ValueError, match=r"could not be tried out on \['extra', 'input_ids'\] \(div"
    ):
        pk.attach(model, example={"input_ids": torch.tensor([[3, 4, 5]]), "extra": 1})
    pk.attach(model, example={"input_ids": torch.tensor([[3, 4, 5]])})


def test_a_vision_language_model():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    text = transformers.LlamaConfig(**SIZES, **SPECIAL)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=66, image_token_id=66
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 60, (2, 12))
    ids[:, 1:5] = 66  # the 2 x 2 patches of an image
    labels = ids.clone()
    labels[:, :6] = -100
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": labels}
    plain = model(**inputs)
    want = grads(model, plain.loss)
    fused = pk.attach(model)(**inputs)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert_same_grads(grads(model, fused.loss), want)
    assert model(**inputs, num_candidates=2).scores.shape == (1, 2)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        pk.attach({})
    with pytest.raises(ValueError, match="must be a causal LM of transformers, got Linear"):
        pk.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        pk.attach(make("Llama").model)
    t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        pk.attach(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(TypeError, match=r"attach got options \['temprature'\]; there are"):
        pk.attach(make("Llama"), temprature=1.0)
    with pytest.raises(ValueError, match="ties"):
        pk.attach(make("Llama"), ties="no")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards must be a tensor of shape \(B, n\), got \(4,\)"),
        ({"rewards": torch.zeros(1, 2)}, "labels must have 2 rows, one for each candidate, got 4"),
        ({"num_candidates": 3}, "labels must have a multiple of num_candidates=3 rows"),
        ({"num_candidates": 0}, "num_candidates must be an integer >= 1, got 0"),
        ({"candidate_mask": torch.ones(2, 2)}, "needs to know the candidates of each prompt"),
        ({"num_candidates": 4, "rewards": torch.zeros(2, 2)}, "num_candidates=4 but rewards have"),
        ({"logits_to_keep": 2, "num_candidates": 2}, "targets"),
        ({"num_candidates": 2, "sft_weight": 0.1}, r"got \['sft_weight'\]; options are given to"),
        ({"sequence_group": None}, r"got \['sequence_group'\]"),
    ],
)
def test_batches_that_do_not_fit(extra, message):
    with pytest.raises(ValueError, match=message):
        pk.attach(make("Llama"))(**batch(), **extra)


def test_the_loss_that_was_asked_for():
    model, inputs = make("Llama"), batch()
    pk.attach(model, loss="ranking")
    assert model.accepts_loss_kwargs is False
    with pytest.raises(ValueError, match="loss='ranking', and the batch does not say which rows"):
        model(**inputs)
    assert model(**inputs, num_candidates=2).scores.shape == (2, 2)
    pk.detach(model)
    assert not hasattr(model, "accepts_loss_kwargs")
    pk.attach(model, loss="cross_entropy")
    with pytest.raises(ValueError, match=r"loss='cross_entropy', which has no \['num_cand"):
        model(**inputs, num_candidates=2)
    pk.attach(pk.detach(model))
    with pytest.raises(ValueError, match="cannot be divided by num_items_in_batch, got 7"):
        model(**inputs, num_candidates=2, num_items_in_batch=7)
    with pytest.raises(ValueError, match="loss must be one of .*, got 'pro'"):
        pk.attach(pk.detach(model), loss="pro")


def test_rewards_without_labels_and_labels_shifted_twice():
    model, inputs = pk.attach(make("Llama")), batch()
    labels = inputs.pop("labels")
    with pytest.raises(ValueError, match=r"\['rewards'\] need labels"):
        model(**inputs, rewards=torch.zeros(2, 2))
    twice = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with pytest.raises(ValueError, match="labels are shifted already"):
        model(**inputs, labels=twice)


# ---- Trainer, accelerate, compile


def ranked_rows(prompts: int = 8, n: int = 2, length: int = 9) -> list[dict]:
    """One item a prompt: n rows of ids, labels and their rewards."""
    generator = torch.Generator().manual_seed(7)
    items = []
    for _ in range(prompts):
        ids = torch.randint(3, 67, (n, length), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        items.append({"input_ids": ids, "labels": labels,
                      "rewards": torch.randn(n, generator=generator)})  # fmt: skip
    return items


def collate_lists(items: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.cat([x["input_ids"] for x in items]),
        "labels": torch.cat([x["labels"] for x in items]),
        "rewards": torch.stack([x["rewards"] for x in items]),
    }


def trained(model, data, collator, folder, batch_size: int, accumulation: int):
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, max_steps=3,
        gradient_accumulation_steps=accumulation, learning_rate=0.05, optim="sgd", report_to=[],
        logging_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
        lr_scheduler_type="constant", dataloader_drop_last=True, seed=3,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=collator
    )
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return losses, trainer.evaluate()["eval_loss"], list(model.parameters())


def test_trainer_accumulates_cross_entropy_as_before(tmp_path):
    def collate(items):
        rows = {k: torch.cat([x[k] for x in items]) for k in ("input_ids", "labels")}
        rows["labels"][0, :6] = -100  # micro-batches of different numbers of tokens
        return rows

    runs = []
    for attached in (False, True):
        model = make("Llama")
        if attached:
            pk.attach(model, loss="cross_entropy")
        runs.append(trained(model, ranked_rows(), collate, tmp_path, 1, 2))
    (a, a_eval, a_parameters), (b, b_eval, b_parameters) = runs
    assert a == pytest.approx(b, rel=1e-4) and a_eval == pytest.approx(b_eval, rel=1e-4)
    for x, y in zip(a_parameters, b_parameters, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_trainer_accumulates_the_ranking_loss_as_one_batch(tmp_path):
    runs = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = pk.attach(make("Llama"), loss="ranking")
        runs.append(
            trained(model, ranked_rows(), collate_lists, tmp_path, batch_size, accumulation)
        )
    for losses, evaluated, parameters in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-3)
        assert evaluated == pytest.approx(runs[0][1], rel=1e-3)
        for x, y in zip(parameters, runs[0][2], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_accelerate_before_and_after(own_accelerate_state):
    from accelerate import Accelerator

    inputs, rewards = batch(), torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    losses, plain = [], accelerator.prepare(make("Llama"))(**inputs)
    for first in (True, False):
        model = make("Llama")
        if first:
            pk.attach(model)
        prepared = accelerator.prepare(model)
        if not first:
            pk.attach(prepared)
        out = prepared(**inputs, rewards=rewards)
        assert isinstance(out.logits, LazyLogits)
        accelerator.backward(out.loss)
        losses.append(out.loss.detach())
        assert all(p.grad is not None for p in model.parameters())
        torch.testing.assert_close(prepared(**inputs).loss, plain.loss, rtol=0.01, atol=0.01)
    torch.testing.assert_close(losses[0], losses[1])


def test_compiled_without_a_graph_break():
    model, inputs = make("Llama"), batch()
    rewards = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    pk.attach(model, loss="ranking")
    want = grads(model, model(**inputs, rewards=rewards).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        out = compiled(**inputs, rewards=rewards)
        assert_same_grads(grads(model, out.loss), want)
    assert out.logits is None and out.scores.shape == (2, 2)
    twin = copy.deepcopy(model)
    assert_same_grads(grads(twin, twin(**inputs, rewards=rewards).loss), want)
    pk.detach(model)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__
    assert model(**inputs).logits is not None


def test_functional_call_uses_the_parameters_given():
    model, inputs = pk.attach(make("Llama")), batch()
    other = {k: p * 1.1 for k, p in model.named_parameters()}
    moved = torch.func.functional_call(model, other, kwargs=inputs)
    assert isinstance(moved.logits, LazyLogits) and moved.loss != model(**inputs).loss
    leaves = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    torch.func.functional_call(model, leaves, kwargs=inputs).loss.backward()
    want = grads(model, model(**inputs).loss)
    assert_same_grads({k: p.grad for k, p in leaves.items()}, want)


def test_score_only_path_exports():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(67, 16))

        def forward(self, hidden, targets):
            return pk.linear_token_logps(hidden, self.weight, targets)

    scorer, hidden = Scorer(), torch.randn(2, 5, 16)
    targets = torch.randint(0, 67, (2, 5))
    targets[0, 2:] = -100
    with torch.no_grad():
        program = torch.export.export(scorer, (hidden, targets))
        got = program.module()(hidden, targets)
    assert any("pro_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(got, scorer(hidden, targets).detach())
