"""The client of many requests: order, faults, limits, and a key that shows nowhere."""

from __future__ import annotations

import random
import time

import pytest
from servers import FAULTS, FakeServer

from pro_trainer.prepare import client as clients
from pro_trainer.prepare.answers import Failure, ServerError, readable, retry_after
from pro_trainer.prepare.client import Client
from pro_trainer.prepare.options import ServerOptions
from pro_trainer.prepare.served import read_answer

QUICK = {"concurrency": 16}


@pytest.fixture(autouse=True, scope="module")
def _soon_again():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients, "FIRST_WAIT", 0.001)
        patch.setattr(clients, "MAX_BYTES", 1 << 20)
        yield


def requests(count):
    return [("/v1/completions", {"prompt": f"p{i}", "temperature": 1.0}) for i in range(count)]


def texts(answer):
    return [choice.text for choice in read_answer(answer).choices]


def ask(urls, count=60, read=texts, **options):
    with Client(urls, ServerOptions(**{**QUICK, **options})) as client:
        return list(client.ask(iter(requests(count)), read)), client.failures


@pytest.fixture(scope="module")
def right():
    """Answers without any fault."""
    with FakeServer() as server:
        found, failures = ask([server.url])
    assert not failures and len({x[0] for x in found}) == 60
    return found


def test_answers_come_in_the_order_of_the_requests_and_many_at_once(right):
    under_way = most = 0

    def delay(number):
        nonlocal under_way, most
        with server.lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(random.random() * 0.02)
        with server.lock:
            under_way -= 1
        return 0.0

    with FakeServer(delay=delay) as server:
        assert ask([server.url], concurrency=8)[0] == right
    assert 4 <= most <= 8


@pytest.mark.parametrize("fault", [*FAULTS, "hangs"])
def test_each_fault_is_asked_again_and_counted(right, fault):
    with FakeServer(lambda number, body: fault if number % 5 == 0 else None) as server:
        found, failures = ask([server.url], server_timeout=0.5 if fault == "hangs" else 600)
    assert found == right
    (reason,) = failures
    expected = {
        "breaks off": "broken connection",
        "floods": "answer too large",
        "hangs": "time-out",
    }.get(fault, f"HTTP {fault}" if isinstance(fault, int) else "malformed answer")
    assert reason == expected and failures[reason] >= 12


def test_a_dead_server_is_left_out_and_the_others_do_its_work(right):
    with FakeServer() as first, FakeServer() as second:
        first.die()
        found, failures = ask([first.url, second.url], concurrency=2)
        assert found == right and len(second.asked) == 60
        assert set(failures) == {"no connection"} and 3 <= failures["no connection"] <= 8
        first.live()
        ask([first.url, second.url])
        assert len(first.asked) == 30  # in turn


def test_a_server_that_comes_back_is_used_again(right):
    with FakeServer(delay=lambda number: 0.005) as server:
        answers = []
        with Client([server.url], ServerOptions(**QUICK, server_patience=10)) as client:
            for answer in client.ask(iter(requests(60)), texts):
                answers.append(answer)
                if len(answers) == 5:
                    server.die()
                    time.sleep(0.05)
                    server.live()
        assert answers == right and client.failures


def test_what_one_request_is_refused_or_fails_for_is_its_own_failure():
    def fault(number, body):
        return {"p3": 400, "p4": 302, "p5": 500, "p6": "another form"}.get(body["prompt"])

    with FakeServer(fault) as server:
        found, failures = ask([server.url], count=10, server_retries=2, concurrency=2)
    reasons = [x.reason for x in found if isinstance(x, Failure)]
    assert reasons == ["HTTP 400", "HTTP 302", "HTTP 500", "malformed answer"]
    assert [isinstance(x, Failure) for x in found] == [3 <= i <= 6 for i in range(10)]
    counts = {"HTTP 400": 1, "HTTP 302": 1, "HTTP 500": 3, "malformed answer": 3}
    assert failures == counts and found[3].detail == "no, None: go away"


