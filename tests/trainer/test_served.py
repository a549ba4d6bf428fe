"""``prepare`` on servers: the same bytes whatever they do, and only samples are written."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from servers import FAULTS, MODEL, FakeServer, words
from texts import assistant, pair, records, row, system, user

from pro_trainer.cli.prepare import Progress, prepare
from pro_trainer.data.records import RankedList
from pro_trainer.prepare import client, served
from pro_trainer.prepare.answers import ServerError
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.served import Served, Servers, read_answer

LISTS = 13


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch):
    """Second tries do not wait for long."""
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)


@pytest.fixture(scope="module")
def build(make_arguments, tmp_path_factory):
    """Builds arguments of a run on prompts alone."""
    data = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(LISTS)))

    def built(folder: Path, fake: FakeServer | None, name="out.jsonl", **changes):
        options = {"data": [str(data)], "num_samples": 4, "temperature": [0.5, 1.5]}
        options["server"] = [fake.url] if fake else []
        return make_arguments(folder, name, **{**options, **changes})

    return built


@pytest.fixture
def arguments(build, tmp_path):
    return lambda fake, name="out.jsonl", **changes: build(tmp_path, fake, name, **changes)


def written(folder: Path, name="out.jsonl"):
    """Output and report."""
    return [(folder / f"{name}{end}").read_bytes() for end in ("", ".report.json")]


@pytest.fixture(scope="module")
def undisturbed(build, tmp_path_factory):
    """What a run without faults writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with FakeServer() as server:
        prepare(build(folder, server))
    return written(folder)


def test_prompts_alone_become_lists_of_samples(arguments, tmp_path):
    with FakeServer() as server:
        report = prepare(arguments(server))
    made = records(tmp_path / "out.jsonl")
    for i, record in enumerate(made):
        assert record["prompt"] == f"question {i}" and record["sources"] == ["chatty"] * 4
        assert record["chosen_index"] is None and record["sft_index"] == 0
        assert record["rewards"] == sorted(record["rewards"], reverse=True)
        bodies = [x for x in server.asked if f'"question {i}"' in json.dumps(x)]
        assert [body["temperature"] for body in sorted(bodies, key=str)] and len(bodies) == 2
        expected = {
            f" {words(json.dumps(x['messages']), x['seed'], k, x['temperature'])}"
            for x in bodies
            for k in range(2)
        }
        assert set(record["completions"]) == expected
    assert len(made) == LISTS and report.samples["chatty"]["made"] == 4 * LISTS
    assert "prompts alone" in report.text() and report.chosen_first is None
    asked = server.asked[1:]  # after the one that tried the server out
    assert {body["temperature"] for body in asked} == {0.5, 1.5}
    assert len({body["seed"] for body in asked}) == 2 * LISTS and len(asked) == 2 * LISTS
    for body in asked:
        assert body["model"] == MODEL and body["n"] == 2 and body["max_tokens"] == 8
        assert body["top_p"] == 0.95 and body["stop"] == ["\n\nHuman:"]
        assert 0 <= body["seed"] < 2**31


@pytest.mark.parametrize("n", ["ignores", "refuses"])
def test_servers_without_n_are_asked_several_times(arguments, tmp_path, n):
    with FakeServer(n=n) as server:
        report = prepare(arguments(server, num_samples=3))
    asked = server.asked[2 if n == "ignores" else 3 :]
    assert len(asked) == 3 * LISTS and not any("n" in body for body in asked)
    assert [body["temperature"] for body in asked].count(0.5) == 2 * LISTS
    assert report.samples["chatty"] == {"made": 3 * LISTS}
    assert all(len(set(record["completions"])) == 3 for record in records(tmp_path / "out.jsonl"))


