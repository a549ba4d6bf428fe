"""``pro-kernels eval`` on a small checkpoint against a forward of each sequence on its own."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs the 'train' extra")

from transformers import HfArgumentParser, LlamaConfig, LlamaForSequenceClassification

from pro_trainer.cli.evaluate import EvalArguments, evaluate_files
from pro_trainer.data.records import RankedList
from pro_trainer.evaluate.compare import compare
from pro_trainer.evaluate.generation import generate_answers
from pro_trainer.evaluate.metrics import list_statistics, ranking_metrics
from pro_trainer.evaluate.tables import cell, evaluation_report, markdown_table
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.encode import Encoder
from pro_trainer.train.config import PROConfig


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
def checkpoint(tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model on disk."""
    model, tokenizer = tiny
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifiers(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Sequence classifiers on disk, by their number of labels."""
    tokenizer = tiny[1]
    folders = {}
    for labels in (1, 2):
        torch.manual_seed(labels)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=labels,
            pad_token_id=tokenizer.pad_token_id,
        )
        folder = tmp_path_factory.mktemp(f"labels{labels}")
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[labels] = str(folder)
    return folders


def config(folder: Path, **options: object) -> PROConfig:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return PROConfig(**{**defaults, **options})


@torch.no_grad()
def mean_logp(tiny, prompt: str, completion: str) -> float:
    """Mean log-probability of a completion and its EOS, from the logits of one plain forward."""
    model, tokenizer = tiny
    context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    made = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    logits = model.eval()(torch.tensor([context + made])).logits[0].double()
    logps = logits.log_softmax(-1)[len(context) - 1 : -1]
    return logps.gather(1, torch.tensor(made)[:, None]).mean().item()


def test_scores_of_a_checkpoint_are_those_of_plain_forwards(
    tiny, checkpoint: str, write_lines: Callable[..., str], tmp_path: Path, capsys
) -> None:
    records = make_records()
    output = tmp_path / "deep" / "results"
    result = evaluate_files(
        EvalArguments(model=checkpoint, data=[write_lines(*records)]), config(output)
    )
    scores, rewards = torch.zeros(len(records), 4), torch.zeros(len(records), 4)
    mask = torch.zeros(len(records), 4, dtype=torch.bool)
    for i, record in enumerate(records):
        for j, completion in enumerate(record["completions"]):
            scores[i, j] = mean_logp(tiny, record["prompt"], completion)
            rewards[i, j], mask[i, j] = record["rewards"][j], True
    expected = ranking_metrics(scores, rewards, mask)
    for name, value in expected.items():
        assert result["metrics"][name] == pytest.approx(value, abs=2e-5), name
    assert {"loss", "sft_loss", "rank_loss_1", "rank_loss_2", "rank_loss_3"} <= set(
        result["metrics"]
    )
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


def test_files_of_an_earlier_evaluation_are_replaced(
    checkpoint: str, write_lines: Callable[..., str], tmp_path: Path
) -> None:
    arguments = EvalArguments(model=checkpoint, data=[write_lines(*make_records(3))])
    (tmp_path / "eval.json").write_text("old")
    evaluate_files(arguments, config(tmp_path))
    first = (tmp_path / "eval.json").read_bytes()
    evaluate_files(arguments, config(tmp_path, per_device_eval_batch_size=1))
    again = json.loads((tmp_path / "eval.json").read_text())
    for name, value in json.loads(first)["metrics"].items():
        assert again["metrics"][name] == pytest.approx(value, rel=1e-5), name


def test_lists_in_order_only(
    checkpoint: str, write_lines: Callable[..., str], tmp_path: Path
) -> None:
    records = [
        {key: value for key, value in record.items() if key != "rewards"}
        for record in make_records(4)
    ]
    result = evaluate_files(
        EvalArguments(model=checkpoint, data=[write_lines(*records)]), config(tmp_path)
    )
    assert {row["gap_to"] for row in result["by_reward_gap"]} <= {1, 2, 3}
    assert result["metrics"]["prompts"] == 4


def test_undefined_numbers_are_null_in_json(
    checkpoint: str, write_lines: Callable[..., str], tmp_path: Path
) -> None:
    one = {"prompt": "q: ", "completions": ["a", "bc"], "rewards": [1.0, 0.0]}
    result = evaluate_files(
        EvalArguments(model=checkpoint, data=[write_lines(one)]), config(tmp_path)
    )
    assert math.isnan(result["by_rank"][0]["standard_error"])
    text = (tmp_path / "eval.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["by_rank"][0]["standard_error"] is None


def test_generation_with_a_reward_model(
    tiny, checkpoint: str, classifiers: dict[int, str], write_lines: Callable[..., str],
    tmp_path: Path,
) -> None:  # fmt: skip
    records = make_records(5)
    result = evaluate_files(
        EvalArguments(
            model=checkpoint,
            data=[write_lines(*records)],
            generate=3,
            max_new_tokens=6,
            reward_model=classifiers[1],
        ),
        config(tmp_path),
    )
    found = result["generation"]
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
        mean = sum(row[name] for row in found["answers"]) / 3
        assert found[name] == pytest.approx(mean)
    wins = sum(row["reward"] > row["best_completion_reward"] for row in found["answers"])
    assert found["win_rate"] == pytest.approx(wins / 3)
    assert "BLEU against the best completion" in (tmp_path / "eval.md").read_text()


def test_bleu_of_the_answers_is_against_the_best_completion(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The model "answers" with the best completion of each list, in another place each time.
    best = ["one two three four five", "six seven eight nine ten"]
    messages = ({"role": "assistant", "content": best[1]},)
    lists = [
        RankedList(("p0 ",), ("a b c d e", best[0]), (0.0, 2.0)),
        RankedList(("p1 ", "p2 "), (messages, "f g h i j"), None),
    ]
    asked: list[str] = []

    def answer(model: object, tokenizer: object, prompts: list[RankedList], **options: object):
        asked.extend(ranked.prompts[0] for ranked in prompts)
        assert options["do_sample"] is False
        return [[f" {text}"] for text in best]

    monkeypatch.setattr("pro_trainer.evaluate.generation.sample", answer)
    found = generate_answers(tiny[0], Encoder(tiny[1]), lists, max_new_tokens=4)
    assert asked == ["p0 ", "p1 "]
    assert found["bleu"] == pytest.approx(100)
    assert "reward" not in found and "win_rate" not in found
    with pytest.raises(ValueError, match="no lists to answer"):
        generate_answers(tiny[0], Encoder(tiny[1]), [], max_new_tokens=4)


def test_a_loss_with_a_reference_model(
    tiny, checkpoint: str, write_lines: Callable[..., str], tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    data = [write_lines(*make_records(3))]
    arguments = EvalArguments(model=checkpoint, data=data, base=str(copy))
    result = evaluate_files(arguments, config(tmp_path, loss_type="dpo"))
    assert result["metrics"]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # of a model to itself
    arguments.base = checkpoint  # the same weights: nothing to compare, and scored once
    assert evaluate_files(arguments, config(tmp_path))["base"] is None
    with pytest.raises(ValueError, match="'dpo' compares with the model that training started"):
        evaluate_files(arguments, config(tmp_path, loss_type="dpo"))


def test_a_model_beside_its_base(
    tiny, checkpoint: str, write_lines: Callable[..., str], tmp_path: Path, capsys
) -> None:
    model, tokenizer = tiny
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    for made in (other, tokenizer):
        made.save_pretrained(tmp_path / "tuned")
    data = [write_lines(*make_records(12))]
    tuned, base = str(tmp_path / "tuned"), checkpoint
    options = config(tmp_path / "out")
    found = evaluate_files(
        EvalArguments(model=tuned, data=data, base=base, generate=2, max_new_tokens=4), options
    )
    alone = [
        evaluate_files(EvalArguments(model=m, data=data), config(tmp_path / "x"))["metrics"]
        for m in (base, tuned)
    ]
    assert (found["base_metrics"], found["metrics"]) == tuple(alone)
    for name in ("pairwise_accuracy", "kendall_tau", "ndcg", "top1_accuracy", "loss"):
        row = found["comparison"][name]
        assert row["base"] == pytest.approx(alone[0][name], rel=1e-5), name
        assert row["tuned"] == pytest.approx(alone[1][name], rel=1e-5), name
        assert row["low"] <= row["difference"] <= row["high"] and row["low"] < row["high"], name
    printed = capsys.readouterr().out
    for part in ("base |", "tuned |", "95 % interval", "--- prompt 1", "--- base", "--- tuned"):
        assert part in printed, part
    assert "--- prompt 2" in (tmp_path / "out" / "eval.md").read_text()


def test_intervals_are_those_of_resampled_lists() -> None:
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
        a, b = (ranking_metrics(s[drawn], rewards[drawn], mask[drawn]) for s in scores)
        by_hand.append(b["pairwise_accuracy"] - a["pairwise_accuracy"])
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
    ],
)
def test_arguments_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalArguments(**{"model": "m", "data": ["d"], **options})


def test_generation_without_sacrebleu_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pro_trainer.cli.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs sacrebleu: pip install sacrebleu"):
        EvalArguments(model="m", data=["d"], generate=1)


def refused(arguments: EvalArguments, options: PROConfig, message: str) -> None:
    """The error comes, and nothing is written."""
    output = Path(options.output_dir)
    with pytest.raises(ValueError, match=message):
        evaluate_files(arguments, options)
    assert output.is_file() or not output.exists() or not list(output.iterdir())


def test_unusable_models_data_and_folders(
    checkpoint: str, classifiers: dict[int, str], write_lines: Callable[..., str], tmp_path: Path
) -> None:
    data = write_lines(*make_records(2))
    options = config(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(EvalArguments(model=str(empty), data=[data]), options, "empty: not a causal LM")
    refused(EvalArguments(model=classifiers[1], data=[data]), options, "lacks weights|LM head")
    two_labels = EvalArguments(
        model=checkpoint, data=[data], generate=1, reward_model=classifiers[2]
    )
    refused(two_labels, options, "num_labels=2")
    refused(EvalArguments(model=checkpoint, data=[str(tmp_path / "no")]), options, "no")
    nothing = write_lines(name="nothing.jsonl")
    refused(EvalArguments(model=checkpoint, data=[nothing]), options, "nothing.jsonl")
    long_answers = EvalArguments(model=checkpoint, data=[data], generate=1, max_new_tokens=4096)
    refused(long_answers, options, "max_new_tokens=4096 leaves no room")

    arguments = EvalArguments(model=checkpoint, data=[data])
    file = tmp_path / "file"
    file.write_text("kept")
    refused(arguments, config(file), "output_dir .*file is a file")
    refused(arguments, config(file / "below"), "output_dir .* cannot be written")
    assert file.read_text() == "kept"


def test_a_model_that_gives_no_numbers_is_an_error(
    tiny, tmp_path: Path, write_lines: Callable[..., str]
) -> None:
    model, tokenizer = tiny
    broken = type(model)(model.config)
    broken.load_state_dict(model.state_dict())
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    folder = tmp_path / "broken"
    broken.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = EvalArguments(model=str(folder), data=[write_lines(*make_records(2))])
    refused(arguments, config(tmp_path / "out"), "nan|not numbers|not finite")


def test_flags_of_the_command() -> None:
    parser = HfArgumentParser((EvalArguments, PROConfig))
    arguments, options = parser.parse_args_into_dataclasses(
        ["--model", "m", "--data", "a", "b", "--output_dir", "o", "--use_cpu", "--generate", "3"]
    )
    assert (arguments.data, arguments.generate, options.output_dir) == (["a", "b"], 3, "o")


def test_tables() -> None:
    assert [cell(x) for x in (1234567, 0.5, 0.0, 1e-5, 12345.678, math.nan, "a|b\nc")] == [
        "1,234,567", "0.5000", "0.0000", "1e-05", "1.235e+04", "–", "a\\|b c",
    ]  # fmt: skip
    assert markdown_table(["what", "n"], [["lists", 12], ["pairs", 12345]]) == (
        "| what  |      n |\n|-------|-------:|\n| lists |     12 |\n| pairs | 12,345 |"
    )


def test_report_leaves_nothing_out() -> None:
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
