"""Logistic regression from a question's words alone to the answer, the label and the crop."""

from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline

from awares.data.rows import rows_of_source
from awares.method.crops import boxes_to_crops
from awares.settings import CropSettings


def text_probe() -> Pipeline:
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True)
    return make_pipeline(words, LogisticRegression(max_iter=2000, C=1.0))


def crossed_accuracy(questions: Sequence[str], labels: Sequence[str], folds: int = 10) -> tuple[float, float]:
    """Cross-validated accuracy (0 to 1) of the probe over ``folds`` parts, and of the most frequent label."""
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    parts = KFold(min(folds, max(2, len(labels))), shuffle=True, random_state=0)
    if len(set(labels)) == 1 or any(len({labels[at] for at in fitted}) == 1 for fitted, _ in parts.split(labels)):
        return majority, majority  # a part cannot be fitted
    guesses = cross_val_predict(text_probe(), list(questions), list(labels), cv=parts)
    return float(np.mean(guesses == np.array(labels))), majority


def word_guesses(train: datasets.Dataset, test: datasets.Dataset, section: CropSettings) -> pd.DataFrame:
    """Accuracy of the probe for answer and crop: source, guessed, words, majority (percent), gain (points), n."""
    records = []
    for source in dict.fromkeys(train["source"]):
        parts = rows_of_source(train, source), rows_of_source(test, source)
        labels = {"answer": [[answers[0] for answers in rows["answers"]] for rows in parts]}
        boxes = [zip(rows["question_boxes"], rows["answer_boxes"], strict=True) for rows in parts]
        crops = [["+".join(boxes_to_crops([*these, *those], section)) for these, those in pairs] for pairs in boxes]
        labels |= {"crop": crops} if all(any(names) for names in crops) else {}
        known, asked = (rows["question"][:] for rows in parts)
        for guessed, (given, wanted) in labels.items() if asked else ():
            majority = float(np.mean(np.array(wanted) == Counter(given).most_common(1)[0][0]))
            words = float(text_probe().fit(known, given).score(asked, wanted)) if len({*given}) > 1 else majority
            records.append((source, guessed, 100 * words, 100 * majority, 100 * (words - majority), len(wanted)))
    return pd.DataFrame(records, columns=["source", "guessed", "words", "majority", "gain", "n"])


def label_leaks(train: datasets.Dataset, test: datasets.Dataset) -> pd.DataFrame:
    """How well the probe predicts curated rows: columns check, value, bound, n; empty without LR and HR rows.

    ``when``: area under the ROC curve, of 0.70 at most. ``where``: accuracy (percent) for the crops of all HR rows.
    """
    records: list[tuple[str, float, float, int]] = []
    if set(train["label"]) == set(test["label"]) == {"LR", "HR"}:
        model = text_probe().fit(train["question"][:], train["label"][:])
        of_hr = model.predict_proba(test["question"][:])[:, 0]  # classes are sorted: HR, LR
        auc = float(roc_auc_score(np.array(test["label"][:]) == "HR", of_hr))
        both = datasets.concatenate_datasets([train, test])
        needy = both.select(np.flatnonzero(np.array(both["label"][:]) == "HR"))
        crops = ["+".join(names) for names in needy["target_crops"]]
        words, majority = crossed_accuracy(needy["question"][:], crops)
        records = [("when", auc, 0.70, len(test)), ("where", 100 * words, 100 * majority + 10, len(needy))]
    return pd.DataFrame(records, columns=["check", "value", "bound", "n"])
