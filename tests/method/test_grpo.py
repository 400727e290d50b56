"""Multi-turn GRPO: what is masked, the loss, the reward's terms, sharing of prompts, resuming."""

from types import SimpleNamespace

import pytest
import torch
from conftest import overriding
from test_sft import killed_at, weights
from trl import GRPOTrainer

from awares.engine.chat_format import END_OF_TURN
from awares.engine.jsonl import read_records
from awares.engine.model import load_model, load_processor
from awares.errors import AwaresError
from awares.method import crops, grpo, protocol, rewards, sft
from awares.method.metrics import anls
from awares.method.rollout import Engine
from awares.study import rollouts as study_rollouts
from awares.training import checkpoints as training

SECTION = {"answer_reward": "anls", "batch_size": 8, "per_device_batch_size": 4, "generations": 4, "max_steps": 3}
SECTION |= {"save_steps": 1, "max_completion_length": 48, "learning_rate": 1.0e-2, "scheduler": "constant"}
SMALL = {"threads": 1, **{f"grpo.{key}": value for key, value in SECTION.items()}}
CALL = ("bottom-right", "top-left")
ANSWERS = ["word 3", "word 4", "none", "word 3", "later", "word 4", "word", "word 3"]
WHOLE = {"crops.offered": ["all"], "grpo.reward": "visionthink", "grpo.answer_reward": "judge", "grpo.alpha_ans": 1.0}
FREE = {"crops.offered": ["box"], "crops.region_budget": 0.25, "grpo.reward": "ergo"}
FREE |= {"grpo.answer_reward": "judge", "grpo.alpha_ans": 1.0}
TORN = '<tool_call>\n{"name": "crop", "argu'
TOOL = {"role": "tool", "name": "crop", "content": [{"type": "image", "image": None}]}
settings = overriding(SMALL)


@pytest.fixture(scope="module")
def world(tiny, saved) -> SimpleNamespace:
    """An SFT policy on disk and six curated rows, every second one HR."""
    rows = tiny.rows([(224, 168), (168, 280)], [[], ["top"]] * 3)
    return SimpleNamespace(policy=saved, rows=rows, processor=load_processor(saved))


def trainer_for(world, folder, params=None, reward=None):
    model, processor = load_model(world.policy), load_processor(world.policy)
    trainer = grpo.build_grpo_trainer(params or settings(), world.rows, model, processor, folder, reward)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def disturb(trainer) -> None:
    """Move the policy away from the reference: LoRA's second half starts at zero."""
    torch.manual_seed(5)
    for name, weight in sorted(trainer.model.named_parameters()):
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.3)


def write(trainer, call=CALL, callers=(1, 4), first=0):
    """Fix what the policy writes: the ``callers`` call in turn 1 and answer in turn 2, the others answer at once.

    ``first``: the place of this process's first completion.
    """
    own = []
    encode = lambda text: trainer.processing_class.tokenizer(text + END_OF_TURN)["input_ids"]  # noqa: E731
    called = call if isinstance(call, str) else protocol.OURS.render_call(call)

    def turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if num_generations == 1:
            return [encode(ANSWERS[i]) for i in own if i in callers], None
        own[:] = range(first, first + len(prompt_ids))
        return [encode(called if i in callers else ANSWERS[i]) for i in own], None

    trainer._generate_single_turn = turn


def rollouts(trainer):
    """Rows 2 and 3 of the data, four completions each, scored."""
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (2, 2, 2, 2, 3, 3, 3, 3)])


@pytest.fixture
def play(world, tmp_path):
    """``play(params, reward, call)``: a disturbed trainer, and the batch of its eight rollouts."""

    def run(params=None, reward=None, call=CALL):
        trainer = trainer_for(world, tmp_path, params, reward)
        disturb(trainer)
        write(trainer, call)
        return trainer, rollouts(trainer)

    return run


def conversations(world):
    """The same eight rollouts as whole conversations, written by `protocol`."""
    for index, answer in enumerate(ANSWERS):
        row = world.rows[2 if index < 4 else 3]
        names = CALL if index in (1, 4) else ()
        pictures = [crops.cut(row["image"], name) for name in names]
        yield protocol.messages(row["question"], crops.low_resolution(row["image"]), names, pictures, answer)


