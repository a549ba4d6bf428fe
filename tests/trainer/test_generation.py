"""Sampling: the same text for a prompt whatever it is batched with, and nothing left changed."""

from __future__ import annotations

import copy

import pytest
import torch
from texts import bytes_tokenizer, user
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from pro_trainer.prepare.draws import TokenPicker
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.sampling import bleu, prompt_limit, sample
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["a", "a much longer prompt than the others: ", "middle one", "b?"]


@pytest.fixture(scope="module")
def shared_model(tiny):
    """A model whose tokens are sure enough of themselves to end texts now and then."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


@pytest.fixture
def model(shared_model):
    """The same, to be changed."""
    return copy.deepcopy(shared_model)


@pytest.fixture
def tokenizer():
    """Not the model's own, to be changed."""
    return ByT5Tokenizer(extra_ids=0)


def draw(model, tokenizer, prompts, seeds=None, encoder=None, **options):
    few = {"num_samples": 2, "max_new_tokens": 12, "batch_size": 3, "top_p": 1.0, "stop": []}
    seeds = range(len(prompts)) if seeds is None else seeds
    encoder = encoder or Encoder(tokenizer)
    return sample(model, encoder, prompts, PrepareArguments(**{**few, **options}), seeds)


@pytest.mark.parametrize("special", [True, False])
def test_a_prompt_is_continued_the_same_alone_and_in_any_batch(model, tokenizer, special):
    """Also by a tokenizer with neither a padding nor an end token."""
    if not special:
        tokenizer = bytes_tokenizer()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    together = draw(model, tokenizer, PROMPTS, batch_size=8, top_p=0.9)
    for i, prompt in enumerate(PROMPTS):
        alone = draw(model, tokenizer, [prompt], seeds=[i], batch_size=1, top_p=0.9)
        assert alone == [together[i]]
    assert draw(model, tokenizer, PROMPTS, batch_size=3, top_p=0.9) == together
    assert [len(texts) for texts in together] == [2] * len(PROMPTS)
    assert len({text for texts in together for text in texts}) == 2 * len(PROMPTS)
    assert (tokenizer.pad_token is None) == (not special)  # as it was
    if not special:
        with pytest.raises(ValueError, match="the prompt is empty, and .* neither a BOS nor an E"):
            draw(model, tokenizer, [""])


