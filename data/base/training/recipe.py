"""The recipe of base training (recipe.yaml), typed."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt, PositiveInt

FILE = Path(__file__).with_name("recipe.yaml")
BASE = FILE.parents[1]  # folder of the shipped model


class Stage(BaseModel, frozen=True, extra="forbid"):
    """One stage: its optimiser, the weights that it trains and starts from, and the examples that it draws."""

    name: str
    steps: PositiveInt
    learning_rate: NonNegativeFloat
    work: PositiveInt
    trains: Literal["vision", "language", "both"]
    starts_from: tuple[str, ...]
    dense: tuple[str, ...] = ("glyph", "early", "word", "trait", "link", "glance", "code", "misread")
    painters: dict[str, float]
    views: dict[str, float]
    called: float = 0.0  # share of the groups whose parts are the result of a call
    argument: float = 0.0  # share of the other pictures with questions whose answer is the argument of a call
    graded: float = 0.0  # share of the pictures whose evidence has any size from 13 to 48 px, not one of two
    candid: float = 0.0  # share of the full and half views whose system message wants illegible print admitted
    twice: tuple[str, ...] = ()  # kinds of questions that are drawn twice as often
    after_call_weight: float = 1.0  # of the answer after a call; a conversation has at most one

    @property
    def asks(self) -> bool:  # whether its examples have questions
        return self.trains != "vision"


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides the trained weights."""

    seed: NonNegativeInt
    begin: Literal["glyphs", "joint", "review"]  # first stage to run
    warmup_steps: PositiveInt
    decay_fraction: NonNegativeFloat
    weight_decay: NonNegativeFloat
    stages: dict[str, Stage]  # in order

    def to_run(self) -> list[Stage]:
        """The stages from ``begin`` on."""
        names = list(self.stages)
        return [self.stages[name] for name in names[names.index(self.begin) :]]


def load_recipe(path: Path = FILE, begin: str | None = None) -> Recipe:
    """Read a recipe; ``begin`` replaces the first stage. pydantic's ValidationError names a bad key."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["stages"] = {name: {"name": name, **stage} for name, stage in values["stages"].items()}
    return Recipe.model_validate(values | ({"begin": begin} if begin else {}))
