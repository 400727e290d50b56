"""Shared prompts sample what TRL samples; test_bases compares log-probabilities and gradients."""
# ruff: noqa: F811 (a fixture of test_grpo)

import pytest
import torch
from test_grpo import disturb, settings, trainer_for, world  # noqa: F401
from trl import GRPOTrainer

from awares.errors import AwaresError
from awares.training.prompt_sharing import expanded_once


def test_shared_prefill_samples_the_tokens_of_trl(world, tmp_path):
    trainer = trainer_for(world, tmp_path, settings(**{"grpo.max_completion_length": 12}))
    disturb(trainer)
    trainer._batch_environments = [None] * 8
    prompts = [trainer.train_dataset[i]["prompt"] for i in (2, 2, 2, 2, 3, 3, 3, 3)]
    ids, images, fields = trainer._tokenize_prompts(prompts)
    sampled = {}
    for share in (True, False):
        trainer.share_prompts = share
        torch.manual_seed(3)
        sampled[share], _ = trainer._generate_single_turn(ids, images, dict(fields), 4)
    assert sampled[True] == sampled[False]
    assert len({tuple(row) for row in sampled[True]}) > 4


def test_a_resumed_run_goes_on_in_the_order_of_its_own_epoch(world, tmp_path):
    plain = GRPOTrainer._get_train_sampler(trainer_for(world, tmp_path / "plain"))
    orders = [list(plain) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for epoch, order in ((0.0, 0), (None, 0), (1.0, 1), (1.37, 1), (2.0 - 1e-9, 2)):
        trainer = trainer_for(world, tmp_path / str(epoch))  # another process
        trainer.state.epoch = epoch
        sampler = trainer._get_train_sampler()
        assert list(sampler) == orders[order] and len(sampler) == len(plain)


def test_vllm_gets_one_placeholder_for_each_image_and_must_read_our_prompts():
    ours, given = [[1, 9, 9, 9, 2, 9, 3], [9, 9, 4, 9, 9], [5]], []

    def generate(prompts, images, read):
        given.append(prompts)
        return read, "completions", "log-probabilities", None

    assert expanded_once(generate, 9, ours, None, read=ours) == (ours, "completions", "log-probabilities", None)
    assert given == [[[1, 9, 2, 9, 3], [9, 4, 9], [5]]]
    with pytest.raises(AwaresError, match="grpo.rollouts vllm: .*7 tokens.* of 5"):
        expanded_once(generate, 9, ours, None, read=given[0])