def plain_log_probs(world, batch):
    """log pi_ref of every completion token, (B, C): a fresh load of the policy, an ordinary pass, plain softmax."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    width = batch["completion_ids"].size(1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    images = {key: batch[key] for key in ("mm_token_type_ids", "pixel_values", "image_grid_thw")}
    with torch.no_grad():
        logits = load_model(world.policy)(input_ids=ids, attention_mask=mask, **images).logits
    scores = torch.log_softmax(logits[:, -width - 1 : -1], -1)
    return scores.gather(2, batch["completion_ids"][..., None])[..., 0] * batch["completion_mask"]


def test_a_rollout_reads_like_the_conversation_and_only_the_assistant_is_trained(world, play):
    (_, batch), tokenizer = play(), world.processor.tokenizer
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    for index, conversation in enumerate(conversations(world)):
        expected = world.processor.apply_chat_template(conversation, **options)
        real = [batch[f"{part}_ids"][index][batch[f"{part}_mask"][index].bool()] for part in ("prompt", "completion")]
        ids = torch.cat(real)
        assert tokenizer.decode(ids) == tokenizer.decode(expected["input_ids"][0][: len(ids)])
        assert len(expected["input_ids"][0]) == len(ids) + 1  # the line break after the last turn
        trained = batch["tool_mask"][index][: len(real[1])]
        assert torch.equal(trained, expected["assistant_masks"][0][len(real[0]) : len(ids)])
        assert not trained[real[1] == world.processor.image_token_id].any()
    assert batch["num_images"] == [1, 3, 1, 1, 3, 1, 1, 1]
    parts = [part for talk in conversations(world) for turn in talk for part in turn["content"]]
    pictures = [part["image"] for part in parts if "image" in part]
    expected = world.processor.image_processor(images=pictures, return_tensors="pt")
    assert all(torch.equal(batch[key], expected[key]) for key in ("image_grid_thw", "pixel_values"))


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_is_grpo_with_kl_over_assistant_tokens(world, play, share):
    params = settings(**{"grpo.beta": 0.7, "grpo.share_prompts": share})
    trainer, batch = play(params)
    reference = plain_log_probs(world, batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], reference, atol=2e-4, rtol=1e-3)
    with torch.no_grad():
        policy = log_probs(trainer, batch, False)[0]
    # Eq. 5-8 by hand: ANLS of the answer, and the cost of the two calls
    marks = torch.tensor([anls(answer, ["word 2" if i < 4 else "word 3"]) for i, answer in enumerate(ANSWERS)])
    area = params.grpo.alpha_use + params.grpo.lambda_area * 0.5
    cost = torch.tensor([0, area, 0, 0, area, 2.0, 2.0, 2.0])
    groups = (params.grpo.alpha_ans * marks - cost).view(2, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-4, rtol=1e-4)
    mask = batch["completion_mask"] * batch["tool_mask"]
    ratio = reference - policy
    token_loss = -advantages[:, None] + 0.7 * (ratio.exp() - ratio - 1)
    by_hand = ((token_loss * mask).sum(1) / mask.sum(1)).mean()
    assert (0.7 * (ratio.exp() - ratio - 1) * mask).sum() > 0.01
    trainer.share_prompts = share
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(by_hand.item(), rel=2e-3, abs=2e-4)


def log_probs(trainer, batch, share):
    trainer.share_prompts = share
    ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    width = batch["completion_ids"].size(1)
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, compute_entropy=True, **images)


def called(*regions, name="crop", **arguments):
    """A tool call as TRL parses it; ``arguments``: instead of the right ones."""
    return {"type": "function", "function": {"name": name, "arguments": arguments or {"regions": list(regions)}}}


def said(text, calls=None):
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def read(completion, form=protocol.OURS, **row):
    return grpo.read_rollout(completion, form, **{**dict.fromkeys(grpo.ROW), "label": "HR", "answers": ["7"], **row})


@pytest.mark.parametrize(
    "completion, answer, requested, fault",
    [
        ([said(" 12 kg ")], "12 kg", (), ""),
        ([said("", [called("top", "left")]), TOOL, said("7")], "7", ("top", "left"), ""),
        ([said("", [called("upper left")]), TOOL, said("7")], "7", ("top-left",), ""),
        ([said("", [called("top"), called("left")]), TOOL, TOOL, said("7")], "7", ("top", "left"), ""),
        ([said("", [called("nowhere")]), TOOL, said("7")], "7", (), "malformed"),
        ([said("", [called(crops=["top"])]), TOOL, said("7")], "7", (), "malformed"),  # TRL has nothing to run
        ([said("", [called(regions="top")]), TOOL, said("7")], "7", ("top",), ""),
        ([said("", [called("top")])], "", ("top",), "overflow"),  # TRL dropped the crops
        ([said("", [called("top")]), TOOL, said("", [called("left")])], "", ("top",), ""),
        ([said("", [called("top")]), TOOL], "", ("top",), ""),  # nothing left to answer with
        ([said(TORN)], TORN, (), "malformed"),
        ([said("GET_CROPS: ['0']")], "GET_CROPS: ['0']", (), "malformed"),  # readable, but TRL has not run it
        ([said("", [called("top", name="Crop")]), TOOL, said("7")], "7", (), "malformed"),  # TRL has shown an error
    ],
)
def test_a_completion_is_read_as_answer_and_requested_crops(completion, answer, requested, fault):
    rollout = read(completion)
    assert (rollout.answer, rollout.crops) == (answer, requested)
    assert (rollout.malformed, rollout.overflow) == (fault == "malformed", fault == "overflow")


def test_an_overflowing_call_still_costs_and_is_counted(world, play):
    names = ("all", "top", "bottom", "left", "right")
    trainer, batch = play(settings(**{"grpo.crop_token_budget": 90}), call=names)
    assert batch["num_images"] == [1] * 8
    metrics = trainer._metrics["train"]
    assert metrics["overflow"] == metrics["call_rate"] == [0.25] and metrics["area"] == [1.0]
    assert (metrics["call_rate_lr"], metrics["call_rate_hr"], metrics["malformed"]) == ([0.25], [0.25], [0.0])
    assert metrics["terms/tool_cost"] == [pytest.approx((2 * 0.26 + 3 * 2.0) / 8)]


def test_scored_rollouts_have_the_reward_and_advantage_of_training(world, play):
    """Float32 sums as in TRL: the weighted answer less the cost, to the bit."""
    params, kept = settings(), []
    trainer, _ = play(params, lambda played, context: kept.extend(played) or [0.0] * len(played))
    trainer.reward = rewards.awares_reward
    batch, scored = rollouts(trainer), study_rollouts.score_rollouts(params, kept)
    columns = torch.tensor([[one["answer"], one["tool_cost"]] for one in scored])
    plain = (columns * torch.tensor([params.grpo.alpha_ans, -1.0])).nansum(1)
    assert [one["reward"] for one in scored] == plain.tolist()
    assert [one["advantage"] for one in scored] == pytest.approx(batch["advantages"].tolist(), abs=1e-6)
    assert all(one["miss"] + one["use"] + one["area"] == pytest.approx(one["tool_cost"]) for one in scored)
    assert [one["prediction"] for one in scored] == ANSWERS and scored[1]["crops"] == CALL


@pytest.mark.parametrize("margin", [0, 28])
def test_the_tool_returns_the_crops_in_order_or_an_error_message(world, margin):
    form = protocol.from_params(settings(**{"crops.margin": margin}))
    row, environment = {**world.rows[0], "target_crops": ["top", "left"]}, grpo.CropEnvironment(form)
    image = row["image"]
    environment.reset(full_image=image, label="HR", answers=["x"])
    pictures = [crops.cut(image, name, margin=margin) for name in row["target_crops"]]
    two = [picture.tobytes() for picture in pictures]
    learned = sft.conversation(row, "trajectory", image, form)[3]["content"]  # SFT and the engine show the same
    assert [part["image"].tobytes() for part in learned] == two
    played = Engine(load_model(world.policy), world.processor, protocol=form).run([image], ["q"], [("top", "left")])[0]
    assert played.turns[2].images == tuple(picture.size for picture in pictures)
    for regions in (["top", "left"], ["top and left"], ["top", "nowhere", "left"], ["upper", "left", "top"]):
        assert [part["image"].tobytes() for part in environment.crop(regions)] == two
    for bad in (["nowhere"], [], "", [[0, 0, 5, 5]], ["0,0,500,500"], None, {}, [True], 3.0):
        assert environment.crop(bad) == [{"type": "text", "text": protocol.TOOL_ERROR}]


def test_bad_settings_and_inputs_are_refused(world, tmp_path, monkeypatch):
    def build(rows=world.rows, model=None, **changes):
        given = rows, model or load_model(world.policy), world.processor, tmp_path
        return grpo.build_grpo_trainer(settings(**changes), *given)

    with pytest.raises(AwaresError, match="label"):
        build(world.rows.remove_columns("label"))
    with pytest.raises(AwaresError, match="adapter"):
        build(model=build().model)
    with pytest.raises(AwaresError, match="grpo.reward.*module:function"):
        launched = settings(**{"base.launch": "data/launch/2cpu.yaml"})
        grpo.train_grpo(launched, world.rows, world.policy, tmp_path, lambda played, context: [0.0] * len(played))
    with pytest.raises(AwaresError, match="crop_token_budget 20 .*row r1"):
        grpo.check_budget(world.rows, world.processor, settings(**{"grpo.crop_token_budget": 20}))
    grpo.check_budget(world.rows, world.processor, settings(**{"grpo.crop_token_budget": 90}))
    for values in ([1.0], [0.0] * 7 + [float("nan")], None):  # a reward is one finite number for each rollout
        with pytest.raises(AwaresError, match=" 8 rollouts"):
            rewards.RewardContext(settings()).score(lambda *_, values=values: values, [read([said("7")])] * 8)
    monkeypatch.setenv("WORLD_SIZE", "4")  # two completions per process, groups of four
    for fault, changes in (("share_prompts", {}), ("reward visionthink", {**WHOLE, "grpo.share_prompts": False})):
        with pytest.raises(AwaresError, match=f"grpo.{fault}.* 2 completions"):
            build(**changes)


def run(world, out, reward=None, **overrides):
    params = settings(**{"grpo.max_completion_length": 6, **overrides})
    return grpo.train_grpo(params, world.rows, world.policy, out, reward)


def early_words(played, context):
    """A reward of a notebook cell: letters from the first half of the alphabet."""
    early = [sum(letter < "n" for letter in one.text) for one in played]
    context.log(early=early)
    return [letters - 5.0 * len(one.crops) for letters, one in zip(early, played, strict=True)]


def test_an_interrupted_training_goes_on_and_ends_the_same(world, tmp_path, monkeypatch):
    """Two updates: it ends in the middle of an epoch."""

    def train(name, reward=None, steps=2):
        return run(world, tmp_path / name / "main-s1", reward, **{"grpo.max_steps": steps})

    whole, generated, generate = train("whole"), [], GRPOTrainer._generate
    with killed_at(2):
        train("parts")
    (folder,) = (tmp_path / "parts" / ".checkpoints").iterdir()
    assert [training.step_of(path) for path in training.checkpoints(folder)] == [1]
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda *given: (generated.append(1), generate(*given))[1])
    for _ in range(2):
        done = train("parts")
        assert len(generated) == 1 and done.step == 2  # the second update is repeated, and only once
        assert done.log.read_text() == whole.log.read_text()
        done.log.unlink()
    assert all(torch.equal(value, weights(done.adapter)[name]) for name, value in weights(whole.adapter).items())
    other = train("parts", early_words, steps=1)
    assert len(generated) == 2 and other.step == 1  # another reward is another input: from the start
    (entry,) = read_records(other.log)
    assert entry["reward"] == pytest.approx(entry["early"]) and "tool_cost" not in entry
    entries = read_records(whole.log)
    assert [entry["step"] for entry in entries] == [1, 2] and {"call_rate", "entropy", "lr"} <= set(entries[0])
    assert entries[0]["kl"] == pytest.approx(0.0, abs=1e-6) and entries[1]["kl"] > 1e-6
    for entry in entries:
        assert entry["reward"] == pytest.approx(10 * entry["answer"] - entry["tool_cost"], abs=1e-5)


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