def test_a_server_that_does_not_sample_is_told_of(arguments, monkeypatch, capsys):
    monkeypatch.setattr("servers.words", lambda prompt, *of: words(prompt))
    for n in ("takes", "ignores"):
        with FakeServer(n=n) as server:
            with pytest.raises(ValueError, match="every list was dropped: .*'repeated': 39"):
                prepare(arguments(server, f"{n}.jsonl"))
            said = f"prepare: {server.url}/v1 gave the same sample twice: it may not sample at all"
            assert said in capsys.readouterr().err.splitlines()


def test_servers_that_share_the_work_take_n_all_or_none(arguments, monkeypatch):
    with FakeServer() as one, FakeServer(n="ignores") as other:
        prepare(arguments(one, server=[one.url, other.url], limit=4))
        assert not any("n" in body for body in one.asked[1:] + other.asked[1:])
    with FakeServer() as server:
        server.delay = lambda number: setattr(server, "n", "takes" if number == 0 else "ignores")
        with pytest.raises(ServerError, match="gave 1 samples where 2 were asked for"):
            prepare(arguments(server, "x.jsonl"))


def test_dialogues_tools_and_further_fields(arguments, write_lines, tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    tools = [{"type": "function", "function": {"name": "f"}}]
    data = write_lines(
        {"prompt": [system("s"), user("u")], "tools": tools, "chat_template_kwargs": {"x": 1}},
        {"chosen": f"{start} good", "rejected": f"{start} bad"},
        pair("p", "one", "two"),
        {"prompt": "q", "completions": ["alone"]},
    )
    fields = '{"top_k": 7}'
    with FakeServer() as server:
        report = prepare(
            arguments(
                server, data=[data], server_fields=fields, num_samples=2, chat_template="auto"
            )
        )
    bodies = {str(x["messages"][-1]["content"]): x for x in server.asked[1:]}
    assert bodies["u"]["messages"] == [system("s"), user("u")]
    assert bodies["u"]["tools"] == tools and bodies["u"]["chat_template_kwargs"] == {"x": 1}
    assert [m["role"] for m in bodies["c"]["messages"]] == ["user", "assistant", "user"]
    assert all(body["top_k"] == 7 for body in bodies.values())
    first, second, third, fourth = records(tmp_path / "out.jsonl")
    assert all(c[0]["role"] == "assistant" for c in first["completions"])
    assert first["tools"] == tools and first["chat_template_kwargs"] == {"x": 1}
    assert all(c.startswith(" ") and c == f" {c.strip()}" for c in second["completions"])
    assert sorted(second["sources"]) == ["chatty", "chatty", "data", "data"]
    assert len(third["completions"]) == 4 and len(fourth["completions"]) == 3
    assert fourth["completions"][fourth["chosen_index"]] == "alone"
    assert report.chosen_first is not None  # of the lists where one is preferred


def test_texts_are_completed_as_they_are(arguments, write_lines, tmp_path):
    with FakeServer() as server:
        prepare(arguments(server, server_api="completions", server_model=["a/b", "c"], limit=2))
        asked = server.asked[2:]
        assert {body["prompt"] for body in asked} == {"question 0", "question 1"}
        assert {body["model"] for body in asked} == {"a/b", "c"}
        assert sorted(records(tmp_path / "out.jsonl")[0]["sources"]) == ["b"] * 4 + ["c"] * 4
        data = write_lines({"prompt": "x"}, {"prompt": [user("x")]})
        server.asked.clear()
        with pytest.raises(ValueError, match="data.jsonl:2: messages, tools and .* need server_ap"):
            prepare(arguments(server, "x.jsonl", data=[data], server_api="completions"))
        assert not server.asked


@pytest.mark.parametrize("cut_samples", ["keep", "drop"])
def test_what_is_no_sample_is_counted_and_not_written(
    arguments, write_lines, tmp_path, cut_samples
):
    prompts = ("fine", "EMPTY", "CUT", "FILTERED", "STOPS", "REFUSED", "CONTROL")
    data = write_lines(*({"prompt": prompt} for prompt in prompts))
    with FakeServer() as server:
        report = prepare(arguments(server, data=[data], cut_samples=cut_samples))
    made = {record["prompt"]: record["completions"] for record in records(tmp_path / "out.jsonl")}
    sizes = {prompt: len(completions) for prompt, completions in made.items()}
    cut = 4 if cut_samples == "keep" else 2
    assert sizes == {"fine": 4, "EMPTY": 2, "CUT": cut, "FILTERED": 2, "STOPS": 4, "CONTROL": 4}
    assert not any("Human" in text for text in made["STOPS"])
    assert all(text.startswith("\0\x1b[31m\u2028") for text in made["CONTROL"])
    counts = report.samples["chatty"]
    assert counts["made"] == 24 and counts["empty"] == 2
    name, shown = ("cut", "cut at their greatest length: 2")
    if cut_samples == "drop":
        name, shown = ("failed: cut by length", "failed: cut by length: 2")
    assert counts[name] == 2
    assert counts["failed: HTTP 400"] == 4 and counts["failed: ended by content_filter"] == 2
    assert dict(report.dropped) == {"fewer than 2 different candidates": 1}
    said = report.text()
    assert "failed: HTTP 400: 4" in said and shown in said
    assert "lists dropped, fewer than 2 different candidates: 1" in said


def at_random(seed):
    """All faults, each request with a chance of one in three, which differs from run to run."""
    chance = random.Random(seed)
    return lambda number, body: chance.choice(FAULTS) if number and chance.random() < 0.33 else None


@pytest.mark.parametrize("case", ["faults", "order", "hangs", "one dies"])
def test_the_same_bytes_whatever_servers_do(arguments, undisturbed, tmp_path, capsys, case):
    chance = random.Random(0)
    with contextlib.ExitStack() as stack:
        make = {
            "faults": lambda: FakeServer(at_random(1)),
            "order": lambda: FakeServer(delay=lambda number: chance.random() * 0.05),
            "hangs": lambda: FakeServer(lambda number, body: "hangs" if number in (4, 9) else None),
            "one dies": FakeServer,
        }[case]
        servers = [stack.enter_context(make()) for _ in range(2 if case == "one dies" else 1)]
        if case == "one dies":
            servers[0].dies_at = 6
        urls = [server.url for server in servers]
        prepare(arguments(None, server=urls, server_timeout=1.0, concurrency=4))
    assert written(tmp_path) == undisturbed
    said = capsys.readouterr().err
    assert ("requests that failed, sent again or given up: " in said) == (case != "order")
    assert "4 of 4" not in said and f"{LISTS} of {LISTS} lists, " in said
    assert "tokens a second" in said


def test_when_the_only_server_dies_the_run_goes_on_later(
    arguments, run_prepare, undisturbed, tmp_path, capsys
):
    with FakeServer(delay=lambda number: 0.01) as server:
        server.dies_at = 15
        options = arguments(server, concurrency=2, server_patience=0.3)
        assert run_prepare(options) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: no answer from any server in ")
        assert "lists; the same command goes on from there" in error
        kept = (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n")
        assert 0 < kept < LISTS
        server.asked.clear()
        server.live()
        assert run_prepare(options) == 0
        assert len(server.asked) == 1 + 2 * (LISTS - kept)  # what is there is not asked for again
    assert written(tmp_path) == undisturbed


def test_killed_at_random_moments_it_goes_on(arguments, undisturbed, tmp_path):
    chance = random.Random(3)
    context = multiprocessing.get_context("fork")
    with FakeServer(at_random(4), delay=lambda number: chance.random() * 0.06) as server:
        killed = arguments(server, concurrency=2)
        partial, kills, cut = tmp_path / "out.jsonl.partial", 0, set()
        while not (tmp_path / "out.jsonl").exists():
            process = context.Process(target=prepare, args=(killed,))
            process.start()
            enough = len(server.asked) + chance.randint(7, 25)
            while process.is_alive() and len(server.asked) < enough:
                process.join(0.002)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                process.join()
            if partial.exists():
                cut.add(partial.read_bytes().count(b"\n"))
            assert kills < 60
    assert kills >= 2 and len(cut - {0}) >= 2, (kills, cut)
    assert written(tmp_path) == undisturbed


def test_the_key_is_in_no_file_and_no_line(arguments, monkeypatch, tmp_path, capfd, caplog):
    caplog.set_level(0)
    monkeypatch.setenv("THE_KEY", "sk-secret-4711")
    with FakeServer(lambda number, body: 400 if number % 3 == 2 else None) as server:
        prepare(arguments(server, api_key_env="THE_KEY"))
        assert set(server.keys) == {"Bearer sk-secret-4711"}
        files = [path.read_bytes() for path in tmp_path.iterdir()]
        server.dies_at = len(server.asked) + 15
        with pytest.raises(ServerError) as error:
            options = {"api_key_env": "THE_KEY", "server_patience": 0.1, "concurrency": 2}
            prepare(arguments(server, "x.jsonl", **options))
        assert (tmp_path / "x.jsonl.partial.json").exists()
        files += [path.read_bytes() for path in tmp_path.iterdir()]
        server.live()
        server.fault = lambda number, body: 401
        with pytest.raises(ServerError, match=r"HTTP 401 \(no, Bearer \[key\]: go away\)"):
            prepare(arguments(server, "y.jsonl", api_key_env="THE_KEY"))
    everything = f"{files} {capfd.readouterr()} {caplog.text} {error.value!r}"
    assert "THE_KEY" not in str(files) and "secret-4711" not in everything


def test_other_servers_or_options_of_theirs_are_other_settings(arguments, tmp_path):
    with FakeServer() as server:
        server.dies_at = 20
        with pytest.raises(ServerError):
            prepare(arguments(server, concurrency=1, server_patience=0.1))
        settings = json.loads((tmp_path / "out.jsonl.partial.json").read_text())
        assert settings["server"] == [server.url] and settings["server_model"] == [MODEL]
        server.live()
        with pytest.raises(ValueError, match="cut_samples was 'keep', is 'drop'.*Finish it with"):
            prepare(arguments(server, cut_samples="drop"))
        server.n = "ignores"
        with pytest.raises(ValueError, match="fields no server gets was .., is .'n'."):
            prepare(arguments(server))


@pytest.mark.parametrize("generator", ["small", None])
def test_prompts_alone_with_a_local_generator(
    arguments, recipe_models, tmp_path, write_lines, generator
):
    data = write_lines(
        {"prompt": "a text"}, {"prompt": [user("messages")]}, {"instruction": "x", "input": "y"}
    )
    with FakeServer() as server:
        changes = {
            "data": [data],
            "generator": [str(recipe_models / "small")],
            "chat_template": "auto",
        }
        prepare(arguments(None if generator else server, **changes))
    first, second, third = records(tmp_path / "out.jsonl")
    assert {"small"} <= set(first["sources"]) <= {"small", "chatty"}
    assert (len(first["completions"]) > 4) == (generator is None)
    assert isinstance(first["completions"][0], str) and third["prompt"] == "x\ny"
    assert second["prompt"] == [user("messages")] and second["completions"][0][0]["content"]


SAID = {"role": "assistant", "refusal": None, "tool_calls": []}
CHAT = {  # as vLLM 0.11 writes it
    "choices": [
        {"index": 1, "message": SAID | {"content": "Second."}, "finish_reason": "stop"},
        {"index": 0, "message": SAID | {"content": None, "reasoning_content": "Let me think"},
         "finish_reason": "length"},
    ],
    "usage": {"prompt_tokens": 9, "total_tokens": 49, "completion_tokens": 40},
}  # fmt: skip
TEXT = {
    "choices": [{"index": 0, "text": " One.", "logprobs": None, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3},
}


@pytest.mark.parametrize(
    ("answer", "choices", "tokens"),
    [
        (CHAT, [("", "length"), ("Second.", "stop")], 40),
        (TEXT, [(" One.", "stop")], 3),
        ({"choices": [{"text": "x"}]}, [("x", None)], 0),  # llama.cpp, old
        ({"choices": [{"text": "x", "finish_reason": "eos_token"}], "usage": None},
         [("x", "eos_token")], 0),
    ],
)  # fmt: skip
def test_answers_of_other_servers(answer, choices, tokens):
    found = read_answer(answer)
    assert [tuple(choice) for choice in found.choices] == choices and found.tokens == tokens


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "not an object"),
        ({"error": "x"}, "choices must be a list, got null"),
        ({"choices": []}, "choices must hold objects"),
        ({"choices": [{"message": {"role": "user", "content": "x"}}]}, "one of the assistant"),
        ({"choices": [{"message": {"content": ["x"]}}]}, "text must be a string, got a list"),
        ({"choices": [{"text": None}]}, "text must be a string, got null"),
        ({"choices": [{"text": "\ud800"}]}, "lone surrogate"),
        ({"choices": [{"text": "x", "finish_reason": 3}]}, "finish_reason must be a string"),
    ],
)
def test_malformed_answers(answer, message):
    with pytest.raises(ValueError, match=message):
        read_answer(answer)


