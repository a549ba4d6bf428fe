"""What scores candidates: functions, servers, judges, and what is made of several scores."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from servers import MODEL, FakeServer
from texts import assistant, records, user
from trainer_runs import QUICK

from pro_trainer.cli import commands
from pro_trainer.cli.prepare import _settings, prepare
from pro_trainer.data.choose import without_near_duplicates
from pro_trainer.data.lists import read_lists
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.prepare import recipe
from pro_trainer.prepare.build import build_rewards
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.pool import combined
from pro_trainer.prepare.report import PrepareReport
from pro_trainer.prepare.rewards.base import parse
from pro_trainer.prepare.rewards.judge import Judge
from pro_trainer.prepare.rewards.server import Server
from pro_trainer.text.options import ListOptions

SOURCE = """
from __future__ import annotations
from dataclasses import KW_ONLY, dataclass

@dataclass
class Settings:  # which looks its module up
    _: KW_ONLY
    scale: float = -1.0

def short(completions):
    return [Settings().scale * len(text) for text in completions]

def right(completions, answer, **columns):
    assert set(columns) == {"prompts", "id"}
    return [float(a == text.strip()) for text, a in zip(completions, answer)]

def turns(prompts, completions):
    prompts[0].append(completions[0].pop())
    return [0.5 * isinstance(p, list) + i for i, p in enumerate(prompts)]

count = lambda prompts, completions: [1.0]
nan = lambda prompts, completions: [float("nan")] * len(prompts)
none = lambda prompts, completions: [None] * len(prompts)
word = lambda prompts, completions: "good"
boom = lambda prompts, completions: 1 / 0
odd = lambda texts: texts
needs = lambda prompts, completions, proof: [0.0] * len(prompts)
number = 3
"""
LISTS = [
    {"prompt": f"{i}? ", "completions": ["a long way off", str(i), "no", "a long way of"],
     "answer": str(i), "id": i}
    for i in range(5)
]  # fmt: skip


@pytest.fixture
def build(tmp_path, write_lines, monkeypatch, make_arguments):
    """Builds arguments for a run on five lists without a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    data = write_lines(*LISTS)

    def built(*reward: str, **changes) -> PrepareArguments:
        options = {"data": [data], "chat_template": "auto", **changes}
        return make_arguments(tmp_path, reward=list(reward), **options)

    return built


def written(tmp_path: Path) -> list[dict]:
    return records(tmp_path / "out.jsonl")


def test_rewards_are_weighted_and_their_scores_kept_where_the_trainer_reads_them(
    build, tmp_path, capsys
):
    report = prepare(build("0.5*mine.py:short", "-2*mine.py:right"))
    assert "columns that nothing uses" not in report.text()
    for i, record in enumerate(written(tmp_path)):
        raw = record["raw_rewards"]
        assert raw["short"] == [-float(len(text)) for text in record["completions"]]
        assert raw["right"] == [float(text == str(i)) for text in record["completions"]]
        sums = [0.5 * a - 2 * b for a, b in zip(raw["short"], raw["right"], strict=True)]
        assert record["rewards"] == sums == sorted(sums, reverse=True)
        assert record["answer"] == str(i) and record["id"] == i  # to be scored by again
    made = str(tmp_path / "out.jsonl")
    assert commands.inspect(["--demo", "--data", made, "--num", "1"]) == 0
    out = capsys.readouterr().out
    assert "lists kept: 5" in out
    assert "columns that nothing uses (records that have them): answer (5), id (5)\n" in out
    run = ["--demo", "--data", made, "--output_dir", str(tmp_path / "run"), *QUICK]
    assert commands.train([*run, "--eval_fraction", "0", "--num_candidates", "2"]) == 0
    # Without a reward the scores go with their candidates.
    before = {
        (record["prompt"], text): score
        for record in written(tmp_path)
        for text, score in zip(record["completions"], record["raw_rewards"]["short"], strict=True)
    }
    prepare(build(data=[made], output=str(tmp_path / "again.jsonl"), ranking_length=2))
    for record in records(tmp_path / "again.jsonl"):
        short = [before[record["prompt"], text] for text in record["completions"]]
        assert record["raw_rewards"]["short"] == short


