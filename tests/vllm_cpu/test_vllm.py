"""vLLM itself on CPUs: its server behind `RemoteEngine`, and the rollouts of GRPO. Run by `make vllm`."""

import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="lives in a separate environment: make vllm")

import torch
from test_remote import UNTOLD
from trl import GRPOTrainer
from vllm import LLM

from awares.clients.chat import ChatClient, Server
from awares.clients.engine import RemoteEngine
from awares.config import load_params
from awares.data.rows import make_split
from awares.engine.jsonl import read_records
from awares.engine.model import load_model, load_processor, save_model
from awares.method import evaluation, grpo
from awares.method.rollout import Engine

ROOT = Path(__file__).parents[2]
BASE, SFT, GRPO = (ROOT / "data" / name for name in ("base", "policy/sft", "policy/grpo"))
UPDATES, COMPLETIONS, BLOCK = 20, 64, 32
os.environ |= {
    "NO_PROXY": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def settings(**overrides):
    return load_params("mini", overrides={"threads": 1, **overrides}, path=ROOT / "params.yaml")


@pytest.fixture
def say(capsys):
    """Prints a line past pytest's capture."""

    def show(text):
        with capsys.disabled():
            print(f"\n  {text}")

    return show


def merged(folder, *adapters):
    save_model(load_model(BASE, adapter=adapters), load_processor(BASE), folder)
    return folder


# The server


class VllmServer:
    """``python -m vllm...api_server`` on a free port; `ready` waits for its health."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", self.address.rpartition(":")[2], "--model", str(model), "--served-model-name", "policy"]
        command += ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--block-size", str(BLOCK)]
        command += ["--chat-template", str(model / "chat_template.jinja"), "--limit-mm-per-prompt", '{"image": 11}']
        command += ["--chat-template-content-format", "openai"]
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def ready(self):
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-4000:])

    def metric(self, name):
        found = urllib.request.urlopen(f"{self.address}/metrics", timeout=5).read().decode()
        return sum(float(value) for value in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", found, re.MULTILINE))


@pytest.fixture(scope="module")
def starting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = VllmServer(merged(folder / "policy", SFT, GRPO), folder / "log.txt")
    yield server
    server.process.terminate()
    server.process.wait(60)


@pytest.fixture(scope="module")
def rows():
    return make_split(settings(**{"evaluation.rows": 52}), "evaluation")


@pytest.fixture(scope="module")
def own(starting, rows):
    """The in-process engine's trajectories, computed while the server starts."""
    folder = starting.log.with_name("policy")
    engine = Engine.from_params(load_model(folder), load_processor(folder), settings())
    return engine.run(rows["image"], rows["question"], row_ids=rows["id"])


@pytest.fixture(scope="module")
def remote(starting, own):
    processor = load_processor(starting.log.with_name("policy"))
    client = ChatClient(Server(url=f"{starting.ready().address}/v1", model="policy"), None)
    return RemoteEngine(client, processor, settings().protocol.max_new_tokens)


def test_evaluation_rows_equal_the_in_process_engines_and_turn_two_reuses_turn_one(starting, rows, own, remote, say):
    before = starting.metric("prefix_cache_hits_total")
    found = remote.run(rows["image"], rows["question"], row_ids=rows["id"])
    hits = starting.metric("prefix_cache_hits_total") - before
    ties = [one.row_id for one in own if one.margin < 1e-3]
    pairs = [(one, other) for one, other in zip(found, own, strict=True) if other.row_id not in ties]
    callers = [one for one in found if one.crops]
    say(f"{len(rows)} rows, {len(callers)} with a call, {len(ties)} with a margin below 1e-3")
    different = [one.row_id for one, other in pairs if replace(one, **UNTOLD) != replace(other, **UNTOLD)]
    assert not different and len(pairs) >= 300 and len(callers) >= 50
    prompts = [one.turns[0].text_tokens + one.turns[0].visual_tokens for one in callers]
    assert hits >= sum(length // BLOCK * BLOCK for length in prompts) > 1000


def test_the_operating_curve_equals_the_in_process_one(starting, rows, own, remote, say):
    """The call's log-odds of the first token, and the rows whose first token a bias changes."""
    part, biases, folder = rows.select(range(120)), [-3.0, 0.0, 6.0], starting.log.with_name("policy")
    scored = RemoteEngine(remote.client, remote.processor, remote.max_new_tokens, scores=True)
    found = scored.run(part["image"], part["question"], row_ids=part["id"])
    apart = max(abs(one.call_gap - other.call_gap) for one, other in zip(found, own, strict=False))
    engine = Engine.from_params(load_model(folder), load_processor(folder), settings())
    runs = (scored, part, found), (engine, part, own[:120])
    curves = [evaluation.sweep_call_bias(*run, 0.0, biases) for run in runs]
    calls = {bias: sum(bool(one.crops) for one in done) for bias, done in curves[0].items()}
    say(f"log-odds of {len(found)} calls: at most {apart:.1e} apart; calls by bias: {calls}")
    assert apart < 1e-3 and calls[-3.0] < calls[0.0] < calls[6.0]
    for bias in biases:
        pairs = [pair for pair in zip(*(curve[bias] for curve in curves), strict=True) if pair[1].margin >= 1e-3]
        assert len(pairs) > 100 and all(replace(one, **UNTOLD) == replace(other, **UNTOLD) for one, other in pairs)


# GRPO


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The SFT policy on disk, and training rows labelled by the base model's answers: one epoch of updates."""
    policy = merged(tmp_path_factory.mktemp("sft") / "merged", SFT)
    params = settings(**{"data.train_rows": UPDATES * COMPLETIONS // 8 // 5})
    rows = make_split(params, "train")
    base = Engine.from_params(load_model(BASE), load_processor(BASE), params)
    half, full = (base.answer(rows["image"], rows["question"], view) for view in ("half", "full"))
    return policy, evaluation.label_rows(rows, half, full, params)


def trained_with(world, folder, rollouts):
    policy, rows = world
    params = settings(**{"grpo.rollouts": rollouts, "grpo.batch_size": COMPLETIONS, "grpo.max_steps": UPDATES})
    trainer = grpo.build_grpo_trainer(params, rows, load_model(policy), load_processor(policy), folder)
    assert torch.initial_seed() == params.seed  # not the one that vLLM sets
    trainer.args.save_strategy = "no"
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def prompts():
    """All prompts of GRPO's turns, as we write them and as vLLM reads them."""
    found = {"ours": [], "vllm": []}
    turn, generate = GRPOTrainer._generate_single_turn, LLM.generate

    def written(self, prompt_ids, *given, **named):
        found["ours"] += prompt_ids
        return turn(self, prompt_ids, *given, **named)

    def read(self, *given, **named):
        outputs = generate(self, *given, **named)
        found["vllm"] += [list(one.prompt_token_ids) for one in outputs]
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_single_turn", written)
        patch.setattr(LLM, "generate", read)
        yield found


@pytest.fixture(scope="module")
def trained(world, prompts, tmp_path_factory):
    """A trainer after its updates with vLLM's rollouts."""
    return trained_with(world, tmp_path_factory.mktemp("grpo"), "vllm")


def test_vllm_reads_our_prompts_on_every_batch(trained, prompts, say):
    assert prompts["vllm"] == prompts["ours"]
    image = trained.processing_class.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    shown = [ids.count(image) for ids in prompts["ours"]]
    say(f"{len(shown)} prompts, {sum(count > 1 for count in shown)} with crops")
    assert shown.count(1) >= UPDATES * COMPLETIONS and sum(count > 1 for count in shown) > UPDATES


def test_vllm_generates_with_the_weights_of_the_last_update(trained):
    trained._generate_and_score_completions([trained.train_dataset[0]] * 8)
    runner = trained.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    served = dict(runner.model.named_parameters())
    trained.model.merge_adapter()
    changed = 0.0
    for name, module in trained.core.named_modules():
        if name.endswith("o_proj") and "language_model" in name:
            weight = module.base_layer.weight
            layer = re.search(r"layers\.(\d+)\.", name).group(1)
            (held,) = (one for key, one in served.items() if key.endswith(f"layers.{layer}.self_attn.o_proj.weight"))
            torch.testing.assert_close(held.float(), weight.to(held.dtype).float())
            changed += (module.get_delta_weight("default") != 0).float().mean().item()
    trained.model.unmerge_adapter()
    assert changed > 0


def test_rewards_are_those_of_local_rollouts_within_sampling_noise(world, trained, tmp_path, say):
    local = trained_with(world, tmp_path, "local")
    for term in ("reward", "call_rate"):
        series = [[one[term] for one in each.state.log_history if "reward" in one] for each in (local, trained)]
        differences = [ours - vllm for ours, vllm in zip(*series, strict=True)]
        mean, error = statistics.mean(differences), statistics.stdev(differences) / UPDATES**0.5
        say(f"{term}: local {statistics.mean(series[0]):.3f}, local - vLLM {mean:.3f}, standard error {error:.3f}")
        assert len(differences) == UPDATES and abs(mean) < 3 * error < 0.5


def test_two_processes_hold_whole_groups_and_share_their_prompts(world, tmp_path):
    policy, rows = world
    sizes = {"grpo.batch_size": 16, "grpo.per_device_batch_size": 8, "grpo.max_steps": 1, "grpo.rollouts": "vllm"}
    places = {"base.launch": "data/launch/2cpu.yaml", "paths.runs": str(tmp_path)}
    params = settings(**sizes, **places, **{"grpo.share_prompts": True})
    done = grpo.train_grpo(params, rows, policy, params.run_dir("grpo"))
    (entry,) = read_records(done.log)
    assert entry["step"] == 1 and entry["reward"] > 8 and entry["grad_norm"] > 0
