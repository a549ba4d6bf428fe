"""``pro-kernels eval`` on a small checkpoint against a forward of each sequence on its own."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_ranking import pad
from texts import assistant, classifier, save

from pro_trainer.cli.evaluate import EvalArguments, evaluate_files
from pro_trainer.data.records import RankedList
from pro_trainer.evaluate.compare import compare
from pro_trainer.evaluate.generation import generate_answers
from pro_trainer.evaluate.metrics import list_statistics, ranking_metrics
from pro_trainer.evaluate.tables import cell, evaluation_report, markdown_table
from pro_trainer.models import tiny_llama
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.encode import Encoder
from pro_trainer.train.config import PROConfig
from pro_trainer.train.trainer import PROTrainer


def make_records(lists: int = 9) -> list[dict]:
    """Lists of two to four candidates, so that batches are ragged."""
    generator = random.Random(0)
    return [
        {
            "prompt": f"question {i}: ",
            "completions": [
                "".join(generator.choices("abcdefg ", k=generator.randint(3, 12))) + str(k)
                for k in range(2 + i % 3)
            ],
            "rewards": [generator.uniform(-2, 2) for _ in range(2 + i % 3)],
        }
        for i in range(lists)
    ]


@pytest.fixture(scope="module")
def classifiers(tiny, tmp_path_factory) -> dict[int, str]:
    """Sequence classifiers on disk, by their number of labels."""
    made = {labels: classifier(len(tiny[1]), labels) for labels in (1, 2)}
    return {n: save(tmp_path_factory.mktemp("labels"), x, tiny[1]) for n, x in made.items()}


@pytest.fixture
def evaluate(tiny_folder, write_lines, tmp_path):
    """Evaluate the checkpoint on some records; options of a config are given as a dict."""

    def run(records: list[dict], output: Path = tmp_path, config: dict | None = None, **arguments):
        data = [write_lines(*records)]
        defaults = {"use_cpu": True, "per_device_eval_batch_size": 4, "report_to": "none"}
        options = PROConfig(output_dir=str(output), disable_tqdm=True, **defaults | (config or {}))
        arguments = {"model": tiny_folder, "data": data} | arguments
        return evaluate_files(EvalArguments(**arguments), options)

    return run


@torch.no_grad()
def mean_logp(tiny, prompt: str, completion: str) -> float:
    """Mean log-probability of a completion and its EOS, from the logits of one plain forward."""
    model, tokenizer = tiny
    context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    made = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    logits = model.eval()(torch.tensor([context + made])).logits[0].double()
    logps = logits.log_softmax(-1)[len(context) - 1 : -1]
    return logps.gather(1, torch.tensor(made)[:, None]).mean().item()


def test_scores_of_a_checkpoint_are_those_of_plain_forwards(tiny, evaluate, tmp_path, capsys):
    records = make_records()
    output = tmp_path / "deep" / "results"
    output.mkdir(parents=True)
    (output / "eval.json").write_text("replaced")
    result = evaluate(records, output)
    naive = [
        [
            (mean_logp(tiny, record["prompt"], completion), reward)
            for completion, reward in zip(record["completions"], record["rewards"], strict=True)
        ]
        for record in records
    ]
    for name, value in ranking_metrics(*pad(naive)).items():
        assert result["metrics"][name] == pytest.approx(value, abs=2e-5), name
    terms = {"loss", "sft_loss", "rank_loss_1", "rank_loss_2", "rank_loss_3"}
    assert terms <= set(result["metrics"])
    by_size = {row["candidates"]: row["prompts"] for row in result["by_candidates"]}
    assert by_size == {2: 3, 3: 3, 4: 3}
    pairs = 3 * (1 + 3 + 6)
    assert sum(row["pairs"] for row in result["by_reward_gap"]) == pairs
    assert result["metrics"]["pairs"] == pairs

    assert sorted(p.name for p in output.iterdir()) == ["eval.json", "eval.md", "eval.png"]
    assert json.loads((output / "eval.json").read_text()) == json.loads(json.dumps(result))
    assert (output / "eval.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    markdown = (output / "eval.md").read_text()
    assert evaluation_report(result) in printed and markdown.startswith(evaluation_report(result))
    assert re.search(r"\| lists +\| +9 \|", markdown)

    alone = evaluate(records, config={"per_device_eval_batch_size": 1})["metrics"]
    assert alone == pytest.approx(result["metrics"], rel=1e-5)


def test_lists_in_order_only_and_numbers_that_are_undefined(evaluate, tmp_path):
    one = [{"prompt": "q: ", "completions": ["a", "bc", "def"]}]
    result = evaluate(one)
    assert {row["gap_to"] for row in result["by_reward_gap"]} == {1, 2}
    assert result["metrics"]["prompts"] == 1
    assert math.isnan(result["by_rank"][0]["standard_error"])
    text = (tmp_path / "eval.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["by_rank"][0]["standard_error"] is None


def test_generation_with_a_reward_model(tiny, evaluate, classifiers, tmp_path):
    records = make_records(5)
    found = evaluate(records, generate=3, max_new_tokens=6, reward_model=classifiers[1])
    found = found["generation"]
    assert found["prompts"] == len(found["answers"]) == 3
    assert 0 <= found["bleu"] <= 100
    model, tokenizer = tiny
    judge = RewardModel.from_path(classifiers[1])
    for row, record in zip(found["answers"], records, strict=False):
        best = max(zip(record["rewards"], record["completions"], strict=True))[1]
        assert row["prompt"] == record["prompt"] and row["best_completion"] == best
        ids = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        greedy = model.generate(**ids, max_new_tokens=6, do_sample=False)
        new = greedy[0, ids["input_ids"].shape[1] :]
        assert row["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        expected = judge.score([row["prompt"]] * 2, [row["answer"], best])
        assert [row["reward"], row["best_completion_reward"]] == pytest.approx(expected, abs=1e-5)
    for name in ("reward", "best_completion_reward"):
        assert found[name] == pytest.approx(sum(row[name] for row in found["answers"]) / 3)
    wins = sum(row["reward"] > row["best_completion_reward"] for row in found["answers"])
    assert found["win_rate"] == pytest.approx(wins / 3)
    assert "BLEU against the best completion" in (tmp_path / "eval.md").read_text()


def test_bleu_of_the_answers_is_against_the_best_completion(tiny, monkeypatch):
    # The model "answers" with the best completion of each list, in another place each time.
    best = ["one two three four five", "six seven eight nine ten"]
    lists = [
        RankedList(("p0 ",), ("a b c d e", best[0]), (0.0, 2.0)),
        RankedList(("p1 ", "p2 "), ((assistant(best[1]),), "f g h i j"), None),
    ]
    asked: list[str] = []

    def answer(model: object, encoder: object, prompts: list[RankedList], options: object):
        asked.extend(ranked.prompts[0] for ranked in prompts)
        assert options.num_samples == 1 and options.stop == []
        return [[f" {text}"] for text in best]

    monkeypatch.setattr("pro_trainer.evaluate.generation.sample", answer)
    found = generate_answers(tiny[0], Encoder(tiny[1]), lists, max_new_tokens=4)
    assert asked == ["p0 ", "p1 "]
    assert found["bleu"] == pytest.approx(100)
    assert "reward" not in found and "win_rate" not in found
    with pytest.raises(ValueError, match="no lists to answer"):
        generate_answers(tiny[0], Encoder(tiny[1]), [], max_new_tokens=4)


def test_a_loss_with_a_reference_model(tiny_folder, evaluate, tmp_path):
    copied = str(shutil.copytree(tiny_folder, tmp_path / "copy"))
    result = evaluate(make_records(3), config={"loss_type": "dpo"}, base=copied)
    assert result["metrics"]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # of a model to itself
    # The same weights: nothing to compare, and scored once.
    assert evaluate(make_records(3), base=tiny_folder)["base"] is None
    with pytest.raises(ValueError, match="'dpo' compares with the model that training started"):
        evaluate(make_records(3), config={"loss_type": "dpo"}, base=tiny_folder)


@pytest.mark.parametrize("loss_type", ["bco", "kto", "kto batch", "pro"])
def test_the_loss_is_the_trainers_and_its_interval_of_what_is_shown(loss_type, evaluate, tmp_path):
    """Lists count by their weight, and what the loss takes from all lists is that of all."""
    models = [tiny_llama(seed) for seed in (0, 1)]  # in this order KL is not below 0
    base, tuned = (save(tmp_path / f"model{i}", *model) for i, model in enumerate(models))
    lists = [x | {"prompt_weight": i % 3} for i, x in enumerate(make_records())]
    loss_type, *kl = loss_type.split()
    config = {"loss_type": loss_type, "kto_kl": kl[0] if kl else "other_prompts"}
    config["beta"] = None if loss_type == "pro" else 1.0
    found = evaluate(lists, config=config, model=tuned, base=base)
    row = found["comparison"]["loss"]
    assert row["base"] == pytest.approx(found["base_metrics"]["loss"], rel=1e-5)
    assert row["tuned"] == pytest.approx(found["metrics"]["loss"], rel=1e-5)
    args = PROConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **config)
    (ref_model, _), (model, tokenizer) = models
    of_trainer = {"ref_model": ref_model} if args.needs_reference() else {}
    trainer = PROTrainer(model, args, None, lists, tokenizer, **of_trainer)
    assert row["tuned"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_a_model_beside_its_base(tiny, tiny_folder, evaluate, tmp_path, capsys):
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    tuned, records = save(tmp_path / "tuned", other, tiny[1]), make_records(6)
    found = evaluate(records, model=tuned, base=tiny_folder, generate=2, max_new_tokens=4)
    printed = capsys.readouterr().out
    for part in ("base |", "tuned |", "95 % interval", "--- prompt 1", "--- base", "--- tuned"):
        assert part in printed, part
    assert "--- prompt 2" in (tmp_path / "eval.md").read_text()
    alone = [evaluate(records, model=model)["metrics"] for model in (tiny_folder, tuned)]
    assert [found["base_metrics"], found["metrics"]] == alone
    for name in ("pairwise_accuracy", "kendall_tau", "ndcg", "top1_accuracy", "loss"):
        row = found["comparison"][name]
        assert row["base"] == pytest.approx(alone[0][name], rel=1e-5), name
        assert row["tuned"] == pytest.approx(alone[1][name], rel=1e-5), name
        assert row["low"] <= row["difference"] <= row["high"] and row["low"] < row["high"], name


def test_intervals_are_those_of_resampled_lists():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(300, 4, generator=generator) for _ in range(2)]
    rewards = torch.randn(300, 4, generator=generator)
    mask = torch.ones(300, 4, dtype=torch.bool)
    mask[::3, 3] = False
    base, tuned = (list_statistics(s, rewards, mask) for s in scores)
    found = compare(base, tuned)
    for name in ("pairwise_accuracy", "kendall_tau", "ndcg", "top1_accuracy"):
        whole = [x.metrics()[name] for x in (base, tuned)]
        assert (found[name].base, found[name].tuned) == pytest.approx(whole)
    by_hand = []
    for _ in range(400):
        drawn = torch.randint(300, (300,), generator=generator)
        a, b = (x.right[drawn].sum() / x.pairs[drawn].sum() for x in (base, tuned))
        by_hand.append(b - a)
    ends = torch.tensor(by_hand).quantile(torch.tensor([0.025, 0.975]))
    got = torch.tensor([found["pairwise_accuracy"].low, found["pairwise_accuracy"].high])
    assert (got - ends).abs().max() < 0.012  # of a width of about 0.11
    assert compare(base, base)["ndcg"][2:] == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "eval needs --model and --data"),
        ({"data": []}, "eval needs --model and --data"),
        ({"generate": -1}, "generate must be at least 0, got -1"),
        ({"generate": 2, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"reward_model": "r"}, "reward_model scores generated answers, but generate is 0"),
        ({"generate": 1}, "needs sacrebleu: pip install sacrebleu"),
    ],
)
def test_arguments_out_of_range(options, message, monkeypatch):
    monkeypatch.setattr("pro_trainer.cli.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        EvalArguments(**{"model": "m", "data": ["d"], **options})


def test_unusable_models_data_and_folders(
    tiny, tiny_folder, evaluate, classifiers, write_lines, tmp_path
):
    broken = copy.deepcopy(tiny[0])
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    broken = save(tmp_path / "broken", broken, tiny[1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    nothing = write_lines(name="nothing.jsonl")
    out = tmp_path / "out"
    for output, arguments, message in (
        (out, {"model": str(tmp_path / "empty")}, "empty: not a causal LM"),
        (out, {"model": classifiers[1]}, "lacks weights|LM head"),
        (out, {"model": broken}, "nan|not numbers|not finite"),
        (out, {"generate": 1, "reward_model": classifiers[2]}, "num_labels=2"),
        (out, {"generate": 1, "max_new_tokens": 4096}, "max_new_tokens=4096 leaves no room"),
        (out, {"data": [str(tmp_path / "no")]}, "no"),
        (out, {"data": [nothing]}, "nothing.jsonl"),
        (tmp_path / "file", {}, "output_dir .*file is a file"),
        (tmp_path / "file" / "below", {}, "output_dir .* cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(make_records(2), output, **arguments)
    assert not out.exists() or not list(out.iterdir())
    assert (tmp_path / "file").read_text() == "kept"


def test_a_report_leaves_nothing_out():
    assert [cell(x) for x in (1234567, 0.5, 0.0, 1e-5, 12345.678, math.nan, "a|b\nc")] == [
        "1,234,567", "0.5000", "0.0000", "1e-05", "1.235e+04", "–", "a\\|b c",
    ]  # fmt: skip
    assert markdown_table(["what", "n"], [["lists", 12], ["pairs", 12345]]) == (
        "| what  |      n |\n|-------|-------:|\n| lists |     12 |\n| pairs | 12,345 |"
    )
    metrics = {
        "loss": 1.5, "rank_loss_10": 0.1, "rank_loss_2": 0.2, "rank_loss_1": 0.3, "sft_loss": 2.0,
        "pairwise_accuracy": 0.75, "prompts": 3, "pairs": 8, "a_new_metric": 0.123,
    }  # fmt: skip
    result = {"model": "m", "metrics": metrics, "by_candidates": [], "by_reward_gap": []}
    text = evaluation_report(result)
    places = [text.index(f"| {name}") for name in ("rank loss 1 ", "rank loss 2", "rank loss 10")]
    assert places == sorted(places) and text.index("| sft loss") > places[-1]
    assert "| a_new_metric" in text and "| pairwise accuracy" in text
    for value in metrics.values():
        assert cell(value) in text
    assert "By number of candidates" not in text and "Greedy answers" not in text