def test_a_module_of_the_working_folder_and_messages(build, write_lines, tmp_path):
    lists = [{"prompt": [user(f"q{i}")], "completions": [[assistant("a")], [assistant("b")]]}
             for i in range(2)]  # fmt: skip
    (tmp_path / "of_the_folder.py").write_text(SOURCE)
    prepare(build("of_the_folder:turns", data=[write_lines(*lists, name="chats.jsonl")]))
    made = written(tmp_path)
    assert [record["rewards"] for record in made] == [[1.5, 0.5], [3.5, 2.5]]
    # What a function does to its arguments stays its own.
    assert [record["prompt"] for record in made] == [x["prompt"] for x in lists]
    assert made[0]["completions"] == [[assistant("b")], [assistant("a")]]


@pytest.mark.parametrize(
    ("reward", "wrong"),
    [
        ("mine.py:count", "data.jsonl:1 to .*:2: reward mine.py:count: a list of 8 numbers .* 1$"),
        ("mine.py:nan", "data.jsonl:1, the completion 'a long way off': a finite number .* got na"),
        ("mine.py:none", "reward mine.py:none, .*a finite number was expected, got None"),
        ("mine.py:word", "a list of 8 numbers was expected, one for each completion, got str"),
        ("mine.py:boom", r"mine.py:boom raised ZeroDivisionError: division by zero \(mine.py:25\)"),
        ("mine.py:odd", r"the keyword arguments prompts and completions was expected, got odd\(te"),
        ("mine.py:needs", "needs a column 'proof' of the data; .* are answer, id"),
        ("mine.py:number", "mine.py has no function 'number', it has boom, count, nan"),
        ("gone.py:f", "reward gone.py:f cannot be imported: FileNotFoundError"),
        ("no_module:f", "reward no_module:f cannot be imported: ModuleNotFoundError"),
        ("x*mine.py:short", r"reward 'x\*mine.py:short': \[WEIGHT\*\]WHAT was expected"),
        ("0*mine.py:short", "a finite number other than 0"),
        ("http://h:1/v1", r"end in one of /score, /classify, /pooling, /chat/completions"),
        ("ftp://h:1/score", r"a URL was expected as \[MODEL@\]http://HOST:PORT/PATH"),
        ("http://h:1/score?key=x", "the path of the URL must say|a user, a password or a query"),
    ],
)  # fmt: skip
def test_a_reward_that_is_none(build, tmp_path, reward, wrong):
    with pytest.raises(ValueError, match=wrong):
        prepare(build(reward))
    assert not (tmp_path / "out.jsonl").exists()


def test_how_rewards_are_written():
    given = ["0.7*a.b:short", "-1e-1*f.py:short", "org/rm", "./x/", "3*http://h:1/score",
             "Org/M-7B@https://h/v1/chat/completions/"]  # fmt: skip
    assert [tuple(spec)[:4] for spec in parse(given)] == [
        (0.7, "function", "a.b", "short"),
        (-0.1, "function", "f.py", "short"),
        (1.0, "classifier", "org/rm", ""),
        (1.0, "classifier", "./x/", ""),
        (3.0, "score", "http://h:1/score", ""),
        (1.0, "judge", "https://h/v1/chat/completions", "Org/M-7B"),
    ]
    assert [spec.name for spec in parse(given[1:])] == ["short", "rm", "x", "score", "M-7B"]
    assert [spec.name for spec in parse(given[:2])] == ["a.b:short", "f.py:short"]
    with pytest.raises(ValueError, match="reward a:f was given twice"):
        parse(["a:f", "2*a:f"])


@pytest.mark.parametrize(
    "rewards",
    [
        ["--reward", "mine.py:right", "-0.5*mine.py:short"],
        ["--reward", "mine.py:right", "--reward=-0.5*mine.py:short"],
        ["--config", "x.yaml", "--reward", "mine.py:right", "-0.5*mine.py:short"],
    ],
)
def test_several_rewards_on_the_command_line(build, tmp_path, rewards):
    (tmp_path / "x.yaml").write_text("reward: mine.py:nan\n")  # the command line wins
    flags = ["--data", *build().data, "--output", str(tmp_path / "out.jsonl")]
    assert commands.prepare([*flags, *rewards]) == 0
    assert written(tmp_path)[0]["rewards"][0] == 7.0
    assert list(written(tmp_path)[0]["raw_rewards"]) == ["right", "short"]


