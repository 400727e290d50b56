"""Tables say what the rows say, figures can be drawn from them, and published notebooks hold nothing of one run."""

import json
import math

import datasets
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import trajectory
from matplotlib.collections import LineCollection
from nbformat import v4
from PIL import Image

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.errors import AwaresError, Failure
from awares.method import evaluation
from awares.method.judges import build_judge, semantic
from awares.study import curation_tables, diagnostics, figures, publish, tables, text_probe

PARAMS = load_params("mini", overrides={"evaluation.bootstrap": 200})


def rows(count=4, label=None, target=None):
    plain = {"question": "what is the total?", "answers": ["12"], "source": "chartqa", "split": "train"}
    boxes = {"question_boxes": [], "answer_boxes": [[0, 0, 400, 100]]}
    image = [Image.new("RGB", (224, 112), (number, 0, 0)) for number in range(count)]
    made = make_dataset({"id": f"row-{n}", "image": image[n], **plain, **boxes} for n in range(count))
    return made.add_column("label", label).add_column("target_crops", target) if label else made


def test_rows_without_an_answer_or_a_score_are_left_out_of_the_repair_and_counted():
    def unsure(question, prediction, answers):  # gives no usable reply about one answer
        return math.nan if prediction == "7" else semantic(question, prediction, answers)

    given = [trajectory(answer="12"), Failure("row-1", "status 400"), trajectory(), trajectory(answer="7")]
    curated = rows(label=["HR", "HR", "LR", "LR"], target=[["all"], ["all"], [], []])
    for name in ("low_answer", "high_answer"):
        curated = curated.add_column(name, ["no", "12", "12", "12"])
    table = curation_tables.repair_table(curated, given, build_judge(unsure, PARAMS)).set_index("label")
    assert table.n.to_dict() == {"HR": 1, "LR": 1, "all": 2} and table.lost.to_dict() == {"HR": 1, "LR": 1, "all": 2}
    assert table["half+crops"].to_dict() == {"HR": 100, "LR": 100, "all": 100}


def test_first_turns_have_intervals_around_the_tables_values():
    labelled = rows(40, ["HR", "HR", "LR", "LR"] * 10, [["top"], ["left"], [], []] * 10)
    done = [trajectory(crops=names, status="valid" if names else "none") for names in (["top"], [], ["right"], [])] * 10
    done[0] = trajectory(crops=["top"], status="recovered")
    found = diagnostics.first_turn_intervals({"sft": done}, labelled, PARAMS.evaluation).set_index("quantity")
    table = evaluation.cdp_table({"sft": done}, labelled, 0.25).squeeze()
    assert all(found.value[name] == pytest.approx(table[name]) for name in ("recall", "fpr", "exact", "area"))
    assert found.value["valid"] == 95 and found.value["recovered"] == 5 and found.value["malformed"] == 0
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert found.low["recall"] == pytest.approx(25, abs=10) and found.low["exact"] == found.high["exact"] == 100


def test_error_table_tells_when_where_and_reading_apart():
    labelled = rows(6, ["HR", "HR", "HR", "HR", "HR", "LR"], [["top-left"]] * 5 + [[]])
    requests = [[], ["bottom"], ["left"], ["top"], [], []]
    done = [trajectory(f"row-{n}", "12" if n == 4 else "?", names) for n, names in enumerate(requests)]
    errors = diagnostics.error_table(evaluation.scored("awares", labelled, done), labelled, 0.95).set_index("kind").rows
    assert errors.to_dict() == {"correct": 1, "when": 1, "where": 1, "reading": 3}


def test_curated_tables():
    labelled = rows(4, ["HR", "HR", "LR", "LR"], [["top"], ["top", "left"], [], []])
    assert curation_tables.label_metrics(labelled) == {"rows": 4, "hr": 50.0, "area": (0.5 + 0.75) / 2}
    assert curation_tables.label_table(labelled).set_index("source").hr.to_dict() == {"chartqa": 50, "all sources": 50}
    crops = diagnostics.outcome_shares({"chartqa": labelled["target_crops"][:]}).set_index("outcome").share
    assert crops["top"] == crops["several"] == 25 and crops.sum() == 100
    assert curation_tables.missed_evidence(labelled, 0.95) == 0
    assert curation_tables.missed_evidence(rows(1, ["HR"], [["bottom"]]), 0.95) == 100
    assert tables.first_rows(labelled, 1, label="LR")["id"][:] == ["row-2"]