@pytest.mark.parametrize(
    ("fault", "first", "message", "for_all"),
    [
        (401, 0, "HTTP 401 .no, None: go away", True),
        (404, 0, r"/v1/completions: HTTP 404", True),
        (500, 0, "HTTP 500 .no, .*, 3 times, and nothing else is ans", False),
        # In the middle: a request is only given up while others are answered.
        (500, 30, "HTTP 500 .no, .*, 3 times, and nothing else is ans", False),
        ("another form", 30, "3 times, and nothing else is ans", False),
        (503, 0, "no answer from any server in .* seconds; .*HTTP 503", False),
        ("dead", 0, "no answer from any server in .* seconds; .*no connection", False),
    ],
)
def test_when_no_server_can_go_on_the_run_stops(right, fault, first, message, for_all):
    with FakeServer(lambda number, body: fault if number >= first else None) as server:
        if fault == "dead":
            server.die()
        patience = 0.2 if "no answer" in message else 20
        options = {"server_retries": 2, "server_patience": patience, "concurrency": 1}
        with Client([server.url], ServerOptions(**options)) as client:
            with pytest.raises(ServerError, match=message) as error:
                for answer, expected in zip(client.ask(requests(60), texts), right, strict=False):
                    assert answer == expected
        assert error.value.for_all == for_all and len(server.asked) < first + 40


def test_the_rate_limit_and_retry_after_are_kept_to():
    with FakeServer() as server:
        began = time.monotonic()
        ask([server.url], count=11, requests_per_second=50)
        assert time.monotonic() - began >= 0.2
    with FakeServer(lambda number, body: 429 if number == 0 else None) as busy:
        busy.retry_after = "0.3"
        began = time.monotonic()
        ask([busy.url], count=5, concurrency=1)
        assert time.monotonic() - began >= 0.3  # all of them wait
        busy.asked.clear()
        busy.retry_after = "60"
        with FakeServer() as other:
            ask([busy.url, other.url], count=20, concurrency=1)
            assert len(busy.asked) == 1 and len(other.asked) == 20  # or go elsewhere
    for value, seconds in {"7": 7, " 1.5 ": 1.5, "1e9": 0, "": 0, "soon": 0, "9999": 600}.items():
        assert retry_after(value) == seconds
    assert retry_after("Wed, 21 Oct 2065 07:28:00 GMT") == 600
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_a_caller_that_stops_or_fails_leaves_nothing_running():
    with FakeServer(delay=lambda number: 0.02) as server:
        with Client([server.url], ServerOptions(**QUICK)) as client:
            answers = client.ask(iter(requests(60)), texts)
            next(answers)
            answers.close()
        thread = client._thread
        assert not thread.is_alive() and len(server.asked) < 60


def test_a_key_is_cut_out_of_what_servers_say():
    key = "sk-Very/secret+1"
    assert readable(f"\x1b[31m{key}\n" + "x" * 300, key) == f"[31m[key] {'x' * 190}..."


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("localhost:8000", None, "a URL http://... or https://... was expected, got 'localhost"),
        ("http://", None, "was expected, got 'http://'"),
        ("http://h:x", None, "was expected, got"),
        ("https://u:secret@host/v1", None, "URL of host holds a user, a password or a query: giv"),
        ("https://host/v1?key=secret", None, "URL of host holds a user, a password or a query"),
        ("http://h", "NO_SUCH_secret", "api_key_env: there is no environment"),
        ("http://h", "ODD", "api_key_env: the value of ODD cannot be sent"),
    ],
)
def test_bad_options_are_refused_and_no_secret_is_repeated(monkeypatch, url, key, message):
    monkeypatch.setenv("ODD", "k\u00e9y")
    with pytest.raises(ValueError, match=message) as error:
        Client([url], ServerOptions(api_key_env=key))
    assert "secret" not in str(error.value)
