"""Tables say what the rows say, figures can be drawn from them, and published notebooks hold nothing of one run."""

import math
import re
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from nbformat import v4
from PIL import Image

from awares.config import load_params
from awares.data.rows import make_dataset
from awares.errors import AwaresError, Failure
from awares.method import evaluation
from awares.method.judges import build_judge, semantic
from awares.method.rollout import Trajectory, Turn
from awares.study import curation_tables, diagnostics, figures, publish, tables
from awares.study import text_probe as leaks

PARAMS = load_params("mini", overrides={"evaluation.bootstrap": 200})


def trajectory(row_id="a", answer="12", crops=(), status="none", tokens=16):
    turns = (Turn("user", "q", ((112, 112),), tokens, 9), Turn("assistant", answer, (), 0, 2))
    return Trajectory(row_id, answer, tuple(crops), status, turns, tokens, 64, 0.1, 1.0)


def rows(count=4, label=None, target=None, boxes=((0, 0, 400, 100),), source="chartqa"):
    made = make_dataset(
        {
            "id": f"row-{number}",
            "image": Image.new("RGB", (224, 112), (number, 0, 0)),
            "question": "what is the total?",
            "answers": ["12"],
            "source": source,
            "question_boxes": [],
            "answer_boxes": [list(box) for box in boxes],
            "split": "train",
        }
        for number in range(count)
    )
    if label:
        made = made.add_column("label", label).add_column("target_crops", target)
    return made


# Tables


def test_rows_without_an_answer_or_a_score_are_left_out_of_the_repair_and_counted():
    def unsure(question, prediction, answers):  # gives no usable reply about one answer
        return math.nan if prediction == "7" else semantic(question, prediction, answers)

    given = [trajectory(answer="12"), Failure("row-1", "status 400"), trajectory(), trajectory(answer="7")]
    curated = rows(label=["HR", "HR", "LR", "LR"], target=[["all"], ["all"], [], []])
    for name in ("low_answer", "high_answer"):
        curated = curated.add_column(name, ["no", "12", "12", "12"])
    table = tables.repair_table(curated, given, build_judge(unsure, PARAMS)).set_index("label")
    assert table.n.to_dict() == {"HR": 1, "LR": 1, "all": 2} and table.lost.to_dict() == {"HR": 1, "LR": 1, "all": 2}
    assert table["half+crops"].to_dict() == {"HR": 100, "LR": 100, "all": 100}


def test_main_table_averages_over_benchmarks_not_rows():
    scores = pd.DataFrame(
        {
            "system": "awares",
            "benchmark": ["chartqa"] * 3 + ["pope"],
            "score": [1.0, 1.0, 1.0, 0.0],
            "rtr": [0.2, 0.2, 0.2, 0.6],
        }
    )
    table = report_table(scores)
    assert table.loc["average", "accuracy"] == 50 and table.loc["average", "rtr"] == pytest.approx(0.4)
    assert table.loc["chartqa", "accuracy_low"] == 100 and table.n.tolist() == [3, 1, 4]


def report_table(scores):
    return evaluation.main_table(scores, PARAMS.evaluation).set_index("benchmark")


def test_scored_refuses_trajectories_of_other_rows():
    good = evaluation.scored("full", rows(1), [trajectory("row-0", "12", tokens=64)])
    assert good.score.tolist() == [1.0] and good.rtr.tolist() == [1.0]
    with pytest.raises(AwaresError, match="row-0.*other"):
        evaluation.scored("full", rows(1), [trajectory("other")])


def test_first_turns_have_intervals_around_the_tables_values():
    labelled = rows(40, ["HR", "HR", "LR", "LR"] * 10, [["top"], ["left"], [], []] * 10)
    done = [trajectory(crops=names, status="valid") for names in (["top"], [], ["right"], [])] * 10
    done[0] = trajectory(crops=["top"], status="recovered")
    done = [one if one.crops else trajectory(crops=[], status="none") for one in done]
    found = diagnostics.first_turn_intervals({"sft": done}, labelled, PARAMS.evaluation).set_index("quantity")
    table = evaluation.cdp_table({"sft": done}, labelled, 0.25).squeeze()
    assert all(found.value[name] == pytest.approx(table[name]) for name in ("recall", "fpr", "exact", "area"))
    assert found.value["valid"] == 95 and found.value["recovered"] == 5 and found.value["malformed"] == 0
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert found.low["recall"] == pytest.approx(25, abs=10) and found.low["exact"] == found.high["exact"] == 100