def test_metrics_are_written_with_nan(tmp_path):
    values = {"a": {"b": np.float64(1.23456789)}, "c": float("nan"), "n": 3}
    assert math.isnan(tables.save_metrics(values, tmp_path / "metrics.json")["c"])
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": {"b": 1.234568}, "c": None, "n": 3}


def test_the_probe_finds_what_words_reveal_and_nothing_else():
    rng, crops = np.random.default_rng(0), [["top"], ["left"]] * 50
    labels = rng.choice(["LR", "HR"], 200).tolist()
    telling = [f"question {'small' if label == 'HR' else 'large'} {n % 7}" for n, label in enumerate(labels)]
    for texts, least, most in ((telling, 0.95, 1), ([f"question {rng.integers(5)}" for _ in labels], 0, 0.7)):
        parts = [rows(100, labels[at:][:100], crops).remove_columns("question") for at in (0, 100)]
        given = [part.add_column("question", texts[100 * n :][:100]) for n, part in enumerate(parts)]
        leaks = text_probe.label_leaks(*given).set_index("check")
        assert least <= leaks.value["when"] <= most and leaks.n["where"] == labels.count("HR")
    assert text_probe.crossed_accuracy(telling, labels)[0] == 1.0
    assert text_probe.crossed_accuracy(["p", "q"], ["a", "b"]) == (0.5, 0.5)  # one part of two has a single class left


def test_frontier_is_the_cheapest_best_option_of_each_row():
    rng = np.random.default_rng(0)
    scores = (rng.random((60, 11)) < 0.3).astype(float)
    rtrs = 0.25 + np.array([0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 1.0]) + rng.random((60, 1)) * 0.1
    found = diagnostics.oracle_frontier(scores, rtrs)
    right = np.where(scores == 1, rtrs, np.inf).min(1)
    cost = np.where(np.isinf(right), rtrs[:, 0], right)
    assert (found.accuracy, found.rtr) == pytest.approx((scores.max(1).mean(), cost.mean()))
    start = found.accuracy_curve[0], found.rtr_curve[0]
    assert start == pytest.approx((scores[:, 0].mean(), rtrs[:, 0].mean()))
    assert (np.diff(found.rtr_curve) >= 0).all() and (np.diff(found.accuracy_curve) >= 0).all()
    slopes = np.diff(found.accuracy_curve) / np.maximum(np.diff(found.rtr_curve), 1e-12)
    assert (np.diff(slopes) <= 1e-6).all()  # concave: no mixture beats a point of it
    graded = diagnostics.oracle_frontier([[0.6, 1.0, 1.0]], [[0.25, 0.75, 0.5]])
    assert (graded.accuracy, graded.rtr, graded.choice.tolist()) == (1.0, 0.5, [2])


def test_judge_agreement_is_the_confusion_matrix():
    columns = {"verdict": [0] * 8, "verdict_a": [2, 2, 2, 0, 1, 0, 0, 0], "verdict_b": [2, 2, 0, 2, 0, 0, 1, 0]}
    curated = datasets.Dataset.from_dict(columns)
    row = curation_tables.judge_agreement(curated).to_dict("records")[0]
    assert (row["judge_a"], row["judge_b"], row["n"]) == ("a", "b", 8)
    assert (row["lr_lr"], row["lr_hr"], row["hr_lr"], row["hr_hr"]) == (50, 12.5, 12.5, 25)
    assert row["agreement"] == 75 and row["kappa"] == pytest.approx((0.75 - 0.53125) / (1 - 0.53125))
    assert curation_tables.label_shares(curated).iloc[0].tolist() == ["a", 50, 12.5, 37.5, 62.5, 37.5, 8]


