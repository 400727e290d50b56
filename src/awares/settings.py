"""`Params`, the types and limits of params.yaml, which explains each value. No key has a default."""

from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt
from pydantic.dataclasses import dataclass

from awares import registry

Crop = Literal[
    "top-left", "top-right", "bottom-left", "bottom-right", "center", "top", "bottom", "left", "right", "all"
]
Task = Literal["chartqa", "docvqa", "ocrbench", "pope", "realworldqa", "vstar"]
LoraModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CROP_NAMES: tuple[Crop, ...] = get_args(Crop)
FREE_BOX = "box"
MAIN_SYSTEMS = ("full", "half", "no_image", "sft", "awares")  # the rows of Table 1 that the main line fills
# The sections that decide what a stage writes: a variant that changes none of them shares the main line's run.
DECIDES = {"data": {"data"}, "curation": {"data", "crops", "protocol", "curation", "base"}}
DECIDES["sft"] = DECIDES["curation"] | {"sft"}
DECIDES["grpo"] = DECIDES["sft"] | {"grpo"}
_SEEDED = ("sft", "grpo", "evaluation", "operating_curve", "latency")  # stages whose run folders name the training seed

_Item = TypeVar("_Item")


def _distinct(values: tuple[_Item, ...]) -> tuple[_Item, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is listed twice")
    return values


Whole = Annotated[StrictInt, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]  # `1e-5` is text for YAML; here it is the number
Pixels = Annotated[StrictInt, Field(ge=4, le=48)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0.01, le=1)]
Distinct = Annotated[tuple[_Item, ...], AfterValidator(_distinct)]
Listed = Annotated[Distinct[_Item], Field(min_length=1)]
JudgeName = Annotated[str, AfterValidator(registry.judge.check)]


@dataclass_transform(frozen_default=True)
class Section:
    """Base of all settings: each subclass becomes a frozen dataclass that pydantic validates."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))(cls)


class Paths(Section):
    runs: str
    reports: str


class Data(Section):
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
    graded: Fraction


class CropSettings(Section):
    offered: Listed[Literal[Crop, "box"]]
    region_budget: Share
    margin: Whole
    rule: Annotated[str, AfterValidator(registry.crop_rule.check)]
    iou_threshold: Fraction
    coverage_threshold: Fraction
    max_side: Annotated[StrictInt, Field(ge=28)]
    min_pixels: Whole
    max_pixels: Whole
    geometry: Literal["ours", "released"]

    @property
    def pixels(self) -> tuple[int, int]:
        """The least and the most pixels of an image after the image processor; 0 = the checkpoint's."""
        return self.min_pixels, self.max_pixels


class ProtocolSettings(Section):
    name: Literal["ours", "released"]
    system_file: str
    max_new_tokens: Count
    token_budget: Count


class Curation(Section):
    drop_both_wrong: StrictBool
    embedder: str
    embedding_threshold: Fraction
    anls_threshold: Fraction
    judge_order: Literal["once", "both"]
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


class Training(Section):
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


class Sft(Training):
    answers: Literal["accepted", "full"]
    level: Literal["trajectory", "turn"]
    tool_turn_weight: Amount
    hr_upsample: Count
    phased: StrictBool
    max_length: Count
    launch: str
    checkpoints: Count
    selection_rows: Count
    share_computation: StrictBool


class Grpo(Training):
    cold_start: StrictBool
    estimator: Literal["sampled", "exact"]
    advantage: Literal["group_std", "group", "turn"]
    fresh: StrictBool
    balanced: StrictBool
    held_out_rows: Whole
    choose_bias: StrictBool
    reward: Annotated[str, AfterValidator(registry.reward.check)]
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


class Evaluation(Section):
    seed: Whole
    unseen_seed: Whole
    study_rows: Count
    shift_seed: Whole
    graded_rows: Count
    shifted_rows: Count
    evidence_px: tuple[Pixels, Pixels]
    bootstrap: Count
    level: Fraction
    judge: JudgeName
    relaxed_iou: Fraction
    call_bias: float
    dial_biases: Listed[float]
    engine: Literal["local", "vllm"]
    chunk_rows: Count
    rows: Count
    frontier_rows: Count
    dial_rows: Count
    lmms_eval: str