def test_label_rows_come_from_the_two_answers():
    labelled = evaluation.label_rows(
        rows(2), [trajectory(answer="13"), trajectory(answer="12")], [trajectory(answer="12")] * 2, PARAMS
    )
    assert labelled["label"][:] == ["HR", "LR"]
    assert labelled["target_crops"][:] == [["top-left"], []]


def test_error_table_tells_when_where_and_reading_apart():
    labelled = rows(4, ["HR", "HR", "HR", "LR"], [["top-left"]] * 3 + [[]])
    done = [trajectory(f"row-{n}", "?", names) for n, names in enumerate([[], ["bottom"], ["top"], []])]
    errors = diagnostics.error_table(evaluation.scored("awares", labelled, done), labelled, 0.95).set_index("kind").rows
    assert errors.to_dict() == {"correct": 0, "when": 1, "where": 1, "reading": 2}


def test_compare_is_paired():
    scores = pd.DataFrame({"score": [1.0, 0.0, 1.0, 0.0], "rtr": 0.5, "benchmark": "pope"})
    both = pd.concat([scores.assign(system="a"), scores.assign(system="b", rtr=1.0)])
    found = evaluation.compare(both, [("a", "b")], PARAMS.evaluation).squeeze()
    assert (found.difference, found.low, found.high, found.rtr) == (0, 0, 0, -0.5) and not found.significant


def test_majority_counts_by_the_benchmarks_metric():
    table = curation_tables.majority_table(rows(3))
    assert table.to_dict("records") == [{"benchmark": "chartqa", "answer": "12", "accuracy": 100.0}]


def test_curated_tables():
    labelled = rows(4, ["HR", "HR", "LR", "LR"], [["top"], ["top", "left"], [], []])
    assert tables.label_metrics(labelled) == {"rows": 4, "hr": 50.0, "area": (0.5 + 0.75) / 2}
    labels = tables.label_table(labelled).set_index("source")
    assert labels.hr.to_dict() == {"chartqa": 50, "all sources": 50}
    crops = tables.crop_table(labelled).query("source == 'chartqa'").set_index("crop").share
    assert crops["top"] == crops["several"] == 50 and crops.sum() == 100
    assert tables.missed_evidence(labelled, 0.95) == 0
    assert tables.missed_evidence(rows(1, ["HR"], [["bottom"]]), 0.95) == 100
    assert tables.first_rows(labelled, 1, label="LR")["id"][:] == ["row-2"]


def test_accuracy_by_size_orders_by_evidence():
    evidence = pd.DataFrame(
        {"height": range(8), "label": ["HR"] * 4 + ["LR"] * 4, "half": [False] * 4 + [True] * 4, "full": True}
    )
    table = tables.accuracy_by_size(evidence, parts=2)
    assert table.half.tolist() == [0, 100] and table.full.tolist() == [100, 100] and table.n.tolist() == [4, 4]
    for nothing in (evidence[:4], evidence.drop(columns=["half", "full"])):  # of HR rows alone, of released rows
        empty = tables.accuracy_by_size(nothing, parts=2)
        assert list(empty) == list(table) and empty.empty


def test_checks_compare_with_their_bounds(tmp_path):
    checks = [("a", 1.5, "<=", 1.5), ("b", 0.4, ">=", 0.5), ("c", np.nan, "<=", 1.0), ("d", None, ">=", 0.0)]
    table = tables.check_table(checks)
    assert table.holds.tolist() == [True, False, False, False]
    tables.save_table(table, tmp_path / "checks.csv")
    assert (tmp_path / "checks.csv").read_text().splitlines()[1] == "a,1.5,<=,1.5,True"


def test_metrics_are_json_with_null_for_nan(tmp_path):
    written = tables.save_metrics(
        {"a": {"b": np.float64(1.23456789)}, "c": float("nan"), "n": 3}, tmp_path / "metrics.json"
    )
    assert written["a"] == {"b": 1.234568} and np.isnan(written["c"])
    assert tables.load_metrics(tmp_path) == {"a": {"b": 1.234568}, "c": None, "n": 3}


