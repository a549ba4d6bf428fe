"""``distinct_rows``: a padded batch gives what it gave, from fewer tokens, or is refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import threading
import types
import warnings

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import nn

import pro_kernels as pk
import trees
from pro_kernels.distinct import decoder, interface
from trees import padded

SIZES = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "GptOss": {"sliding_window": 6, **EXPERTS},
    "Mixtral": EXPERTS,
    "Cohere2": {"sliding_window": 6},
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "GPTNeoX": {},
    "GPT2": GPT2,
    "Qwen3Next": {**DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "Qwen3_5Text": DELTA,
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "Bamba": {**MAMBA, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "FalconH1": {**MAMBA, "mamba_d_ssm": 64},
}  # fmt: skip


def make(name: str, **more: object) -> nn.Module:
    torch.manual_seed(1)
    own = MODELS[name] if name == "GPT2" else {**SIZES, **MODELS[name]}
    if name == "Phi3":
        own = {k: v for k, v in own.items() if k != "head_dim"}
    config = getattr(transformers, f"{name}Config")(**{**own, **more})
    return transformers.AutoModelForCausalLM.from_config(config)


def batch(left: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts of three completions, ragged, one of them twice."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 67, (count,), generator=generator).tolist()

    rows = []
    for length in (14, 9):
        prompt = tokens(length)
        rows += [prompt + tokens(k) for k in (3, 11, 6)]
    return padded([*rows, list(rows[1])], left)


def run(model: nn.Module, inputs: dict, **more: object) -> tuple[torch.Tensor, dict]:
    """Logits of the tokens that are there, and gradients of a loss on them."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False, **more).logits[inputs["attention_mask"] != 0]
    by = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (logits * by).sum().backward()
    return logits.detach(), {
        k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None
    }


def assert_same(ours, theirs, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=rtol)
    assert ours[1].keys() == theirs[1].keys()
    size = max(x.norm() for x in theirs[1].values())
    for name, want in theirs[1].items():
        assert (ours[1][name] - want).norm() <= rtol * max(want.norm(), 0.01 * size), name