@pytest.mark.parametrize(
    ("normalize", "rewards"),
    [
        ("none", [2 * 1 - 30, 2 * 3 - 10, 2 * 3 - 20]),
        ("zscore", [2 * -(2**0.5) - 1.5**0.5, 2**0.5 + 1.5**0.5, 2**0.5]),
        ("rank", [-1.0, 2 * 0.75, 2 * 0.75 - 0.5]),
    ],
)
def test_scores_are_normalised_in_their_list_and_length_costs(normalize, rewards):
    raw = {"a": [1.0, 3.0, 3.0], "b": [30.0, 10.0, 20.0]}
    weights = {"a": 2.0, "b": -1.0}
    assert combined(raw, weights, [0, 0, 0], normalize) == pytest.approx(rewards)
    shorter = [rewards[0], rewards[1] - 1, rewards[2] - 2]
    assert combined(raw, weights, [0, 2, 4], normalize, 0.5) == pytest.approx(shorter)
    equal = combined({"a": [0.1] * 3}, {"a": 1.0}, [0, 0, 0], normalize)
    assert equal in ([0.1] * 3, [0.0] * 3, [0.5] * 3)


def test_near_duplicates_go_before_they_are_scored_and_are_counted(build, tmp_path):
    report = prepare(build("mine.py:short", near_duplicates=0.8))
    assert report.lost == {"near-duplicates": 5} and report.reward_count["data"] == 15
    assert "candidates dropped, near-duplicates: 5" in report.text()
    assert all("a long way of" not in record["completions"] for record in written(tmp_path))
    texts = ["a long way off", "A  long way of", "b"]
    assert without_near_duplicates(texts, 0.8, first=1) == [1, 2]
    assert without_near_duplicates(texts, 1.0, first=None) == [0, 1, 2]


def test_equal_rewards_of_those_kept_and_best_of_n(build):
    report = prepare(build("mine.py:right", ranking_length=2, select="top", limit=2))
    assert report.kept == 2
    with pytest.raises(ValueError, match="rewards of the candidates kept equal': 2"):
        prepare(build("-1*mine.py:right", ranking_length=2, select="top", limit=2, overwrite=True))
    # No candidate of the first is right at first; that of the second place is.
    assert report.best_of == {"data": {1: 0.0, 2: 1.0, 4: 1.0}}
    assert "  of the best of the first 1, 2, 4 in each list: 0, 1, 1" in report.text()
    lines = [
        {"record": None, "dropped": "x", "samples": {}, "lost": {}, "notes": {},
         "chosen_first": None, "scored": {"rewards": r, "lengths": [1] * len(r),
                                          "sources": ["s"] * len(r)}}
        for r in ([3.0, 1.0, 5.0], [0.0])
    ]  # fmt: skip
    counted = PrepareReport.of(lines, DataReport(), None)
    assert counted.best_of == {"s": {1: 1.5, 2: 1.5, 3: 2.5}}  # of a list with fewer its best


def test_the_settings_hold_the_source_of_a_function(build, tmp_path):
    def source():
        given = build("mine.py:short")
        found = _settings(given, torch.device("cpu"), None, build_rewards(given, "cpu", ()))
        return found["the source of reward mine.py:short"]

    before = source()
    (tmp_path / "mine.py").write_text(f"{SOURCE}\n# another hash\n")
    assert source() != before


# Servers


