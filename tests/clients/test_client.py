"""The client against a real server process that fails in every way: nothing lost, nothing recorded requested twice."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import ServerProcess

from awares.clients.chat import ChatClient, Request, Server
from awares.errors import AwaresError, AwaresRequestError, Failure

KEY = "sk-planted-5f1d"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The module's server; the requests of one test have texts that no other test's have."""
    running = ServerProcess(tmp_path_factory.mktemp("faulty") / "log.jsonl", "faulty")
    yield running
    running.close()


@pytest.fixture
def client(faulty: ServerProcess, tmp_path: Path) -> Callable[..., ChatClient]:
    def make(file: str | None = "replies.jsonl", **options: Any) -> ChatClient:
        limits = {"url": faulty.url, "model": "m", "concurrency": 4, "timeout": 60.0, "attempts": 3, **options}
        return ChatClient(Server(**limits), tmp_path / file if file else None)

    return make


def request(text: str, row_id: str = "r", **settings: Any) -> Request:
    return Request(row_id, [{"role": "user", "content": text}], {"temperature": 0.0, **settings})


def replies(client: ChatClient, requests: Sequence[Request | str], **options: Any) -> list[Any]:
    """The replies to ``requests``; a text is the request of the row r<place>."""
    asked = [request(one, f"r{place}") if isinstance(one, str) else one for place, one in enumerate(requests)]
    return client.converse([one.row_id for one in asked], lambda place, send: send(asked[place]), **options)


def failed(client: ChatClient, requests: Sequence[Request | str]) -> list[bool]:
    """Whether each row has failed, where failures end no call."""
    return [isinstance(one, Failure) for one in replies(client, requests, on_failure=lambda failure: failure)]


def test_replies_come_in_order_with_raw_bodies_and_concurrency_is_bounded(client, faulty: ServerProcess) -> None:
    asked = [f"order {i}|slow={0.3 - 0.02 * i:.2f}" for i in range(12)]
    found = replies(client(), asked)
    assert [reply.text for reply in found] == [f"reply to {text}" for text in asked]
    assert found[0].raw["object"] == "chat.completion" and found[0].seconds >= 0.3
    assert 1 < max(one["under way"] for one in faulty.arrivals() if one["text"] in asked) <= 4


@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "half", "torn", "garbage", "other", "slow=20"])
def test_a_passing_fault_is_retried(client, faulty: ServerProcess, fault: str) -> None:
    text = f"passing {fault}|{fault},{fault},ok"
    found = replies(client(timeout=1.0 if "slow" in fault else 60.0), [text])
    assert found[0].text == f"reply to {text}" and faulty.counts()[text] == 3


def test_a_lasting_fault_fails_its_row_only(client, faulty: ServerProcess) -> None:
    tries = {"lost a": 1, "lost b|400": 1, "lost c|500": 3, "lost d|null": 1, "lost e|half": 3, "lost f": 1}
    with pytest.raises(AwaresRequestError, match="4 of 6 rows") as caught:
        replies(client(), [*tries])
    found = [(failure.row_id, failure.silent) for failure in caught.value.failures]
    assert found == [("r1", True), ("r2", True), ("r3", False), ("r4", False)]
    assert {text: faulty.counts()[text] for text in tries} == tries
    assert failed(client(attempts=1), [*tries]) == [False, True, True, True, True, False]
    assert faulty.counts()["lost a"] == faulty.counts()["lost f"] == 1 and faulty.counts()["lost b|400"] == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_the_call_and_the_key_stays_secret(client, faulty, monkeypatch, tmp_path, status):
    monkeypatch.setenv("AWARES_API_KEY", KEY)
    asked, begun = [f"under way {status}|slow=20", *(f"no {status} {i}|{status}" for i in range(30))], time.monotonic()
    with pytest.raises(AwaresRequestError, match=f"{status}.*AWARES_API_KEY") as caught:
        failed(client(), asked)
    assert time.monotonic() - begun < 10  # the slow request is not waited for
    assert "your key was" in str(caught.value) and KEY not in str(caught.value)
    assert sum(faulty.counts()[text] for text in asked) <= 9
    assert not any(KEY in file.read_text() for file in tmp_path.iterdir())


def test_the_key_comes_from_the_named_variable_only_and_is_not_kept(client, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another's")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert replies(client(), ["key 0|key"])[0].text == "Bearer none"
    assert replies(client(key_variable="JUDGE_KEY"), ["key 1|key"])[0].text == "Bearer ***"
    assert KEY not in (tmp_path / "replies.jsonl").read_text()


def test_a_recorded_request_is_not_sent_again_and_any_difference_makes_another(client, faulty: ServerProcess) -> None:
    replies(client(), [request("once", "a")])
    replies(client(), [request("once", "b"), request("once", "c")])
    assert faulty.counts()["once"] == 1
    replies(client(), [request("once", seed=1), request("once", max_tokens=2)])
    replies(client(model="n"), [request("once")])
    assert faulty.counts()["once"] == 4
    in_memory = client(file=None)
    for _ in range(2):  # kept during one call only
        replies(in_memory, [request("once")])
    assert faulty.counts()["once"] == 6 and len(in_memory.replies) == 1


def test_a_server_that_is_gone_or_refuses_row_after_row_ends_the_call(client, faulty: ServerProcess) -> None:
    """After one reply a refusal concerns its row; before it, to continue would lose every row."""
    with pytest.raises(AwaresRequestError, match="3 rows in a row"):
        failed(client(url="http://127.0.0.1:9/v1", attempts=2, stop_after=3), [f"gone {i}" for i in range(500)])
    asked = [f"set up wrongly {i}|400" for i in range(30)]
    with pytest.raises(AwaresRequestError, match="3 rows in a row.*status 400"):
        failed(client(stop_after=3, concurrency=1), asked)
    assert sum(faulty.counts()[text] for text in asked) in (3, 4)  # one may be on its way
    mixed = ["at first", *(f"now and then {i}|400" for i in range(4))]
    for _ in range(2):  # the second time only the refused ones are sent
        assert failed(client("mixed.jsonl", stop_after=3, concurrency=1), mixed) == [False, True, True, True, True]


def test_a_file_with_something_else_or_held_by_another_process_is_refused(client, tmp_path: Path) -> None:
    for text in ("notes of mine", '{"id": 1}\n'):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(AwaresError, match=r"notes\.txt"):
            replies(client("notes.txt"), ["refused file"])
        assert (tmp_path / "notes.txt").read_text() == text
    with client("held.jsonl").opened(), pytest.raises(AwaresError, match=r"held\.jsonl: another process"):
        replies(client("held.jsonl"), ["refused file"])
