"""The client against a real server process that fails in every way: nothing lost, nothing recorded asked twice."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from awares.clients.chat import ChatClient, Server, _retry_after
from awares.clients.replies import Request
from awares.errors import AwaresError, AwaresRequestError, Failure

HERE = Path(__file__).parents[1]
KEY = "sk-planted-5f1d"


class Faulty:
    """The process of faulty_server.py and its log of arrivals."""

    def __init__(self, log: Path) -> None:
        self.log, self.port = log, 0
        self.start()

    def start(self) -> None:
        """Start, after `stop` at the same port again."""
        command = [sys.executable, str(HERE / "faulty_server.py"), str(self.log), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def arrivals(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []

    def counts(self) -> Counter[str]:
        return Counter(arrival["text"] for arrival in self.arrivals())

    def peak(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/peak") as answer:
            return int(answer.read())


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    faulty = Faulty(tmp_path_factory.mktemp("faulty") / "log.jsonl")
    yield faulty
    faulty.stop()


@pytest.fixture
def faulty(process: Faulty, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """The module's server; the requests of one test have texts that no other's have."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AWARES_API_KEY", raising=False)
    return process


@pytest.fixture
def client(faulty: Faulty, tmp_path: Path) -> Callable[..., ChatClient]:
    def make(cache: str | None = "replies.jsonl", **options: Any) -> ChatClient:
        limits = {"concurrency": 4, "timeout": 60.0, "attempts": 3, "first_wait": 0.01, **options}
        return ChatClient(Server(faulty.url, "m", **limits), tmp_path / cache if cache else None)

    return make


def request(text: str, row_id: str = "r", **settings: Any) -> Request:
    return Request(row_id, [{"role": "user", "content": text}], {"temperature": 0.0, **settings})


def requests(*texts: str) -> list[Request]:
    return [request(text, f"r{index}") for index, text in enumerate(texts)]


def test_replies_come_in_order_raw_bodies_kept_and_concurrency_is_bounded(client, faulty: Faulty) -> None:
    asked = requests(*(f"order {i}|slow={0.3 - 0.02 * i:.2f}" for i in range(12)))
    replies = client().ask(asked)
    assert [reply.text for reply in replies] == [f"reply to {one.messages[0]['content']}" for one in asked]
    assert replies[0].raw["object"] == "chat.completion" and replies[0].seconds >= 0.3
    assert 1 < faulty.peak() <= 4


@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "half", "torn", "garbage", "other"])
def test_what_may_pass_is_tried_again(client, faulty: Faulty, fault: str) -> None:
    text = f"passing {fault}|{fault},{fault},ok"
    (reply,) = client().ask([request(text)])
    assert reply.text == f"reply to {text}" and faulty.counts()[text] == 3


def test_an_answer_that_takes_too_long_is_asked_for_again(client, faulty: Faulty) -> None:
    patient, text = client(timeout=2.0, attempts=2), "late|slow=20,ok"
    assert patient.ask([request(text)])[0].text == f"reply to {text}" and faulty.counts()[text] == 2
    with pytest.raises(AwaresRequestError, match="row r: no answer within 2 s .2 attempts"):
        patient.ask([request("too late|slow=20")])


def test_what_cannot_pass_is_lost_at_once_and_costs_no_other_row(client, faulty: Faulty) -> None:
    asked = requests("lost a", "lost b|400", "lost c|500", "lost d|null", "lost e|half", "lost f")
    with pytest.raises(AwaresRequestError, match="4 of 6 rows have no reply.*run again") as caught:
        client().ask(asked)
    assert [failure.row_id for failure in caught.value.failures] == ["r1", "r2", "r3", "r4"]
    for reason in ("row r1: status 400", "row r2: status 500", "without text", "not JSON"):
        assert reason in str(caught.value)
    tries = {"lost a": 1, "lost b|400": 1, "lost c|500": 3, "lost d|null": 1, "lost e|half": 3}
    assert {text: faulty.counts()[text] for text in tries} == tries
    values = client(attempts=1).ask(asked, return_failures=True)
    assert [isinstance(value, Failure) for value in values] == [False, True, True, True, True, False]
    assert faulty.counts()["lost a"] == faulty.counts()["lost f"] == 1 and faulty.counts()["lost b|400"] == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_the_call_and_the_key_is_told_to_nobody(
    client, faulty: Faulty, monkeypatch, tmp_path: Path, status: int
) -> None:
    monkeypatch.setenv("AWARES_API_KEY", KEY)
    asked = requests(*(f"refused {status} {i}|{status}" for i in range(30)))
    with pytest.raises(AwaresRequestError, match=f"refuses every request, status {status}.*AWARES_API_KEY") as caught:
        client().ask(asked, return_failures=True)
    assert "your key was" in str(caught.value) and KEY not in str(caught.value)
    assert sum(faulty.counts()[one.messages[0]["content"]] for one in asked) <= 8
    assert KEY not in (tmp_path / "replies.jsonl").read_text() if (tmp_path / "replies.jsonl").exists() else True