class RewardServer(FakeServer):
    """Scores texts by their length; ``spoil`` makes another answer of a right one.

    The first text, which is sent to see what the server does, is scored rightly.
    """

    def __init__(self, spoil=lambda answer: answer, judge=lambda text: "", **options) -> None:
        self.spoil, self.judge = spoil, judge
        super().__init__(**options)

    def answer(self, path, body):
        spoil = self.spoil if "Say hello" not in json.dumps(body) else lambda answer: answer
        if "REFUSED" in json.dumps(body):
            return 400, b'{"error": {"message": "too long for me"}}'
        if path.endswith("/chat/completions"):
            said = {"role": "assistant", "content": self.judge(body["messages"][0]["content"])}
            return 200, json.dumps(spoil({"choices": [{"message": said}]})).encode()
        if path == "/score":
            items = [{"score": len(text) / 10} for text in body["text_2"]]
        else:
            said = body["input"] if "input" in body else body["messages"][-1]["content"]
            value = len(said) / 10
            items = [{"probs": [value], "num_classes": 1}]
            if path == "/pooling":
                items = [{"data": [[9.0], [value]] if "tokens" in said else [value]}]
        data = [{"index": i} | item for i, item in enumerate(items)]
        return 200, json.dumps(spoil({"data": data[::-1]})).encode()


QUICKLY = {"server_retries": 0, "server_patience": 0.2}
CHAT = RankedList(([{"role": "system", "content": "s"}, user("q")],), ([assistant("four")],
                  [assistant("REFUSED")]), template={"enable_thinking": False})  # fmt: skip
TEXT = RankedList(("q: ",), ("of tokens", " b"), where="x.jsonl:3")
PAIRS = [(ranked, text) for ranked in (TEXT, CHAT) for text in ranked.completions]


@pytest.mark.parametrize(
    ("path", "stay", "values", "body"),
    [
        ("/score", False, [0.9, 0.2, None, None],
         {"text_1": "q: ", "text_2": ["of tokens", " b"]}),
        ("/classify", False, [0.9, 0.1, 0.4, None],
         {"messages": [user("q: "), assistant("of tokens")]}),
        ("/pooling", True, [1.2, 0.5, 0.4, None], {"input": "q: of tokens"}),
    ],
)  # fmt: skip
def test_reward_models_behind_servers(path, stay, values, body):
    with RewardServer() as server:
        (spec,) = parse([f"org/rm@{server.url}{path}"])
        options = PrepareArguments(**QUICKLY, chat_template="off" if stay else "auto")
        with Server(spec, options) as reward:
            scores = reward.score(PAIRS)
    assert [score.value for score in scores] == values
    why = "refused by the server, HTTP 400"
    assert [score.notes for score in scores] == [(why,) if v is None else () for v in values]
    asked = {json.dumps(x, sort_keys=True): x for x in server.asked}
    assert json.dumps({"model": "org/rm", **body}, sort_keys=True) in asked
    if path != "/score":
        assert any(x.get("chat_template_kwargs") == {"enable_thinking": False}
                   for x in server.asked)  # fmt: skip


def spoilt(path, value):
    """What puts ``value`` at a path of an answer."""

    def spoil(answer):
        at = answer
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return answer

    return spoil


@pytest.mark.parametrize(
    ("path", "spoil", "wrong"),
    [
        ("/score", lambda _: [], r"vLLM's /score with 2 of one number each .* got \[\]"),
        ("/score", lambda a: {"data": a["data"][:1]}, r"x.jsonl:3, the completion .*\(1 of 2\)"),
        ("/score", spoilt(["data", 0, "score"], "high"), "a finite number .* got 'high'"),
        ("/score", spoilt(["data", 0, "score"], float("nan")), "a finite number .* got nan"),
        ("/classify", spoilt(["data", 0, "probs"], [0.5, 0.5]), "one number each was"),
        ("/pooling", spoilt(["data", 0, "data"], []), "one number each was expected"),
        ("/v1/chat/completions", lambda _: {"choices": []}, "an answer of a chat model"),
    ],
)  # fmt: skip
def test_a_server_that_answers_nonsense(path, spoil, wrong):
    with RewardServer(spoil) as server:
        (spec,) = parse([server.url + path])
        kind = Judge if spec.kind == "judge" else Server
        with kind(spec, PrepareArguments(**QUICKLY)) as reward:
            with pytest.raises(ValueError, match=wrong):
                reward.score(PAIRS[:2])


