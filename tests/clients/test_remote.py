"""The remote engine against a real server process: its trajectories equal the in-process engine's, token for token."""
# ruff: noqa: F811 (fixtures of test_client and test_rollout)

import base64
import io
import json
from dataclasses import replace

import pytest
from chat_server import ServerProcess
from conftest import tiny_tokenizer
from PIL import Image
from test_client import faulty  # noqa: F401
from test_rollout import ORDERS, TIE, engine, rigged, rows_of  # noqa: F401

from awares.clients.chat import ChatClient, Server
from awares.clients.engine import RemoteEngine
from awares.engine import chat_format
from awares.engine.model import make_processor
from awares.errors import AwaresError, AwaresRequestError
from awares.method import crops, protocol

NOWHERE = "http://127.0.0.1:9/v1"
UNTOLD = {"seconds": 0.0, "margin": 0.0, "call_logprob": None, "call_gap": None}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of a server process with the very model of the fixture ``tiny``."""
    server = ServerProcess(tmp_path_factory.mktemp("engine") / "log.jsonl", "engine")
    yield server.url
    server.close()


@pytest.fixture
def remote(url, tiny, tmp_path):
    def make(url=url, processor=tiny.processor, **options):
        client = ChatClient(Server(url=url, model="tiny", attempts=2), tmp_path / "replies.jsonl")
        return RemoteEngine(client, processor, **{"max_new_tokens": 16, **options})

    return make


def assert_same(found, expected):
    """Equal in all that a server can tell, but for rows in which rounding may choose a token."""
    for one, other in zip(found, expected, strict=True):
        assert replace(one, **UNTOLD) == replace(other, **UNTOLD) or other.margin < TIE
    assert sum(other.margin < TIE for other in expected) <= len(expected) // 4


def test_trajectories_equal_the_in_process_engines_and_a_second_run_needs_no_server(rigged, remote):
    images = rows_of(rigged, ORDERS)
    found = remote().run(images, ORDERS)
    assert_same(found, engine(rigged).run(images, ORDERS))
    assert remote(NOWHERE).run(images, ORDERS) == found
    with pytest.raises(AwaresRequestError, match="7 of 7 rows"):
        remote(NOWHERE).run(images, [*ORDERS[1:], "new"])
    forced = [("center", "bottom"), (), None, ("all",), ("left",), *[None] * (len(ORDERS) - 5)]
    assert_same(remote().run(images, ORDERS, forced), engine(rigged).run(images, ORDERS, forced))
    assert {trajectory.call_status for trajectory in found} == {"none", "valid", "malformed"}
    assert all(trajectory.seconds > 0 and trajectory.margin == float("inf") for trajectory in found)
    images, orders = [rigged.noise(112, 168, 0)], ["do top-left,right"]  # a call that runs out of tokens
    found = remote(max_new_tokens=5).run(images, orders)
    assert found[0].call_status == "recovered"
    assert_same(found, engine(rigged, max_new_tokens=5).run(images, orders))
    assert remote().run([], []) == []


def say(text):
    """The step that makes the faulty server answer ``text``."""
    return "say=" + base64.b64encode(text.encode()).decode()


def sent_image(part):
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).tobytes()


def test_turn_two_resends_turn_one_byte_for_byte_and_crops_without_loss(tiny, remote, faulty):
    image, call = tiny.noise(224, 168, 3), protocol.OURS.render_call(["right", "top-left"])
    (found,) = remote(faulty.url, check=False).run([image], [f"where?|{say(call)}"])
    remote(faulty.url, check=False).run([image], ["where?"], forced=[()])
    first, second, third = [arrival["body"] for arrival in faulty.arrivals()][-3:]
    assert found.crops == ("right", "top-left") and found.answer == "reply to \n</tool_response>".strip()
    low, both = first.pop("messages"), second.pop("messages")
    free, *barred = (body.pop("bad_words") for body in (first, second, third))  # turn 2, and a row that may not call
    assert barred == [[*free, chat_format.TOOL_CALL]] * 2 and tiny.processor.image_token in free
    assert json.dumps(both[:2]) == json.dumps(low) and first == second
    assert [message["role"] for message in both] == ["system", "user", "assistant", "user"]
    assert both[2]["content"] == call
    assert [part["type"] for part in both[3]["content"]] == ["text", "image_url", "image_url", "text"]
    pieces = [crops.cut(image, name).tobytes() for name in found.crops]
    assert [sent_image(part) for part in both[3]["content"][1:3]] == pieces
    assert sent_image(both[1]["content"][0]) == crops.low_resolution(image).tobytes()
    assert (first["skip_special_tokens"], first["repetition_penalty"], first["temperature"]) == (False, 1.0, 0.0)


def test_a_server_with_another_prompt_or_image_limit_is_refused_before_a_reply_is_recorded(tiny, remote, tmp_path):
    tokenizer = tiny_tokenizer()
    other = make_processor(tokenizer)
    swapped = chat_format.CHAT_TEMPLATE.replace("</tool_response>", "X").replace("<tool_response>", "</tool_response>")
    tokenizer.chat_template = other.chat_template = swapped.replace("X", "<tool_response>")  # as many tokens as before
    limited = make_processor(tiny_tokenizer(), max_pixels=112 * 112)
    for processor, forced in ((other, [("top",)]), (limited, None)):
        with pytest.raises(AwaresRequestError, match="prompt.*--chat-template-content-format openai"):
            remote(processor=processor).run([tiny.noise(448, 448, 0)], ["q"], forced=forced)
    assert not (tmp_path / "replies.jsonl").exists()


def test_a_server_that_reports_no_tokens_must_be_trusted_and_failed_rows_are_named(tiny, remote, faulty):
    image, questions = tiny.noise(112, 112, 0), ["a", "b|500", f"c|{say('<|image_pad|>')}", "d"]
    with pytest.raises(AwaresRequestError, match="check=False"):
        remote(faulty.url).run([image], ["q"])
    with pytest.raises(AwaresRequestError, match="row w: .*image placeholder") as caught:
        remote(faulty.url, check=False).run([image] * 4, questions, row_ids=list("uvwx"))
    assert [failure.row_id for failure in caught.value.failures] == ["v", "w"]
    found, _ = remote(faulty.url, check=False).run([image] * 2, ["a", "d"])
    assert found.answer == "reply to a" and faulty.counts()["a"] == faulty.counts()["d"] == 1
    assert found.turns[1].text_tokens == len(tiny.processor.tokenizer("reply to a<|im_end|>")["input_ids"])


def test_what_this_engine_cannot_do_is_named_before_anything_is_sent(tiny, remote):
    nowhere = remote(NOWHERE, check=False)
    with pytest.raises(AwaresError, match="call_bias 2.0"):
        nowhere.run([tiny.noise(56, 56, 0)], ["q"], call_bias=2.0)
    assert "tiny" in nowhere.key() and nowhere.key() != remote(max_side=160).key()
