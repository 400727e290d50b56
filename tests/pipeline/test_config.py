"""params.yaml is read strictly: right values are typed, each wrong one is an error that names its key."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from awares.config import load_params
from awares.errors import AwaresError
from awares.registry import reward

PARAMS = Path(__file__).parents[2] / "params.yaml"


def edited(folder, change):
    """The path of params.yaml with one edit."""
    raw = yaml.safe_load(PARAMS.read_text())
    change(raw)
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return folder / "params.yaml"


def test_paper_values():
    params = load_params("paper", path=PARAMS)
    assert (params.sft.tool_turn_weight, params.sft.lora_rank, params.sft.learning_rate) == (5.0, 8, 1e-4)
    assert (params.sft.batch_size, params.sft.epochs, params.sft.max_length, params.sft.share) == (128, 2, 8192, 0.5)
    assert (params.grpo.alpha_ans, params.grpo.alpha_miss, params.grpo.alpha_use) == (10, 2, 0.25)
    assert (params.grpo.lambda_area, params.grpo.beta, params.grpo.generations) == (0.01, 0.05, 8)
    assert params.base.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert params.data.train_rows * len(params.data.sources) == 50_000


@pytest.mark.parametrize("profile", ["mini", "paper"])
def test_every_variant_is_valid(profile):
    for name in yaml.safe_load(PARAMS.read_text())["variants"]:
        assert load_params(profile, name, path=PARAMS).variant == name


def test_run_folders(monkeypatch):
    monkeypatch.chdir(PARAMS.parent / "tests")  # params.yaml is in the folder above
    assert load_params().root == PARAMS.parent.resolve() and load_params("").profile == "mini"
    params = load_params("mini", overrides="{seed: 2}", path=PARAMS)
    assert params.run_dir("data") == params.path("runs/mini/data/main")
    assert params.run_dir("grpo") == params.path("runs/mini/grpo/main-s2")
    assert params.report_dir() == params.path("reports/mini") and not params.unseen
    unseen = load_params("mini", overrides="{evaluation.seed: 999}", path=PARAMS)
    assert unseen.unseen and unseen.run_dir("evaluation") == unseen.path("runs/mini/unseen/main-s1-e999")
    assert unseen.run_dir("operating_curve") == unseen.path("runs/mini/operating_curve/main-s1-e999")
    assert unseen.run_dir("grpo").name == "main-s1"


def test_variant_then_overrides(tmp_path):
    values = {"grpo.lambda_area": 0.0, "grpo.beta": 0.1, "profiles.paper.grpo.epochs": 7, "profiles.mini.threads": 3}
    path = edited(tmp_path, lambda raw: raw["variants"].update(no_area=values, bad={"grpo.x": 1}))  # breaks no other
    params = load_params(variant="no_area", overrides={"grpo.beta": 0.2, "comparison.own": ["mine"]}, path=path)
    assert (params.grpo.lambda_area, params.grpo.beta, params.grpo.epochs, params.threads) == (0.0, 0.2, 1, 3)
    assert params.comparison.own == ("mine",)
    assert params.run_dir("grpo").name == "no_area-s1" and params.run_dir("sft").name == "main-s1"
    assert params.run_dir("curation").name == "main" and params.run_dir("ablations").name == "ablations"
    assert replace(params, variant="turn").run_dir("evaluation").name == "turn-s1"
    always = load_params(overrides={"curation.judge": "always"}, path=path).curation
    assert always.all_judges == ("semantic", "embedding", "anls", "always")  # the judge that decides gives one, too
    assert hash(params) and params.as_dict()["grpo"]["beta"] == 0.2
    assert load_params(overrides="{sft.learning_rate: 1e-5}").sft.learning_rate == 1e-5  # a text for YAML


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"profile": "huge"}, "'huge': known are mini, paper"),
        ({"variant": "huge"}, "'huge': known are main"),
        ({"path": "/nowhere/params.yaml"}, "/nowhere/params.yaml"),
        ("{sft.learning_rate: fast}", "sft.learning_rate.*'fast'"),
        ("{grpo.betta: 0.0}", "unknown key grpo.betta"),
        ("{crops.rule: biggest}", "crops.rule.*'biggest'.*coverage, iou"),
        ("{crops.offered: [top]}", "crops.offered.*all"),
        ("{curation.judge: oracle}", "curation.judge.*'oracle'.*semantic, embedding, anls"),
        ("{evaluation.judge: llama}", "evaluation.judge llama"),
        ("{evaluation.dial_rows: 5}", "evaluation.dial_rows"),
        ("{grpo.reward: no_such_module:f}", "grpo.reward.*no_such_module"),
        ("{data.tasks: [pope, pope]}", "data.tasks.*twice"),
        ("{evaluation.seed: 101}", "evaluation.seed.* must differ"),
        ("{sft.per_device_batch_size: 7}", "sft.batch_size .*multiple of .* 7"),
        ("{grpo.generations: 5}", "grpo.batch_size .*multiple of grpo.generations 5"),
        ("[1, 2]", "overrides must be a mapping"),
    ],
)
def test_bad_argument(arguments, named):
    arguments = {"overrides": arguments} if isinstance(arguments, str) else arguments
    with pytest.raises(AwaresError, match=named):
        load_params(**{"profile": "mini", "path": PARAMS, **arguments})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw["sft"].pop("tool_turn_weight"), "sft.tool_turn_weight is missing"),
        (lambda raw: raw["profiles"]["mini"]["sft"].pop("epochs"), "profile mini.* sft.epochs is missing"),
        (lambda raw: raw.update(sft=3), "sft is a value"),
        (lambda raw: raw["sft"].update(batch_size=4), "sft.batch_size .*profiles.mini"),
        (lambda raw: raw.update(seed=2), "seed 2"),
        (lambda raw: raw.update(profile=None), "unknown profile None"),
        (lambda raw: raw["ablations"]["sft"].append("nosuch"), "ablations.sft.*'nosuch'"),
        (lambda raw: raw["ablations"]["sft"].append("labels_anls"), "ablations.sft: .*labels_anls .*curation"),
        (lambda raw: raw["ablations"]["grpo"].append("main"), "ablations.grpo: .*main .*nothing"),
    ],
)
def test_bad_file(tmp_path, change, named):
    with pytest.raises(AwaresError, match=named):
        load_params(path=edited(tmp_path, change))


def test_a_registered_function_is_a_name_and_its_source_enters_the_key(monkeypatch):
    monkeypatch.setattr(reward, "_functions", dict(reward._functions))

    @reward("brief")
    def brief(completions, **columns):
        return [-len(text) for text in completions]

    assert load_params(overrides={"grpo.reward": "brief"}, path=PARAMS).grpo.reward == "brief"
    assert reward.find("brief") is brief and reward.find(brief) is brief
    assert "-len(text)" in reward.source("brief")
    assert reward.find("posixpath:split")("a/b") == ("a", "b")
    with pytest.raises(AwaresError, match="posixpath:nosuch"):
        reward.check("posixpath:nosuch")


def test_a_key_that_occurs_twice_and_a_file_of_another_project_are_named(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    twice = f"{PARAMS.read_text()}\nseed: 5\n"
    faults = {twice: r".*seed occurs twice(.|\n)*line \d{3}", "train: {epochs: 3}\n": " is no params.yaml of awares"}
    for text, fault in faults.items():
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(AwaresError, match=str(tmp_path / "params.yaml") + fault):
            load_params()