def test_a_server_that_fails_stops_the_run_and_one_that_refuses_drops_a_candidate(
    build, tmp_path, write_lines
):
    lists = ["one", "REFUSED", "three"], ["REFUSED", "three"]
    lines = [{"prompt": "p", "completions": texts} for texts in lists]
    data = [write_lines(*lines, name="refused.jsonl")]
    options = {"data": data, "server_retries": 0, "server_patience": 0.2}
    with RewardServer() as server:
        report = prepare(build(f"{server.url}/classify", **options))
    (record,) = written(tmp_path)
    assert record["completions"] == ["three", "one"] and record["rewards"] == [0.5, 0.3]
    assert report.notes == {"classify": {"refused by the server, HTTP 400": 2}}
    assert report.lost == {"without a score": 2}
    assert report.dropped == {recipe.TOO_FEW: 1}
    partial = tmp_path / "out.jsonl.partial"
    for fault in (400, 404, 500):  # of all texts: before anything is sampled or scored
        with RewardServer(fault=lambda number, body, fault=fault: fault) as server:
            wrong = f"reward {server.url}/classify: .*HTTP {fault}.*go away"
            with pytest.raises((ValueError, ConnectionError), match=wrong):
                prepare(build(f"{server.url}/classify", overwrite=True, **options))
        assert not partial.exists()
    url = f"{server.url}/classify"  # nobody is there any more
    with pytest.raises(ConnectionError, match=f"reward {url}: no answer from any server"):
        prepare(build(url, overwrite=True, **options))
    with RewardServer(fault=lambda number, body: 500 if "three" in str(body) else None) as server:
        with pytest.raises(ValueError, match="refused.jsonl:2: reward http://.*: HTTP 500"):
            prepare(build(f"{server.url}/classify", overwrite=True, **options))


def test_the_settings_hold_the_model_of_a_server(build, tmp_path):
    with RewardServer() as server:
        written = f"reward {server.url}/v1/chat/completions"
        for model in ("", "m@"):
            (reward,) = build_rewards(build(f"{model}{server.url}/v1/chat/completions"), "cpu", ())
            assert reward.identity() == ({} if model else {f"the models of {written}": [MODEL]})
        (reward,) = build_rewards(build(f"{server.url}/score"), "cpu", ())
        assert list(reward.identity().values()) == [[MODEL]]
        server.models = {"object": "error"}  # no list
        (reward,) = build_rewards(build(f"{server.url}/score"), "cpu", ())
        assert reward.identity() == {}


def test_a_judge_that_gives_numbers(build, tmp_path):
    def judge(text):
        length = len(re.search(r"\[Answer\]\n(.*)", text)[1])
        return "no idea" if length == 2 else f"[[1]] at first, then [[{length / 2}]]."

    with RewardServer(judge=judge) as server:
        report = prepare(build(f"2*m@{server.url}/v1/chat/completions"))
    assert server.asked[0]["temperature"] == 0 and server.asked[0]["model"] == "m"
    assert report.notes == {"m": {"judge's answer not understood": 5}}
    assert report.lost == {"without a score": 5}
    for i, record in enumerate(written(tmp_path)):
        assert record["completions"] == ["a long way off", "a long way of", str(i)]
        assert record["raw_rewards"] == {"m": [7.0, 6.5, 0.5]}
        assert record["rewards"] == [14.0, 13.0, 1.0]
    wrong = "every list was dropped: .*; reward judge, judge's answer not understood: 20"
    with RewardServer(judge=lambda text: "[[ten]]") as server:
        with pytest.raises(ValueError, match=wrong):
            prepare(build(f"{server.url}/v1/chat/completions", overwrite=True))


