"""params.yaml is read strictly: right values typed, every wrong one an error that names its key."""

from pathlib import Path

import pytest
import yaml

from awares.config import SECTIONS, load_params
from awares.errors import AwaresError

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture
def edited(tmp_path):
    """Write params.yaml with one edit and return its path."""

    def edit(change):
        raw = yaml.safe_load(PARAMS.read_text())
        change(raw)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
        return tmp_path / "params.yaml"

    return edit


def test_file_begins_with_the_small_profile():
    assert PARAMS.read_text().splitlines()[0] == "profile: mini"


def test_paper_values_stand():
    params = load_params("paper", path=PARAMS)
    assert (params.sft.tool_turn_weight, params.sft.lora_rank, params.sft.learning_rate) == (5.0, 8, 1e-4)
    assert (params.sft.scheduler, params.sft.warmup_ratio, params.sft.weight_decay) == ("cosine", 0.05, 0.001)
    assert (params.sft.batch_size, params.sft.epochs, params.sft.max_length, params.sft.share) == (128, 2, 8192, 0.5)
    assert (params.grpo.alpha_ans, params.grpo.alpha_miss, params.grpo.alpha_use) == (10, 2, 0.25)
    assert (params.grpo.lambda_area, params.grpo.beta, params.grpo.generations) == (0.01, 0.05, 8)
    assert (params.grpo.batch_size, params.grpo.temperature, params.grpo.top_p) == (64, 1.0, 1.0)
    assert params.base.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert params.data.train_rows * len(params.data.sources) == 50_000
    assert params.data.validation_rows * len(params.data.sources) == 2_000


def test_every_value_says_where_it_comes_from():
    """Each method key carries a comment, or its section begins with one; so does each size key of the paper profile."""
    lines = PARAMS.read_text().splitlines()
    sizes, paper = lines.index("profiles:"), lines.index("  paper:")
    bare, covered = [], False
    for before, line in zip(lines, lines[1:sizes], strict=False):
        if not before.startswith(" "):
            covered = line.startswith("  #") and "assumed" in line
        if line.startswith("  ") and "#" not in line and not covered and line != "  main: {}":
            bare.append(line)
    leaves = [line for line in lines[paper + 1 :] if line.strip() and not line.rstrip().endswith(":")]
    assert bare + [line for line in leaves if "#" not in line] == []


def test_both_profiles_have_the_same_keys():
    profiles = yaml.safe_load(PARAMS.read_text())["profiles"]
    shapes = [{key: sorted(v) if isinstance(v, dict) else None for key, v in p.items()} for p in profiles.values()]
    assert len(shapes) == 2 and shapes[0] == shapes[1]


def test_run_folders():
    params = load_params("mini", overrides="{seed: 2}", path=PARAMS)
    assert params.run_dir("data").relative_to(params.root).as_posix() == "runs/mini/data"
    assert params.run_dir("grpo").relative_to(params.root).as_posix() == "runs/mini/grpo/main-s2"
    assert params.report_dir().relative_to(params.root).as_posix() == "reports/mini"


def test_unseen_evaluation_seed_has_its_own_folder():
    params = load_params("mini", overrides="{evaluation.seed: 999}", path=PARAMS)
    assert params.unseen and params.run_dir("evaluation") == params.path("runs/mini/unseen/main-s1-e999")
    assert params.run_dir("grpo").name == "main-s1"
    assert not load_params("mini", path=PARAMS).unseen


def test_found_from_a_folder_below(monkeypatch):
    monkeypatch.chdir(PARAMS.parent / "tests")
    assert load_params().root == PARAMS.parent.resolve()


def test_profile_empty_means_the_files_own():
    assert load_params("", path=PARAMS).profile == "mini"


def test_variant_then_overrides(edited):
    path = edited(lambda raw: raw["variants"].update(no_area={"grpo.lambda_area": 0.0, "grpo.beta": 0.1}))
    params = load_params(variant="no_area", overrides={"grpo.beta": 0.2}, path=path)
    assert (params.grpo.lambda_area, params.grpo.beta) == (0.0, 0.2)
    assert params.run_dir("grpo").name == "no_area-s1"


