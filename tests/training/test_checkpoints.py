"""Checkpoints belong to their inputs: the key, torn folders, the rows of a share."""
# ruff: noqa: F811 (fixtures of test_sft)

import json
import shutil

import pytest
import torch
from conftest import ROOT
from test_sft import checkpoints_of, finished, run, settings, weights, world  # noqa: F401

from awares.engine import keys as work_keys
from awares.engine.jsonl import exclusive_lock
from awares.engine.model import load_model, save_model
from awares.engine.rows import FEATURES
from awares.errors import AwaresError
from awares.training import checkpoints as training


def test_every_input_is_part_of_the_key(world, tmp_path):
    def key(params=None, rows=world.rows, base=world.base):
        return training.describe_inputs("sft", params or settings(), [rows], base)

    rows, other, model = world.rows, tmp_path / "other", load_model(world.base)
    model.lm_head.weight.data += 1.0
    save_model(model, world.processor, other)
    swapped = rows.remove_columns("image").add_column("image", [{"bytes": b"x", "path": None}] * len(rows))
    keys = [key(), key(settings(seed=2)), key(settings(**{"sft.phased": True})), key(base=other)]
    keys += [key(rows=rows.select(range(11))), key(rows=swapped.cast_column("image", FEATURES["image"]))]
    assert len({json.dumps(each, sort_keys=True) for each in keys}) == len(keys)
    assert key() == key(rows=rows.select(range(12)))  # the same content, another fingerprint
    code = ROOT / "src/awares"
    files = [str(file) for name in ("engine", "method", "training") for file in (code / name).glob("*.py")]
    assert key()["code"] == work_keys.code_of(*sorted(files))  # the folders that DVC declares as the stage's code


def test_a_model_of_the_hub_is_keyed_by_its_commit(monkeypatch):
    """New weights under the same name are not taken for those that were trained on."""
    found = set()
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(work_keys, "hf_hub_download", lambda *_, at=commit: f"hub/snapshots/{at}/config.json")
        found.add(work_keys.folder_digest("Owner/Model"))
    assert len(found) == 2


def test_checkpoints_of_other_inputs_are_never_used(world, finished, tmp_path):
    kept, faster = checkpoints_of(finished, tmp_path), {"sft.learning_rate": 5.0e-3}
    result = run(world, tmp_path / "main-s1", **faster)
    assert not torch.equal(*(next(iter(weights(one.adapter).values())) for one in (result, finished)))
    (other,) = {*(tmp_path / ".checkpoints").iterdir()} - {kept}
    with exclusive_lock(other / "training"), pytest.raises(AwaresError, match="another process"):
        run(world, tmp_path / "main-s1", **faster)
    shutil.rmtree(other)
    kept.rename(other)  # someone mixes up the folders
    with pytest.raises(AwaresError, match="checkpoints of other inputs"):
        run(world, tmp_path / "main-s1", **faster)


def test_what_is_saved_is_one_policy_without_paths_of_this_machine(world, finished):
    by_adapter, merged = load_model(world.base, adapter=finished.adapter), load_model(finished.merged)
    for name, value in by_adapter.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[name], atol=1e-6, rtol=1e-6)
    untrained = load_model(world.base).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, untrained[name])}
    assert changed and all("language_model.layers" in name for name in changed)
    written = [path for folder in (finished.adapter, finished.merged) for path in folder.iterdir()]
    texts = [path.read_text() for path in written if path.suffix != ".safetensors"]
    assert not any(str(finished.adapter.parents[1]) in text for text in texts)
