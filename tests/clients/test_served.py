"""Judges and oracle behind a real server process that fails: every row is labelled or listed, nothing asked twice."""

import dataclasses
import math
from collections import Counter
from functools import partial

import pytest
import yaml
from chat_server import ServerProcess
from conftest import ROOT
from test_curation import FakeEngine, make_rows

from awares.bench.plan import require_servers
from awares.clients import served
from awares.clients.judges import Evidence, OneNumber, PairReply, ServedJudge, make_oracle
from awares.config import load_params
from awares.engine.jsonl import read_records
from awares.errors import AwaresError, AwaresRequestError
from awares.method import curation
from awares.study import curation_tables

ROWS = 60
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a server in the place of the last one; its log is a new one."""
    started = []

    def start(mode="judge"):
        started.append(ServerProcess(tmp_path / f"server-{len(started)}.jsonl", mode))
        for name in ("BASE", "LLAMA", "DEEPSEEK", "QWEN3_VL"):
            monkeypatch.setenv(f"AWARES_{name}_URL", started[-1].url)
        return started[-1]

    yield start
    for running in started:
        running.close()


def settings(folder, change=lambda raw: None, attempts=3, **values):
    """Parameters with served judges and oracle, short time-outs, runs in ``folder``; ``change`` edits served.yaml."""
    declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text())
    for model in declared["models"].values():
        model.update(timeout=1.0, retries=1, concurrency=8, attempts=attempts)
    change(declared)
    (folder / "served.yaml").write_text(yaml.safe_dump(declared))
    usual = {"judge": "llama", "judges": ["llama", "semantic"], "oracle": "qwen3_vl", "judge_order": "both"}
    values = {**usual, "chunk_rows": 20, **values, "served_file": str(folder / "served.yaml"), "lucky_margin": 0.0}
    overrides = {f"curation.{key}": value for key, value in values.items()} | {"paths.runs": str(folder / "runs")}
    return load_params(overrides=overrides)


def curate(params, out, rows=ROWS, engine=None):
    judges, oracle = params.curation.all_judges, make_oracle(params)
    given = {out.name: make_rows(rows)}, engine or FakeEngine(), judges, oracle, params, out.parent
    return curation.curate(*given, ready=partial(require_servers, params))[out.name]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"first": 1, "second": 1, "better": 2}', (1, 1, 2)),  # both right, one better said
        ('```json\n{"first": 0, "second": 0, "better": 0}\n```', (0, 0, 0)),
        ('The first. {"first": 1, "second": 0, "better": 1} So it is.', (1, 0, 1)),
        ('{"first": 1, "second": 0, "better": 2}', None),  # contradicts itself
        ('{"first": 1, "second": 0, "better": 3}', None),
        ('{"first": 1, "second": 0, "better": 1, "sure": 1}', None),
        ('{"first": 1, "better": 1}', None),
        ('{"first": 1, "second": 0, "bet', None),
        *(("2", (2,)), (" 0\n", (0,)), ("```json\n1\n```", (1,)), ("Answer: 2.", (2,))),  # curation.judge_order once
        *((number, None) for number in ("3", "12", "1 or 2", "")),
    ],
)
def test_comparisons_are_read_or_refused(text, found):
    reply = (PairReply if "{" in text else OneNumber).read(text)
    assert (reply and tuple(reply.model_dump().values())) == found


@pytest.mark.parametrize(
    ("boxes", "found"),
    [
        ("[[1.0, 2.4, 3, 4]]", [[1, 2, 3, 4]]),
        ("[[3, 4, 1, 2], [-5, 0, 1200, 9]]", [[1, 2, 3, 4], [0, 0, 1000, 9]]),
        *((boxes, None) for boxes in ("[]", "null", "[1, 2, 3, 4]", "[[0.4, 0.4, 0.6, 0.6]]", "[[1, 2, 3]]")),
        *((f"[{box}, [1, 2, 3, 4]]", None) for box in ("[5, 2, 5, 4]", '[1, 2, 3, "x"]', "[NaN, 2, 3, 4]")),
    ],
)
def test_boxes_are_read_tidied_or_refused(boxes, found):
    """Refused: no box, fractions of 1, one empty box among others, three numbers, no numbers."""
    reply = Evidence.read(f'So: {{"question_boxes": {boxes}, "answer_boxes": []}}')
    assert (reply and reply.question_boxes) == found
    prompt = served.Prompt(version="1", system="s", user="{question}: {answer}")  # braces of an answer stay
    assert prompt.messages({"question": "{answer}?", "answer": "{x}"})[1]["content"] == "{answer}?: {x}"


def test_the_judge_is_asked_in_both_orders_and_a_preference_that_turns_is_none(start, tmp_path):
    start()
    judge = ServedJudge("llama", settings(tmp_path))
    questions = ["what is 2?", "what is 4?", "what is 8?", "biased 5?"]
    lows, highs, answers = ["2", "no", "no", "5"], ["two", "4", "9", "5"], [["2"], ["4"], ["8"], ["5"]]
    found = judge.judge(questions, lows, highs, answers, ["a", "b", "c", "d"])
    assert [(one.value, one.low, one.high) for one in found] == [(1, 1, 0), (2, 0, 1), (0, 0, 0), (0, 1, 1)]
    assert [one.both_wrong for one in found] == [False, False, True, False]
    biased = found[3]
    assert (biased.forward, biased.swapped, len(biased.replies), biased.version) == (1, 2, 2, "judge-1")
    assert judge.scores(questions[:3], lows[:3], answers[:3]) == [1, 0, 0]
    assert math.isnan(judge.scores(["what is 3?"], ["3"], [["3"]])[0])  # the server talks garbage about 3
    records = [{"id": str(i), "llama": dataclasses.asdict(one)} for i, one in enumerate(found)]
    assert curation_tables.order_effects(records).values.tolist() == [["llama", 4, 75.0, 25.0, 0.0, 0]]
    for right, value in ((0, 0), (1, 2)):  # of two wrong answers none is better, of two right ones one may be
        low_first, low_second = (PairReply(first=right, second=right, better=better) for better in (2, 1))
        one = judge.combine((low_first, "low first"), (low_second, "high first"))
        assert (one.value, one.forward, one.swapped, one.both_wrong) == (value, 2, 2, not right)


def test_the_judge_in_the_papers_order_is_asked_once_with_the_low_answer_first(start, tmp_path):
    server, params = start(), settings(tmp_path, judge_order="once")
    judge = ServedJudge("llama", params)
    questions = ["what is 2?", "what is 4?", "what is 8?", "biased 5?", "what is 3?"]
    lows, highs, answers = ["2", "no", "no", "5", "3"], ["two", "4", "9", "5", "4"], [["2"], ["4"], ["8"], ["5"], ["3"]]
    found = judge.judge(questions, lows, highs, answers, [*"abcde"])
    assert [one.value for one in found] == [1, 2, 0, 1, None]  # the bias shows; the server talks garbage about 3
    replied = [(one.forward, one.swapped, len(one.replies)) for one in found[:4]]
    assert replied == [(1, None, 1), (2, None, 1), (0, None, 1), (1, None, 1)]
    # scores are those of evaluation.judge, to which "two" is 2
    assert [(one.low, one.high, one.both_wrong) for one in found[:3]] == [(1, 1, False), (0, 1, False), (0, 0, True)]
    sent = {arrival["text"].splitlines()[0]: arrival for arrival in server.arrivals()}
    assert "First answer: no\nSecond answer: 4" in sent["Question: what is 4?"]["text"]
    assert all("response_format" not in arrival["body"] for arrival in sent.values())
    assert judge.key() != ServedJudge("llama", settings(tmp_path)).key()
    rows = curate(params, tmp_path / "out", rows=20)
    assert rows["label"] == ["HR" if n % 4 in (1, 2) else "LR" for n in range(20) if n != 3]


def test_a_failing_server_costs_only_its_rows_and_the_silent_ones_are_asked_about_again(start, tmp_path):
    params, garbage = settings(tmp_path), {n: "judge" for n in range(ROWS) if n % 20 == 3}
    for mode, silent, asked in (
        ("mute", {10: "judge", 9: "oracle"}, None),
        ("judge", {}, {10: 3, 9: 1}),  # each request once: both orders of the judge, then the oracle
        ("judge", {}, {}),
    ):
        server = start(mode)
        rows = curate(params, tmp_path / "out")
        lost = {int(one["id"][4:]): one for one in read_records(tmp_path / "out" / curation.LOST_FILE)}
        assert {n: one["step"] for n, one in lost.items()} == {**garbage, **silent}
        assert all("timed out" in lost[n]["reason"] for n in silent)
        numbers = [n for n in range(ROWS) if n not in lost]
        assert rows["id"] == [f"row-{n}" for n in numbers]
        assert rows["label"] == ["HR" if n % 4 in (1, 2) else "LR" for n in numbers]
        boxes = [[], [[300, 50, 400, 100]], [[800, 850, 900, 900]], []]  # by n % 4: the HR rows have boxes
        assert rows["oracle_answer_boxes"] == [boxes[n % 4] for n in numbers]
        for one in read_records(tmp_path / "out" / "oracle.jsonl"):  # every third reply has words around its JSON
            n = int(one["id"][4:])
            assert one["read"] == ("" if n in lost else "strict" if n % 3 else "tolerant")
        agreement = curation_tables.judge_agreement(rows)
        assert (agreement.agreement[0], agreement.n[0]) == (100, len(rows))
        if asked is not None:
            about = Counter(arrival["text"].splitlines()[0] for arrival in server.arrivals())
            assert about == {f"Question: what is {n}?": count for n, count in asked.items()}


def test_a_step_requires_the_server_of_its_own_model_only(start, tmp_path, monkeypatch):
    server, engine = start(), FakeEngine()
    chosen = {"engine": "base", "judges": ["llama", "anls"]}
    everything = settings(tmp_path, **chosen)
    for name in ("base", "llama", "qwen3_vl"):  # the first step of which the server is missing
        with monkeypatch.context() as patch:
            patch.setenv(f"AWARES_{name.upper()}_URL", NOWHERE)
            with pytest.raises(AwaresRequestError, match=rf"^{name}: .*127.0.0.1:9/v1.*AWARES_{name.upper()}_URL"):
                curate(everything, tmp_path / "out", rows=12, engine=engine)
        assert engine.calls == (0 if name == "base" else 2)  # the base model's answers are kept
    other = lambda raw: raw["models"]["qwen3_vl"].update(model="other")  # noqa: E731
    with pytest.raises(AwaresRequestError, match="qwen3_vl: other.*serves .*--served-model-name other"):
        curate(settings(tmp_path, other, **chosen), tmp_path / "new", rows=11, engine=FakeEngine(dies_at=0))
    everything = settings(tmp_path, **chosen)
    found = curate(everything, tmp_path / "out", rows=12, engine=engine)
    server.close()
    assert curate(everything, tmp_path / "out", rows=12)["label"] == found["label"] and engine.calls == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw["models"].pop("llama"), "models.llama"),
        (lambda raw: raw["models"]["llama"].update(url="localhost:8000"), "models.llama.*url"),
        (lambda raw: raw["models"]["llama"].update(timeout="long"), "models.llama.*timeout"),
        (lambda raw: raw["prompts"].pop("judge"), "prompts"),
    ],
)
def test_a_fault_of_the_file_is_named(tiny, tmp_path, change, named):
    with pytest.raises(AwaresError, match="base.model"):  # the served base must be the base
        served.make_engine("base", tiny.processor, settings(tmp_path))
    with pytest.raises(AwaresError, match=named):
        ServedJudge("llama", settings(tmp_path, change))