def test_the_same_answers_are_the_same_bytes_whatever_time_they_took(tmp_path):
    done = [trajectory("a"), trajectory("b", crops=("left",), status="valid")]
    for name, seconds in (("quick", 0.1), ("slow", 9.0)):
        evaluation.save_trajectories(tmp_path / name, [replace(one, seconds=seconds) for one in done])
    assert (tmp_path / "quick").read_bytes() == (tmp_path / "slow").read_bytes()
    assert evaluation.load_trajectories(tmp_path / "slow") == [replace(one, seconds=0.0) for one in done]


def test_seed_means_and_missing_seed(tmp_path):
    params = load_params("mini", overrides={"paths.runs": str(tmp_path)})
    runs = pd.DataFrame(
        {"system": "sft", "benchmark": "pope", "accuracy": [80.0, 84.0], "rtr": [0.4, 0.5], "seed": [1, 2]}
    )
    means = tables.seed_means(runs).squeeze()
    assert (means.accuracy, means.accuracy_low, means.accuracy_high, means.seeds) == (82, 80, 84, 2)
    with pytest.raises(AwaresError, match="seed 2 has not been evaluated"):
        tables.seed_table(params, 2)
    with pytest.raises(AwaresError, match="no trajectories here"):
        evaluation.load_trajectories(tmp_path / "none.jsonl")


# Leaks


def test_leaks_are_found_where_there_are_any_and_only_there():
    rng = np.random.default_rng(0)
    labels = rng.choice(["LR", "HR"], 200).tolist()
    telling = [f"question {'small' if label == 'HR' else 'large'} {n % 7}" for n, label in enumerate(labels)]
    silent = [f"question {rng.integers(5)}" for _ in labels]
    assert leaks.question_auc(telling[:100], labels[:100], telling[100:], labels[100:]) > 0.95
    assert leaks.question_auc(silent[:100], labels[:100], silent[100:], labels[100:]) < 0.70
    words, majority = leaks.question_accuracy(telling[:100], labels[:100], telling[100:], labels[100:])
    assert words == 1.0 and majority < 0.7
    assert leaks.question_accuracy(["q"], ["a"], ["q", "r"], ["a", "b"]) == (0.5, 0.5)
    assert leaks.crossed_accuracy(telling, labels)[0] == 1.0
    assert leaks.crossed_accuracy(silent, labels)[0] < 0.65
    assert leaks.crossed_accuracy(["q"], ["a"]) == (1.0, 1.0)
    assert leaks.crossed_accuracy(["p", "q"], ["a", "b"]) == (0.5, 0.5)  # one part of two has a single class left


# Figures


def png(picture):
    return picture.data[:8] == b"\x89PNG\r\n\x1a\n"


def test_figures_draw_and_repeat(tmp_path):
    figures.style(60)
    requests = {"oracle": [(), ("top",), ("top", "left")], "SFT": [(), (), ("all",)]}
    first, second = (
        figures.save_figure(figures.flow_figure(requests, "held-out"), tmp_path / f"{n}.png") for n in range(2)
    )
    assert png(first) and first.data == second.data == (tmp_path / "0.png").read_bytes()
    names = ("full", "half", "awares", "visionzip_50", "visionzip_awares", "random_crop")
    main = pd.DataFrame({"system": names, "accuracy": 50.0, "accuracy_low": 40.0, "accuracy_high": 60.0, "rtr": 0.5})
    main = pd.concat([main.assign(benchmark=name) for name in ("pope", "average")])
    times = main.assign(batch="1", ms=3.0, ms_low=2.0, ms_high=5.0)
    curves = pd.DataFrame({"step": [1, 2], "reward": [0.1, 0.2], "kl": [None, None]})
    sizes = pd.DataFrame({"width": [8, 8, 9], "height": [8, 8, 9], "source": ["a", "a", "b"]})
    for figure in (
        figures.accuracy_rtr_figure(main),
        figures.systems_figure(main),
        figures.accuracy_time_figure(times),
        figures.curves_figure(curves, {"reward": "reward", "kl": "KL", "absent": "?"}),
        figures.scatter_figure(sizes, "width", "height", "source", ("px", "px")),
        figures.bars_figure(times[:2], "system", {"ms_low": "low", "ms_high": "high"}, "ms"),
    ):
        assert png(figures.show(figure))
    labels = [text.get_text() for text in figures.systems_figure(main).axes[0].get_legend().get_texts()]
    assert labels == ["full", "half", "AwaRes", "visionzip_50", "visionzip_awares", "random_crop"]


