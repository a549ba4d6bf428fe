"""TRL's trainers and the authors' batches on the fused path, against their own code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys

import pytest
import torch
import transformers
from torch import nn

import pro_kernels as pk
from pro_kernels.distinct.decoder import Distinct
from pro_kernels.models import COUNTS, official
from pro_kernels.models import trl as swap
from pro_kernels.models.lazy import LazyLogits
from pro_trainer.train.official import official_batch, official_loss
from tiny_models import V, assert_same_grads, grads, make

VOCABULARY = 259
tiny = functools.partial(make, vocab_size=VOCABULARY)


def assert_same_parameters(ours: nn.Module, theirs: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(ours.parameters(), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)


# ---- the authors' code


@pytest.fixture
def batch() -> dict:
    """Two prompts of three completions in the authors' form."""
    generator = torch.Generator().manual_seed(2)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    lists = [
        {
            "prompts": [tokens(5 + b)],
            "completions": [tokens(3 + i) for i in range(3)],
            "rewards": sorted(torch.randn(3, generator=generator).tolist(), reverse=True),
            "sft_index": b,
        }
        for b in range(2)
    ]
    return official_batch(lists, pad_token_id=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_official_batches_give_the_official_loss_and_gradients(dtype, rtol, batch):
    close = functools.partial(
        torch.testing.assert_close, rtol=rtol, atol=min(rtol, 1e-5), check_dtype=False
    )
    model, calls = tiny().to(dtype), []
    theirs = official_loss(model, batch)
    want = grads(model, theirs.loss)
    out = official.compute_loss(model, batch)
    close(grads(model, out.loss), want)
    close(out.loss, theirs.loss)
    close(out.rank_losses, theirs.rank_losses)
    model.model.register_forward_hook(lambda *_: calls.append(1))
    again = official.compute_loss(model, {**batch, "labels": batch["input_ids"]})
    assert again.loss == out.loss and isinstance(out.logits, LazyLogits) and len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, r"batch must hold tensors .*, got none for \['rewards'\]"),
        ({"prefix_mask": torch.zeros(1, 1, 1)}, r"batch\['prefix_mask'\] must have shape \(2, 3"),
        ({"rewards": torch.zeros(3)}, r"batch\['rewards'\] must have shape \(2, 3\), got \(3,\)"),
        ({"input_ids": torch.zeros(2, 3)}, r"batch\['input_ids'\] must have shape \(B, n, T\)"),
    ],
)
def test_official_batches_that_do_not_fit(change, message, batch):
    with pytest.raises(ValueError, match=message):
        official.compute_loss(tiny(), batch | change)


@pytest.mark.parametrize("options", [{}, {"compat": "official", "top_k": 1}], ids=str)
def test_a_model_attached_otherwise_is_refused(options, batch):
    model = pk.attach(tiny(), **options)
    with pytest.raises(ValueError, match="the model is attached with .*detach"):
        official.compute_loss(model, batch)
    pk.detach(model)
    pk.attach(model, compat="official")  # terms are of the model's fp32 already
    assert official.compute_loss(model, batch).loss.isfinite()
    with pytest.raises(ValueError, match="top_k"):
        official.compute_loss(model, batch, top_k=1)


# ---- TRL


@pytest.fixture
def trl():
    module = pytest.importorskip("trl")
    yield module
    swap.restore_trl()