def check_same(model: nn.Module, inputs: dict, rtol: float = 1e-4) -> None:
    """What it gave, from fewer tokens; afterwards the model is as it was."""
    want = run(model, inputs)
    with pk.distinct_rows(model) as rows:
        assert_same(run(model, inputs), want, rtol)
        assert rows.saved
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"] != 0]
    assert logits.equal(want[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_of_a_padded_batch(name, implementation):
    if name == "GptOss" and implementation == "sdpa":
        pytest.skip("GPT-OSS has no sdpa")
    model = make(name, attn_implementation=implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(model, batch())
        if name != "GPT2":
            check_same(model, batch(left=True))
    if name == "GPT2":  # its positions are the columns of the batch: rows padded on the left differ
        want = run(model, batch(left=True))
        with pk.distinct_rows(model) as rows, pytest.warns(UserWarning, match="position_ids"):
            assert_same(run(model, batch(left=True)), want)
        assert not rows.saved


def test_what_is_run():
    model, inputs = make("Llama"), batch()
    want = model(**inputs, use_cache=False, output_hidden_states=True)
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    with pk.distinct_rows(model) as rows:
        seen.clear()
        out = model(**inputs, use_cache=False, output_hidden_states=True)
        assert seen == [rows.run_tokens] == [14 + 20 + 9 + 20]
        assert rows.padded_tokens == inputs["input_ids"].numel() == 7 * 27
        assert rows.saved == 1 - 63 / 189
        as_tuple = model(**inputs, use_cache=False, return_dict=False)
    real = inputs["attention_mask"] != 0
    for ours, theirs in zip(out.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)
        assert not ours[~real].any()
    torch.testing.assert_close(as_tuple[0], out.logits)
    assert type(out) is type(want) and out.past_key_values is None


def test_what_is_left_alone():
    model, inputs = make("Llama").eval(), batch()
    full = {k: x[:1, :17] for k, x in inputs.items()}
    want = model.generate(**full, max_new_tokens=4, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pk.distinct_rows(model) as rows:
            assert model.generate(**full, max_new_tokens=4, do_sample=False).equal(want)
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
            assert rows.padded_tokens == 0
            model(**full, use_cache=False)  # nothing to leave out
            assert rows.padded_tokens == rows.run_tokens == 17


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"attention_mask": torch.ones(7, 1, 27, 27, dtype=torch.bool)}, "4 dimensions"),
        ({"position_ids": torch.arange(27).repeat(7, 1).flip(1)}, "position_ids are not those of"),
        ({"output_attentions": True}, "output_attentions asks for attention weights"),
        ({"is_causal": False}, "is_causal=False asks for attention to later tokens"),
        ({"token_type_ids": torch.zeros(7, 27).long()}, "token_type_ids.* are tensors"),
        ({"attention_mask": (torch.arange(27) % 5 > 0).long().repeat(7, 1)}, "padding between"),
    ],
    ids=["mask", "positions", "attentions", "causal", "tensors", "holes"],
)
def test_what_it_does_not_understand_runs_as_it_was_and_is_named_once(more, wrong):
    model = make("Llama", attn_implementation="eager").eval()
    inputs = {**batch(), **more, "use_cache": False}
    want = model(**inputs).logits
    with pk.distinct_rows(model) as rows:
        with pytest.warns(UserWarning, match=f"a padded batch was run as it is: .*{wrong}"):
            assert model(**inputs).logits.equal(want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
        assert rows.run_tokens == rows.padded_tokens


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_positions_that_are_given(left):
    inputs = batch(left)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for shift in (0, 5):
        check_same(make("Llama"), {**inputs, "position_ids": positions + shift})


@pytest.mark.parametrize("name", ["Gemma3Text", "Qwen3_5Text"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model = make(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check_same(model, batch())


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        check_same(make("Llama"), batch(), rtol=0.05)


def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False,
                             target_modules=["q_proj", "v_proj"])  # fmt: skip
    check_same(peft.get_peft_model(make("Llama"), config), batch())
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="learns a prompt"):
        pk.distinct_rows(peft.get_peft_model(make("Llama"), prompt))


def test_a_mask_that_is_no_tensor_and_noise_of_neftune():
    model, inputs = make("Llama").train(), batch()
    whole = {"full_attention": None, "sliding_attention": None}
    with pk.distinct_rows(model) as rows:
        with pytest.warns(UserWarning, match=r"its attention_mask is no \(R, T\) tensor: dict"):
            with contextlib.suppress(Exception):  # what the model itself says to it
                model(**inputs | {"attention_mask": whole}, use_cache=False)
        model.get_input_embeddings().neftune_noise_alpha = 5.0
        with pytest.warns(UserWarning, match="NEFTune's noise goes by the length of a row"):
            model(**inputs, use_cache=False)
        assert rows.padded_tokens == 0
        model.eval()(**inputs, use_cache=False)
        assert rows.saved


def test_a_cache_that_somebody_may_want_is_kept():
    model, inputs = make("Llama").eval(), batch()
    with pk.distinct_rows(model) as rows:
        with torch.no_grad():
            assert model(**inputs).past_key_values is not None and rows.padded_tokens == 0
        assert model(**inputs).past_key_values is None and rows.saved


def test_copies_pickles_shared_configs_and_a_forward_that_was_there():
    """A copy runs as the model did before; who had a forward of his own has it again."""
    model, inputs, calls = make("Llama"), batch(), []

    def noted(self, *args, **kwargs):
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    other = transformers.LlamaForCausalLM(model.config)
    want = [run(x, inputs) for x in (model, other)]
    model.model.forward = types.MethodType(noted, model.model)
    with pk.distinct_rows(other):
        with pk.distinct_rows(model) as rows:
            with pytest.raises(TypeError, match="runs distinct rows cannot be pickled"):
                pickle.dumps(model)
            twin, before = copy.deepcopy(model), rows.run_tokens
            calls.clear()
            assert_same(run(twin, inputs), want[0])
            assert rows.run_tokens == before
            assert_same(run(model, inputs), want[0])
            assert calls == [twin.model, model.model] and rows.saved
        assert_same(run(other, inputs), want[1])  # its config still names our attention
    assert model.config._attn_implementation == "sdpa"
    assert model.model.forward.__func__ is noted
    del model.model.forward
    pickle.dumps(model)
    with pk.distinct_rows(twin) as rows:
        assert_same(run(twin, inputs), want[0])
        assert rows.saved
    assert twin.config._attn_implementation == "sdpa"
    assert not any(decoder._configs.get(id(x.config)) for x in (model, twin))


def test_several_models_in_several_threads():
    models = [make(name) for name in ("Llama", "Gemma3Text")]
    want = [run(model, batch(seed=i)) for i, model in enumerate(models)]
    found: list = [None, None]

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = run(models[i], batch(seed=i))

    with pk.distinct_rows(models[0]) as first, pk.distinct_rows(models[1]) as second:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert first.saved and second.saved
    for ours, theirs in zip(found, want, strict=True):
        assert_same(ours, theirs)


def test_compiled_layers_do_not_compile_again_for_every_batch():
    model = make("Llama")
    want = [run(model, batch(seed=seed)) for seed in range(3)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with pk.distinct_rows(model) as rows:
        compiled = torch.compile(model, backend=counter)
        counts = []
        for seed in range(3):
            logits, grads = run(compiled, batch(seed=seed))
            grads = {name.removeprefix("_orig_mod."): x for name, x in grads.items()}
            assert_same((logits, grads), want[seed])
            counts.append(counter.frame_count)
        assert rows.saved and counts[-1] == counts[1]
    torch._dynamo.reset()


def test_a_router_sees_each_row_as_before():
    model, inputs = make("Mixtral", output_router_logits=True), batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    want = model(**inputs, labels=labels, use_cache=False)
    with pk.distinct_rows(model) as rows:
        out = model(**inputs, labels=labels, use_cache=False)
        assert rows.saved
    torch.testing.assert_close(out.aux_loss, want.aux_loss)
    torch.testing.assert_close(out.loss, want.loss)


def test_a_model_for_rewards():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    model, inputs = transformers.LlamaForSequenceClassification(config), batch()
    want = model(**inputs, use_cache=False).logits
    with pk.distinct_rows(model) as rows:
        found = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        assert rows.saved


def test_attach_with_distinct_rows_and_without():
    model, inputs = make("Llama"), batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :9] = -100
    ranked = {k: x[:6] for k, x in inputs.items()} | {"labels": labels[:6]}
    rewards = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    found = []
    for rows in ("padded", "distinct"):
        pk.attach(model, rows=rows)
        model.zero_grad()
        out = model(**ranked, rewards=rewards, use_cache=False)
        out.loss.backward()
        found.append((out.logps.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
        state = model.model.__dict__.get(decoder.STATE)
        assert (state is not None and state.saved > 0) == (rows == "distinct")
        pk.detach(model)
        assert decoder.STATE not in model.model.__dict__
        assert model.config._attn_implementation == "sdpa"
    assert_same(found[1], found[0])
    with pytest.raises(ValueError, match="rows must be one of"):
        pk.attach(model, rows="packed")
    with pk.distinct_rows(model):
        pk.detach(pk.attach(model, rows="distinct"))
        assert decoder.STATE in model.model.__dict__
    pk.attach(model)


def refused(model: nn.Module, wrong: str) -> None:
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=wrong), pk.distinct_rows(model):
        pass
    inner = model.get_decoder()
    assert decoder.STATE not in inner.__dict__ and "forward" not in inner.__dict__
    assert model.config._attn_implementation == before


def test_models_that_cannot():
    sizes = {"vocab_size": 67, "hidden_size": 32}
    mamba = transformers.MambaConfig(**sizes, num_hidden_layers=2, state_size=4)
    refused(transformers.MambaForCausalLM(mamba), "cannot run distinct rows: ")
    bloom = transformers.BloomConfig(**sizes, n_layer=2, n_head=4)
    refused(transformers.BloomForCausalLM(bloom), "cannot run distinct rows: ")
    refused(make("Llama", attention_dropout=0.1), "does not know attention dropout of 0.1")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        pk.distinct_rows(3)
    with pytest.raises(ValueError, match="must be a causal language model of trans.*, got Linear"):
        pk.distinct_rows(nn.Linear(2, 2))


def test_it_lasts_until_the_last_who_asked_for_it():
    model = make("Llama")
    with pk.distinct_rows(model) as first:
        second = pk.distinct_rows(model)
        assert second is first
    model(**batch(), use_cache=False)
    assert first.saved
    second.close()
    assert model.config._attn_implementation == "sdpa" and "forward" not in model.model.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [trees.moved, trees.leaking])
def test_planted_faults_in_the_tree_are_refused(fault, dtype, monkeypatch):
    # Weights large enough for attention to look at something.
    model, plain = make("Llama", initializer_range=0.3).to(dtype), pk.TokenTree.from_sequences
    monkeypatch.setattr(pk.TokenTree, "from_sequences", lambda rows: fault(plain(rows)))
    refused(model, "gradients of distinct rows differ from those of the padded batch by")


def test_planted_faults_in_windows_are_refused(monkeypatch):
    """Too wide a window is seen even where the rows of the trial are shorter than it."""
    plain = interface.over_tree

    def no_window(*args, sliding_window=None, **kwargs):
        return plain(*args, **kwargs)

    for window in (4, 64):
        model = make("Mistral", sliding_window=window)
        with monkeypatch.context() as patch:
            patch.setattr(interface, "over_tree", no_window)
            if window == 4:
                refused(model, "differ from those of the padded batch")
        name = transformers.models.mistral.modeling_mistral.MistralAttention
        with monkeypatch.context() as patch:
            patch.setattr(name, "forward", _without_window(name.forward))
            unseen = "is not told of sliding_window=64"
            refused(model, "differ from those" if window == 4 else unseen)


def _without_window(forward):
    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        registered = interface.registered("sdpa")
        functions = transformers.AttentionInterface._global_mapping
        whole = functions[registered]
        functions[registered] = lambda *a, sliding_window=None, **k: whole(*a, **k)
        try:
            return forward(self, *args, **kwargs)
        finally:
            functions[registered] = whole

    return run


def test_padding_that_is_read_is_refused(monkeypatch):
    plain = pk.TokenTree.index

    def next_to(self, shape, mask):
        index = plain(self, shape, mask)
        index[1:][mask.flatten()[1:] != 0] = index[:-1][mask.flatten()[1:] != 0]
        return index

    monkeypatch.setattr(pk.TokenTree, "index", next_to)
    refused(make("Llama"), "differ from those of the padded batch")
