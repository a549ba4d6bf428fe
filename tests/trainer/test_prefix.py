"""A prompt that runs once: log-probs and gradients as without sharing, in every shape of model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pro_trainer.batch.collate import PROCollator
from pro_trainer.batch.prefix import check_sharing, model_inputs, packing_refusal, sharing_refusal

transformers = pytest.importorskip("transformers")

PAD, VOCAB = 0, 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# A window of 5 is shorter than prompts and completions: it ends inside both, and across the two.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3-sliding": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    ),
    "gemma2": ("Gemma2", {"sliding_window": 5, "layer_types": MIXED}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "layer_types": MIXED}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
    ),
}


def make(shape: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A random model; weights are large enough for attention to be far from uniform."""
    kind, options = SHAPES[shape]
    config_class = {
        "Gemma3": "Gemma3TextConfig",
    }.get(kind, f"{kind}Config")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    common = COMMON if kind != "GPT2" else {"vocab_size": VOCAB}
    config = getattr(transformers, config_class)(
        **common, **options, attn_implementation=attention, initializer_range=0.3
    )
    torch.manual_seed(1)
    return getattr(transformers, model_class)(config).to(dtype).eval()


def ids(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def lists(kind: str = "ragged") -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(3)
    one = {
        "prompts": [ids(g, 9)],
        "completions": [ids(g, m) for m in (7, 1, 12)],
        "rewards": [2.0, 1.0, 0.0],
    }
    two = {
        "prompts": [ids(g, 3)],
        "completions": [ids(g, m) for m in (4, 8)],
        "rewards": [1.0, 0.5],
    }
    start = ids(g, 6)
    differing = {
        # Common start of 6; the third is the start itself, the fourth shares nothing in `apart`.
        "prompts": [start + ids(g, 3), start + ids(g, 1), start, start + ids(g, 7)],
        "completions": [ids(g, m) for m in (5, 9, 6, 1)],
        "rewards": [4.0, 3.0, 2.0, 1.0],
    }
    apart = {**differing, "prompts": [ids(g, m) for m in (4, 1, 8, 2)]}
    kinds = {"ragged": [one, two], "differing": [differing, one], "apart": [apart, two]}
    return kinds[kind]


def logps(model: Any, batch: dict[str, Any]) -> Tensor:
    """(N,) log-probs of the scored tokens, from decoder and head."""
    output = model.base_model(**model_inputs(batch, model), use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[batch["layout"].rows]
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(1, batch["layout"].targets[:, None])[:, 0]


def grads(model: Any, batch: dict[str, Any], weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (logps(model, batch) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()  # NaN fails every comparison


def collate(features: list[dict[str, Any]], form: str, **options: Any) -> dict[str, Any]:
    return PROCollator(PAD, form=form, **options)(features)


def reference_batch(model: Any, features: list[dict[str, Any]]) -> dict[str, Any]:
    """The padded batch.

    Eager attention of transformers gives NaN in float64 for padding rows that a window leaves
    without any key (the mask's lowest float64 is -inf in its float32 softmax). There the mask is
    dropped: with padding on the right, causality alone keeps it out of sight.
    """
    batch = collate(features, "padded")
    if model.config._attn_implementation == "eager" and model.dtype == torch.float64:
        del batch["attention_mask"]
    return batch


def tolerance(shape: str) -> float:
    """In float64, Llama and its kin still take norms (and eager softmax) in float32."""
    return 1e-13 if shape == "gpt2" else 1e-6


@pytest.mark.parametrize("form", ["shared", "packed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_gradients_are_those_of_the_padded_batch(shape, attention, form):
    model = make(shape, attention)
    padded, other = reference_batch(model, lists()), collate(lists(), form)
    expected, got = logps(model, padded).detach(), logps(model, other).detach()
    assert relative(got, expected) < tolerance(shape)
    # The model must be one on which a wrong mask or position would show.
    assert expected.std() > 0.5
    weights = torch.randn(len(expected), dtype=torch.float64)
    expected, got = grads(model, padded, weights), grads(model, other, weights)
    assert expected.keys() == got.keys() and len(got) > 20
    for name, gradient in got.items():
        assert relative(gradient, expected[name]) < tolerance(shape), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_differs_by_rounding(shape, attention):
    """In fp32 sharing is as near to the fp64 truth as the padded batch is."""
    model = make(shape, attention, torch.float32)
    padded, shared = collate(lists(), "padded"), collate(lists(), "shared")
    weights = torch.randn(padded["layout"].num_tokens)
    with torch.no_grad():
        plain_logps, got_logps = logps(model, padded), logps(model, shared)
    plain, got = grads(model, padded, weights), grads(model, shared, weights)
    model = model.double()
    padded = reference_batch(model, lists())
    with torch.no_grad():
        true_logps = logps(model, padded)
    truth = grads(model, padded, weights.double())
    assert relative(got_logps, true_logps) < 2 * relative(plain_logps, true_logps) + 1e-6
    for name, gradient in got.items():
        floor = 2 * relative(plain[name].double(), truth[name]) + 1e-6
        assert relative(gradient.double(), truth[name]) < floor, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_changes_nothing(shape, attention):
    model = make(shape, attention)
    padded, shared = reference_batch(model, lists()), collate(lists(), "shared")
    weights = torch.randn(padded["layout"].num_tokens, dtype=torch.float64)
    expected = grads(model, padded, weights)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # else nothing is checkpointed
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    got = grads(model, shared, weights)
    assert expected.keys() == got.keys()
    for name, gradient in got.items():
        assert relative(gradient, expected[name]) < tolerance(shape), name


@pytest.mark.parametrize("kind", ["differing", "apart"])
@pytest.mark.parametrize("shape", ["llama", "gemma3", "gpt2"])
def test_candidates_with_prompts_of_their_own(shape, kind):
    model = make(shape)
    padded, shared = collate(lists(kind), "padded"), collate(lists(kind), "shared")
    expected = logps(model, padded)
    assert relative(logps(model, shared), expected) < tolerance(shape)
    if kind == "differing":
        # The common start of 6, the rest of each prompt, the completions; then the second list.
        expected_positions = 6 + (3 + 1 + 0 + 7) + (5 + 9 + 6 + 1) + 9 + (7 + 1 + 12)
        assert shared["preferences"].num_positions == expected_positions


def test_each_candidate_is_as_if_alone():
    """Changing one candidate's tokens moves no log-prob of another, bit for bit."""
    model = make("gemma3")
    features = lists()
    before = logps(model, collate(features, "shared"))
    changed = [dict(features[0]), features[1]]
    changed[0]["completions"] = [[5] * 7, *features[0]["completions"][1:]]
    after = logps(model, collate(changed, "shared"))
    assert not before[:7].equal(after[:7])
    assert before[7:].equal(after[7:])


@pytest.mark.parametrize("official", [False, True])
def test_official_scores_agree_in_every_form(official):
    model = make("llama")
    expected = logps(model, collate(lists(), "padded", official=official))
    for form in ("shared", "packed"):
        got = logps(model, collate(lists(), form, official=official))
        assert relative(got, expected) < tolerance("llama")


def config(**options: Any) -> Any:
    defaults = {"_attn_implementation": "sdpa", "sliding_window": None}
    return SimpleNamespace(**{**defaults, **options})


def small(name: str, **options: Any) -> Any:
    """A model of another family, as small as it comes."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": PAD}
    configuration = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return getattr(transformers, OTHER_CLASSES.get(name, f"{name}ForCausalLM"))(configuration)


OTHER_CLASSES = {"T5": "T5ForConditionalGeneration"}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 16}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: small("Mamba", state_size=4), "carry a state along the row"),
    "linear attention": (
        lambda: small("Lfm2", **ATTENTION, num_key_value_heads=2, layer_types=["conv"]),
        "conv: layers that carry a state",
    ),
    "chunked": (
        lambda: SimpleNamespace(config=text_config(layer_types=["chunked_attention"])),
        "chunked attention goes by the index",
    ),
    "T5": (
        lambda: small("T5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        "encoder-decoder",
    ),
    "bloom": (lambda: small("Bloom", n_head=2), "takes no position_ids"),
    "falcon": (lambda: small("Falcon", num_attention_heads=2, alibi=True), "ALiBi"),
    "gpt-neo": (
        lambda: small(
            "GPTNeo", num_layers=1, num_heads=2, attention_types=[[["local"], 1]], window_size=4
        ),
        "local attention goes by the index",
    ),
    "bidirectional": (
        lambda: SimpleNamespace(config=text_config(use_bidirectional_attention=True)),
        "not causal",
    ),
}


def text_config(**options: Any) -> Any:
    made = config(is_encoder_decoder=False, **options)
    made.get_text_config = lambda: made
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_share_are_refused_with_the_reason(name):
    build, reason = REFUSED[name]
    assert reason in sharing_refusal(build())


@pytest.mark.parametrize("shape", SHAPES)
def test_models_that_can_share_are_not_refused(shape):
    for attention in ("sdpa", "eager"):
        model = make(shape, attention, torch.float32)
        assert sharing_refusal(model) is None
        check_sharing(model, lists(), PAD)
        check_sharing(model, lists("apart"), PAD, form="packed")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|eager"])
def test_attention_without_a_mask_is_refused(name):
    model = make("llama")
    model.config._attn_implementation_internal = name
    assert f"{name!r} takes no mask of its own" in sharing_refusal(model)
    assert packing_refusal(model) is None  # packing is what it is made for
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot share prefixes: attention"):
        check_sharing(model, lists(), PAD)


def test_recurrent_models_are_not_packed_either():
    assert "carry a state" in packing_refusal(REFUSED["mamba"][0]())


class ByIndex(transformers.LlamaForCausalLM):
    """Takes position_ids and pays no heed to them, as no config would tell."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Strict(transformers.LlamaForCausalLM):
    """Takes no 4-D mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        if attention_mask.dim() != 2:
            raise RuntimeError("a 2-D mask, please")
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ByIndex, "token log-probs differ from those of the padded batch by .* rounding accounts"),
        (Strict, "it fails with RuntimeError: a 2-D mask, please"),
    ],
)
def test_the_check_finds_what_no_config_tells(kind, reason):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**COMMON)).train()  # as initialised: nearly uniform
    assert sharing_refusal(model) is None
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot share prefixes: .*{reason}"):
        check_sharing(model, lists(), PAD)
    assert model.training and model.model.layers[0].training


def test_the_check_accepts_the_rounding_of_sixteen_bits():
    for shape in ("llama", "gemma2", "gpt2"):
        check_sharing(make(shape, dtype=torch.bfloat16), lists(), PAD)
    with pytest.raises(ValueError, match="no list to check with"):
        check_sharing(make("llama"), [], PAD)


def test_the_check_leaves_modes_and_gradients_alone():
    model = make("llama").train()
    model.model.layers[1].eval()
    check_sharing(model, lists(), PAD)
    assert model.training and not model.model.layers[1].training
    assert all(p.grad is None for p in model.parameters())


def test_peft_models_share_unless_they_learn_a_prompt():
    peft = pytest.importorskip("peft")
    model = make("llama", dtype=torch.float32)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert sharing_refusal(lora) is None
    check_sharing(lora, lists(), PAD)
    prompt = peft.get_peft_model(
        make("llama", dtype=torch.float32),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    assert "tokens of its own before each row" in sharing_refusal(prompt)


def test_the_check_puts_the_very_weights_back_and_falls_back_where_memory_ends(monkeypatch):
    model = make("llama", dtype=torch.bfloat16)
    before = {name: (x.data_ptr(), x.dtype) for name, x in model.state_dict().items()}
    forward, seen = type(model).forward, []

    def small(self, *args, **kwargs):
        seen.append(self.dtype)
        if self.dtype == torch.float32:
            raise torch.OutOfMemoryError("no room for that")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", small)
    check_sharing(model, lists(), PAD)
    assert seen[0] == torch.float32 and set(seen[1:]) == {torch.bfloat16}
    assert before == {name: (x.data_ptr(), x.dtype) for name, x in model.state_dict().items()}


def test_the_check_goes_past_a_forward_that_turns_autocast_on():
    model = make("llama", dtype=torch.float32)

    def rounded(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return type(model).forward(model, *args, **kwargs)

    model.forward = rounded  # as accelerate leaves it behind
    check_sharing(model, lists(), PAD)


def test_a_router_whose_loss_takes_another_mask_is_named():
    model = make("llama", dtype=torch.float32)
    model.config.output_router_logits = True
    assert "auxiliary loss" in sharing_refusal(model) and packing_refusal(model) is None
