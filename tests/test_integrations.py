"""TRL's trainers and the authors' batches on the fused path, against their own code."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import transformers
from torch import nn

import pro_kernels as pk
from pro_kernels.models import official
from pro_kernels.models import trl as swap
from pro_kernels.models.counts import COUNTS
from pro_kernels.models.lazy import LazyLogits
from pro_trainer.train.official import official_batch, official_loss

VOCABULARY = 259


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# ---- the authors' code


def lists(n: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(2)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {
            "prompts": [tokens(5 + b)],
            "completions": [tokens(3 + i) for i in range(n)],
            "rewards": sorted(torch.randn(n, generator=generator).tolist(), reverse=True),
            "sft_index": b,
        }
        for b in range(2)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_official_batches_give_the_official_loss_and_gradients(dtype):
    batch = official_batch(lists(), pad_token_id=0)
    model = tiny().to(dtype)
    theirs = official_loss(model, batch)
    theirs.loss.backward()
    want = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    out = official.compute_loss(model, batch)
    out.loss.backward()
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(out.loss, theirs.loss, check_dtype=False, **tolerance)
    torch.testing.assert_close(out.rank_losses, theirs.rank_losses, check_dtype=False, **tolerance)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], **tolerance)
    again = official.compute_loss(model, {**batch, "labels": batch["input_ids"]})
    assert again.loss == out.loss and isinstance(out.logits, LazyLogits)


def test_official_code_runs_one_forward():
    model, calls = tiny(), []
    official.compute_loss(model, official_batch(lists(), 0))
    model.model.register_forward_hook(lambda *_: calls.append(1))
    official.compute_loss(model, official_batch(lists(), 0))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, r"batch must hold tensors .*, got none for \['rewards'\]"),
        ({"prefix_mask": torch.zeros(1, 1, 1)}, r"batch\['prefix_mask'\] must have shape \(2, 3"),
        ({"rewards": torch.zeros(3)}, r"batch\['rewards'\] must have shape \(2, 3\), got \(3,\)"),
        ({"input_ids": torch.zeros(2, 3)}, r"batch\['input_ids'\] must have shape \(B, n, T\)"),
    ],
)
def test_official_batches_that_do_not_fit(change, message):
    batch = {**official_batch(lists(), 0), **change}
    with pytest.raises(ValueError, match=message):
        official.compute_loss(tiny(), batch)


@pytest.mark.parametrize("options", [{}, {"compat": "official", "top_k": 1}], ids=str)
def test_a_model_attached_otherwise_is_refused(options):
    model = pk.attach(tiny(), **options)
    with pytest.raises(ValueError, match="the model is attached with .*detach"):
        official.compute_loss(model, official_batch(lists(), 0))
    pk.detach(model)
    pk.attach(model, compat="official")  # terms are of the model's fp32 already
    assert official.compute_loss(model, official_batch(lists(), 0)).loss.isfinite()
    with pytest.raises(ValueError, match="top_k"):
        official.compute_loss(model, official_batch(lists(), 0), top_k=1)


# ---- TRL


@pytest.fixture
def trl():
    module = pytest.importorskip("trl")
    yield module
    swap.restore_trl()


def head_inputs(dtype, seed: int = 4):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(11, 16, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(67, 16, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(67, generator=g).to(dtype).requires_grad_()
    return (hidden, weight, bias), torch.randint(0, 67, (11,), generator=g), g


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("mean_logits",), swap._OUTPUTS], ids=str)
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_outputs_and_gradients_as_trls_function(trl, dtype, temperature, cap, outputs):
    from trl.kernels import ChunkedLogProbFunction

    found = []
    for function in (ChunkedLogProbFunction, swap.FusedLogProbs):
        tensors, targets, g = head_inputs(dtype)
        got = function.apply(*tensors, targets, temperature, 32, cap, 0.5, outputs)
        weights = torch.randn(2, 11, generator=g)
        loss = (got[0] * weights[0]).sum()
        if got[1] is not None:
            loss = loss + (got[1] * weights[1]).sum()
        loss.backward()
        found.append([*got, *(x.grad for x in tensors)])
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    if dtype == torch.bfloat16:  # they round the target's logit, ours is exact
        tolerance = {"rtol": 0.05, "atol": 0.05}
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert theirs.dtype == ours.dtype and theirs.requires_grad == ours.requires_grad
            torch.testing.assert_close(ours, theirs, **tolerance)


WORDS = ["red", "green", "blue", "one", "two", "three"]
PAIRS = [(a, b) for a in WORDS for b in WORDS]
ROWS = {
    "DPO": [
        {"prompt": f"say {a}", "chosen": f" {a} {b}", "rejected": f" {b} {b} {a}"} for a, b in PAIRS
    ],
    "KTO": [{"prompt": f"say {a}", "completion": f" {a} {b}", "label": a < b} for a, b in PAIRS],
    "SFT": [{"prompt": f"say {a}", "completion": f" {a} {b}"} for a, b in PAIRS],
    "GRPO": [{"prompt": f"say {a} {b}"} for a, b in PAIRS],
}
ROWS["RLOO"] = ROWS["GRPO"]
ON_LOGITS = ("CPO", "ORPO", "Reward")
ROWS |= dict.fromkeys(ON_LOGITS, ROWS["DPO"])


def trl_run(trl, folder, kind: str):
    """Losses, parameters and logs of some steps of one of TRL's own trainers."""
    from datasets import Dataset

    transformers.set_seed(1)  # GRPO and RLOO sample
    model, tokenizer = tiny(), transformers.ByT5Tokenizer(extra_ids=0)
    options, more = {}, {"processing_class": tokenizer}
    if kind in ("DPO", "KTO"):
        more["ref_model"] = tiny()
    if kind in ("GRPO", "RLOO"):
        model.save_pretrained(folder)  # from where they load their reference
        tokenizer.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        options = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}
        more["reward_funcs"] = lambda completions, **_: [float(len(set(c))) for c in completions]
    where = trl
    if kind in ("CPO", "ORPO"):
        where = importlib.import_module(f"trl.experimental.{kind.lower()}")
    if kind == "CPO":
        options = {"loss_type": "simpo", "cpo_alpha": 0.0}
    if kind == "Reward":
        transformers.set_seed(1)
        model.config.num_labels = 1
        model = transformers.LlamaForSequenceClassification(model.config)
    config = getattr(where, f"{kind}Config")(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05,
        optim="sgd", lr_scheduler_type="constant", report_to=[], use_cpu=True, bf16=False,
        logging_steps=1, disable_tqdm=True, save_strategy="no", seed=1,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = getattr(where, f"{kind}Trainer")(
        model, args=config, train_dataset=Dataset.from_list(ROWS[kind]), **more
    )
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    return [x["loss"] for x in logs], list(trainer.model.parameters()), logs


def rows_of_each_call(monkeypatch) -> list[int]:
    """The rows that each fused call gets, from now on."""
    rows, apply = [], swap.FusedLogProbs.apply

    def counted(hidden, *args):
        rows.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(swap.FusedLogProbs, "apply", counted)
    return rows


@pytest.mark.parametrize("rows", ["padded", "distinct"])
@pytest.mark.parametrize("kind", ROWS)
def test_trls_trainers_give_the_same_losses_and_parameters(
    trl, tmp_path, monkeypatch, capsys, kind, rows
):
    plain = trl_run(trl, tmp_path, kind)
    swap.accelerate_trl(rows=rows)
    calls = rows_of_each_call(monkeypatch)
    fused = trl_run(trl, tmp_path, kind)
    said = capsys.readouterr().out
    assert said.count("tokens were run (") == (rows == "distinct")
    assert bool(calls) == (kind not in ON_LOGITS)
    assert plain[0] == pytest.approx(fused[0], rel=1e-5, abs=1e-6)
    for a, b in zip(plain[1], fused[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for theirs, ours in zip(plain[2], fused[2], strict=True):
        for name in theirs.keys() & {"entropy", "mean_token_accuracy", "rewards/margins"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)
    swap.restore_trl()
    calls.clear()
    trl_run(trl, tmp_path, kind)
    assert not calls


@pytest.mark.filterwarnings("error:a padded batch was run as it is")
def test_margins_in_a_batch_of_the_reward_trainer_leave_its_rows_distinct(
    trl, tmp_path, monkeypatch
):
    rows = [{**row, "margin": i / 8} for i, row in enumerate(ROWS["Reward"])]
    monkeypatch.setitem(ROWS, "Reward", rows)
    plain = trl_run(trl, tmp_path, "Reward")
    swap.accelerate_trl()
    ran, padded = COUNTS["run_tokens"], COUNTS["padded_tokens"]
    fused = trl_run(trl, tmp_path, "Reward")
    ran, padded = COUNTS["run_tokens"] - ran, COUNTS["padded_tokens"] - padded
    assert 0 < ran < padded
    assert plain[0] == pytest.approx(fused[0], rel=1e-5)


def test_a_model_that_cannot_run_distinct_rows_runs_padded_ones_and_it_is_said(
    trl, tmp_path, monkeypatch, capsys
):
    def refused(model):
        raise ValueError("this one cannot")

    monkeypatch.setattr(swap, "distinct_rows", refused)
    swap.accelerate_trl()
    losses, _, _ = trl_run(trl, tmp_path, "DPO")
    said = capsys.readouterr().out
    assert len(losses) == 3
    for name in ("model", "ref_model"):
        assert said.count(f"pro_kernels: {name} runs padded rows: this one cannot") == 1
    with pytest.raises(ValueError, match="rows must be one of"):
        swap.accelerate_trl(rows="packed")


def test_positions_that_are_not_scored_never_reach_the_head(trl, monkeypatch):
    import trl.trainer.utils as utils

    swap.accelerate_trl()
    model = tiny()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    seen = rows_of_each_call(monkeypatch)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert seen == [8, 0] and out.log_probs.shape == (2, 8)
    (out.entropy.sum() + nothing.loss).backward()
    want = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    entropy = -(want.exp() * want).sum(-1)
    torch.testing.assert_close(out.entropy, entropy * out.label_mask, rtol=1e-4, atol=1e-5)


def test_a_weight_that_zero_3_split_is_trls_own_matter(trl, monkeypatch):
    from trl.kernels import ChunkedLogProbFunction

    tensors, targets, _ = head_inputs(torch.float32)
    tensors[1].ds_id = 7
    seen = []
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", lambda *args: seen.append(args))
    swap.FusedLogProbs.apply(*tensors, targets, 0.7, 32, 4.0, 0.5, ("entropy",))
    assert seen == [(*tensors, targets, 0.7, 32, 4.0, 0.5, ("entropy",))]


def test_twice_is_refused_and_a_function_of_other_arguments_stays_trls_own(trl, monkeypatch):
    import trl.trainer.utils as utils

    swap.accelerate_trl()
    with pytest.raises(ValueError, match="accelerated already"):
        swap.accelerate_trl()
    swap.restore_trl()
    swap.restore_trl()

    class Other:
        @staticmethod
        def forward(ctx, hidden):
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.warns(UserWarning, match="computes token log-probs with the arguments"):
        swap.accelerate_trl()
    assert utils._ChunkedLogProbFunction is Other


def test_a_release_without_that_function_has_its_models_attached(trl, tmp_path, monkeypatch):
    """As of TRL before 1.16, whose trainers work on logits; ORPO's of today still does."""
    import trl.trainer.base_trainer as base
    import trl.trainer.utils as utils

    plain = trl_run(trl, tmp_path, "ORPO")
    monkeypatch.setattr(base, "BaseTrainer", base._BaseTrainer, raising=False)
    monkeypatch.delattr(base, "_BaseTrainer")
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    before = COUNTS["lazy_rows"], COUNTS["made_rows"]
    swap.accelerate_trl()
    fused = trl_run(trl, tmp_path, "ORPO")
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    assert COUNTS["lazy_rows"] > before[0] and COUNTS["made_rows"] == before[1]
    swap.restore_trl()
    monkeypatch.setitem(sys.modules, "trl.trainer.base_trainer", None)
    with pytest.raises(ImportError, match="before the trainer is made does the same"):
        swap.accelerate_trl()


def test_a_missing_trl_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="accelerate_trl needs TRL "):
        swap.accelerate_trl()
