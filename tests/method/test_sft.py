"""SFT: the loss is Eq. 4, samples are the curated trajectories, a training resumes from its own checkpoints alone."""

import shutil
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import overriding
from safetensors.torch import load_file

from awares.engine.model import load_model, load_processor
from awares.errors import AwaresError
from awares.method import crops, protocol, sft
from awares.training import checkpoints as training

SECTION = {"share": 1.0, "epochs": 1.0, "batch_size": 4, "per_device_batch_size": 2, "checkpoints": 3}
SECTION |= {"selection_rows": 1, "learning_rate": 1.0e-2, "warmup_ratio": 0.0}
SMALL = {"threads": 1, "protocol.max_new_tokens": 12, **{f"sft.{key}": value for key, value in SECTION.items()}}
CROPS_OF = {1: ["top-left", "bottom-right"], 4: ["bottom"], 7: ["right", "top-left"]}
settings = overriding(SMALL)


@pytest.fixture(scope="module")
def world(tiny, saved) -> SimpleNamespace:
    """A base model on disk and twelve curated rows, three of them HR."""
    crops_of = [CROPS_OF.get(i, []) for i in range(12)]
    rows = tiny.rows([(224, 168), (168, 224), (280, 224)], crops_of, ["other"])
    return SimpleNamespace(base=saved, rows=rows, processor=load_processor(saved))


def trainer_for(world, params, folder, samples=None):
    model = load_model(world.base)
    samples = sft.plan_samples(world.rows, world.processor, params) if samples is None else samples
    return sft.build_sft_trainer(params, world.rows, samples, model, world.processor, folder)


def collate(trainer, count):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


def find(ids: list[int], part: list[int]) -> range:
    """Where ``part`` stands in ``ids``, once."""
    starts = [i for i in range(len(ids)) if ids[i : i + len(part)] == part]
    assert len(starts) == 1
    return range(starts[0], starts[0] + len(part))


def weights_by_hand(world, ids, row, tool_weight, kinds=("answer", "call")) -> dict[int, float]:
    """Position -> w_t, from the text that the assistant writes, found in the ids."""
    encode = lambda text: world.processor.tokenizer(text)["input_ids"]  # noqa: E731
    start, weights = encode("<|im_start|>assistant\n"), dict[int, float]()
    written = [(row["answers"][0], 1.0)] if "answer" in kinds else []
    if row["label"] == "HR" and "call" in kinds:
        written.append((protocol.OURS.render_call(row["target_crops"]), tool_weight))
    for text, weight in written:
        span = find(ids, start + encode(text + "<|im_end|>"))
        weights |= dict.fromkeys(span[len(start) :], weight)
    return weights


def test_loss_is_the_weighted_cross_entropy_of_the_assistant_tokens(world, tmp_path):
    """Eq. 4 by hand, the call with weight 5."""
    samples = [sft.Sample(1, "trajectory", 0), sft.Sample(0, "direct", 0), sft.Sample(7, "trajectory", 0)]
    trainer = trainer_for(world, settings(**{"sft.tool_turn_weight": 5.0}), tmp_path, samples)
    batch = collate(trainer, 3)
    with torch.no_grad():
        fed = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
        logits = trainer.model(**fed).logits
    total, count = 0.0, 0
    for index, sample in enumerate(samples):
        ids = batch["input_ids"][index].tolist()
        for position, weight in weights_by_hand(world, ids, world.rows[sample.row], 5.0).items():
            total -= weight * torch.log_softmax(logits[index, position - 1], -1)[ids[position]].item()
            count += 1
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(total / count, rel=1e-5)
    pictures = []
    for row in (1, 0, 7):
        image = world.rows[row]["image"]
        pictures += [crops.low_resolution(image), *(crops.cut(image, name) for name in CROPS_OF.get(row, []))]
    pixels = world.processor.image_processor(images=pictures, return_tensors="pt")
    assert all(torch.equal(batch[key], pixels[key]) for key in ("image_grid_thw", "pixel_values"))


@pytest.mark.parametrize("kind, weight", [("answer", 1.0), ("call", 3.0)])
def test_a_turn_level_sample_trains_on_its_own_turn_only(world, tmp_path, kind, weight):
    params = settings(**{"sft.level": "turn", "sft.tool_turn_weight": 3.0})
    batch = collate(trainer_for(world, params, tmp_path, [sft.Sample(1, kind, 0)]), 1)
    by_hand = weights_by_hand(world, batch["input_ids"][0].tolist(), world.rows[1], 3.0, (kind,))
    assert {at: value for at, value in enumerate(batch["loss_weights"][0].tolist()) if value} == by_hand
    assert {*by_hand.values()} == {weight} and torch.equal(batch["labels"] != -100, batch["loss_weights"] > 0)


