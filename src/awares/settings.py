"""The schema of params.yaml: every key with its type and limits, and where a run of these settings writes.

There are no defaults: a key that params.yaml lacks is an error.
"""

from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass

from awares import registry

FREE_BOX = "box"
CropName = Literal[
    "top-left", "top-right", "bottom-left", "bottom-right", "center", "top", "bottom", "left", "right", "all"
]
CROP_NAMES: tuple[str, ...] = get_args(CropName)
Task = Literal["chartqa", "docvqa", "ocrbench", "pope", "realworldqa", "vstar"]
TASKS: tuple[str, ...] = get_args(Task)
LoraModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEMS = ("full", "half", "no_image", "sft", "awares")  # the rows of Table 1 that the main line fills
# The sections that decide what a stage writes: a variant that changes none of them shares the main line's run.
DECIDES = {"data": {"data"}, "curation": {"data", "crops", "protocol", "curation", "base"}}
DECIDES["sft"] = DECIDES["curation"] | {"sft"}
DECIDES["grpo"] = DECIDES["sft"] | {"grpo"}
SEEDED_STAGES = ("sft", "grpo", "evaluation", "operating_curve", "latency")  # their run folders name the training seed

_T = TypeVar("_T")


def _distinct(values: tuple[_T, ...]) -> tuple[_T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is listed twice")
    return values


Whole = Annotated[StrictInt, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=1)]
Amount = Annotated[StrictFloat, Field(ge=0)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
Share = Annotated[StrictFloat, Field(ge=0.01, le=1)]
Distinct = Annotated[tuple[_T, ...], AfterValidator(_distinct)]
Listed = Annotated[Distinct[_T], Field(min_length=1)]
JudgeName = Annotated[str, AfterValidator(registry.judge.check)]
CropRuleName = Annotated[str, AfterValidator(registry.crop_rule.check)]
RewardName = Annotated[str, AfterValidator(registry.reward.check)]


@dataclass_transform(frozen_default=True)
class Section:
    """Base of all settings: each subclass becomes a frozen dataclass that pydantic validates."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)


class Paths(Section):  # where stages write; a relative path starts at the folder of params.yaml
    runs: str
    reports: str


class Data(Section):  # rows; an entry of sources that ends in .jsonl is a file of the user's own
    sources_file: str
    hub_root: str
    reserve: Amount
    duplicate_distance: Annotated[StrictInt, Field(ge=0, le=255)]
    train_seed: Whole
    validation_seed: Whole
    tasks: Listed[Task]
    origin: str
    sources: Listed[str]
    train_rows: Count
    validation_rows: Count


class Crops(Section):  # candidate crops and the rule that maps a box to crops (PAPER §1, §2)
    offered: Listed[Literal[CropName, "box"]]
    region_budget: Share
    rule: CropRuleName
    iou_threshold: Fraction
    coverage_threshold: Fraction
    max_side: Annotated[StrictInt, Field(ge=28)]


class ProtocolSettings(Section):  # form and limits of the two-turn interaction
    name: Literal["ours", "released"]
    system_file: str
    max_new_tokens: Count
    token_budget: Count


class Curation(Section):  # judges, oracle and trajectories (PAPER §2)
    drop_both_wrong: StrictBool
    embedder: str
    embedding_threshold: Fraction
    anls_threshold: Fraction
    oracle_seed: Whole
    served_file: str
    released: str
    engine: Literal["local", "base"]
    judge: JudgeName
    judges: Listed[JudgeName]
    oracle: Literal["annotation", "qwen3_vl"]
    oracle_sigma: Amount
    oracle_margin: Whole
    lucky_margin: Amount
    max_new_tokens: Count
    chunk_rows: Count

    @property
    def all_judges(self) -> tuple[str, ...]:
        """Every judge that gives a verdict."""
        return tuple(dict.fromkeys((*self.judges, self.judge)))


class Training(Section):  # LoRA and optimizer: what both trainings have (Table 11)
    lora_rank: Count
    lora_alpha: Count
    lora_dropout: Fraction
    lora_modules: Listed[LoraModule]
    scheduler: Literal["cosine", "linear", "constant"]
    warmup_ratio: Fraction
    weight_decay: Amount
    max_grad_norm: Amount
    share: Fraction
    learning_rate: Amount
    epochs: Amount
    batch_size: Count
    per_device_batch_size: Count
    gradient_checkpointing: StrictBool


class Sft(Training):  # supervised fine-tuning (PAPER §3, Eq. 4, Tables 8 and 11)
    level: Literal["trajectory", "turn"]
    tool_turn_weight: Amount
    hr_upsample: Count
    phased: StrictBool
    max_length: Count
    launch: str
    checkpoints: Count
    selection_rows: Count
    share_computation: StrictBool


class Grpo(Training):  # multi-turn GRPO (PAPER §4, Eq. 5-8, Tables 4 and 11)
    cold_start: StrictBool
    reward: RewardName
    answer_reward: Literal["similarity", "anls", "judge"]
    embedder: str
    alpha_ans: Amount
    alpha_miss: Amount
    alpha_use: Amount
    lambda_area: Amount
    beta: Amount
    epsilon: Fraction
    generations: Annotated[StrictInt, Field(ge=2)]
    temperature: Amount
    top_p: Fraction
    iterations: Count
    max_steps: Annotated[StrictInt, Field(ge=-1)]
    max_completion_length: Count
    crop_token_budget: Count
    save_steps: Count
    share_prompts: StrictBool
    rollouts: Literal["local", "vllm"]


class Evaluation(Section):  # rows, intervals and thresholds (PAPER §5)
    seed: Whole
    unseen_seed: Whole
    bootstrap: Count
    level: Fraction
    judge: JudgeName  # without a server, so that evaluation needs none
    relaxed_iou: Fraction
    call_bias: StrictFloat
    dial_biases: Listed[StrictFloat]
    rows: Count
    frontier_rows: Count
    dial_rows: Count
    lmms_eval: str


class Comparison(Section):  # systems without training (PAPER §6); own: the user's, one file each in baselines/systems
    systems: Listed[str]
    own: Distinct[str]

    @property
    def all(self) -> tuple[str, ...]:
        """All compared systems, ours first."""
        return (*self.systems, *self.own)


class Latency(Section):  # timing of the systems (PAPER §5)
    seed: Whole
    pruners: Listed[str]
    rows: Count
    repetitions: Count
    batch_tokens: Listed[Annotated[StrictInt, Field(ge=2)]]


class Base(Section):  # the base VLM: a folder of this repository or a model id
    model: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    launch: str


class Plan(Section):  # the hardware that costs are estimated for; bench: a folder of `awares bench --train` or nothing
    gpu: Literal["a100", "h100", "h200"]
    gpus: Count
    utilisation: Share
    bench: str


class Report(Section):  # figures and galleries
    dpi: Annotated[StrictInt, Field(ge=30)]
    gallery: Count


class Params(Section):
    """All settings of a run. ``root`` is the folder of params.yaml; ``changed``: the sections that the variant changes.

    ``unseen``: whether ``evaluation.seed`` was changed, so that evaluation draws rows that no stage has seen.
    """

    root: Path
    profile: str
    variant: str
    changed: frozenset[str]
    unseen: StrictBool
    seed: Whole
    seeds: Listed[Whole]  # further training seeds, for means over seeds
    threads: Count
    paths: Paths
    data: Data
    crops: Crops
    protocol: ProtocolSettings
    curation: Curation
    sft: Sft
    grpo: Grpo
    evaluation: Evaluation
    comparison: Comparison
    latency: Latency
    base: Base
    plan: Plan
    report: Report
    ablations: dict[str, Distinct[str]] = field(hash=False)  # first stage that the variants change -> variants

    def path(self, name: str) -> Path:
        """``name`` relative to the repository root; an absolute path is returned unchanged."""
        return self.root / name

    def run_dir(self, stage: str) -> Path:
        """runs/<profile>/<stage>; below it <variant> (data, curation) or <variant>-s<seed> (SEEDED_STAGES).

        A stage before the first one that the variant changes has the main line's folder. Evaluation on an unseen seed
        has runs/<profile>/unseen/<variant>-s<seed>-e<evaluation seed>, its operating curve the same name in operating_curve.
        """
        folder = self.path(self.paths.runs) / self.profile / stage
        shared = stage in DECIDES and not self.changed & DECIDES[stage]
        name = "main" if shared else self.variant
        if stage in SEEDED_STAGES:
            name = f"{name}-s{self.seed}"
        elif stage not in DECIDES:
            return folder
        if stage in ("evaluation", "operating_curve") and self.unseen:
            name = f"{name}-e{self.evaluation.seed}"
            folder = folder.with_name("unseen") if stage == "evaluation" else folder
        return folder / name

    def model_path(self) -> Path | str:
        """The base model: a folder of this repository, else the id that params.yaml gives."""
        local = self.path(self.base.model)
        return local if local.parent.is_dir() else self.base.model

    def launch(self, stage: str) -> str:
        """The accelerate configuration for training ``stage`` (sft or grpo); "" = train in the notebook's process."""
        return (self.sft.launch if stage == "sft" else "") or self.base.launch

    def report_dir(self) -> Path:
        """reports/<profile>: the published results."""
        return self.path(self.paths.reports) / self.profile

    def as_dict(self) -> dict[str, Any]:
        """All values that a result depends on as a plain dict: for logs and for the keys of checkpoints."""
        return {key: value for key, value in asdict(self).items() if key not in ("root", "changed", "ablations")}
