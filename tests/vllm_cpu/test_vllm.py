"""vLLM itself on CPUs: servers that a step starts itself, and the rollouts of GRPO. Run by `make vllm`."""

import os
import re
import signal
import statistics
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="lives in a separate environment: make vllm")

import torch
import yaml
from conftest import ROOT
from test_remote import UNTOLD
from trl import GRPOTrainer
from vllm import LLM

from awares.clients import launch, served
from awares.clients.engine import RemoteEngine
from awares.config import load_params
from awares.data.rows import make_split
from awares.engine.jsonl import read_records
from awares.engine.model import load_model, load_processor, save_model
from awares.errors import AwaresRequestError
from awares.method import curation, evaluation, grpo
from awares.method.judges import AnnotationOracle
from awares.method.rollout import Engine

BASE, SFT, GRPO = (ROOT / "data" / name for name in ("base", "policy/sft", "policy/grpo"))
UPDATES, COMPLETIONS, BLOCK = 20, 64, 32
FLAGS = {"dtype": "float32", "max-model-len": 4096, "enforce-eager": True, "limit-mm-per-prompt": {"image": 11}}
FLAGS |= {"chat-template": "src/awares/engine/chat_template.jinja", "chat-template-content-format": "openai"}
FLAGS |= {"block-size": BLOCK}
# vLLM drafts the constant text of a call from the prompt, which has it, and keeps what the policy would have written
DRAFTS = {"method": "ngram", "num_speculative_tokens": 16, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
FLAGS |= {"speculative-config": DRAFTS}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Makes parameters under which a step starts its own vLLM server."""
    folder = tmp_path_factory.mktemp("served")
    declared = yaml.safe_load((ROOT / "data" / "served.yaml").read_text()) | {"python": sys.executable, "minutes": 8}
    declared["models"]["base"] |= {"model": "data/base", "vllm": FLAGS, "attempts": 3, "concurrency": 32}
    (folder / "served.yaml").write_text(yaml.safe_dump(declared))
    usual = {"threads": 1, "curation.served_file": str(folder / "served.yaml"), "paths.runs": str(folder / "runs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("AWARES_BASE_URL", raising=False)
        yield lambda **overrides: load_params("mini", overrides={**usual, **overrides})


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


@pytest.fixture(scope="module")
def rows(settings):
    return make_split(settings(**{"evaluation.rows": 52}), "evaluation")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return merged(tmp_path_factory.mktemp("policy") / "policy", SFT, GRPO)


@pytest.fixture(scope="module")
def engine(settings, policy):
    return Engine.from_params(load_model(policy), load_processor(policy), settings())


@pytest.fixture(scope="module")
def own(engine, rows):
    """The in-process engine's trajectories."""
    return engine.run(rows["image"], rows["question"], row_ids=rows["id"])


@pytest.fixture(scope="module")
def remote(settings, engine, policy):
    params = settings()
    limit = params.protocol.max_new_tokens
    with launch.managed():
        yield served.make_engine("awares", engine.processor, params, policy, max_new_tokens=limit)


def metric(name):
    found = urllib.request.urlopen(launch.running.url.replace("/v1", "/metrics"), timeout=5).read().decode()
    return sum(map(float, re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", found, re.MULTILINE)))


def test_evaluation_rows_equal_the_in_process_engines_with_reuse_of_turn_one_and_drafted_calls(rows, own, remote, say):
    found = remote.run(rows["image"], rows["question"], row_ids=rows["id"])
    ties = [one.row_id for one in own if one.margin < 1e-3]
    pairs = [(one, other) for one, other in zip(found, own, strict=True) if other.row_id not in ties]
    callers = [one for one in found if one.crops]
    say(f"{len(rows)} rows, {len(callers)} with a call, {len(ties)} with a margin below 1e-3")
    different = [one.row_id for one, other in pairs if replace(one, **UNTOLD) != replace(other, **UNTOLD)]
    assert not different and len(pairs) >= 300 and len(callers) >= 50
    prompts = [one.turns[0].text_tokens + one.turns[0].visual_tokens for one in callers]
    assert metric("prefix_cache_hits") >= sum(length // BLOCK * BLOCK for length in prompts) > 1000
    written, accepted = metric("generation_tokens"), metric("spec_decode_num_accepted_tokens")
    say(f"{accepted:.0f} of {written:.0f} tokens are accepted drafts: so many decoding steps less")
    assert accepted >= 10 * len(callers)  # a call has about 19 tokens


def test_the_operating_curve_equals_the_in_process_one(rows, own, engine, remote, say):
    """The call's log-odds of the first token, and the rows whose first token a bias changes."""
    part, biases = rows.select(range(120)), [-3.0, 0.0, 6.0]
    scored = RemoteEngine(remote.client, remote.processor, remote.max_new_tokens, scores=True)
    found = scored.run(part["image"], part["question"], row_ids=part["id"])
    apart = max(abs(one.call_gap - other.call_gap) for one, other in zip(found, own, strict=False))
    runs = (scored, part, found), (engine, part, own[:120])
    curves = [evaluation.sweep_call_bias(*run, 0.0, biases) for run in runs]
    calls = {bias: sum(bool(one.crops) for one in done) for bias, done in curves[0].items()}
    say(f"log-odds of {len(found)} calls: at most {apart:.1e} apart; calls by bias: {calls}")
    assert apart < 1e-3 and calls[-3.0] < calls[0.0] < calls[6.0]
    for bias in biases:
        pairs = [pair for pair in zip(*(curve[bias] for curve in curves), strict=True) if pair[1].margin >= 1e-3]
        assert len(pairs) > 100 and all(replace(one, **UNTOLD) == replace(other, **UNTOLD) for one, other in pairs)


def curate(params, rows, folder):
    processor = load_processor(BASE)
    if params.curation.engine == "local":
        engine = Engine.from_params(load_model(BASE), processor, params, progress=False)
    else:
        engine = served.make_engine("base", processor, params)
    oracle = AnnotationOracle(params.curation.oracle_seed, params.curation.oracle_sigma, params.curation.oracle_margin)
    with launch.managed():
        curation.curate({"train": rows}, engine, ["semantic"], oracle, params, folder)
    return read_records(folder / "train" / "answers.jsonl")


def content(records):
    """What a server can tell, by row."""
    untold = {"margin": 0, "call_gap": 0, "call_logprob": 0}
    return {one["id"]: [{**one[side], **untold} for side in ("low", "high")] for one in records}


def kill_after(file, replies):
    """Ends the server from outside once ``file`` has so many replies."""
    while len(read_records(file)) < replies:
        time.sleep(0.02)
    os.killpg(launch.running.process.pid, signal.SIGKILL)


def test_curation_through_vllm_equals_the_local_one_also_when_vllm_is_killed_halfway(settings, tmp_path, say):
    chosen = {"curation.judges": ["semantic"], "curation.lucky_margin": 0.0, "curation.chunk_rows": 50}
    chosen |= {"data.train_rows": 40, "paths.runs": str(tmp_path)}
    rows = make_split(settings(**chosen), "train")
    assert len(rows) == 200
    expected = curate(settings(**chosen), rows, tmp_path / "a")
    ties = {one["id"] for one in expected if min(one[side]["margin"] for side in ("low", "high")) < 1e-3}
    params, replies = settings(**chosen, **{"curation.engine": "base"}), tmp_path / "mini" / ".replies" / "base.jsonl"
    threading.Thread(target=kill_after, args=(replies, 170), daemon=True).start()
    with pytest.raises(AwaresRequestError, match="base: its server ended with exit code -9"):
        curate(params, rows, tmp_path / "b")
    kept = [one["reply_key"] for one in read_records(replies)]
    assert 170 <= len(kept) < 400
    found, wanted = content(curate(params, rows, tmp_path / "b")), content(expected)
    all_kept = [one["reply_key"] for one in read_records(replies)]
    assert all_kept[: len(kept)] == kept and len(all_kept) == len(set(all_kept))  # none is requested again
    assert [row_id for row_id in wanted if found[row_id] != wanted[row_id] and row_id not in ties] == []
    say(f"{len(rows)} rows, {len(ties)} with a margin below 1e-3, {len(kept)} replies kept at the kill")


@pytest.fixture(scope="module")
def world(settings, tmp_path_factory):
    """The SFT policy on disk, and training rows labelled by the base model's answers: one epoch of updates."""
    policy = merged(tmp_path_factory.mktemp("sft") / "merged", SFT)
    params = settings(**{"data.train_rows": UPDATES * COMPLETIONS // 8 // 5})
    rows = make_split(params, "train")
    base = Engine.from_params(load_model(BASE), load_processor(BASE), params)
    half, full = (base.answer(rows["image"], rows["question"], view) for view in ("half", "full"))
    return settings, policy, evaluation.label_rows(rows, half, full, params)


def trained_with(world, folder, rollouts):
    settings, policy, rows = world
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
    settings, policy, rows = world
    sizes = {"grpo.batch_size": 16, "grpo.per_device_batch_size": 8, "grpo.max_steps": 1, "grpo.rollouts": "vllm"}
    places = {"base.launch": "data/launch/2cpu.yaml", "paths.runs": str(tmp_path)}
    params = settings(**sizes, **places, **{"grpo.share_prompts": True})
    done = grpo.train_grpo(params, rows, policy, params.run_dir("grpo"))
    (entry,) = read_records(done.log)
    assert entry["step"] == 1 and entry["reward"] > 8 and entry["grad_norm"] > 0