def test_tables_show_intervals_words_and_the_published_cells_with_their_notes():
    main = pd.DataFrame({"system": ["sft", "x"], "rtr": [0.25, np.nan], "rtr_low": [0.2, np.nan], "rtr_high": [0.3, 1]})
    shown = tables.side_by_side(main.assign(holds=[True, False]), "table4").data
    for text in ("RTR [95 % interval]", "0.250 [0.200, 0.300]", "<td>SFT</td>", "<td>-</td>", "does not hold", "72.20"):
        assert text in shown
    assert "reward_anls, pope rtr: below what the half-resolution view costs" in shown and shown.count("<small>") == 7
    with pytest.raises(AwaresError, match=r"table12\.csv"):
        tables.side_by_side(main, "table12")


def test_figures_draw_and_repeat(tmp_path):
    figures.style(60)
    requests = {"oracle": [(), ("top",), ("top", "left")], "SFT": [(), (), ("all",)]}
    flows = (figures.flow_figure(requests, "held-out") for _ in range(2))
    first, second = (figures.show(flow, path=tmp_path / f"{n}.png") for n, flow in enumerate(flows))
    assert first.data[:4] == b"\x89PNG" and first.data == second.data == (tmp_path / "0.png").read_bytes()
    main = pd.DataFrame({"system": ("full", "half", "awares"), "rtr": [1.0, 0.3, 0.4], "accuracy": 50.0})
    main = main.assign(accuracy_low=40.0, accuracy_high=[51.0, 60.0, 70.0])
    main = pd.concat([main.assign(benchmark=name) for name in ("pope", "average")])
    accuracy = figures.accuracy_figure(main)
    (bars,) = (lines for lines in accuracy.axes[0].collections if isinstance(lines, LineCollection))
    ends = [(low[0], low[1], high[1]) for low, high in bars.get_segments()]
    assert ends == [(1, 40, 51), (0.3, 40, 60), (0.4, 40, 70)]
    done = [trajectory("row-0", "$12$ \x00 \t", ["top", "right"]), trajectory("row-1", "")]
    drawn = figures.gallery(rows(2), done), figures.gallery([]), figures.interaction_figure(rows(1)[0], done[0])
    for figure in drawn:
        assert figures.show(figure).data[:4] == b"\x89PNG"


def executed(root, seconds):
    """A notebook as papermill leaves it: timings, ids, a progress bar, a warning, a path."""
    code = v4.new_code_cell("1 + 1", execution_count=2)
    code.metadata = {"papermill": {"duration": seconds}, "tags": ["parameters"]}
    bar = f"<div><progress value='3'></progress> [3/3 {seconds}]</div>"
    code.outputs = [
        v4.new_output("stream", name="stderr", text=f"warning after {seconds} s"),
        v4.new_output("stream", name="stdout", text=f"wrote {root}/runs/x\n"),
        v4.new_output("display_data", {"text/html": bar, "text/plain": "<IPython.core.display.HTML object>"}),
        v4.new_output("display_data", {"image/png": "AAAA"}, metadata={"image/png": {"alt": "a sign"}}),
        v4.new_output("execute_result", {"text/plain": "2"}, execution_count=2),
    ]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Title <b>"), code])
    notebook.metadata = {"papermill": {"start_time": seconds}, "kernelspec": {"name": f"conda-{seconds}"}}
    return notebook


def test_normalised_notebooks_of_two_runs_are_the_same(tmp_path):
    once, again = (publish.stable_copy(executed(tmp_path, seconds), tmp_path) for seconds in (1.5, 2.5))
    assert nbformat.writes(once) == nbformat.writes(again)
    nbformat.validate(once)
    text = nbformat.writes(once)
    assert "wrote runs/x" in text and "warning" not in text and "progress" not in text and str(tmp_path) not in text
    assert once.cells[1].metadata == {"tags": ["parameters"]} and once.cells[1].outputs[-1].data["text/plain"] == "2"
    assert once.cells[1].outputs[-2].metadata == {"image/png": {"alt": "a sign"}}


def test_publish_names_an_unknown_stage_and_a_missing_notebook(tmp_path, capsys):
    assert publish.main("mini", "comparision") == 1
    assert "'comparision'" in capsys.readouterr().err
    overrides = {"paths.runs": str(tmp_path / "runs"), "paths.reports": str(tmp_path / "reports")}
    with pytest.raises(AwaresError, match="data/main/notebook.ipynb: .*dvc repro report"):
        publish.publish(load_params("mini", overrides=overrides))
    assert not (tmp_path / "reports").exists()
