"""Two processes equal one: real processes under `accelerate launch`, over gloo."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_grpo import world as grpo_world  # noqa: F401
from test_sft import SMALL, world  # noqa: F401

from awares import config, data, launch, sft, training
from awares.config import AwaresError, load_params

HERE = Path(__file__).parent
ROOT = HERE.parent
TWO = "data/launch/2cpu.yaml"


def settings(folder, **overrides):
    named = {"paths.runs": str(folder / "runs"), "sft.selection_rows": 2, **overrides}
    return load_params(path=ROOT / "params.yaml", overrides={**SMALL, **named})


def train(world, folder, **overrides):  # noqa: F811
    params = settings(folder, **overrides)
    for split in ("train", "validation"):
        rows = params.run_dir("curation") / split / "dataset"
        if not rows.exists():
            data.save_rows(world.rows, rows)
    rows = data.load_rows(params.run_dir("curation") / "train" / "dataset")
    return sft.train_sft(params, rows, rows, world.base, params.run_dir("sft"))


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("two")
    return folder, train(world, folder, **{"base.launch": TWO})


def weights(result):
    return load_file(result.adapter / "adapter_model.safetensors")


def test_sft_in_two_processes_has_the_losses_of_one(world, launched, tmp_path):  # noqa: F811
    one, two = train(world, tmp_path), launched[1]
    alone, together = ([e for e in training.read_jsonl(r.log) if "loss" in e] for r in (one, two))
    assert [e["step"] for e in alone] == [e["step"] for e in together] == [1, 2, 3]
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4) and b["lr"] == a["lr"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert one.step == two.step
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=1e-3)


def test_a_launched_training_goes_on_from_its_checkpoint_and_ends_the_same(world, launched):  # noqa: F811
    folder, done = launched
    before = weights(done)
    (work,) = (settings(folder).run_dir("sft").parent / ".checkpoints").iterdir()
    last = training.checkpoints(work)[-1]
    assert training.step_of(last) == 3
    (last / "rng_state_1.pth").unlink()  # killed after the first process had written its part, before the second had
    assert [training.step_of(path) for path in training.checkpoints(work, 2)] == [1, 2]
    again = train(world, folder, **{"base.launch": TWO})
    assert [e["step"] for e in training.read_jsonl(again.log) if "loss" in e] == [1, 2, 3]
    assert all(torch.equal(value, weights(again)[name]) for name, value in before.items())


def test_grpo_in_two_processes_has_the_gradients_of_one(grpo_world, tmp_path):  # noqa: F811
    data.save_rows(grpo_world.rows, tmp_path / "rows")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    starts = {"one": [], "two": ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / TWO)]}
    for name, start in starts.items():
        (tmp_path / name).mkdir()
        given = [str(HERE / "grpo_worker.py"), str(grpo_world.policy), str(tmp_path / "rows"), str(tmp_path / name)]
        subprocess.run([sys.executable, *start, *given], env=environment, cwd=ROOT, check=True)
    one, two = (load_file(tmp_path / name / "gradients.safetensors") for name in starts)
    assert set(one) == set(two) and sum(value.abs().sum() for value in one.values()) > 0
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6, rtol=1e-3), name


def test_the_same_settings_come_out_of_their_overrides():
    params = load_params("paper", "no_area_cost", {"sft.epochs": 3.0, "seed": 7}, path=ROOT / "params.yaml")
    again = load_params("paper", "no_area_cost", config.overrides_of(params), path=ROOT / "params.yaml")
    assert dataclasses.replace(again, changed=params.changed) == params


def test_a_process_that_fails_ends_the_training_with_its_name(world, tmp_path):  # noqa: F811
    with pytest.raises(AwaresError, match="sft: accelerate launch ended with exit code"):
        train(
            world, tmp_path, **{"base.launch": TWO, "sft.batch_size": 5, "sft.per_device_batch_size": 1}
        )  # two processes cannot share five samples
    with pytest.raises(AwaresError, match="nowhere.yaml: no such accelerate configuration"):
        train(world, tmp_path, **{"base.launch": "nowhere.yaml"})


def test_batches_that_do_not_come_out_even_are_named(monkeypatch):
    assert launch.layout("sft", 128, 16) == (16, 8)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch.layout("sft", 128, 16) == (8, 1) and launch.layout("grpo", 96, 4) == (3, 2)
    with pytest.raises(AwaresError, match="sft.batch_size 100 is no multiple of the 16 processes"):
        launch.layout("sft", 100, 16)


@pytest.mark.parametrize("name", ["1gpu", "8gpu", "2x8gpu"])
def test_the_papers_batches_fit_the_configurations(name, monkeypatch):
    count = yaml.safe_load((ROOT / "data" / "launch" / f"{name}.yaml").read_text())["num_processes"]
    monkeypatch.setenv("WORLD_SIZE", str(count))
    params = load_params("paper", path=ROOT / "params.yaml")
    for stage in ("sft", "grpo"):
        section = getattr(params, stage)
        size, steps = launch.layout(stage, section.batch_size, section.per_device_batch_size)
        assert size * steps * count == section.batch_size and size <= section.per_device_batch_size


def test_several_gpus_want_a_launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    launch.require_one_gpu("cpu")
    with pytest.raises(AwaresError, match="8 GPUs are visible.*base.launch"):
        launch.require_one_gpu("cuda")
    monkeypatch.setenv("WORLD_SIZE", "8")
    launch.require_one_gpu("cuda")


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "data" / "launch").glob("*.yaml")))
def test_the_configurations_are_accelerates_own(name):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / "data" / "launch" / name))
    assert found.num_processes == yaml.safe_load((ROOT / "data" / "launch" / name).read_text())["num_processes"]