@pytest.mark.parametrize(
    ("prompt", "message", "changes"),
    [
        row("", "'prompt' is empty"),
        row([user("x"), assistant("y")], "ends with"),
        row("x", "a prompt alone prefers no candidate", sft="chosen"),
    ],
)
def test_prompts_that_cannot_be_answered(arguments, write_lines, prompt, message, changes):
    fine = {"prompt": "fine"} if not changes else pair()
    data = write_lines(fine, {"prompt": prompt})
    with pytest.raises(ValueError, match=f"data.jsonl:2: .*{message}"):
        prepare(arguments(None, server=["http://h.invalid"], data=[data], **changes))


def test_servers_that_list_no_model_or_several(arguments, monkeypatch):
    for listed, shown in (("[]", "0: none"), ('[{"id": "a"}, {"id": "b"}]', "2: 'a', 'b'")):
        reply = f'{{"data": {listed}}}'.encode()
        with FakeServer() as server:
            monkeypatch.setattr(
                "servers._Handler.do_GET", lambda handler, reply=reply: handler.reply(200, reply)
            )
            with pytest.raises(ValueError, match=f"server_model: name one, .* lists {shown}"):
                prepare(arguments(server))


def test_what_a_request_asks_for_depends_on_its_list_alone():
    options = PrepareArguments(num_samples=5, temperature=[0.5, 1.0], seed=7)
    servers = Servers(("http://h/v1",), ("m",), options)
    lists = [RankedList((f"p{i}",), ()) for i in range(4)]
    made = [list(Served("m", "m", servers, None)._requests(lists[k:], k)) for k in (0, 2)]
    assert made[0][4:] == made[1] and [x[1]["n"] for x in made[1]] == [3, 2, 3, 2]
    assert made[0][1][1]["seed"] == made[0][0][1]["seed"] + 3  # those between are of its samples
    alone = Servers(("http://h/v1",), ("m",), options, left_out=("n", "seed"))
    bodies = list(Served("m", "m", alone, None)._requests(lists[:1], 0))
    assert len(bodies) == 5 and not any({"n", "seed"} & body.keys() for _, body in bodies)
    assert [body["temperature"] for _, body in bodies] == [0.5] * 3 + [1.0] * 2
    assert served._plan(options, True) == [(0.5, [0, 2, 4]), (1.0, [1, 3])]


def test_the_progress_tells_what_is_left(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress(100, 1000, lambda: 5000) as shown:
        now = 50.0
        shown.update(100)
        now = 111.0
        shown.update(1)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "prepare: going on after 100 of 1000 lists",
        "prepare: 200 of 1000 lists, 2 a second, 100 tokens a second, about 7 min left",
        "prepare: 201 of 1000 lists, 0.91 a second, 45 tokens a second, about 15 min left",
    ]