def test_a_judge_of_pairs_is_asked_in_both_orders(build, tmp_path):
    (tmp_path / "judge.txt").write_text("{prompt}|{a}|{b}")

    def judge(text):
        _, a, b = text.split("|")
        if {a, b} == {"no", "a long way of"}:
            return "A!"  # whoever stands first
        if {a, b} == {"no", "a long way off"}:
            return "?"
        return "C!" if len(a) == len(b) else "AB"[len(a) < len(b)] + "!"

    with RewardServer(judge=judge) as server:
        report = prepare(build(
            f"{server.url}/v1/chat/completions", limit=1, judge="pairs",
            judge_template="judge.txt", judge_pattern="([ABC])!",
        ))  # fmt: skip
    asked = [x["messages"][0]["content"] for x in server.asked if "hello" not in str(x)]
    assert len(asked) == len(set(asked)) == 4 * 3
    assert {"0?|no|0", "0?|0|no"} <= set(asked)
    (record,) = written(tmp_path)
    scores = dict(zip(record["completions"], record["rewards"], strict=True))
    # Each meets three others twice; that of "no" and "a long way off" was not decided.
    assert scores == {"a long way off": 1.0, "a long way of": 0.5, "0": 0.0, "no": 0.75}
    said = {"judge's answer not understood": 2, "pairs judged by their order": 1}
    assert report.notes == {"judge": said}
    assert "reward judge, pairs judged by their order: 1" in report.text()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"judge": "number"}, "judge_template: {completion} was expected in it"),
        ({"judge": "pairs"}, "judge_template: {a} was expected"),
        ({"judge_template": "none.txt"}, "judge_template none.txt: cannot be read"),
        ({"judge_template": None, "judge_pattern": "["}, "judge_pattern '\\[': no regular expres"),
        ({"judge_template": None, "judge_pattern": "[0-9]"}, "one group .* expected, .* got 0"),
    ],
)
def test_what_a_judge_cannot_be_told(build, tmp_path, options, wrong):
    (tmp_path / "judge.txt").write_text("{prompt}")
    with pytest.raises(ValueError, match=wrong):
        options = {"judge_template": "judge.txt", **options}
        prepare(build("http://127.0.0.1:1/chat/completions", **options))


# What the report says of rewards


def reported(*lists: dict) -> DataReport:
    report = DataReport()
    assert len(list(read_lists([lists], report, ListOptions()))) == len(lists)
    return report


def test_the_data_report_tells_of_rewards_margins_and_length_bias():
    texts = ["x" * 40, "x" * 30, "x" * 20]
    longer = [{"prompt": f"{i}", "completions": texts, "rewards": [i + 2.5, 2, 0]}
              for i in range(3)]  # fmt: skip
    report = reported(*longer)
    found = report.as_dict()["rankings"]
    assert found["reward_histogram"] == [3, 0, 0, 0, 3, 1, 0, 1, 0, 1]
    assert found["margin_to_second"] == {"min": 0.5, "median": 1.5, "p95": 2.5, "max": 2.5}
    assert found["margin_to_worst"]["max"] == 4.5
    assert found["characters_by_rank"] == [40, 30, 20]
    assert found["length_bias"] and found["length_correlation"] == pytest.approx(0.96, abs=0.04)
    text = report.text()
    assert "mean characters by rank, best first: 40, 30, 20" in text
    assert "length bias: longer candidates rank higher" in text
    shorter = reported(*({"prompt": f"{i}", "completions": texts[::-1]} for i in range(3)))
    assert "correlation of rank and length within a list, mean: -1.00" in shorter.text()
    assert "length bias: shorter candidates rank higher" in shorter.text()
    mixed = reported(longer[0], {"prompt": "p", "completions": texts[::-1]})
    assert "length bias" not in mixed.text()


def test_what_is_uncounted_leaves_nothing(tmp_path):
    report = reported({"prompt": "p", "completions": ["aa", "b"], "rewards": [1, 0]})
    (ranked,) = read_lists([[{"prompt": "p", "completions": ["aa", "b"], "rewards": [1, 0]}]],
                           DataReport(), ListOptions())  # fmt: skip
    report.uncount(ranked, "why")
    assert report.rankings.as_dict() == DataReport().rankings.as_dict()


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        ([1, 2], "'raw_rewards' must be an object of names with 2 numbers each, got a list"),
        ({"a": [1]}, "2 completions but 1 raw_rewards.a"),
        ({"a": [1, "x"]}, r"raw_rewards.a\[1\] must be a number"),
    ],
)
def test_raw_rewards_that_are_none(raw, wrong):
    record = {"prompt": "p", "completions": ["a", "b"], "raw_rewards": raw}
    with pytest.raises(ValueError, match=wrong):
        list(read_lists([[record]], DataReport(), ListOptions()))