def test_whiskers_are_on_their_own_bars():
    values = [("x", "p"), ("x", "q"), ("y", "p"), ("y", "q")]
    table = pd.DataFrame([(*names, v, v - 1, v + 2) for v, names in enumerate(values)]).iloc[[0, 3, 1, 2]]
    table.columns = ["benchmark", "system", "accuracy", "accuracy_low", "accuracy_high"]
    figure = figures.bars_figure(table, "benchmark", "accuracy", "system", ("", ""))
    axes = figure.axes[0]
    heights = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in axes.patches}
    whiskers = {round(low[0], 3): (low[1], high[1]) for lines in axes.collections for low, high in lines.get_segments()}
    assert whiskers == {place: (height - 1, height + 2) for place, height in heights.items()}
    assert sorted(heights.values()) == [0, 1, 2, 3]
    figures.show(figure)


def test_effects_stand_in_their_order_and_a_hollow_dot_is_none():
    table = pd.DataFrame(
        [("first", "sft", 1.0, 0.5, 1.5, 0.1, -0.1, 0.3), ("second", "awares", -2.0, -5.0, 1.0, -0.2, -0.3, -0.1)],
        columns=["variant", "system", "difference", "low", "high", "rtr", "rtr_low", "rtr_high"],
    )
    figure = figures.effects_figure(table)
    left, right = figure.axes
    places = {label.get_text(): place for label, place in zip(left.get_yticklabels(), left.get_yticks(), strict=True)}
    assert places["first"] > places["second"]
    dots = [
        {
            tuple(offset): tuple(colour[:3])
            for dot in axes.collections
            if isinstance(dot, PathCollection)
            for offset, colour in zip(dot.get_offsets(), dot.get_facecolor(), strict=True)
        }
        for axes in (left, right)
    ]
    white = (1.0, 1.0, 1.0)
    assert dots[0] == {(1.0, places["first"]): figures.COLOURS["sft"], (-2.0, places["second"]): white}
    assert dots[1] == {(0.1, places["first"]): white, (-0.2, places["second"]): figures.COLOURS["awares"]}
    assert png(figures.show(figure))


def test_gallery_takes_whatever_a_policy_writes():
    made = rows(2)
    done = [trajectory("row-0", "$12$ \x00 \t", ["top", "right"], "valid"), trajectory("row-1", "")]
    assert png(figures.show(figures.gallery(made, done, ["note", ""])))
    assert png(figures.show(figures.gallery([])))


# Publishing


def executed(root, seconds):
    """A notebook as papermill leaves it: timings, ids, a progress bar, a warning, a path."""
    code = v4.new_code_cell("1 + 1", execution_count=2)
    code.metadata = {"papermill": {"duration": seconds}, "tags": ["parameters"]}
    bar = f"<div><progress value='3'></progress> [3/3 {seconds}]</div>"
    code.outputs = [
        v4.new_output("stream", name="stderr", text=f"warning after {seconds} s"),
        v4.new_output("stream", name="stdout", text=f"wrote {root}/runs/x\n"),
        v4.new_output("display_data", {"text/html": bar, "text/plain": "<IPython.core.display.HTML object>"}),
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


def test_page_stands_alone(tmp_path):
    notebook = executed(tmp_path, 1)
    for described in ({}, {"image/png": {"alt": 'a "sign" of the row'}}):
        picture = v4.new_output("display_data", {"image/png": "AAAA"}, metadata=described)
        notebook.cells[1].outputs.append(picture)
    page = publish.to_html(publish.stable_copy(notebook, tmp_path), "title")
    assert "<script" not in page and "Title" in page and "wrote runs/x" in page
    assert re.findall(r'\balt="(.*?)"', page) == [publish.NO_ALT, "a &quot;sign&quot; of the row"]


def test_publish_refuses_an_unknown_name(capsys):
    assert publish.main(["mini", "comparision"]) == 1
    assert "'comparision': publish report," in capsys.readouterr().err


def test_publish_names_the_notebook_that_is_missing(tmp_path):
    overrides = {"paths.runs": str(tmp_path / "runs"), "paths.reports": str(tmp_path / "reports")}
    with pytest.raises(AwaresError, match="data/main/notebook.ipynb: .*dvc repro report"):
        publish.publish(load_params("mini", overrides=overrides))
    assert not (tmp_path / "reports").exists()