def test_the_plan_follows_the_parameters(world, tmp_path):
    def kinds(**overrides):
        samples = sft.plan_samples(world.rows, world.processor, settings(**overrides))
        return samples, [sample.kind for sample in samples]

    samples, names = kinds(**{"sft.epochs": 2.0})
    assert sorted(sample.row for sample in samples) == sorted([*range(12)] * 2)
    assert names.count("trajectory") == 6 and names.count("direct") == 18
    lengths = [[sample.length for sample in samples[start : start + 4]] for start in range(0, 24, 4)]
    assert lengths == [sorted(batch) for batch in lengths]
    assert kinds(**{"sft.hr_upsample": 3})[1].count("trajectory") == 9
    phased = kinds(**{"sft.phased": True, "sft.batch_size": 3, "sft.per_device_batch_size": 1})[1]
    assert phased[:3] == ["call"] * 3 and "call" not in phased[3:] and len(phased) == 15
    assert kinds()[0] == kinds()[0] != kinds(seed=2)[0]
    samples, names = kinds(**{"sft.level": "turn"})
    assert sorted(names) == ["answer"] * 3 + ["call"] * 3 + ["direct"] * 9
    trainer = trainer_for(world, settings(**{"sft.level": "turn"}), tmp_path, samples)
    collated = [trainer.data_collator([trainer.train_dataset[i]])["input_ids"].shape[1] for i in range(len(samples))]
    assert collated == [sample.length for sample in samples]


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (("label", "maybe"), {}, "row r1: label 'maybe'"),
        (("target_crops", []), {}, "row r1.*target_crops"),
        (None, {"sft.max_length": 9}, "row r.*sft.max_length 9"),
        (None, {"protocol.max_new_tokens": 5}, "row r1: the call.*protocol.max_new_tokens"),  # always cut off
        (None, {"sft.gradient_checkpointing": True}, "sft.share_computation"),
    ],
)
def test_bad_rows_and_settings_are_named(world, tmp_path, change, overrides, message):
    rows = world.rows
    if change:
        values = [change[1] if index == 1 else old for index, old in enumerate(rows[change[0]])]
        rows = rows.remove_columns(change[0]).add_column(change[0], values)
    with pytest.raises(AwaresError, match=message):
        samples = sft.plan_samples(rows, world.processor, settings(**overrides))
        trainer_for(world, settings(**overrides), tmp_path, samples)


def run(world, out, **overrides):
    return sft.train_sft(settings(**overrides), world.rows, world.rows.select(range(2)), world.base, out)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> training.TrainedPolicy:
    """A training of three updates without an interruption; its checkpoints are in ``../../.checkpoints``."""
    return run(world, tmp_path_factory.mktemp("finished") / "main-s1")


def checkpoints_of(result, tmp_path):
    """A copy of the checkpoint folder of ``result``."""
    (folder,) = (result.adapter.parents[1] / ".checkpoints").iterdir()
    return shutil.copytree(folder, tmp_path / ".checkpoints" / folder.name)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@contextmanager
def killed_at(step):
    """The training in this block ends with its update ``step``, before the checkpoint is written."""
    original = training.Log.on_log

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with mock.patch.object(training.Log, "on_log", stop), pytest.raises(KeyboardInterrupt):
        yield


def test_an_interrupted_training_goes_on_and_ends_the_same(world, finished, tmp_path, monkeypatch):
    steps, step = [], sft.WeightedSFTTrainer.training_step
    with killed_at(3):
        run(world, tmp_path / "main-s1")
    assert not (tmp_path / "main-s1" / "merged").exists()
    monkeypatch.setattr(sft.WeightedSFTTrainer, "training_step", lambda *given: (steps.append(1), step(*given))[1])
    resumed = run(world, tmp_path / "main-s1")
    assert len(steps) == 2  # the micro-batches of the third update
    shutil.rmtree(tmp_path / "main-s1")  # DVC has emptied the stage's output; the checkpoints are still there
    again = run(world, tmp_path / "main-s1")
    assert len(steps) == 2 and resumed.step == again.step == finished.step
    assert finished.log.read_text() == again.log.read_text()
    assert all(torch.equal(value, weights(again.adapter)[name]) for name, value in weights(finished.adapter).items())


def test_the_latest_checkpoint_that_is_not_worse_than_the_best_is_chosen_and_saved(world, tmp_path, monkeypatch):
    for best, scores in {3: [0.9, 0.92, 0.93], 2: [0.93, 0.92, 0.85], 1: [0.9, 0.7, 0.8]}.items():
        candidates = [{"step": at, "validation_accuracy": mark} for at, mark in enumerate(scores, 1)]
        assert sft.choose(candidates, 300)["step"] == best
    marks = {1: 0.9, 2: 0.9, 3: 0.0}

    def score(checkpoint, *others):
        step = training.step_of(checkpoint)
        return {"step": step, "validation_accuracy": marks[step], "call_rate": 0.0}

    monkeypatch.setattr(sft, "candidate_score", score)
    result = run(world, tmp_path / "main-s1")
    (folder,) = (tmp_path / ".checkpoints").iterdir()
    assert (result.step, result.accuracy) == (2, 0.9)
    for name, value in weights(folder / "checkpoint-2").items():
        assert torch.equal(value, weights(result.adapter)[name])
    assert not torch.equal(weights(folder / "checkpoint-1")[name], value)
