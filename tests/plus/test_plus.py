"""GRPO beyond the paper: which rows, turn-wise advantages, the exact gradient of a decision, a chosen bias."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import overriding, trajectory
from test_grpo import trainer_for
from test_sft import killed_at

from awares.engine.jsonl import read_records
from awares.engine.model import load_model, load_processor
from awares.engine.rows import load_rows, save_rows
from awares.errors import AwaresError
from awares.method.rollout import Engine
from awares.plus import estimators, exact
from awares.study import comparison

SECTION: dict = {"batch_size": 4, "per_device_batch_size": 2, "generations": 2, "max_steps": 3, "save_steps": 1}
SECTION |= {"learning_rate": 1.0e-2, "scheduler": "constant", "held_out_rows": 2, "answer_reward": "anls"}
SMALL = {"threads": 1, **{f"grpo.{key}": value for key, value in SECTION.items()}}
settings = overriding(SMALL)


@pytest.fixture(scope="module")
def world(tiny, saved) -> SimpleNamespace:
    """A policy on disk, six curated rows (every second one HR), and both plays of each."""
    rows = tiny.rows([(224, 168), (168, 280)], [[], ["top"]] * 3)
    engine = Engine.from_params(load_model(saved), load_processor(saved), settings(), progress=False)

    def run(call_bias, row_ids):
        return engine.run(rows["image"], rows["question"], call_bias=call_bias, row_ids=row_ids)

    return SimpleNamespace(policy=saved, rows=rows, plays=exact.play(SimpleNamespace(run=run), rows))


def test_turn_advantages_add_up_to_the_group_advantage():
    rewards, called = torch.tensor([10.0, 0.0, 8.0, 6.0, 1.0, 1.0, 1.0, 5.0]), torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0])
    found = estimators.turn_advantages(rewards, called, 4)
    groups = rewards.view(2, 4)
    assert torch.allclose(found.sum(1), (groups - groups.mean(1, keepdim=True)).flatten())
    assert found[:4].tolist() == [[-1, 5], [-1, -5], [1, 1], [1, -1]]  # direct 5 and call 7 on average, all 6
    assert found[4:, 0].tolist() == [0] * 4  # all decided alike: no credit for the decision


def test_the_decision_is_the_call_or_the_first_token():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    tool = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    parts = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    assert estimators.per_token(parts, mask, tool).tolist() == [[3, 3, 4, 4, 4, 4], [5, 6, 6, 6, 6, 6]]
    assert estimators.per_token(parts, mask, None)[0].tolist() == [3, 4, 4, 4, 4, 4]


def test_training_credits_turns_and_measures_held_out_rows(world, tmp_path, monkeypatch):
    params, seen = settings(**{"grpo.advantage": "turn", "grpo.max_completion_length": 48}), []
    plain = estimators.per_token
    monkeypatch.setattr(estimators, "per_token", lambda *args: seen.append(plain(*args)) or seen[-1])
    done = estimators.train_sampled(params, world.rows, world.policy, tmp_path, world.rows)
    log = read_records(done.log)
    assert [one["step"] for one in log if "reward" in one] == [1, 2, 3]
    held = [one for one in log if "held_out_reward" in one]
    assert [one["step"] for one in held] == [0, 1, 2, 3] and all(0 <= one["held_out_rtr"] <= 1.3 for one in held)
    assert all(one.dim() == 2 for one in seen) and len(seen) >= 3


@pytest.mark.parametrize("advantage", ["group_std", "group"])
def test_advantages_with_and_without_the_standard_deviation(world, tmp_path, advantage):
    params = settings(**{"grpo.advantage": advantage})
    trainer = trainer_for(world, tmp_path, params, lambda rollouts, context: [4.0, 0.0])
    found = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 2)["advantages"]
    scale = 8**0.5 + 1e-4 if advantage == "group_std" else 1.0
    assert found.tolist() == pytest.approx([2 / scale, -2 / scale])


def test_prompt_rows_are_fresh_and_balanced(tiny):
    rows = tiny.rows([(56, 56)], [["top"], [], [], [], ["top"], [], [], ["top"]])
    assert estimators.prompt_rows(rows, settings())["id"][:] == rows["id"][:]
    fresh = settings(**{"grpo.fresh": True, "sft.share": 0.5})
    assert estimators.prompt_rows(rows, fresh)["id"][:] == ["r4", "r5", "r6", "r7"]
    both = estimators.prompt_rows(rows, settings(**{"grpo.fresh": True, "grpo.balanced": True, "sft.share": 0.25}))
    assert both["id"][:] == ["r2", "r3", "r4", "r7"]
    with pytest.raises(AwaresError, match="leaves no row.*sft.share"):
        estimators.prompt_rows(rows, settings(**{"grpo.fresh": True, "sft.share": 1.0}))


def test_the_first_token_is_that_of_the_engine(world):
    params, processor = settings(), load_processor(world.policy)
    batch = exact.FirstTurns(params, processor)([{**row, "direct": 1.0, "called": 3.0} for row in world.rows])
    trainer = object.__new__(exact.DecisionTrainer)
    trainer.decide(processor, params)
    assert batch.pop("gain").tolist() == [2.0] * 6 and batch.pop("direct").tolist() == [1.0] * 6
    with torch.no_grad():
        found = trainer.first_token(load_model(world.policy), batch)
    own = [one.call_logprob for one in world.plays[False]]
    assert found[:, trainer.call].tolist() == pytest.approx(own, abs=1e-4)


def test_the_gradient_is_that_of_the_expected_reward(world):
    trainer = object.__new__(exact.DecisionTrainer)
    trainer.decide(load_processor(world.policy), settings(**{"grpo.beta": 0.0}))
    logits = torch.randn(3, trainer.call + 9, requires_grad=True)
    model = lambda **inputs: SimpleNamespace(logits=logits[:, None])  # noqa: E731
    direct, gain = torch.tensor([9.0, 0.0, 5.0]), torch.tensor([-2.0, 9.5, 0.25])
    loss = trainer.compute_loss(model, {"direct": direct, "gain": gain})
    with torch.no_grad():
        masked = logits.index_fill(1, trainer.never, -1e9).softmax(1)
        call = masked[:, trainer.call]
    assert loss.item() == pytest.approx(-(direct + call * gain).mean().item(), abs=1e-5)
    loss.backward()
    assert logits.grad[:, trainer.call].tolist() == pytest.approx((-call * (1 - call) * gain / 3).tolist(), abs=1e-5)


def rate(policy, rows):
    engine = Engine.from_params(load_model(policy), load_processor(policy), settings(), progress=False)
    done = engine.run(rows["image"], rows["question"], row_ids=rows["id"])
    return torch.tensor([one.call_logprob for one in done]).exp().mean().item()


def test_exact_training_follows_the_rewards_and_resumes(world, tmp_path):
    price = {"grpo.alpha_use": 0.0, "grpo.alpha_miss": 9.0, "grpo.lambda_area": 0.0, "grpo.alpha_ans": 0.0}
    params = settings(**price)  # an HR row pays 9 for not calling, an LR row nothing
    hr = world.rows.filter(lambda row: row["label"] == "HR")
    plays = {call: [trajectory(name, "no", ("top",) * call) for name in hr["id"]] for call in (False, True)}
    whole = exact.train_exact(params, hr, plays, world.policy, tmp_path / "whole", world.rows)
    assert rate(whole.merged, hr) > rate(world.policy, hr) + 1e-4
    log = read_records(whole.log)
    assert [one["step"] for one in log if "reward" in one] == [1, 2, 3] and {"call_rate", "kl"} <= {*log[-1], *log[-2]}
    with killed_at(2):
        exact.train_exact(params, hr, plays, world.policy, tmp_path / "other" / "parts", world.rows)
    parts = exact.train_exact(params, hr, plays, world.policy, tmp_path / "other" / "parts", world.rows)
    name = "adapter_model.safetensors"
    assert (parts.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert [{**one, "seconds": 0} for one in read_records(parts.log)] == [{**one, "seconds": 0} for one in log]
    params = settings(**{"grpo.reward": "visionthink"})  # a reward of groups
    with pytest.raises(AwaresError, match="grpo.estimator exact.*visionthink.*sampled"):
        exact.train_exact(params, world.rows, world.plays, world.policy, tmp_path, world.rows)


def test_the_chosen_bias_has_the_highest_reward(world):
    """Calls pay off on the two rows with the largest gaps only: a bias between the second and the third one's."""
    rows = world.rows.select(range(4))
    gaps = [3.0, 1.2, 0.7, -5.0]
    direct = [replace(trajectory(f"r{i}", "no"), call_gap=gap) for i, gap in enumerate(gaps)]
    called = [trajectory(f"r{i}", f"word {i}" if i < 2 else "no", crops=("top",)) for i in range(4)]
    params = settings(**{"evaluation.dial_biases": [-4.0, -2.0, -1.0, 0.0, 2.0], "grpo.alpha_miss": 0.0})
    assert exact.best_bias(params, rows, {False: direct, True: called}) == -1.0


def test_a_variant_is_evaluated_with_its_own_bias(tmp_path):
    params = replace(settings(**{"grpo.choose_bias": True}), root=tmp_path, changed=frozenset({"grpo"}))
    with pytest.raises(AwaresError, match="dvc repro grpo"):
        comparison.call_bias(params)
    params.run_dir("grpo").mkdir(parents=True)
    (params.run_dir("grpo") / "metrics.json").write_text('{"call_bias": -0.5}')
    assert comparison.call_bias(params) == -0.5 and comparison.call_bias(settings()) == 0.0


def test_answers_after_a_call_can_be_those_of_the_base_model(tiny, tmp_path):
    from awares.method import sft

    rows = tiny.rows([(56, 56)], [["top"], []]).add_column("high_answer", ["seen", "other"])
    save_rows(rows, tmp_path / "rows")
    hr, lr = load_rows(tmp_path / "rows")
    last = lambda row, kind, answers: sft.conversation(row, kind, None, answers=answers)[-1]["content"]  # noqa: E731
    written = [last(hr, "trajectory", "full"), last(hr, "trajectory", "accepted"), last(lr, "direct", "full")]
    assert [one[0]["text"] if isinstance(one, list) else one for one in written] == ["seen", "word 0", "word 1"]
