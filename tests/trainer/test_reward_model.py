"""Scores of tiny sequence classifiers: what is scored, and that the batch does not matter."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch
from test_generation import TEMPLATE
from texts import assistant, classifier, save, user
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ByT5Tokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
)

from pro_trainer.prepare.scoring import RewardModel

llama = functools.partial(classifier, 259)


def gpt2():
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=259, num_labels=1, **ends, **size))


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=259, num_labels=1, num_attention_heads=2, pad_token_id=0, **size)
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer(extra_ids=0)


def pairs(n=20):
    draw = random.Random(0)
    letters = "abcdefgh </s>\n"
    text = lambda most: "".join(draw.choices(letters, k=draw.randint(1, most)))  # noqa: E731
    return [text(40) for _ in range(n)], [text(60) for _ in range(n)]


@pytest.mark.parametrize("build", [llama, lambda: llama(pad_token_id=None), gpt2, bert])
def test_scores_do_not_depend_on_the_batch(build, tokenizer):
    prompts, completions = pairs()
    alone = RewardModel(build().train(), tokenizer, batch_size=1)
    assert not alone.model.training
    alone = alone.score(prompts, completions)
    assert len(set(alone)) == len(alone) and all(isinstance(score, float) for score in alone)
    together = RewardModel(build(), tokenizer, batch_size=8)
    assert together.score(prompts, completions) == pytest.approx(alone, rel=1e-5, abs=1e-6)
    backwards = together.score(prompts[::-1], completions[::-1])
    assert backwards[::-1] == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_a_score_is_the_classifiers_own_at_the_last_token(tokenizer):
    model = llama(pad_token_id=None).eval()
    scores = RewardModel(model, tokenizer, batch_size=4).score(["q: ", "longer q: "], ["a", "bcd"])
    plain = llama(pad_token_id=None).eval()  # one text, no padding: transformers' own reading
    for text, score in zip(["q: a", "longer q: bcd"], scores, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])  # ends with EOS
        assert score == pytest.approx(plain(input_ids=ids).logits.item(), abs=1e-6)


def test_messages_are_scored_as_the_template_writes_them(tokenizer, tmp_path):
    reward_model = RewardModel.from_path(save(tmp_path / "rm", llama(), tokenizer))
    question, answer = (user("hi"),), (assistant("yes"),)
    with pytest.raises(ValueError, match="/rm lacks: set tokenizer.chat_template"):
        reward_model.score([question], [answer])
    reward_model.tokenizer.chat_template = TEMPLATE
    reward_model = RewardModel(reward_model.model, reward_model.tokenizer)
    ids = tokenizer("<user>hi<assistant>yes", add_special_tokens=False)["input_ids"]
    assert reward_model.encode(question, answer) == (ids, False)
    scores = reward_model.score([question, question], [answer, "yes"])
    assert scores == pytest.approx(reward_model.score_ids([ids]) * 2, abs=1e-6)
    with pytest.raises(TypeError, match="a prompt that is a string"):
        reward_model.score(["hi"], [answer])


def test_a_long_text_loses_its_start_but_for_the_first_special_token_and_is_counted(tokenizer):
    tokenizer.model_max_length = 12
    reward_model = RewardModel(llama(), tokenizer)
    long, cut = reward_model.encode("x" * 50 + "end", " answer")
    assert cut and len(long) == 12
    assert tokenizer.decode(long) == "xend answer</s>"
    assert reward_model.score(["x" * 50 + "end"], [" answer"]) == reward_model.score(
        ["y" * 9 + "xend"], [" answer"]
    )
    assert not reward_model.encode("x", "y")[1]
    tokenizer.model_max_length = 10**30
    assert RewardModel(gpt2(), tokenizer).max_length == 256  # the model's own limit

    class WithStart(ByT5Tokenizer):
        def build_inputs_with_special_tokens(self, ids, other=None):
            return [self.unk_token_id, *ids]

    started = WithStart(extra_ids=0, model_max_length=4)
    ids, cut = RewardModel(llama(), started).encode("abcd", "efg")
    assert cut and ids[0] == tokenizer.unk_token_id and tokenizer.decode(ids[1:]) == "efg"


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


def own_code(folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}, "num_labels": 1}'
    )
    (folder / "odd.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\n"
        "from transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'odd'\n"
    )


@pytest.mark.parametrize(
    ("build", "change", "wrong"),
    [
        (lambda: llama(2), None, r"/rm: .*num_labels=1\), .* has num_labels=2"),
        (lambda: LlamaForCausalLM(llama().config), None, r"lacks weights of \w+ \(score.weight\)"),
        (llama, no_safetensors, "not a reward model: .*safetensors"),
        (llama, own_code, "not a reward model: .* contains custom code"),
    ],
)
def test_a_folder_without_a_safe_reward_model_is_refused(build, change, wrong, tokenizer, tmp_path):
    folder = Path(save(tmp_path / "rm", build(), tokenizer))
    if change:
        change(folder)
    with pytest.raises(ValueError, match=wrong):
        RewardModel.from_path(str(folder))
    assert not (folder / "ran").exists()


def test_what_cannot_be_scored(tokenizer, tmp_path):
    reward_model = RewardModel(llama(), tokenizer)
    assert reward_model.score([], []) == []
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        reward_model.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="without tokens"):
        reward_model.score_ids([[5], []])
    for wrong, options in {
        "the tokenizer has 300 tokens, .* only 259": {"tokenizer": ByT5Tokenizer(extra_ids=41)},
        "num_labels=3": {"model": llama(3)},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            RewardModel(**{"model": llama(), "tokenizer": tokenizer, **options})
    with pytest.raises(ValueError, match="nothing-here: not a reward model"):
        RewardModel.from_path(str(tmp_path / "nothing-here"))
    with torch.no_grad():
        reward_model.model.score.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nan.*not finite numbers, in torch.float32"):
        reward_model.score(["a"], ["b"])