def head_inputs(dtype):
    g = torch.Generator().manual_seed(4)
    shapes = (11, 16), (V, 16), (V,)
    leaves = [torch.randn(x, generator=g).to(dtype).requires_grad_() for x in shapes]
    return leaves, torch.randint(0, V, (11,), generator=g), g


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
        scored = [(x * w).sum() for x, w in zip(got, weights, strict=False) if x is not None]
        sum(scored).backward()
        found.append([*got, *(x.grad for x in tensors)])
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    if dtype == torch.bfloat16:  # they round the target's logit, ours is exact
        tolerance = {"rtol": 0.05, "atol": 0.05}
    for theirs, ours in zip(*found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert theirs.dtype == ours.dtype and theirs.requires_grad == ours.requires_grad
            torch.testing.assert_close(ours, theirs, **tolerance)


WORDS = ["red", "green", "blue", "one"]
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
# A tensor of margins beside the rows leaves these distinct.
ROWS["Reward"] = [{**row, "margin": i / 8} for i, row in enumerate(ROWS["Reward"])]


ARGUMENTS = {
    "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True,
    "bf16": False, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
    "gradient_checkpointing": False,
}  # fmt: skip


def trl_trainer(trl, folder, kind: str, **given):
    """One of TRL's own trainers, of two steps."""
    from datasets import Dataset

    transformers.set_seed(1)  # GRPO and RLOO sample
    model, tokenizer = tiny(), transformers.ByT5Tokenizer(extra_ids=0)
    options, more = {"max_steps": 2}, {"processing_class": tokenizer}
    if kind in ("DPO", "KTO"):
        more["ref_model"] = tiny()
    if kind in ("GRPO", "RLOO"):
        model.save_pretrained(folder)  # from where they load their reference
        tokenizer.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        options |= {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}
        if kind == "GRPO":
            options["num_iterations"] = 2  # the second step is on old samples
        more["reward_funcs"] = lambda completions, **_: [float(len(set(c))) for c in completions]
    where = trl
    if kind in ("CPO", "ORPO"):
        where = importlib.import_module(f"trl.experimental.{kind.lower()}")
        options |= {"loss_type": "simpo", "cpo_alpha": 0.0} if kind == "CPO" else {}
    if kind == "Reward":
        transformers.set_seed(1)
        model.config.num_labels = 1
        model = transformers.LlamaForSequenceClassification(model.config)
    config = getattr(where, f"{kind}Config")(
        **ARGUMENTS, output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.05,
        seed=1, **options | given,
    )  # fmt: skip
    return getattr(where, f"{kind}Trainer")(
        model, args=config, train_dataset=Dataset.from_list(ROWS[kind]), **more
    )


def trl_run(trl, folder, kind: str, **options):
    """Losses, the model and logs of some steps of a trainer."""
    trainer = trl_trainer(trl, folder, kind, **options)
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    return [x["loss"] for x in logs], trainer.model, logs


def rows_of_each_call(monkeypatch) -> list[int]:
    """The rows that each fused call gets, from now on."""
    rows, apply = [], swap.FusedLogProbs.apply

    def counted(hidden, *args):
        rows.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(swap.FusedLogProbs, "apply", counted)
    return rows


@pytest.mark.parametrize("kind", ROWS)
def test_trls_trainers_give_the_same_losses_and_parameters(
    trl, tmp_path, monkeypatch, capsys, kind
):
    calls, found = rows_of_each_call(monkeypatch), []
    for rows in ("padded", "distinct"):
        swap.accelerate_trl(rows=rows)
        found.append(trl_run(trl, tmp_path, kind))
        swap.restore_trl()
        assert capsys.readouterr().out.count("tokens were run (") == (rows == "distinct")
        assert bool(calls) == (kind not in ON_LOGITS)
        calls.clear()
    losses, model, logs = trl_run(trl, tmp_path, kind)
    assert not calls
    for fused in found:
        assert fused[0] == pytest.approx(losses, rel=1e-5, abs=1e-6)
        assert_same_parameters(fused[1], list(model.parameters()), 1e-4)
        for theirs, ours in zip(logs, fused[2], strict=True):
            for name in theirs.keys() & {"entropy", "mean_token_accuracy", "rewards/margins"}:
                # A margin is a difference of sums of up to 90 nats, times 0.1.
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=4e-6)


# ---- TRL's GRPO

every_level = pytest.mark.parametrize("importance_sampling_level", ["token", "sequence"])
GRPO = [
    {"loss_type": "grpo", "beta": 0.0, "epsilon_high": 0.28, "delta": 1.4},
    {"loss_type": "bnpo", "use_bias_correction_kl": False},
    {"loss_type": "dr_grpo", "top_entropy_quantile": 0.4},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4, "entropy_coef": 0.3},
    {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.1},
    {"loss_type": "sapo"},
    {"loss_type": "luspo"},
]