def test_whether_replies_are_kept_is_said_as_it_is(client, faulty: Faulty) -> None:
    for cache, kept in (("kept.jsonl", "the others are kept: run again"), (None, "the others are not kept")):
        asked = requests("kept or not", "this one is none|400")
        with pytest.raises(AwaresRequestError, match=f"1 of 2 rows have no reply; {kept}") as raised:
            client(cache).ask(asked)
        assert "***" not in str(raised.value)  # no key is set, and none is masked


def test_the_key_comes_from_the_named_variable_alone(client, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another's")
    assert client().ask([request("key 0|key")])[0].text == "Bearer none"
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert (
        client(key_variable="JUDGE_KEY").ask([request("key 1|key")])[0].text == "Bearer ***"
    )  # it was sent, and is not kept


def test_retry_after_is_honoured(client, faulty: Faulty) -> None:
    text = "wait|429=1.2,ok"
    client().ask([request(text)])
    first, second = [arrival["time"] for arrival in faulty.arrivals() if arrival["text"] == text]
    assert second - first >= 1.2
    with pytest.raises(AwaresRequestError, match="asks to wait 86400 s"):
        client().ask([request("wait long|429=86400")])
    assert faulty.counts()["wait long|429=86400"] == 1
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == _retry_after("soon") == _retry_after(None) == 0
    assert 3.1e9 > _retry_after("Fri, 31 Dec 2060 23:59:59 GMT") > 1e8


def test_back_off_doubles_to_a_limit_with_a_jitter_of_its_own_seed() -> None:
    server = Server("http://x/v1", "m", first_wait=1.0, longest_wait=8.0)
    waits = [server.wait(attempt, "key") for attempt in range(1, 7)]
    assert all(top / 2 <= wait <= top for wait, top in zip(waits, (1, 2, 4, 8, 8, 8), strict=True))
    assert waits == [server.wait(attempt, "key") for attempt in range(1, 7)]
    assert len({server.wait(1, "key"), server.wait(1, "other"), replace(server, seed=1).wait(1, "key")}) == 3


def test_the_same_request_is_asked_once_and_any_difference_is_another_request(client, faulty: Faulty) -> None:
    text = "once|slow=0.2"
    assert len(client().ask([request(text, "a"), request(text, "b"), request(text, "c")])) == 3
    client().ask([request(text, "d")])
    assert faulty.counts()[text] == 1
    client().ask([request(text, seed=1), replace(request(text), version="2")])
    other = client()
    other.server = replace(other.server, model="n")
    other.ask([request(text)])
    assert faulty.counts()[text] == 4
    client(cache=None).ask([request(text)])
    client(cache=None).ask([request(text)])
    assert faulty.counts()[text] == 6


def test_a_check_that_raises_keeps_the_reply_out_of_the_file(client, faulty: Faulty, tmp_path: Path) -> None:
    def refuse(reply: Any) -> None:
        raise AwaresRequestError("not this server")

    with pytest.raises(AwaresRequestError, match="not this server"):
        client().ask([replace(request("checked"), check=refuse)])
    client().ask([request("checked")])
    assert faulty.counts()["checked"] == 2


def test_it_works_inside_a_running_event_loop(client) -> None:
    async def cell() -> Any:
        return client().ask(requests("loop a", "loop b"))

    assert [reply.text for reply in asyncio.run(cell())] == ["reply to loop a", "reply to loop b"]


def test_a_server_that_disappears_and_comes_back_loses_nothing(client, faulty: Faulty, tmp_path: Path) -> None:
    asked = requests(*(f"restart {i}|slow=0.5" for i in range(24)))

    def outage() -> None:
        while lines(tmp_path / "replies.jsonl") < 5:
            time.sleep(0.01)
        faulty.stop()
        done_before.append(lines(tmp_path / "replies.jsonl"))
        time.sleep(1.0)
        faulty.start()

    done_before: list[int] = []
    away = threading.Thread(target=outage)
    away.start()
    replies = client(attempts=20, first_wait=0.2, longest_wait=2.0).ask(asked)
    away.join()
    assert [reply.text for reply in replies] == [f"reply to {one.messages[0]['content']}" for one in asked]
    twice = sum(faulty.counts()[one.messages[0]["content"]] > 1 for one in asked)
    assert done_before[0] < len(asked) and twice <= 4  # at most those that were under way when it went


def test_a_server_that_is_gone_for_good_ends_the_call(client) -> None:
    nobody = client(attempts=2, stop_after=3)
    nobody.server = replace(nobody.server, url="http://127.0.0.1:9/v1")
    with pytest.raises(AwaresRequestError, match="gave up after 3 rows without an answer.*run again"):
        nobody.ask(requests(*(f"gone {i}" for i in range(500))), return_failures=True)


def test_a_server_that_refuses_row_after_row_is_set_up_wrongly(client, faulty: Faulty) -> None:
    """One request of the others' kind is refused for itself; where nothing goes through, going on would lose every row."""
    texts = [f"set up wrongly {i}|400" for i in range(30)]
    with pytest.raises(AwaresRequestError, match="gave up after 3 rows.*status 400.*run again"):
        client(stop_after=3, concurrency=1).ask(requests(*texts), return_failures=True)
    assert sum(faulty.counts()[text] for text in texts) == 3
    mixed = [text for i in range(4) for text in (f"now and then {i}|400", f"in between {i}")]
    for _ in range(2):  # the second time only the refused ones go out, one after another
        values = client("mixed.jsonl", stop_after=3, concurrency=1).ask(requests(*mixed), return_failures=True)
        assert [isinstance(value, Failure) for value in values] == [True, False] * 4


JOB = """
import json, sys
from awares.clients.chat import ChatClient, Server
from awares.clients.replies import Request

url, cache, out = sys.argv[1:]
client = ChatClient(Server(url, "m", concurrency=4, first_wait=0.1), cache)
texts = [f"killed {i}|slow=0.2" for i in range(40)]
replies = client.ask([Request(f"r{i}", [{"role": "user", "content": text}], {}) for i, text in enumerate(texts)])
open(out, "w").write(json.dumps([reply.text for reply in replies]))
"""


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def test_after_kill_9_the_same_command_goes_on_and_no_recorded_reply_is_asked_again(
    faulty: Faulty, tmp_path: Path
) -> None:
    cache, out = tmp_path / "replies.jsonl", tmp_path / "out.json"
    command = [sys.executable, "-c", JOB, faulty.url, str(cache), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
    recorded: set[str] = set()
    for enough in (6, 18):
        job = subprocess.Popen(command, env=environment)
        while lines(cache) < enough:
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
        job.wait()
        whole = [json.loads(line) for line in cache.read_bytes().split(b"\n")[:-1]]
        recorded = {record["reply"]["choices"][0]["message"]["content"].removeprefix("reply to ") for record in whole}
        with cache.open("ab") as file:  # what a kill within a write leaves behind
            file.write(cache.read_bytes().split(b"\n")[0][:-7])
    time.sleep(0.5)  # the server is still logging what was under way
    before = faulty.counts()
    subprocess.run(command, env=environment, check=True)
    texts = [f"killed {i}|slow=0.2" for i in range(40)]
    assert json.loads(out.read_text()) == [f"reply to {text}" for text in texts]
    after = faulty.counts()
    assert len(recorded) >= 18 and all(after[text] == before[text] for text in recorded)
    assert all(after[text] == before[text] + 1 for text in texts if text not in recorded)
    keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 40


def test_a_cache_that_is_no_cache_or_that_another_process_holds_is_refused(client, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"key": "k", "id": 1}\n')
    with pytest.raises(AwaresError, match="other.jsonl, line 1: no recorded reply"):
        client("other.jsonl").ask([request("refused cache")])
    for text in ("notes of mine", '{"id": 1}\n'):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(AwaresError, match="notes.txt: contains something other than replies"):
            client("notes.txt").ask([request("refused cache")])
        assert (tmp_path / "notes.txt").read_text() == text
    first, second = client("held.jsonl"), client("held.jsonl")
    with first.replies.opened(), pytest.raises(AwaresError, match="held.jsonl: another process is writing it"):
        second.ask([request("refused cache")])


def test_bad_settings_are_named() -> None:
    with pytest.raises(AwaresError, match="server.url 'localhost:8000'"):
        Server("localhost:8000", "m")
    with pytest.raises(AwaresError, match="server.attempts must be above 0"):
        Server("http://localhost/v1", "m", attempts=0)
