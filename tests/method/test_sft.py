"""SFT: the loss is Eq. 4, samples are the curated trajectories, a training resumes from its own checkpoints alone."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from awares.config import load_params
from awares.engine import keys as work_keys
from awares.engine.jsonl import exclusive_lock, read_records
from awares.engine.model import load_model, load_processor, save_model
from awares.engine.rows import FEATURES
from awares.errors import AwaresError
from awares.method import crops, protocol, sft
from awares.training import checkpoints as training
from awares.training.prompt_sharing import without_prefix

ROOT = Path(__file__).parents[2]
SMALL = {
    "threads": 1,
    "sft.share": 1.0,
    "sft.epochs": 1.0,
    "sft.batch_size": 4,
    "sft.per_device_batch_size": 2,
    "sft.checkpoints": 3,
    "sft.selection_rows": 1,
    "sft.learning_rate": 1.0e-2,
    "sft.warmup_ratio": 0.0,
    "protocol.max_new_tokens": 12,
}
PACKAGES = ("engine", "method", "training")
MIXED = [(0, "direct"), (1, "trajectory"), (4, "trajectory"), (5, "direct")]
CROPS_OF = {1: ["top-left", "bottom-right"], 4: ["bottom"], 7: ["right", "top-left"]}


def settings(**overrides):
    return load_params(path=ROOT / "params.yaml", overrides={**SMALL, **overrides})


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> SimpleNamespace:
    """A base model on disk and twelve curated rows, three of them HR."""
    base = tmp_path_factory.mktemp("base") / "base"
    save_model(tiny.model, tiny.processor, base)
    crops_of = [CROPS_OF.get(i, []) for i in range(12)]
    rows = tiny.rows([(224, 168), (168, 224), (280, 224)], crops_of, ["other"])
    return SimpleNamespace(base=base, rows=rows, processor=load_processor(base))


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


def weights_by_hand(world, ids: list[int], row: dict, tool_weight: float) -> dict[int, float]:
    """Position -> w_t, from the text that the assistant writes, found in the ids."""
    encode = lambda text: world.processor.tokenizer(text)["input_ids"]  # noqa: E731
    start = encode("<|im_start|>assistant\n")
    written = {row["answers"][0]: 1.0}
    if row["label"] == "HR":
        written[protocol.OURS.render_call(row["target_crops"])] = tool_weight
    weights: dict[int, float] = {}
    for text, weight in written.items():
        body = encode(text + "<|im_end|>")
        span = find(ids, start + body)
        weights |= {position: weight for position in span[len(start) :]}
    return weights


def test_loss_is_the_weighted_cross_entropy_of_the_assistant_tokens(world, tmp_path):
    params = settings(**{"sft.tool_turn_weight": 5.0})
    samples = [sft.Sample(1, "trajectory", 0), sft.Sample(0, "direct", 0), sft.Sample(7, "trajectory", 0)]
    trainer = trainer_for(world, params, tmp_path, samples)
    batch = collate(trainer, 3)
    with torch.no_grad():
        logits = trainer.model(
            **{key: value for key, value in batch.items() if key not in ("labels", "loss_weights")}
        ).logits
    total, count = 0.0, 0
    for index, sample in enumerate(samples):
        ids = batch["input_ids"][index].tolist()
        for position, weight in weights_by_hand(world, ids, world.rows[sample.row], 5.0).items():
            total -= weight * torch.log_softmax(logits[index, position - 1], -1)[ids[position]].item()
            count += 1
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind, expected", [("answer", (0.0, 1.0)), ("call", (3.0,))])
def test_a_turn_level_sample_trains_on_its_own_turn_only(world, tmp_path, kind, expected):
    params = settings(**{"sft.level": "turn", "sft.tool_turn_weight": 3.0})
    trainer = trainer_for(world, params, tmp_path, [sft.Sample(1, kind, 0)])
    batch = collate(trainer, 1)
    ids = batch["input_ids"][0].tolist()
    call = world.processor.tokenizer(protocol.OURS.render_call(CROPS_OF[1]) + "<|im_end|>")["input_ids"]
    trained = set(batch["loss_weights"][0].nonzero().flatten().tolist())
    assert trained == set((batch["labels"][0] != -100).nonzero().flatten().tolist())
    assert trained.isdisjoint(find(ids, call)) == (expected[0] == 0.0)
    assert set(batch["loss_weights"][0].unique().tolist()) == {0.0, expected[-1]}


def test_crops_of_the_second_turn_stand_in_the_order_of_the_call(world, tmp_path):
    trainer = trainer_for(world, settings(), tmp_path, [sft.Sample(7, "trajectory", 0)])
    batch, image = collate(trainer, 1), world.rows[7]["image"]
    expected = [crops.low_resolution(image), *(crops.cut(image, name) for name in ("right", "top-left"))]
    pixels = world.processor.image_processor(images=expected, return_tensors="pt")
    assert torch.equal(batch["image_grid_thw"], pixels["image_grid_thw"])
    assert torch.equal(batch["pixel_values"], pixels["pixel_values"])
    text = world.processor.tokenizer.decode(batch["input_ids"][0])
    assert text.index('"right", "top-left"') < text.index("<tool_response>\n<|vision_start|>")


def test_checkpointing_keeps_gradients_out_of_the_vision_tower(world, tmp_path):
    params = settings(**{"sft.gradient_checkpointing": True, "sft.share_computation": False})
    trainer = trainer_for(world, params, tmp_path, [sft.Sample(1, "trajectory", 0)])
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    base = trainer.model.get_base_model()
    seen = base.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    features = seen.pooler_output if hasattr(seen, "pooler_output") else seen
    assert not any(part.requires_grad for part in (features if isinstance(features, tuple) else [features]))
    assert base.get_input_embeddings()(batch["input_ids"]).requires_grad


def test_a_second_process_may_not_train_in_the_same_folder(world, tmp_path):
    trainer = trainer_for(world, settings(), tmp_path, [sft.Sample(1, "trajectory", 0)])
    with exclusive_lock(tmp_path / "training"), pytest.raises(AwaresError, match="another process is writing it"):
        training.train(trainer, tmp_path, training.Log(tmp_path / "log.jsonl", sft._log_entry, "loss"))


def test_micro_batches_do_not_change_the_update(world, tmp_path):
    adapters = []
    for size in (4, 1):
        params = settings(**{"sft.per_device_batch_size": size})
        trainer = trainer_for(
            world, params, tmp_path / str(size), sft.plan_samples(world.rows, world.processor, params)[:4]
        )
        trainer.train()
        adapters.append(
            {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
        )
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], atol=1e-5, rtol=1e-3)


def test_a_shared_prefix_gives_the_loss_and_the_gradients_of_whole_samples(world, tmp_path):
    found = {}
    for share in (True, False):
        params = settings(**{"sft.share_computation": share})
        trainer = trainer_for(world, params, tmp_path / str(share), [sft.Sample(i, kind, 0) for i, kind in MIXED])
        torch.manual_seed(3)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:  # it starts at zero, where half of the gradients would be zero
                weight.data.normal_(0.0, 0.3)
        batch = collate(trainer, len(MIXED))
        rest = without_prefix(trainer.model.get_base_model(), batch)
        assert batch["input_ids"].shape[1] - rest["input_ids"].shape[1] == rest["past_key_values"].get_seq_length() > 50
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[share] = loss.item(), {n: w.grad for n, w in trainer.model.named_parameters() if w.requires_grad}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, gradient in found[False][1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[True][1][name], gradient, atol=1e-5, rtol=1e-3)


def test_a_picture_passes_through_the_vision_tower_once_in_all_epochs(world, tmp_path, monkeypatch):
    passed, build = [], sft.build_sft_trainer

    def watched(*given):
        trainer = build(*given)
        eye = trainer.model.get_base_model().model.visual.patch_embed
        eye.register_forward_hook(lambda _module, inputs, _output: passed[-1].append(len(inputs[0])))
        return trainer

    monkeypatch.setattr(sft, "build_sft_trainer", watched)
    for epochs in (1.0, 2.0):
        passed.append([])
        params = settings(**{"sft.epochs": epochs, "sft.share_computation": True})
        folder, samples = tmp_path / str(epochs), sft.plan_samples(world.rows, world.processor, params)
        folder.mkdir()
        sft.fit_sft(params, world.rows, world.base, folder, folder / "log.jsonl", samples)
    assert sum(passed[0]) == sum(passed[1]) > 0


def test_a_shared_prefix_does_not_go_with_checkpointing(world, tmp_path):
    with pytest.raises(AwaresError, match=r"sft\.share_computation"):
        trainer_for(world, settings(**{"sft.gradient_checkpointing": True}), tmp_path)


def test_planned_length_is_the_length_of_the_collated_sample(world, tmp_path):
    params = settings(**{"sft.level": "turn"})
    samples = sft.plan_samples(world.rows, world.processor, params)
    trainer = trainer_for(world, params, tmp_path, samples)
    lengths = [trainer.data_collator([trainer.train_dataset[i]])["input_ids"].shape[1] for i in range(len(samples))]
    assert lengths == [sample.length for sample in samples]


def test_plan_follows_the_knobs(world):
    def kinds(**overrides):
        samples = sft.plan_samples(world.rows, world.processor, settings(**overrides))
        return samples, [sample.kind for sample in samples]

    samples, names = kinds(**{"sft.epochs": 2.0})
    assert sorted(sample.row for sample in samples) == sorted([*range(12)] * 2)
    assert names.count("trajectory") == 6 and names.count("direct") == 18
    assert all(
        a.length <= b.length
        for i in range(0, 24, 4)
        for a, b in zip(samples[i : i + 4], samples[i + 1 : i + 4], strict=False)
    )
    assert kinds(**{"sft.hr_upsample": 3})[1].count("trajectory") == 9
    assert sorted(kinds(**{"sft.level": "turn"})[1]) == ["answer"] * 3 + ["call"] * 3 + ["direct"] * 9
    phased = kinds(**{"sft.phased": True, "sft.batch_size": 3, "sft.per_device_batch_size": 1})[1]
    assert phased[:3] == ["call"] * 3 and "call" not in phased[3:] and len(phased) == 15
    assert kinds()[0] == kinds()[0] != kinds(seed=2)[0]


@pytest.mark.parametrize(
    "change, overrides, message",
    [
        (("label", "maybe"), {}, "row r1: label 'maybe'"),
        (("target_crops", []), {}, "row r1.*target_crops"),
        (None, {"sft.max_length": 9}, "row r.*sft.max_length 9"),
        (None, {"protocol.max_new_tokens": 5}, "row r1: the call.*protocol.max_new_tokens"),  # always cut off
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(world, change, overrides, message):
    rows = world.rows
    if change:
        column, value = change
        values = [value if index == 1 else old for index, old in enumerate(rows[column])]
        rows = rows.remove_columns(column).add_column(column, values)
    with pytest.raises(AwaresError, match=message):
        sft.plan_samples(rows, world.processor, settings(**overrides))


def run(world, out, **overrides):
    return sft.train_sft(settings(**overrides), world.rows, world.rows.select(range(2)), world.base, out)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> training.TrainedPolicy:
    """A training of three updates that nothing has disturbed; its checkpoints stand two folders above ``adapter``."""
    return run(world, tmp_path_factory.mktemp("finished") / "main-s1")


def checkpoints_of(result, tmp_path):
    """A copy of the checkpoint folder of ``result``."""
    (folder,) = (result.adapter.parents[1] / ".checkpoints").iterdir()
    return shutil.copytree(folder, tmp_path / ".checkpoints" / folder.name)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def interrupt(monkeypatch, at: int) -> None:
    """Stop the next training at step ``at``, before its checkpoint is written."""
    original = training.Log.on_log

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Log, "on_log", stop)


def test_an_interrupted_training_goes_on_and_ends_the_same(world, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, at=3)
        run(world, tmp_path / "parts" / "main-s1")
    assert not (tmp_path / "parts" / "main-s1" / "merged").exists()
    steps, step = [], sft.WeightedSFTTrainer.training_step
    monkeypatch.setattr(sft.WeightedSFTTrainer, "training_step", lambda *given: (steps.append(1), step(*given))[1])
    resumed = run(world, tmp_path / "parts" / "main-s1")
    assert len(steps) == 2  # the micro-batches of the third update
    assert finished.log.read_text() == resumed.log.read_text()
    assert resumed.step == finished.step
    for name, value in weights(finished.adapter).items():
        assert torch.equal(value, weights(resumed.adapter)[name])


def test_a_finished_training_is_saved_again_without_training(world, finished, tmp_path, monkeypatch):
    checkpoints_of(finished, tmp_path)  # DVC has emptied the stage's output, the checkpoints are still there
    monkeypatch.setattr(sft.WeightedSFTTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    again = run(world, tmp_path / "main-s1")
    assert again.log.read_text() == finished.log.read_text()
    assert all(torch.equal(value, weights(again.adapter)[name]) for name, value in weights(finished.adapter).items())


def test_checkpoints_of_other_inputs_are_never_used(world, finished, tmp_path):
    kept = checkpoints_of(finished, tmp_path)
    result = run(world, tmp_path / "main-s1", **{"sft.learning_rate": 5.0e-3})
    assert not torch.equal(*(next(iter(weights(one.adapter).values())) for one in (result, finished)))
    (other,) = {*(tmp_path / ".checkpoints").iterdir()} - {kept}
    shutil.rmtree(other)
    kept.rename(other)  # someone mixes up the folders
    with pytest.raises(AwaresError, match="checkpoints of other inputs"):
        run(world, tmp_path / "main-s1", **{"sft.learning_rate": 5.0e-3})


def test_every_input_is_part_of_the_key(world, tmp_path):
    params, rows = settings(), world.rows

    def key(params=params, rows=rows, base=world.base):
        return training.describe_inputs("sft", params, [rows], base)

    other = tmp_path / "other"
    model = load_model(world.base)
    model.lm_head.weight.data += 1.0
    save_model(model, world.processor, other)
    pictures = list(rows["image"])
    swapped = rows.remove_columns("image").add_column("image", [{"bytes": b"x", "path": None}] * len(pictures))
    keys = [key(), key(params=settings(seed=2)), key(params=settings(**{"sft.phased": True})), key(base=other)]
    keys += [key(rows=rows.select(range(11))), key(rows=swapped.cast_column("image", FEATURES["image"]))]
    assert len({json.dumps(each, sort_keys=True) for each in keys}) == len(keys)
    assert key() == key(rows=rows.select(range(12)))  # the same content, another fingerprint
    code = work_keys.code_of(
        *sorted(str(file) for name in PACKAGES for file in (ROOT / "src/awares" / name).glob("*.py"))
    )
    assert key()["code"] == code  # all that DVC declares as the stage's code


def test_another_prompt_of_the_same_name_is_another_training(world, tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(training, "run_training", lambda *given, **_: keys.append(given[6]) or tmp_path)
    for text in ("Answer.", "Answer in one word."):
        (tmp_path / "prompt.txt").write_text(text)
        with pytest.raises(ValueError):  # no checkpoint to choose
            run(world, tmp_path, **{"protocol.system_file": str(tmp_path / "prompt.txt")})
    assert keys[0]["prompt"] != keys[1]["prompt"]


def test_a_model_of_the_hub_is_keyed_by_its_commit(monkeypatch):
    """New weights under the same name are not taken for those that were trained on."""
    found = set()
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(work_keys, "hf_hub_download", lambda *_, at=commit: f"hub/snapshots/{at}/config.json")
        found.add(work_keys.folder_digest("Owner/Model"))
    assert len(found) == 2


def test_a_torn_checkpoint_is_skipped(finished, tmp_path):
    folder = checkpoints_of(finished, tmp_path)
    assert [training.step_of(path) for path in training.checkpoints(folder)] == [1, 2, 3]
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{")
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    assert [training.step_of(path) for path in training.checkpoints(folder)] == [1]
    assert training.checkpoints(folder, 2) == []  # one process wrote it, two cannot go on from it


@pytest.mark.parametrize(
    ("marks", "step"),
    [
        ([0.9, 0.92, 0.93], 3),
        ([0.93, 0.9, 0.9], 3),
        ([0.93, 0.92, 0.85], 2),
        ([0.9, 0.7, 0.8], 1),
        ([1.0, 1.0, 0.97], 2),
    ],
)
def test_the_latest_checkpoint_that_is_not_worse_than_the_best_is_chosen(marks, step):
    scores = [{"step": at, "validation_accuracy": mark} for at, mark in enumerate(marks, 1)]
    assert sft.choose(scores, 300)["step"] == step


def test_the_chosen_checkpoint_is_the_one_that_is_saved(world, tmp_path, monkeypatch):
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


def test_what_is_saved_is_one_policy_without_paths_of_this_machine(world, finished):
    result = finished
    by_adapter, merged = load_model(world.base, adapter=result.adapter), load_model(result.merged)
    for name, value in by_adapter.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[name], atol=1e-6, rtol=1e-6)
    untrained = load_model(world.base).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, untrained[name])}
    assert changed and all("language_model.layers" in name for name in changed)
    written = [
        path for folder in (result.adapter, result.merged) for path in folder.iterdir() if path.suffix != ".safetensors"
    ]
    assert not [path for path in written if str(result.adapter.parents[1]) in path.read_text()]
    entries = read_records(result.log)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3]
    candidate = {"step", "validation_accuracy", "call_rate"}
    assert [set(entry) for entry in entries if "loss" not in entry] == [candidate] * 3


def test_a_model_that_carries_an_adapter_is_refused(world):
    adapted = load_model(world.base, trainable=True)
    adapted.peft_config = {}
    with pytest.raises(AwaresError, match="adapter"):
        training.require_plain(adapted)


def test_the_share_of_rows_is_the_first_of_every_source(world):
    rows = world.rows.remove_columns("source").add_column("source", ["a", "a", "b"] * 4)
    assert sft.share_of(rows, 0.5)["id"][:] == ["r0", "r1", "r2", "r3", "r4", "r5"]
    assert sft.share_of(rows, 1.0)["id"][:] == rows["id"][:]