def grpo_batch(seed: int) -> dict:
    """What ``_compute_loss`` takes: ragged completions, one empty, one with a tool's text."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(8) < torch.tensor([8, 3, 0, 6])[:, None]).long()
    batch = {"prompt_ids": torch.randint(3, VOCABULARY, (4, 5), generator=g)}
    batch |= {"completion_ids": torch.randint(3, VOCABULARY, (4, 8), generator=g) * mask}
    batch |= {"prompt_mask": torch.ones(4, 5).long(), "completion_mask": mask}
    batch |= {"tool_mask": torch.ones(4, 8).long(), "num_items_in_batch": torch.tensor(23)}
    batch["tool_mask"][3, 2:4] = 0
    logps = torch.randn(2, 4, 8, generator=g) - 5
    old, ref = torch.where(mask == 0, 0.0, logps)
    return batch | {
        "advantages": torch.randn(4, generator=g),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }


@every_level
@pytest.mark.parametrize("options", GRPO, ids=str)
def test_policy_loss_is_that_of_trls_trainer(trl, tmp_path, options, importance_sampling_level):
    options = {**options, "importance_sampling_level": importance_sampling_level}
    trainer, batch = trl_trainer(trl, tmp_path, "GRPO", **options), grpo_batch(7)
    trainer.model.eval()
    shared = ("beta", "max_completion_length", "use_bias_correction_kl")
    options |= {name: getattr(trainer.args, name) for name in shared}
    g = torch.Generator().manual_seed(8)
    noise, entropies = torch.randn(2, 4, 8, generator=g)
    leaves = [x.requires_grad_() for x in (batch["old_per_token_logps"] + noise, entropies.abs())]
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*leaves, None)
    found = []
    for factor in (None, torch.rand(4, 1, generator=g)):
        if factor is not None:
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
            batch["importance_sampling_ratio"] = factor
        theirs = trainer._compute_loss(trainer.model, batch)
        ours, metrics = pk.policy_loss(
            leaves[0],
            batch["old_per_token_logps"],
            batch["advantages"],
            (batch["completion_mask"] * batch["tool_mask"]).bool(),
            ref_logps=batch["ref_per_token_logps"] if options["beta"] else None,
            entropies=leaves[1],
            importance_sampling_ratio=factor,
            num_items_in_batch=batch["num_items_in_batch"],
            **options,
        )
        for loss in (theirs, ours):
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            found.append((loss, *(torch.zeros(4, 8) if x is None else x for x in grads)))
        logged = {name: values.pop() for name, values in trainer._metrics["eval"].items()}
        assert logged.keys() - metrics.keys() <= {"clip_ratio/low_min", "clip_ratio/high_max"}
        for name, value in metrics.items():
            assert value.item() == pytest.approx(logged[name], rel=1e-5, abs=1e-7), name
        torch.testing.assert_close(found[-1], found[-2], rtol=2e-5, atol=1e-7)
    assert found[0][0] != found[2][0]


@every_level
@pytest.mark.parametrize("options", [*GRPO, {"loss_type": "vespo"}], ids=str)
def test_grpos_loss_and_gradients_stay_what_they_are(
    trl, tmp_path, options, importance_sampling_level
):
    options = {**options, "importance_sampling_level": importance_sampling_level}
    trainer, batch, found = trl_trainer(trl, tmp_path, "GRPO", **options), grpo_batch(9), []
    model = trainer.model.eval()
    with torch.no_grad():
        ids = [torch.cat([batch[f"{x}_{y}"] for x in ("prompt", "completion")], 1)
               for y in ("ids", "mask")]  # fmt: skip
        logps = trainer._get_per_token_logps_and_entropies(model, *ids, 8)[0]
    for of in ("old", "ref"):
        batch[f"{of}_per_token_logps"] = logps + 0.3 * batch[f"{of}_per_token_logps"].sin()
    for accelerated in (False, True):
        if accelerated:
            swap.accelerate_trl()
        with pk.distinct_rows(model) if accelerated else contextlib.nullcontext():
            loss = trainer._compute_loss(model, batch)
            found.append((loss, grads(model, loss), dict(trainer._metrics["eval"])))
            trainer._metrics["eval"].clear()
    (theirs, expected, logged), (ours, got, metrics) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert_same_grads(got, expected)
    for name, (value,) in logged.items():
        assert metrics[name] == pytest.approx([value], rel=1e-4, abs=1e-6), name


def test_a_model_that_cannot_run_distinct_rows_runs_padded_ones_and_it_is_said(
    trl, tmp_path, monkeypatch, capsys
):
    def refused(model):
        raise ValueError("this one cannot")

    monkeypatch.setattr(swap, "distinct_rows", refused)
    swap.accelerate_trl()
    losses, _, _ = trl_run(trl, tmp_path, "DPO")
    said = capsys.readouterr().out
    assert len(losses) == 2
    for name in ("model", "ref_model"):
        assert said.count(f"pro_kernels: {name} runs padded rows: this one cannot") == 1
    with pytest.raises(ValueError, match="rows must be one of"):
        swap.accelerate_trl(rows="packed")


def test_a_training_in_which_no_batch_ran_distinct_rows_says_why():
    begun = Distinct(None, "sdpa", None, refused={"further tensors: bbox"})
    assert swap._sentence(begun).endswith("no batch ran distinct rows: further tensors: bbox")
    begun.padded_tokens, begun.run_tokens = 8, 6
    assert swap._sentence(begun).endswith("6 of 8 tokens were run (25% saved)")


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
    before = COUNTS.copy()
    swap.accelerate_trl()
    fused = trl_run(trl, tmp_path, "ORPO")
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    assert COUNTS["lazy_rows"] > before["lazy_rows"]
    assert COUNTS["made_rows"] == before["made_rows"]
    swap.restore_trl()
    monkeypatch.setitem(sys.modules, "trl.trainer.base_trainer", None)
    with pytest.raises(ImportError, match="before the trainer is made does the same"):
        swap.accelerate_trl()


# ---- ranked lists in TRL and LLaMA-Factory

# Of different n, and the best is not the first.
LISTS = [
    {
        "prompt": f"say {a}",
        "completions": [f" {b} {a}"[: 9 + i] for i, b in enumerate(WORDS[:n])],
        "rewards": [0.5, 2.0, -1.0, 0.25][:n],
    }
    for a, n in zip(WORDS[:3], (3, 2, 4), strict=True)
]
BEST_FIRST = [{k: x[k] for k in ("prompt", "completions")} for x in LISTS]


class Bytes(transformers.ByT5Tokenizer):
    """A token a byte, and no EOS that nobody wrote."""

    def _add_eos_if_not_present(self, token_ids):
        return token_ids


def reference_loss(model: nn.Module, item: dict, end: tuple = (1,), **options) -> torch.Tensor:
    """PRO of one list of strings, one token a byte, from the logits of each candidate by itself."""
    prompt = [byte + 3 for byte in item["prompt"].encode()]
    answers = [[*(byte + 3 for byte in x.encode()), *end] for x in item["completions"]]
    length = max(map(len, answers))
    targets = torch.full((1, len(answers), length), -100)
    logits = torch.zeros(*targets.shape, VOCABULARY)
    for i, answer in enumerate(answers):
        rows = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logits[0, i, : len(answer)], targets[0, i, : len(answer)] = rows, torch.tensor(answer)
    rewards = torch.tensor([item["rewards"]]) if "rewards" in item else None
    return pk.reference.pro_loss(logits, targets, rewards, **options).loss


def step_of_sgd(items: list[dict], rate: float, **options) -> tuple[float, list[torch.Tensor]]:
    """The mean of the lists' losses, and the parameters after a step on it."""
    model = tiny()
    loss = torch.stack([reference_loss(model, x, **options) for x in items]).mean()
    gradients = grads(model, loss)
    return loss.item(), [p.detach() - rate * gradients[k] for k, p in model.named_parameters()]