def test_whole_number_where_a_number_is_wanted():
    value = load_params(overrides="{sft.tool_turn_weight: 1}", path=PARAMS).sft.tool_turn_weight
    assert value == 1.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("{sft.learning_rate: 1e-5}", "sft.learning_rate must be a number, not '1e-5': .*write 1.0e-5"),
        ("{sft.learning_rate: 1e5}", "write 1.0e\\+5"),
        ("{sft.learning_rate: fast}", "sft.learning_rate must be a number, not 'fast'$"),
        ("{sft.learning_rate: .nan}", "sft.learning_rate must lie between"),
        ("{sft.phased: 1}", "sft.phased must be true or false"),
        ("{grpo.generations: 8.0}", "grpo.generations must be a whole number"),
        ("{grpo.generations: true}", "grpo.generations must be a whole number"),
        ("{grpo.beta: -1.0}", "grpo.beta must lie between 0 and inf"),
        ("{grpo.betta: 0.0}", "grpo.betta: known are .*beta"),
        ("{crops.rule: biggest}", "crops.rule: unknown 'biggest', choose from coverage, iou"),
        ("{curation.judge: oracle}", "curation.judge: unknown 'oracle', choose from semantic, embedding, anls"),
        ("{curation.judges: [semantic, gpt]}", "curation.judges: unknown 'gpt'"),
        ("{data.sources: []}", "data.sources must be a list of at least one"),
        ("{data.tasks: [pope, pope]}", "none of them twice"),
        ("{data.tasks: [mmlu]}", "data.tasks: unknown 'mmlu'"),
        ("{evaluation.seed: 101}", "data seeds must differ"),
        ("{sft.per_device_batch_size: 7}", "sft.batch_size 16 must be a multiple"),
        ("{grpo.generations: 5}", "grpo.batch_size 64 .*multiple of grpo.generations 5"),
        ("{models.x: 1}", "unknown key models.x"),
        ("{seed: a}", "seed must be a whole number"),
        ("[1, 2]", "overrides must be a mapping"),
        ("{a: ", "overrides are not YAML"),
    ],
)
def test_bad_override(overrides, said):
    with pytest.raises(AwaresError, match=said):
        load_params("mini", overrides=overrides, path=PARAMS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"profile": "huge"}, "unknown profile 'huge': known are mini, paper"),
        ({"variant": "huge"}, "unknown variant 'huge': known are main"),
        ({"path": "/nowhere/params.yaml"}, "no such file"),
    ],
)
def test_bad_names(arguments, said):
    with pytest.raises(AwaresError, match=said):
        load_params(**{"path": PARAMS, **arguments})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["sft"].pop("tool_turn_weight"), "sft.tool_turn_weight is missing"),
        (lambda raw: raw["profiles"]["mini"]["sft"].pop("epochs"), "sft.epochs is missing.*profiles"),
        (lambda raw: raw["sft"].update(batch_size=4), "unknown key sft.batch_size"),
        (lambda raw: raw["profiles"]["mini"]["sft"].update(phased=True), "unknown key profiles.mini.sft.phased"),
        (lambda raw: raw.update(extra=1), "unknown key params.yaml.extra"),
        (lambda raw: raw.update(seeds=2), "seeds must be a list"),
        (lambda raw: raw.update(seed=2), "seed 2 is not one"),
        (lambda raw: raw.update(profile=None), "profile must be a name"),
        (lambda raw: raw["profiles"]["mini"].pop("threads"), "threads must be a whole number, not None"),
        (lambda raw: raw["variants"].update(bad={"grpo.x": 1}), None),
    ],
)
def test_bad_file(edited, change, said):
    path = edited(change)
    if said is None:  # a broken variant does not stand in the way of the others
        load_params(path=path)
        with pytest.raises(AwaresError, match="variants.bad: grpo.x"):
            load_params(variant="bad", path=path)
        return
    with pytest.raises(AwaresError, match=said):
        load_params(path=path)


def test_sections_hold_no_defaults():
    """A default in code would hide a key that is missing in params.yaml."""
    for kind in SECTIONS.values():
        with pytest.raises(TypeError):
            kind()


def test_as_dict_names_every_value_and_no_folder():
    values = load_params(path=PARAMS).as_dict()
    assert values["grpo"]["beta"] == 0.05 and "root" not in values


def test_the_judge_that_decides_is_heard():
    params = load_params("mini", path=PARAMS, overrides={"curation.judge": "always"})
    assert params.curation.panel == ("semantic", "embedding", "anls", "always")
    assert load_params("mini", path=PARAMS).curation.panel == ("semantic", "embedding", "anls")
