"""The recipe of base training (recipe.yaml), typed."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

FILE = Path(__file__).with_name("recipe.yaml")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage(Section):
    """One stage: its optimiser, the weights that it trains and starts from, and the examples that it draws.

    Fractions: ``called``: of the groups, those whose parts are the result of a call; ``argument``: of the other pictures,
    those with questions whose answer is the argument of a call; ``candid``: of the full and half views, those whose system
    message asks to admit what cannot be read. ``twice``: kinds of questions that come up twice as often.
    """

    name: str
    steps: int = Field(ge=1)
    learning_rate: float = Field(ge=0)
    work: int = Field(ge=1)
    trains: Literal["vision", "language", "both"]
    starts_from: tuple[str, ...]
    dense: tuple[str, ...] = ("glyph", "early", "word", "trait", "link", "glance", "code", "misread")
    painters: dict[str, float]
    views: dict[str, float]
    called: float = 0.0
    argument: float = 0.0
    candid: float = 0.0
    twice: tuple[str, ...] = ()
    after_call_weight: float = 1.0  # of the answer behind a call: there is one a conversation

    @property
    def asks(self) -> bool:
        """Whether its examples have questions."""
        return self.trains != "vision"


class Recipe(Section):
    """Everything that decides the trained weights. ``begin``: the first stage to run."""

    seed: int = Field(ge=0)
    begin: Literal["glyphs", "joint", "review"]
    warmup_steps: int = Field(ge=1)
    decay_fraction: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
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