def ranking_trainer(folder, items: list[dict], **arguments):
    from datasets import Dataset

    from pro_kernels.integrations.trl import RankingTrainer

    names = ("loss_options", "eval_dataset", "formatting_func")
    more = {name: arguments.pop(name) for name in names if name in arguments}
    config = importlib.import_module("trl").SFTConfig(**{
        **ARGUMENTS, "output_dir": str(folder), "max_steps": 1, "learning_rate": 0.5,
        "max_grad_norm": 0.0, "per_device_train_batch_size": 3, **arguments,
    })  # fmt: skip
    return RankingTrainer(
        tiny(), args=config, train_dataset=Dataset.from_list(items),
        processing_class=Bytes(extra_ids=0), **more,
    )  # fmt: skip


@pytest.mark.parametrize("rows", ["padded", "distinct"])
@pytest.mark.parametrize("size", [1, 3], ids=["accumulated", "one batch"])
@pytest.mark.parametrize("items", [LISTS, BEST_FIRST], ids=["rewards", "best first"])
def test_lists_in_trls_trainer_have_the_loss_and_gradients_of_the_reference(
    trl, tmp_path, items, size, rows
):
    loss, parameters = step_of_sgd(items, 0.5, sft_weight=0.1)
    trainer = ranking_trainer(
        tmp_path, items, per_device_train_batch_size=size, gradient_accumulation_steps=3 // size,
        loss_options={"sft_weight": 0.1, "rows": rows},
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["rank_loss"] + log["sft_loss"] == pytest.approx(loss, rel=1e-5)
    assert 0 <= log["rewards/accuracies"] <= 1
    assert_same_parameters(trainer.model, parameters, 1e-5)


def test_lists_held_out_are_a_mean_over_lists(trl, tmp_path):
    from datasets import Dataset

    held_out = Dataset.from_list(LISTS)
    trainer = ranking_trainer(
        tmp_path, LISTS, eval_dataset={"some": held_out}, per_device_eval_batch_size=2
    )
    want = step_of_sgd(LISTS, 0.0)[0]
    assert trainer.evaluate()["eval_some_loss"] == pytest.approx(want, rel=1e-5)
    if "evaluate" in vars(trl.SFTTrainer):  # it prepares what it is given
        assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "dft"}, "loss_type='dft' has no place"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no place"),
        ({"packing": True}, "packing=True has no place"),
        ({"completion_only_loss": False}, "completion_only_loss=False has no place"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "skip_prepare_dataset=True has no"),
        ({"formatting_func": str}, "formatting_func=.* has no place"),
        ({"items": [{"prompt": "a", "chosen": "b"}]}, r"\['completions'\] are not among"),
        ({"items": [{**LISTS[0], "rewards": [1.0]}]}, "list 0 has 3 completions and 1 rewards"),
        ({"items": [{**LISTS[0], "rewards": [1.0] * 3}]}, "no list can be ranked: .*are equal"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_the_ranking_would_leave_unread_is_refused(trl, tmp_path, arguments, message):
    arguments = {"items": LISTS, **arguments}
    with pytest.raises(ValueError, match=message):
        ranking_trainer(tmp_path, arguments.pop("items"), **arguments)


def test_lists_and_candidates_that_are_left_out_are_counted(trl, tmp_path):
    long = {**LISTS[0], "prompt": "say " * 20}
    equal = {**LISTS[1], "rewards": [1.0, 1.0]}
    with pytest.warns(UserWarning) as warned:
        trainer = ranking_trainer(tmp_path, [*LISTS, long, equal], max_length=40)
    said = [str(x.message) for x in warned if "left out" in str(x.message)]
    assert len(trainer.train_dataset) == 3
    assert [x.partition(" are")[0] for x in said] == ["1 lists", "1 lists", "3 candidates"]


@pytest.mark.parametrize("items", [LISTS, BEST_FIRST], ids=["rewards", "best first"])
def test_lists_in_llamafactory_have_the_loss_and_gradients_of_the_reference(
    tmp_path, monkeypatch, items
):
    pytest.importorskip("llamafactory")
    from pro_kernels.integrations import llamafactory

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny().save_pretrained(tmp_path / "model")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    columns, rows = {"prompt": "prompt", "chosen": "completions"}, items
    if "rewards" not in items[0]:  # chosen and the list of those that are worse
        columns = {"prompt": "prompt", "chosen": "best", "rejected": "rest"}
        rows = [
            {"prompt": x["prompt"], "best": x["completions"][0], "rest": x["completions"][1:]}
            for x in items
        ]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    info = {"lists": {"file_name": "lists.jsonl", "ranking": True, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    run = {
        "stage": "dpo", "pref_loss": "pro", "pro_options": {"sft_weight": 0.1}, "do_train": True,
        "model_name_or_path": str(tmp_path / "model"), "finetuning_type": "full",
        "dataset": "lists", "dataset_dir": str(tmp_path), "template": "empty",
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3, "max_steps": 1, "learning_rate": 0.5, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_only_model": True, "report_to": "none", "use_cpu": True, "bf16": False,
        "fp16": False, "disable_gradient_checkpointing": True,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # which is YAML, too
    monkeypatch.setattr(sys, "argv", ["llamafactory", str(tmp_path / "run.yaml")])
    llamafactory.main()
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    loss, parameters = step_of_sgd(items, 0.5, end=(), sft_weight=0.1)  # the template adds none
    assert state["log_history"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    trained = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_parameters(trained, parameters, 1e-5)
    run |= {"output_dir": str(tmp_path / "other"), "pref_ftx": 0.1}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="pref_ftx=0.1 is no option of pref_loss: pro"):
        llamafactory.main()
