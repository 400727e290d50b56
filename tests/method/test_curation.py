"""Judges, oracle, and a curation that ends with the same bytes after a kill; its raw files and tables."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.engine import jsonl as records
from awares.errors import AwaresError, AwaresRequestError, Failure
from awares.method import curation
from awares.method.judges import AnnotationOracle, Judge, build_judge, label
from awares.method.rollout import Engine
from awares.study import curation_tables

fixed = Judge("fixed", lambda questions, predictions, answers: list(map(float, predictions)), 0.5, 0.1)


def test_verdict_rule():
    """0.9 is within the margin of 1.0; both wrong are equally bad, however close one is."""
    for low, high, value in ((1.0, 1.0, 0), (0.9, 1.0, 0), (0.8, 1.0, 2), (1.0, 0.8, 1), (0.0, 0.5, 2), (0.4, 0.1, 0)):
        found = fixed.judge(["q"], [str(low)], [str(high)], [["a"]])[0]
        assert dataclasses.astuple(found) == (value, low, high, low == 0.4)
        assert label(value) == {0: "LR", 1: "LR", 2: "HR"}[value]


def locate(oracle, question, answer=(), row_ids=("r",)):
    boxes = {"question_boxes": list(map(list, question)), "answer_boxes": list(map(list, answer))}
    return oracle.locate([{"id": row_id, **boxes} for row_id in row_ids])


def test_oracle_error_belongs_to_the_row_and_has_the_requested_size():
    ids, box = [f"row-{number}" for number in range(500)], ((300, 300, 700, 700),)
    found = locate(AnnotationOracle(0, 20), box, row_ids=ids)
    assert found == locate(AnnotationOracle(0, 20), box, row_ids=ids[::-1])[::-1]
    assert found != locate(AnnotationOracle(2, 20), box, row_ids=ids)
    errors = np.array([record["question_boxes"][0] for record in found]) - [300, 300, 700, 700]
    assert np.abs(errors.mean(axis=0)).max() < 3 and errors.std() == pytest.approx(20, rel=0.1)
    assert locate(AnnotationOracle(0, 0), box) == [{"question_boxes": [[300, 300, 700, 700]], "answer_boxes": []}]
    grown = locate(AnnotationOracle(0, 0, 20), ((10, 300, 990, 700),))
    assert grown[0]["question_boxes"] == [[0, 280, 1000, 720]]
    for record in locate(AnnotationOracle(3, 300, 7), ((0, 0, 3, 3),), ((997, 0, 1000, 1000),), ids):
        for box in [*record["question_boxes"], *record["answer_boxes"]]:
            assert 0 <= box[0] < box[2] <= 1000 and 0 <= box[1] < box[3] <= 1000


def make_rows(count=11):
    """Row n is answered correctly at full resolution when n % 4 < 3, at half resolution when n % 4 < 1."""
    plain = {"source": "chartqa", "split": "train", "question_boxes": [[50, 50, 150, 100]]}
    return make_dataset(
        {"id": f"row-{n}", "image": Image.new("RGB", (84, 56), (n, n, n)), "question": f"what is {n}?", **plain}
        | {"answers": [str(n), f"{n} kg"], "answer_boxes": [[300, 50, 400, 100] if n % 2 else [800, 850, 900, 900]]}
        for n in range(count)
    )


class FakeEngine:
    """Answers like `rollout.Engine`; dies at call ``dies_at``; fails to answer a row of ``bad`` (id -> view)."""

    wrong = "illegible"

    def __init__(self, dies_at=None, weights="w1", bad=(), unsure=()):
        self.calls, self.dies_at, self.weights, self.bad, self.unsure, self.seen = 0, dies_at, weights, bad, unsure, []

    def key(self, crops=True):
        return self.weights

    def answer(self, images, questions, view="full", crops=None, row_ids=None):
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        if lost := [Failure(row_id, "status 400") for row_id in row_ids if (row_id, view) in self.bad]:
            raise AwaresRequestError("rows have no reply", lost)
        self.calls += 1
        self.seen += [(row_id, view) for row_id in row_ids]
        assert [image.size for image in images] == [(84, 56)] * len(row_ids)
        return [self._trajectory(question, view) for question in questions]

    def _trajectory(self, question, view):
        number = int(question.split()[-1].rstrip("?"))
        answer = f"{number} KG" if number % 4 < {"half": 1, "full": 3, "half+crops": 3}[view] else self.wrong
        margin = 0.5 if (number, view) in self.unsure else 9.0
        values = {"answer": answer, "visual_tokens": 3, "seconds": np.random.random(), "margin": margin}
        return SimpleNamespace(answer=answer, to_dict=lambda: dict(values))


def changed(**values):
    """Small chunks and two judges, with other ``values`` of `curation`."""
    base = {"judge": "semantic", "judges": ["semantic", "anls"], "oracle_sigma": 5.0, "chunk_rows": 3}
    return load_params(overrides={f"curation.{key}": value for key, value in {**base, **values}.items()})


params = pytest.fixture(changed)


def run(params, out_dir, engine=None, rows=None, judges=("semantic", "anls"), oracle=None, work_dir=None, **choices):
    section = params.curation
    oracle = oracle or AnnotationOracle(section.oracle_seed, section.oracle_sigma, section.oracle_margin)
    rows = make_rows() if rows is None else rows
    given = {out_dir.name: rows}, engine or FakeEngine(), judges, oracle, params, out_dir.parent, work_dir
    return curation.curate(*given, **choices)[out_dir.name]


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_curated_rows_and_raw_outputs(params, tmp_path):
    rows = run(params, tmp_path / "out")
    assert rows["id"] == make_rows()["id"] and rows[0]["image"].size == (84, 56)
    assert [row["label"] for row in rows] == ["HR" if n % 4 in (1, 2) else "LR" for n in range(11)]
    assert [row["both_wrong"] for row in rows] == [n % 4 == 3 for n in range(11)]
    first, second = rows[1], rows[2]
    assert (first["low_answer"], first["high_answer"], first["verdict"]) == ("illegible", "1 KG", 2)
    assert (first["low_score_semantic"], first["high_score_anls"]) == (0.0, 1.0)
    # C* covers the question box *and* the answer box
    assert first["target_crops"] == ["top-left"] and second["target_crops"] == ["all"]
    assert rows[0]["target_crops"] == [] and rows[0]["oracle_question_boxes"] == []
    answers, verdicts, located = (records.read_records(tmp_path / "out" / name) for name in curation.RAW_FILES)
    assert [record["id"] for record in answers] == [record["id"] for record in verdicts] == rows["id"][:]
    assert answers[1]["low"]["answer"] == "illegible" and "seconds" not in answers[1]["low"]
    assert verdicts[1]["semantic"] == {"value": 2, "low": 0.0, "high": 1.0, "both_wrong": False}
    assert [record["id"] for record in located] == [f"row-{n}" for n in range(11) if n % 4 in (1, 2)]
    rows = run(changed(drop_both_wrong=True), tmp_path / "out", FakeEngine(dies_at=0))
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(11) if n % 4 != 3]


def test_crop_rule_and_judge_of_a_notebook_cell(params, tmp_path):
    def whole_image(boxes, section):
        return ("all",) if len(boxes) > 1 else ()

    def first_row_only(question, prediction, answers):
        return float(prediction == "illegible" if question == "what is 1?" else True)

    rows = run(params, tmp_path / "out", rule=whole_image)
    assert rows["target_crops"][1:3] == [["all"], ["all"]] and rows["target_crops"][0] == []
    rows = run(params, tmp_path / "out", FakeEngine(dies_at=0), judge=first_row_only)  # the answers are reused
    assert rows["verdict_first_row_only"] == [0, 1, *[0] * 9] == rows["verdict"] and set(rows["label"]) == {"LR"}
    assert len({build_judge(wanted, params).key() for wanted in (first_row_only, "semantic", fixed)}) == 3


def test_rows_that_half_resolution_gets_right_by_luck_need_a_crop(params, tmp_path):
    for value, both_wrong, low, high, expected in (
        (0, False, 1.4, 1.5, "HR"),
        (0, False, 1.5, 9.0, "LR"),  # sure enough
        (0, False, 0.1, 1.4, "LR"),  # full resolution is no surer
        (0, True, 0.1, 9.0, "LR"),  # a crop does not help a row that is wrong at both resolutions
        (None, None, 0.1, 9.0, ""),
    ):
        margins = {"low": {"margin": low}, "high": {"margin": high}}
        verdict = {"value": value, "both_wrong": both_wrong}
        assert curation.row_label(margins, verdict, 1.5) == expected
        assert curation.row_label(margins, verdict, 0.0) == ("" if value is None else "LR")  # the paper's rule
    unsure = [(4, "half")]
    rows = run(params, tmp_path / "out", FakeEngine(unsure=unsure))
    assert (rows[4]["label"], rows[4]["verdict"], rows[4]["low_answer"]) == ("HR", 0, "4 KG")
    assert rows[4]["target_crops"]
    assert curation_tables.answers_correct(rows, params).sum().to_dict() == {"half": 3, "full": 9}


def test_rows_that_the_base_models_server_refuses_are_lost_and_no_others(params, tmp_path):
    bad = [("row-4", "half"), ("row-9", "full")]
    engine = FakeEngine(bad=bad)
    rows = run(params, tmp_path / "out", engine)
    assert rows["id"] == [row_id for row_id in make_rows()["id"] if row_id not in ("row-4", "row-9")]
    assert [row["label"] for row in rows] == ["HR" if n % 4 in (1, 2) else "LR" for n in range(11) if n not in (4, 9)]
    lost = records.read_records(tmp_path / "out" / curation.LOST_FILE)
    assert lost == [{"id": row_id, "step": "base", "reason": "status 400"} for row_id, _ in bad]
    with pytest.raises(AwaresError, match="11 of 11 lost"):
        run(params, tmp_path / "none" / "out", FakeEngine(bad=[(row_id, "half") for row_id in make_rows()["id"]]))


def test_killed_run_resumes_and_repeats_nothing(params, tmp_path):
    whole = tmp_path / "whole" / "out"
    run(params, whole)
    for dies_at in range(8):
        broken = tmp_path / str(dies_at) / "out"
        first, second = FakeEngine(dies_at), FakeEngine()
        with pytest.raises(KeyboardInterrupt):
            run(params, broken, first)
        for file in broken.parent.rglob("*.jsonl"):  # a kill within a write
            file.write_bytes(file.read_bytes() + b'{"id": "row-')
        for engine in (second, FakeEngine(dies_at=0)):  # the third time all is done, and every file can be read
            run(params, broken, engine)
        assert content(whole) == content(broken)
        done = [row_id for row_id, view in first.seen if view == "full"]  # a chunk is done when both views are
        assert not set(done) & {row_id for row_id, _ in second.seen}
        assert len(second.seen) == 2 * (11 - len(done))


def test_work_of_other_inputs_is_never_used(params, tmp_path):
    out = tmp_path / "out"
    run(params, out)
    other, fewer, done = FakeEngine(weights="w2"), FakeEngine(), FakeEngine(dies_at=0)
    run(params, out, other)
    run(params, out, fewer, rows=make_rows(4))
    assert (other.calls, fewer.calls) == (8, 4)  # another model or other rows: every row is answered again
    strict = dataclasses.replace(build_judge("anls", params), correct_threshold=0.9)
    noisy = run(params, out, done, judges=["semantic", strict])  # another judge or oracle needs no new answers
    exact = run(params, out, done, oracle=AnnotationOracle(0, 0.0))
    assert noisy["oracle_answer_boxes"][1] != exact["oracle_answer_boxes"][1] == [[300, 50, 400, 100]]
    moved = make_dataset([{**row, "answer_boxes": [[800, 800, 900, 900]]} for row in make_rows(4)])
    where = run(params, out, done, rows=moved, oracle=AnnotationOracle(0, 0.0))
    assert where["oracle_answer_boxes"][1] == [[800, 800, 900, 900]]  # corrected boxes are other inputs
    with pytest.raises(KeyboardInterrupt):  # another work_dir has no answers
        run(changed(judge="anls"), tmp_path / "labels_anls" / "train", done)
    assert len(run(changed(judge="anls"), tmp_path / "labels_anls" / "train", done, work_dir=tmp_path)) == 11


def test_errors_come_before_work(params, tmp_path):
    bare = make_dataset([{**row, "question_boxes": [], "answer_boxes": []} for row in make_rows(2)])
    cases = [({"rows": bare}, "row-0"), ({"judges": ["anls"]}, "'semantic'"), ({"rows": make_rows(0)}, "empty")]
    cases.append(({"rows": make_rows(2).remove_columns("answers")}, "answers"))
    with pytest.raises(AwaresError, match=r"curation\.lucky_margin"):  # a server gives no logits
        changed(engine="base", lucky_margin=1.5)
    for arguments, named in cases:
        with pytest.raises(AwaresError, match=named):
            run(params, tmp_path / "out", FakeEngine(dies_at=0), **arguments)


def test_engine_key_follows_the_weights(tiny):
    engine, weight = Engine(tiny.model, tiny.processor, max_new_tokens=4), next(tiny.model.parameters())
    before, kept = engine.key(), weight.data.clone()
    weight.data.view(-1)[0] += 1e-3
    after = engine.key()
    weight.data.copy_(kept)
    assert before != after and before == engine.key()