def test_seeds_and_not_the_global_state_decide(model, tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(model, tokenizer, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draw(model, tokenizer, PROMPTS) == first
    assert draw(model, tokenizer, PROMPTS, seeds=[9, 8, 7, 6]) != first
    assert draw(model, tokenizer, [], seeds=[]) == []


def test_several_temperatures_are_those_of_the_samples_in_turn(model, tokenizer):
    cold, hot = (draw(model, tokenizer, PROMPTS, num_samples=3, temperature=[t]) for t in (0.2, 3))
    both = draw(model, tokenizer, PROMPTS, num_samples=3, temperature=[0.2, 3])
    assert both == [[a[0], b[1], a[2]] for a, b in zip(cold, hot, strict=True)] != cold


def test_tokens_are_drawn_from_the_tempered_and_cut_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    uniforms = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000

    def shares(temperature, top_p):
        picker = TokenPicker(uniforms, temperature, top_p)
        return (picker(None, logits.repeat(4000, 1)) == 0).double().mean(0)

    whole = (logits[0].double() / 0.7).softmax(-1)
    torch.testing.assert_close(shares(0.7, 1.0), whole, rtol=0, atol=5e-4)
    # 0.763 + 0.183 reach 0.94 together; the third token is the first one not needed.
    cut = torch.where(torch.arange(5) < 2, whole, 0)
    torch.testing.assert_close(shares(0.7, 0.94), cut / cut.sum(), rtol=0, atol=5e-4)
    assert shares(0.7, 0.01).tolist() == [1, 0, 0, 0, 0]
    # The least number there is draws no token of probability 0, the greatest none beyond the last.
    edges = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    assert TokenPicker(edges, 1.0, 1.0)(None, logits).argmax(-1).tolist() == [1, 2]


def test_modes_config_and_tokenizer_are_left_as_they_were(shared_model, model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    tokenizer.padding_side = "right"
    config = model.generation_config
    config.repetition_penalty = 1.7  # of the checkpoint; not for us, and not to be lost
    changed = draw(model, tokenizer, PROMPTS)
    assert changed == draw(shared_model, ByT5Tokenizer(extra_ids=0), PROMPTS)
    assert config.repetition_penalty == 1.7 and tokenizer.padding_side == "right"
    assert not model.model.layers[0].training and model.model.layers[1].training
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="not finite numbers"):
        draw(model, tokenizer, PROMPTS)
    assert model.generation_config is config and model.training


def test_text_ends_at_eos_and_before_a_stop_string(model, tokenizer, monkeypatch):
    def continued(**options):
        options = {"num_samples": 1, "max_new_tokens": 40, **options}
        return draw(model, tokenizer, ["abc"], **options)[0][0]

    plain = continued()
    stop = plain[5:7]
    assert stop in plain and continued(stop=["never", stop]) == plain[: plain.index(stop)]
    model.generation_config.eos_token_id = [tokenizer(plain[4])["input_ids"][0]]
    assert continued() == plain[: plain.index(plain[4])]

    steps = []

    def only_a(self, ids, scores):
        steps.append(1)
        letters = torch.full_like(scores, -torch.inf)
        letters[:, tokenizer("A")["input_ids"][0]] = 0
        return letters

    monkeypatch.setattr(TokenPicker, "__call__", only_a)
    continued(stop=["AA"])
    assert len(steps) == 2  # a stop string ends the work


def test_messages_go_through_the_chat_template(model, tokenizer):
    messages = (user("hi"),)
    with pytest.raises(ValueError, match="needs a chat template"):
        draw(model, tokenizer, [messages])
    tokenizer.chat_template = TEMPLATE
    as_written = Encoder(tokenizer, ListOptions(chat_template="off"))
    written = draw(model, tokenizer, ["<user>hi<assistant>"], encoder=as_written)
    assert draw(model, tokenizer, [messages]) == draw(model, tokenizer, ["hi"]) == written
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation: roles must alternate"):
        draw(model, tokenizer, [messages])


def test_prompts_are_cut_to_what_the_context_leaves(tokenizer):
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=1, n_head=2, **ends)
    model = GPT2LMHeadModel(config)
    prompt = "x" * 30 + "the end of it"
    whole = draw(model, tokenizer, [prompt], max_new_tokens=14)
    assert whole == draw(model, tokenizer, [prompt[-10:]], max_new_tokens=14)
    assert prompt_limit(model, 14) == 10 and prompt_limit(model, 14, 4) == 4
    short = draw(model, tokenizer, [prompt], max_new_tokens=14, max_prompt_length=4)
    assert short == draw(model, tokenizer, [prompt[-4:]], max_new_tokens=14)
    with pytest.raises(ValueError, match="max_new_tokens=24 leaves no room .* 24 positions"):
        draw(model, tokenizer, [prompt], max_new_tokens=24)


def test_a_peft_model_samples_with_its_adapter(model, tokenizer):
    peft = pytest.importorskip("peft")
    plain = draw(model, tokenizer, PROMPTS)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert draw(adapted, tokenizer, PROMPTS) != plain
    with adapted.disable_adapter():
        assert draw(adapted, tokenizer, PROMPTS) == plain


def test_bleu():
    pytest.importorskip("sacrebleu")
    reference = "the cat sat on the mat today"
    assert bleu([reference], [reference]) == pytest.approx(100)
    # 6 of 7 words, 5 of 6 pairs, 4 of 5 triples, 3 of 4 quadruples; no brevity penalty
    assert bleu(["the cat sat on the mat again"], [reference]) == pytest.approx(
        100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    )
