"""Two processes equal one: real processes under `accelerate launch`, over gloo.

They run ``python test_launch.py FUNCTION MODEL FOLDER``: `update` or `train_sharded`, on the rows in FOLDER.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_grpo
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_grpo import world as grpo_world  # noqa: F401
from test_sft import SMALL, weights, world  # noqa: F401
from torch.distributed.fsdp import FSDPModule

from awares.baselines.trained import ergo_reward
from awares.clients import launch
from awares.config import load_params
from awares.engine.jsonl import read_records, write_records
from awares.engine.model import load_model, load_processor
from awares.engine.rows import load_rows, save_rows
from awares.errors import AwaresError
from awares.method import grpo, sft
from awares.training import checkpoints as training
from awares.training import distributed

HERE = ROOT / "tests"
CONFIGURATIONS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "data/launch").glob("*.yaml"))}
TWO, FSDP2 = "data/launch/2cpu.yaml", "data/launch/fsdp2-8gpu.yaml"
SEARCH = os.pathsep.join(map(str, (ROOT / "src", HERE, HERE / "method", HERE / "training")))
WORKERS = {**os.environ, "PYTHONPATH": SEARCH, "OMP_NUM_THREADS": "1"}
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]


def settings(folder, **overrides):
    named = {"paths.runs": str(folder / "runs"), "sft.selection_rows": 2, **overrides}
    return load_params(overrides={**SMALL, **named})


def train(world, folder, **overrides):  # noqa: F811
    params = settings(folder, **overrides)
    return sft.train_sft(params, world.rows, world.rows, world.base, params.run_dir("sft"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):  # noqa: F811
    return train(world, tmp_path_factory.mktemp("one"))


def losses(log):
    return [entry for entry in read_records(log) if "loss" in entry]


def steps(folder):
    return [training.step_of(path) for path in training.checkpoints(folder, 2)]


def require_same_training(log, other):
    assert [e["step"] for e in losses(log)] == [e["step"] for e in losses(other)] == [1, 2, 3]
    for a, b in zip(losses(log), losses(other), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4) and b["lr"] == a["lr"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def train_sharded(base, folder):
    """SFT in one CPU process, sharded; it prints what each process holds. The libraries shard, train, save and load.

    accelerate shards on GPUs only: on a CPU it reads the configuration and ignores it. Here its plugin is put where
    accelerate keeps it on a GPU.
    """
    plain = training.train

    def shard_and_train(trainer, *given):
        for state in (PartialState(), trainer.accelerator.state):
            state.distributed_type = DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        trainer.is_fsdp_enabled = True
        plain(trainer, *given)
        parts = sum(isinstance(module, FSDPModule) for module in trainer.model.modules())
        whole = sum(weight.numel() for weight in trainer.model.parameters())
        here = sum(weight.to_local().numel() for weight in trainer.model.parameters())
        print(f"{parts} parts, {here} of {whole} weights", flush=True)

    training.train = shard_and_train
    (folder / "checkpoints").mkdir(exist_ok=True)
    changes = {"sft.launch": FSDP2, "sft.share_computation": False, "sft.gradient_checkpointing": True}
    sft.fit_sft(
        settings(folder, **changes), load_rows(folder / "rows"), base, folder / "checkpoints", folder / "log.jsonl"
    )


def run_sharded(world, folder):  # noqa: F811
    """SFT in two processes under the FSDP2 configuration that ships, on a CPU; what they print."""
    given = [*LAUNCH, str(ROOT / FSDP2), "--num_processes", "2", __file__, "train_sharded", str(world.base)]
    done = subprocess.run([sys.executable, *given, str(folder)], env=WORKERS, cwd=ROOT, check=True, capture_output=True)
    return done.stdout.decode()


def test_a_sharded_training_has_the_losses_of_one_and_resumes(world, alone, tmp_path):  # noqa: F811
    save_rows(world.rows, tmp_path / "rows")
    printed, log, work = run_sharded(world, tmp_path), tmp_path / "log.jsonl", tmp_path / "checkpoints"
    held = [tuple(map(int, found)) for found in re.findall(r"(\d+) parts, (\d+) of (\d+) weights", printed)]
    assert len(held) == 2 and sum(here for _, here, _ in held) == held[0][2]  # each process holds its share and no more
    require_same_training(alone.log, log)
    assert steps(work) == [1, 2, 3]
    last = work / "checkpoint-3" / "adapter_model.safetensors"
    before, first = load_file(last), (work / "checkpoint-1" / "optimizer.bin").stat()
    assert before.keys() == weights(alone.adapter).keys()
    assert all(torch.allclose(value, before[name], atol=1e-3) for name, value in weights(alone.adapter).items())
    (work / "checkpoint-3" / "optimizer.bin").unlink()  # killed between the parts of the checkpoint
    assert steps(work) == [1, 2]
    run_sharded(world, tmp_path)
    assert [entry["step"] for entry in losses(log)] == [1, 2, 3]
    after = load_file(last)
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert (work / "checkpoint-1" / "optimizer.bin").stat() == first  # it resumed and did not begin again


def update(policy, folder):
    """One GRPO update with fixed completions, which moves each weight by its gradient."""
    params = test_grpo.settings(**{"grpo.max_steps": 1, "grpo.max_grad_norm": 1000.0, "grpo.learning_rate": 1.0})
    model, processor = load_model(policy), load_processor(policy)
    trainer = grpo.build_grpo_trainer(params, load_rows(folder / "rows"), model, processor, folder / "work")
    test_grpo.disturb(trainer)
    processes = trainer.accelerator.num_processes
    test_grpo.write(trainer, first=8 // processes * trainer.accelerator.process_index)
    trainer.args.save_strategy, trainer.args.optim = "no", "sgd"
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    trainer.train()
    if trainer.accelerator.is_main_process:
        moved = {name: before[name] - weight.detach() for name, weight in trained.items()}
        save_file(moved, folder / f"gradients-{processes}.safetensors")
        write_records(folder / f"log-{processes}.jsonl", [one for one in trainer.state.log_history if "reward" in one])


def test_grpo_in_two_processes_has_the_gradients_of_one(grpo_world, tmp_path):  # noqa: F811
    save_rows(grpo_world.rows, tmp_path / "rows")
    given = [__file__, "update", str(grpo_world.policy), str(tmp_path)]
    subprocess.run([sys.executable, *LAUNCH, str(ROOT / TWO), *given], env=WORKERS, cwd=ROOT, check=True)
    update(grpo_world.policy, tmp_path)
    one, two = (load_file(tmp_path / f"gradients-{processes}.safetensors") for processes in (1, 2))
    assert set(one) == set(two) and sum(value.abs().sum() for value in one.values()) > 0
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6, rtol=1e-3), name
    logs = [read_records(tmp_path / f"log-{processes}.jsonl")[0] for processes in (1, 2)]
    for term in ("reward", "terms/answer", "terms/tool_cost", "call_rate"):  # over the completions of both processes
        assert logs[0][term] == pytest.approx(logs[1][term], rel=1e-5)


def test_a_launched_grpo_finds_the_reward_by_name(grpo_world, tmp_path, monkeypatch):  # noqa: F811
    def join(job):  # its only worker is this process
        assert distributed._read(job).params.grpo.reward == "awares.baselines.trained:ergo_reward"
        monkeypatch.setattr(sys, "argv", ["distributed", str(job), "--worker"])
        distributed.main()

    monkeypatch.setattr(distributed, "join", join)
    params = test_grpo.settings(**{"base.launch": TWO, "paths.runs": str(tmp_path), "grpo.max_completion_length": 6})
    given = params, grpo_world.rows, grpo_world.policy, params.run_dir("grpo")
    assert grpo.train_grpo(*given, ergo_reward).step == 3  # no name of it is in the parameters


def test_two_machines_of_one_process_train_as_one_does(world, alone, tmp_path, monkeypatch):  # noqa: F811
    """Two launchers, each as on a separate machine; the second joins by the file that the first has written."""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**CONFIGURATIONS["2cpu"], "num_machines": 2}))
    machines = {"base.launch": str(tmp_path / "two.yaml")}
    for name in distributed.NODE:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AwaresError, match="MASTER_ADDR, MASTER_PORT, NODE_RANK"):
        train(world, tmp_path, **machines)
    folder = settings(tmp_path).run_dir("sft")
    join = f"while [ ! -f {folder}/launch.job ]; do sleep 0.1; done; "
    join += f"{sys.executable} -m awares.training.distributed {folder}/launch.job"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch._free_port()), "OMP_NUM_THREADS": "1"}
    second = subprocess.Popen(["sh", "-c", join], env={**WORKERS, **shared, "NODE_RANK": "1"}, cwd=ROOT)
    try:
        for name, value in {**shared, "NODE_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        done = train(world, tmp_path, **machines)
        assert second.wait(60) == 0 and not list(folder.glob("launch.*"))
    finally:
        second.kill()
    require_same_training(alone.log, done.log)
    found = weights(done.adapter)
    assert alone.step == done.step
    assert all(torch.allclose(value, found[name], atol=1e-3) for name, value in weights(alone.adapter).items())
    (work,) = (folder.parent / ".checkpoints").iterdir()
    assert steps(work) == [1, 2, 3]
    (work / "checkpoint-3" / "rng_state_1.pth").unlink()  # killed when only the first process had written its part
    assert steps(work) == [1, 2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base.launch": FSDP2}, "base.launch: GRPO.*sft.launch"),
        ({"sft.launch": FSDP2}, "sft.launch.*base.device cpu"),
        ({"base.launch": "nowhere.yaml"}, "nowhere.yaml.*base.launch"),
        ({"sft.launch": "nowhere.yaml"}, "nowhere.yaml.*sft.launch"),
        ({"base.launch": TWO}, "sft.*exit code 1"),
    ],
)
def test_a_launch_that_cannot_train_is_refused_by_name(world, tmp_path, monkeypatch, changes, message):  # noqa: F811
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(AwaresError, match=message):
        train(world, tmp_path, **changes)
    with pytest.raises(AwaresError, match="launch.job"):
        distributed.join(tmp_path / "launch.job")


def test_a_sharded_configuration_must_fit_the_training(tmp_path):
    gpu, found = {"base.device": "cuda", "base.launch": TWO, "sft.launch": FSDP2}, CONFIGURATIONS["fsdp2-8gpu"]
    for shares, changes, named in (
        (True, {}, "sft.share_computation"), (False, {"fsdp_version": 1}, "fsdp_version"),
        (False, {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type"),
    ):  # fmt: skip
        params = settings(tmp_path, **{**gpu, "sft.share_computation": shares})
        with pytest.raises(AwaresError, match=f"sft.launch: .*{named}"):
            distributed._check_fsdp(params, "sft.launch", {**found, "fsdp_config": {**found["fsdp_config"], **changes}})
    distributed._check_fsdp(params, "sft.launch", found)


def test_a_process_loads_the_model_on_its_own_gpu_and_for_fsdp_in_host_memory(tmp_path, monkeypatch):
    params = settings(tmp_path, **{"base.device": "cuda"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(AwaresError, match="8 GPUs.*base.launch"):
        distributed.device(params)
    assert distributed.device(settings(tmp_path)) == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device(params) == "cuda:1"
    with pytest.raises(AwaresError, match="sft.batch_size 101 .* 2 processes"):
        distributed.layout("sft", 101, 16)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert distributed.device(params) == "cpu"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_configurations_fit_the_papers_batches(name, monkeypatch):
    processes, params = CONFIGURATIONS[name]["num_processes"], load_params("paper")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for stage in ("sft", "grpo"):
        section = getattr(params, stage)
        size, steps = distributed.layout(stage, section.batch_size, section.per_device_batch_size)
        assert size * steps * processes == section.batch_size and size <= section.per_device_batch_size


if __name__ == "__main__":
    {"update": update, "train_sharded": train_sharded}[sys.argv[1]](*map(Path, sys.argv[2:]))
