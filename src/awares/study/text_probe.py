"""Leak checks: what can be guessed without looking at the image.

The embedded suite is only worth learning on if neither the answer, nor whether a crop is needed, nor where, follows
from the words of the question. A bag of words and word pairs under logistic regression is the guesser.
"""

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

from awares.config import Crops
from awares.data.rows import evidence_crops, rows_of_source
from awares.errors import AwaresValueError


def question_auc(
    train: Sequence[str], train_labels: Sequence[str], test: Sequence[str], labels: Sequence[str]
) -> float:
    """Area under the ROC curve (0.5 = blind) for telling HR from LR by the question alone; fitted on ``train``.

    Raises AwaresError when a side holds only one of the two labels: then there is nothing to tell apart.
    """
    for name, given in (("train", train_labels), ("test", labels)):
        if set(given) != {"LR", "HR"}:
            raise AwaresValueError(f"{name} labels are {sorted(set(given))}: a leak check needs both LR and HR rows")
    model = _guesser().fit(train, train_labels)
    score = model.predict_proba(test)[:, list(model.classes_).index("HR")]
    return float(roc_auc_score(np.array(labels) == "HR", score))


def question_accuracy(
    train: Sequence[str], train_labels: Sequence[str], test: Sequence[str], labels: Sequence[str]
) -> tuple[float, float]:
    """Accuracy (0 to 1) on ``test`` of the question-only guesser, and of always giving the commonest of ``train``."""
    common = Counter(train_labels).most_common(1)[0][0]
    majority = float(np.mean([label == common for label in labels]))
    if len(set(train_labels)) == 1:
        return majority, majority
    guesses = _guesser().fit(train, train_labels).predict(test)
    return float(np.mean(guesses == np.array(labels))), majority


def crossed_accuracy(questions: Sequence[str], labels: Sequence[str], folds: int = 10) -> tuple[float, float]:
    """Accuracy (0 to 1) of the question-only guesser on each of ``folds`` parts, fitted on the others, and of the commonest label."""
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    if len(set(labels)) == 1:
        return majority, majority
    parts = KFold(min(folds, len(labels)), shuffle=True, random_state=0)
    if any(len({labels[index] for index in fitted}) == 1 for fitted, _ in parts.split(labels)):
        return majority, majority  # too few of the others to fit a guesser in every part
    guesses = cross_val_predict(_guesser(), list(questions), list(labels), cv=parts)
    return float(np.mean(guesses == np.array(labels))), majority


def word_guesses(train: datasets.Dataset, test: datasets.Dataset, section: Crops) -> pd.DataFrame:
    """What the questions' words say about the answer and about the crop that shows the evidence, source by source.

    Columns source, guessed, words, majority (percent right), gain (their difference, points), n.
    """
    records = []
    for source in dict.fromkeys(train["source"]):
        known, asked = rows_of_source(train, source), rows_of_source(test, source)
        labels = {"answer": [[row[0] for row in rows["answers"]] for rows in (known, asked)]}
        crops = [evidence_crops(rows, section) for rows in (known, asked)]
        labels |= {"crop": crops} if all(any(names) for names in crops) else {}  # no boxes tell nothing
        for guessed, (given, wanted) in labels.items() if len(asked) else ():
            words, majority = question_accuracy(list(known["question"]), given, list(asked["question"]), wanted)
            shares = {"words": 100 * words, "majority": 100 * majority, "gain": 100 * (words - majority)}
            records.append({"source": source, "guessed": guessed, **shares, "n": len(wanted)})
    return pd.DataFrame(records)


def label_leaks(train: datasets.Dataset, test: datasets.Dataset) -> pd.DataFrame:
    """What the words say about the labels of curated rows; empty where nothing varies.

    Columns check, value, bound, n. ``when``: area under the ROC curve for LR/HR, bound 0.70. ``where``: percentage of
    HR rows whose crops are guessed (`crossed_accuracy`: all HR rows, the few of ``test`` tell little), bound 10 points above always naming
    the most frequent ones.
    """
    records = []
    if set(train["label"]) == set(test["label"]) == {"LR", "HR"}:
        auc = question_auc(*(list(rows[column]) for rows in (train, test) for column in ("question", "label")))
        records.append({"check": "when", "value": auc, "bound": 0.70, "n": len(test)})
        needy = datasets.concatenate_datasets([train, test]).filter(lambda label: label == "HR", input_columns="label")
        crops = ["+".join(names) for names in needy["target_crops"]]
        words, majority = crossed_accuracy(list(needy["question"]), crops)
        records.append({"check": "where", "value": 100 * words, "bound": 100 * majority + 10, "n": len(needy)})
    return pd.DataFrame(records, columns=["check", "value", "bound", "n"])


def _guesser() -> Pipeline:
    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True),
        LogisticRegression(max_iter=2000, C=1.0),
    )