class ComparedSystems(Section):
    systems: Listed[str]
    own: Distinct[str]


class Latency(Section):
    seed: Whole
    pruners: Listed[str]
    rows: Count
    repetitions: Count
    batch_tokens: Listed[Annotated[StrictInt, Field(ge=2)]]


class Base(Section):
    model: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    attn_implementation: str
    launch: str
    report_to: Literal["none", "tensorboard", "wandb", "trackio"]


class Plan(Section):
    gpu: Literal["a100", "h100", "h200"]
    gpus: Count
    utilisation: Share
    bench: str


class Report(Section):
    dpi: Annotated[StrictInt, Field(ge=30)]
    gallery: Count


class Params(Section):
    """All settings of a run."""

    root: Path  # the folder of params.yaml
    profile: str
    variant: str
    changed: frozenset[str]  # the sections that the variant changes
    unseen: StrictBool  # evaluation.seed was changed: evaluation draws rows that no stage has seen
    seed: Whole
    seeds: Listed[Whole]
    plus_seeds: Listed[Whole]
    threads: Count
    paths: Paths
    data: Data
    crops: CropSettings
    protocol: ProtocolSettings
    curation: Curation
    sft: Sft
    grpo: Grpo
    evaluation: Evaluation
    comparison: ComparedSystems
    latency: Latency
    base: Base
    plan: Plan
    report: Report
    ablations: dict[str, Distinct[str]] = field(hash=False)

    def path(self, name: str) -> Path:
        """``name`` relative to the repository root; an absolute path is returned unchanged."""
        return self.root / name

    def run_dir(self, stage: str) -> Path:
        """runs/<profile>/<stage>; below it <variant> (data, curation) or <variant>-s<seed> (_SEEDED).

        A stage before the first one that the variant changes has the main line's folder. Evaluation on an unseen seed
        has unseen/<variant>-s<seed>-e<evaluation seed>, its operating curve the same name in operating_curve.
        """
        folder = self.path(self.paths.runs) / self.profile / stage
        if stage not in DECIDES and stage not in _SEEDED:
            return folder
        name = "main" if stage in DECIDES and not self.changed & DECIDES[stage] else self.variant
        name += f"-s{self.seed}" if stage in _SEEDED else ""
        if stage in ("evaluation", "operating_curve") and self.unseen:
            name = f"{name}-e{self.evaluation.seed}"
            folder = folder.with_name("unseen") if stage == "evaluation" else folder
        return folder / name

    def on_unseen_rows(self) -> "Params":
        """The same run on the rows of stage `unseen`: ``evaluation.study_rows`` per task, new to every stage."""
        drawn = replace(self.evaluation, seed=self.evaluation.unseen_seed, rows=self.evaluation.study_rows)
        return replace(self, evaluation=drawn, unseen=True)

    def row_sets(self) -> "tuple[Params, Params]":
        """The settings of the evaluation rows and of the rows that no stage has seen."""
        return self, self.on_unseen_rows()

    def report_dir(self) -> Path:
        """reports/<profile>: the published results."""
        return self.path(self.paths.reports) / self.profile

    def model_path(self) -> Path | str:
        """The base model: a folder of this repository, else the model id."""
        local = self.path(self.base.model)
        return local if local.parent.is_dir() else self.base.model

    def launch(self, stage: str) -> str:
        """The accelerate configuration for training ``stage`` (sft or grpo); "" = train in the notebook's process."""
        return (self.sft.launch if stage == "sft" else "") or self.base.launch

    def as_dict(self) -> dict[str, Any]:
        """All values that a result depends on: for logs and for the keys of checkpoints."""
        lists = ("root", "changed", "ablations", "plus_seeds")
        return {key: value for key, value in asdict(self).items() if key not in lists}

    def variants(self, *groups: str) -> list[str]:
        """The names in these groups of ``ablations``, in all by default."""
        return [name for group in groups or self.ablations for name in self.ablations.get(group, ())]
