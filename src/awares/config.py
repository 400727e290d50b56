"""params.yaml -> frozen dataclasses, with one clear error per bad value.

params.yaml has two layers. What the *method* fixes stands once at the top, section by section; what only *size*
changes stands under ``profiles.<name>.<section>``. A section dataclass here holds both, merged:
``params.sft.tool_turn_weight`` comes from the top, ``params.sft.batch_size`` from the profile. There are no defaults in
code: a key that is missing in params.yaml is an error.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from awares.errors import AwaresFileError, AwaresValueError

LOCAL_JUDGES = ("semantic", "embedding", "anls", "always")
JUDGES = (*LOCAL_JUDGES, "llama", "deepseek")
ORACLES = ("annotation", "qwen3_vl")
ENGINES = ("local", "base")  # where the base model answers during curation: here, or the server of that name
CROP_RULES = ("coverage", "iou")
FREE_BOX = "box"
CROP_NAMES = ("top-left", "top-right", "bottom-left", "bottom-right", "center", "top", "bottom", "left", "right", "all")
REWARDS = ("awares", "visionthink", "ergo")
PROTOCOLS = ("ours", "released")
ANSWER_REWARDS = ("similarity", "anls", "judge")
TASKS = ("chartqa", "docvqa", "ocrbench", "pope", "realworldqa", "vstar")
LORA_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # every linear layer of the LM
SYSTEMS = ("full", "half", "no_image", "sft", "awares")
SHUFFLED = "_shuffled"  # ends the name of a pruner's own control, behind the percentage
SEEDED_STAGES = ("sft", "grpo", "evaluation", "latency")
# the sections that decide what a stage writes: a variant that leaves them alone shares the stage with the main line
DECIDES = {"data": {"data"}, "curation": {"data", "crops", "protocol", "curation", "base"}}
ABLATED = ("curation", "sft", "grpo")  # stages that variants repeat
SYSTEM_LIST = "systems"  # variants that repeat all of them
DECIDES["sft"] = DECIDES["curation"] | {"sft"}
DECIDES["grpo"] = DECIDES["sft"] | {"grpo"}


def _method(choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf, least: int = 1) -> Any:
    """A key that stands once at the top of params.yaml. ``least``: the fewest values of a list."""
    return field(metadata={"size": False, "choices": choices, "low": low, "high": high, "least": least})


def _size(choices: tuple[str, ...] = (), low: float = -math.inf, high: float = math.inf) -> Any:
    """A key that stands under every profile."""
    return field(metadata={"size": True, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Paths:
    """Where stages write; relative paths are taken from the folder of params.yaml."""

    runs: str = _method()
    reports: str = _method()


@dataclass(frozen=True)
class Data:
    """Rows: where they come from and how many. An entry of ``sources`` ending in .jsonl is a file of the user's own."""

    sources_file: str = _method()
    hub_root: str = _method()
    reserve: float = _method(low=0)
    duplicate_distance: int = _method(low=0, high=255)
    train_seed: int = _method(low=0)
    validation_seed: int = _method(low=0)
    tasks: tuple[str, ...] = _method(choices=TASKS)
    origin: str = _size()
    sources: tuple[str, ...] = _size()
    train_rows: int = _size(low=1)
    validation_rows: int = _size(low=1)


@dataclass(frozen=True)
class Crops:
    """Candidate crops and the box -> crops rule (PAPER §1, §2)."""

    offered: tuple[str, ...] = _method(choices=(*CROP_NAMES, FREE_BOX))
    region_budget: float = _method(low=0.01, high=1)
    rule: str = _method(choices=CROP_RULES)
    iou_threshold: float = _method(low=0, high=1)
    coverage_threshold: float = _method(low=0, high=1)
    max_side: int = _method(low=28)


@dataclass(frozen=True)
class Protocol:
    """Form and limits of the two-turn interaction."""

    name: str = _method(choices=PROTOCOLS)
    system_file: str = _method()
    max_new_tokens: int = _size(low=1)
    token_budget: int = _size(low=1)


@dataclass(frozen=True)
class Curation:
    """Judge, oracle and trajectories (PAPER §2)."""

    drop_both_wrong: bool = _method()
    embedder: str = _method()
    embedding_threshold: float = _method(low=0, high=1)
    anls_threshold: float = _method(low=0, high=1)
    oracle_seed: int = _method(low=0)
    served_file: str = _method()
    released: str = _method()
    engine: str = _size(choices=ENGINES)
    judge: str = _size(choices=JUDGES)
    judges: tuple[str, ...] = _size(choices=JUDGES)
    oracle: str = _size(choices=ORACLES)
    oracle_sigma: float = _size(low=0)
    oracle_margin: int = _size(low=0)
    lucky_margin: float = _size(low=0)
    max_new_tokens: int = _size(low=1)
    chunk_rows: int = _size(low=1)

    @property
    def panel(self) -> tuple[str, ...]:
        """The judges that are heard: those listed, and the one that decides."""
        return tuple(dict.fromkeys((*self.judges, self.judge)))


@dataclass(frozen=True)
class Sft:
    """Cold start (PAPER §3, Eq. 4, Tables 8 and 11)."""

    level: str = _method(choices=("trajectory", "turn"))
    tool_turn_weight: float = _method(low=0)
    hr_upsample: int = _method(low=1)
    phased: bool = _method()
    lora_rank: int = _method(low=1)
    lora_alpha: int = _method(low=1)
    lora_dropout: float = _method(low=0, high=1)
    scheduler: str = _method(choices=("cosine", "linear", "constant"))
    warmup_ratio: float = _method(low=0, high=1)
    weight_decay: float = _method(low=0)
    max_grad_norm: float = _method(low=0)
    max_length: int = _method(low=1)
    launch: str = _method()
    lora_modules: tuple[str, ...] = _method(choices=LORA_MODULES)
    share: float = _size(low=0, high=1)
    learning_rate: float = _size(low=0)
    epochs: float = _size(low=0)
    batch_size: int = _size(low=1)
    per_device_batch_size: int = _size(low=1)
    checkpoints: int = _size(low=1)
    selection_rows: int = _size(low=1)
    share_computation: bool = _size()
    gradient_checkpointing: bool = _size()


@dataclass(frozen=True)
class Grpo:
    """Multi-turn GRPO (PAPER §4, Eq. 5-8, Tables 4 and 11)."""

    cold_start: bool = _method()
    reward: str = _method(choices=REWARDS)
    answer_reward: str = _method(choices=ANSWER_REWARDS)
    embedder: str = _method()
    alpha_ans: float = _method(low=0)
    alpha_miss: float = _method(low=0)
    alpha_use: float = _method(low=0)
    lambda_area: float = _method(low=0)
    beta: float = _method(low=0)
    epsilon: float = _method(low=0, high=1)
    generations: int = _method(low=2)
    temperature: float = _method(low=0)
    top_p: float = _method(low=0, high=1)
    iterations: int = _method(low=1)
    share: float = _method(low=0, high=1)
    lora_rank: int = _method(low=1)
    lora_alpha: int = _method(low=1)
    lora_dropout: float = _method(low=0, high=1)
    scheduler: str = _method(choices=("cosine", "linear", "constant"))
    warmup_ratio: float = _method(low=0, high=1)
    weight_decay: float = _method(low=0)
    max_grad_norm: float = _method(low=0)
    lora_modules: tuple[str, ...] = _method(choices=LORA_MODULES)
    learning_rate: float = _size(low=0)
    epochs: float = _size(low=0)
    max_steps: int = _size(low=-1)
    batch_size: int = _size(low=1)
    per_device_batch_size: int = _size(low=1)
    max_completion_length: int = _size(low=1)
    crop_token_budget: int = _size(low=1)
    save_steps: int = _size(low=1)
    share_prompts: bool = _size()
    rollouts: str = _size(choices=("local", "vllm"))
    gradient_checkpointing: bool = _size()


@dataclass(frozen=True)
class Evaluation:
    """Systems, tasks and intervals (PAPER §5)."""

    seed: int = _method(low=0)
    unseen_seed: int = _method(low=0)
    bootstrap: int = _method(low=1)
    level: float = _method(low=0, high=1)
    judge: str = _method(choices=LOCAL_JUDGES)
    relaxed_iou: float = _method(low=0, high=1)
    call_bias: float = _method()
    dial_biases: tuple[float, ...] = _method()
    rows: int = _size(low=1)
    frontier_rows: int = _size(low=1)
    dial_rows: int = _size(low=1)
    lmms_eval: str = _size()


@dataclass(frozen=True)
class Comparison:
    """Systems beside those of the evaluation that need no training (PAPER §6): names of `baselines`; ``own``: of src/awares/systems."""

    systems: tuple[str, ...] = _method()
    own: tuple[str, ...] = _method(least=0)

    @property
    def all(self) -> tuple[str, ...]:
        """Every one of them."""
        return (*self.systems, *self.own)


@dataclass(frozen=True)
class Latency:
    """Timing of the systems side by side (PAPER §5, latency)."""

    seed: int = _method(low=0)
    pruners: tuple[str, ...] = _method()
    rows: int = _size(low=1)
    repetitions: int = _size(low=1)
    batch_tokens: tuple[int, ...] = _size(low=2)


@dataclass(frozen=True)
class Base:
    """The base VLM: a folder in this repository or a model id, how it is loaded, and how the embedded one is trained."""

    seed: int = _method(low=0)
    begin: str = _method(choices=("glyphs", "joint", "review"))
    glyphs_steps: int = _method(low=1)
    words_steps: int = _method(low=1)
    vision_steps: int = _method(low=1)
    lookup_steps: int = _method(low=1)
    calls_steps: int = _method(low=1)
    joint_steps: int = _method(low=1)
    review_steps: int = _method(low=1)
    glyphs_learning_rate: float = _method(low=0)
    words_learning_rate: float = _method(low=0)
    vision_learning_rate: float = _method(low=0)
    lookup_learning_rate: float = _method(low=0)
    calls_learning_rate: float = _method(low=0)
    joint_learning_rate: float = _method(low=0)
    review_learning_rate: float = _method(low=0)
    glyphs_work: int = _method(low=1)
    words_work: int = _method(low=1)
    vision_work: int = _method(low=1)
    lookup_work: int = _method(low=1)
    calls_work: int = _method(low=1)
    joint_work: int = _method(low=1)
    review_work: int = _method(low=1)
    warmup_steps: int = _method(low=1)
    decay_fraction: float = _method(low=0, high=1)
    weight_decay: float = _method(low=0)
    model: str = _size()
    dtype: str = _size(choices=("float32", "bfloat16"))
    device: str = _size(choices=("cpu", "cuda"))
    launch: str = _size()


@dataclass(frozen=True)
class Plan:
    """What the costs are counted for, before anything runs. ``bench``: a folder of `awares bench --train`, or nothing."""

    gpu: str = _method(choices=("a100", "h100", "h200"))
    gpus: int = _method(low=1)
    utilisation: float = _method(low=0.01, high=1)
    bench: str = _method()


@dataclass(frozen=True)
class Report:
    """Figures and galleries."""

    dpi: int = _method(low=30)
    gallery: int = _size(low=1)


SECTIONS: dict[str, type] = {
    "paths": Paths,
    "data": Data,
    "crops": Crops,
    "protocol": Protocol,
    "curation": Curation,
    "sft": Sft,
    "grpo": Grpo,
    "evaluation": Evaluation,
    "comparison": Comparison,
    "latency": Latency,
    "base": Base,
    "plan": Plan,
    "report": Report,
}


@dataclass(frozen=True)
class Params:
    """Everything a stage needs, typed. ``root`` is the folder of params.yaml."""

    root: Path
    profile: str
    variant: str
    changed: frozenset[str]  # the sections that the variant changes
    seed: int
    seeds: tuple[int, ...]  # further training seeds, for means over seeds
    threads: int
    ablations: dict[str, tuple[str, ...]] = field(hash=False)  # first stage of their own -> variants
    unseen: bool  # evaluation.seed was overridden: evaluation then generates rows that no stage has seen
    paths: Paths
    data: Data
    crops: Crops
    protocol: Protocol
    curation: Curation
    sft: Sft
    grpo: Grpo
    evaluation: Evaluation
    comparison: Comparison
    latency: Latency
    base: Base
    plan: Plan
    report: Report

    def path(self, name: str) -> Path:
        """``name`` relative to the repository root; an absolute path stays as it is."""
        return self.root / name

    def run_dir(self, stage: str) -> Path:
        """runs/<profile>/<stage>, and /<variant>-s<seed> below it for the stages that depend on the training seed.

        A stage before the first one that the variant changes is the main line's: both share its folder. Evaluation on an
        unseen seed writes to runs/<profile>/unseen/<variant>-s<seed>-e<evaluation seed>.
        """
        folder = self.path(self.paths.runs) / self.profile / stage
        own = self.variant != "main" and (stage not in DECIDES or bool(self.changed & DECIDES[stage]))
        if stage not in SEEDED_STAGES:
            return folder / self.variant if own and stage in DECIDES else folder
        name = f"{self.variant if own else 'main'}-s{self.seed}"
        if stage == "evaluation" and self.unseen:
            return folder.with_name("unseen") / f"{name}-e{self.evaluation.seed}"
        return folder / name

    def model_path(self) -> Path | str:
        """The base model: a folder of this repository, or else an id of the model hub as it stands in params.yaml."""
        local = self.path(self.base.model)
        return local if local.parent.is_dir() else self.base.model

    def launch(self, stage: str) -> str:
        """The accelerate configuration in which ``stage`` (sft or grpo) trains; "" = in the notebook's process."""
        return (self.sft.launch if stage == "sft" else "") or self.base.launch

    def report_dir(self) -> Path:
        """reports/<profile>: what a visitor reads."""
        return self.path(self.paths.reports) / self.profile

    def as_dict(self) -> dict[str, Any]:
        """Plain dict of every value except the root folder: for logs and for keying checkpoints by their inputs."""
        values = dataclasses.asdict(self)
        for name in ("root", "changed", "ablations"):  # say where and beside what, not how
            del values[name]
        return values


def load_params(
    profile: str | None = None,
    variant: str = "main",
    overrides: str | Mapping[str, Any] | None = None,
    path: str | Path = "params.yaml",
) -> Params:
    """Read params.yaml into :class:`Params`.

    ``profile`` None or "" means the file's own ``profile:``. ``variant`` names an entry of ``variants:``, a mapping of
    dotted keys to values (`profiles.<name>.` before a key: for that profile only); ``overrides`` is such a mapping too, or its
    YAML text, e.g. ``"{seed: 2, grpo.beta: 0.0}"``, and comes last. A relative ``path`` is looked for in the working folder and
    then upwards, so that a notebook finds it from notebooks/.

    Raises AwaresError naming the dotted key and the allowed values.
    """
    file = find_file(Path(path))
    raw = read_yaml(file)
    profile = profile or _check("profile", raw.get("profile"), str, {})
    variants = _mapping("variants", raw.get("variants"))
    variant_values = _mapping(f"variants.{variant}", _choose("variant", variant, variants) or {})
    variant_values = {
        _own_key(k): v
        for k, v in variant_values.items()
        if not str(k).startswith("profiles.") or str(k).startswith(f"profiles.{profile}.")
    }
    override_values = parse_overrides(overrides)
    values = _merge(raw, _choose("profile", profile, _mapping("profiles", raw.get("profiles"))), profile, file)
    seen_seed = values["evaluation"].get("seed")
    if values["seed"] in _check("seeds", values["seeds"], tuple[int, ...], {"low": 0}):
        raise AwaresValueError(
            f"seeds {values['seeds']} are the further training seeds: seed {values['seed']} is not one"
        )
    for source, changes in ((f"variants.{variant}", variant_values), ("overrides", override_values)):
        _apply(values, changes, source)
    sections = {name: _section(name, kind, values[name], file) for name, kind in SECTIONS.items()}
    params = Params(
        root=file.parent,
        profile=profile,
        variant=variant,
        changed=frozenset(str(key).partition(".")[0] for key in variant_values),
        seed=_check("seed", values["seed"], int, {"low": 0}),
        seeds=_check("seeds", values["seeds"], tuple[int, ...], {"low": 0}),
        threads=_check("threads", values["threads"], int, {"low": 1}),
        ablations=_ablations(raw, variants),
        unseen=values["evaluation"]["seed"] != seen_seed,
        **sections,
    )
    _check_whole(params)
    return params


def _ablations(raw: Mapping[str, Any], variants: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The lists of variants that the pipeline runs, each of them known and listed where it begins to differ."""
    lists = {}
    for stage, names in _mapping("ablations", raw.get("ablations", {})).items():
        place = f"ablations.{stage}"
        _choose("stage of ablations", stage, {name: None for name in (*ABLATED, SYSTEM_LIST)})
        lists[stage] = _check(place, names, tuple[str, ...], {})
        for name in lists[stage]:
            changes = _mapping(f"variants.{name}", _choose(f"variant of {place}", name, variants))
            sections = {_own_key(key).partition(".")[0] for key in changes}
            first = next((one for one in ABLATED if sections & DECIDES[one]), None)
            if first == ABLATED[0] and "grpo" in sections:
                first = SYSTEM_LIST
            if first != stage:
                raise AwaresValueError(f"{place}: variant {name} first changes {first or 'nothing'}: list it there")
    return lists


def _own_key(dotted: Any) -> str:
    """`profiles.<name>.<section>.<key>`, a value for one profile only, is `<section>.<key>` there."""
    parts = str(dotted).split(".")
    return ".".join(parts[2:] if parts[0] == "profiles" else parts)


def differences(before: Params, after: Params) -> list[tuple[str, Any, Any]]:
    """The parameters in which two settings differ: (dotted key, before, after)."""
    pairs = zip(_flat(before.as_dict()), _flat(after.as_dict()), strict=True)
    return [(key, old, new) for (key, old), (_, new) in pairs if old != new and key != "variant"]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def overrides_of(params: Params) -> dict[str, Any]:
    """Overrides with which `load_params` gives these very settings again, whatever the file says."""
    values = {section: dataclasses.asdict(getattr(params, section)) for section in SECTIONS}
    return {"seed": params.seed, "threads": params.threads, **dict(_flat(values))}


def parse_overrides(overrides: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Dotted key -> value, from a mapping or from its YAML text; empty text means no override."""
    if isinstance(overrides, str):
        try:
            overrides = yaml.safe_load(overrides)
        except yaml.YAMLError as error:
            raise AwaresValueError(
                f'overrides are not YAML: {error}. Write e.g. "{{seed: 2, grpo.beta: 0.0}}"'
            ) from error
    if overrides is None:
        return {}
    return dict(_mapping("overrides", overrides))


def find_file(path: Path) -> Path:
    """A relative ``path`` in the working folder or the nearest folder above that has it; AwaresError if none does."""
    folders = [Path.cwd(), *Path.cwd().parents] if not path.is_absolute() else [path.parent]
    for folder in folders:
        if (folder / path).is_file():
            return (folder / path).resolve()
    raise AwaresFileError(f"{path}: no such file here or in a folder above; run from inside the repository")


def read_yaml(file: Path, named_by: str = "") -> dict[str, Any]:
    """The mapping in a YAML file; AwaresError for none. ``named_by``: the parameter that names the file, for the message."""
    if not file.is_file():
        raise AwaresFileError(f"{file}: no such file{f'; {named_by} names it' if named_by else ''}")
    try:
        return _mapping(file.name, yaml.safe_load(file.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise AwaresValueError(f"{file.name} is not YAML: {error}") from error


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise AwaresValueError(f"{key} must be a mapping of keys to values, not {value!r}")
    return dict(value)


def _choose(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise AwaresValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}")
    return known[name]


def _merge(raw: dict[str, Any], sizes: Any, profile: str, file: Path) -> dict[str, Any]:
    """Lay the profile's size keys beside the method keys of every section, each key allowed in its own place only."""
    sizes = _mapping(f"profiles.{profile}", sizes)
    _known_keys(file.name, raw, {"profile", "seed", "seeds", "variants", "ablations", "profiles", *SECTIONS})
    _known_keys(f"profiles.{profile}", sizes, {"threads", *SECTIONS})
    values = {"seed": raw.get("seed"), "seeds": raw.get("seeds"), "threads": sizes.get("threads")}
    for name, kind in SECTIONS.items():
        method, size = _mapping(name, raw.get(name, {})), _mapping(f"profiles.{profile}.{name}", sizes.get(name, {}))
        _known_keys(name, method, {f.name for f in dataclasses.fields(kind) if not f.metadata["size"]})
        _known_keys(
            f"profiles.{profile}.{name}", size, {f.name for f in dataclasses.fields(kind) if f.metadata["size"]}
        )
        values[name] = {**method, **size}
    return values


def _known_keys(place: str, found: Mapping[str, Any], known: set[str]) -> None:
    for key in found:
        if key not in known:
            raise AwaresValueError(f"unknown key {place}.{key}: known are {', '.join(sorted(known)) or 'none'}")


def _apply(values: dict[str, Any], changes: Mapping[str, Any], source: str) -> None:
    """Set dotted keys in the merged values; a key that no section has is an error."""
    for dotted, value in changes.items():
        section, _, key = str(dotted).partition(".")
        if dotted in ("seed", "threads"):
            values[dotted] = value
        elif section in SECTIONS:
            _known_keys(f"{source}: {section}", {key: value}, {f.name for f in dataclasses.fields(SECTIONS[section])})
            values[section][key] = value
        else:
            raise AwaresValueError(
                f"{source}: unknown key {dotted}: write seed, threads or <section>.<key>, "
                f"with section one of {', '.join(SECTIONS)}"
            )


def _section(name: str, kind: type, values: Mapping[str, Any], file: Path) -> Any:
    hints = typing.get_type_hints(kind)
    checked = {}
    for one in dataclasses.fields(kind):
        if one.name not in values:
            place = f"profiles.<profile>.{name}" if one.metadata["size"] else name
            raise AwaresValueError(f"{name}.{one.name} is missing: add it to {file.name} under {place}")
        checked[one.name] = _check(f"{name}.{one.name}", values[one.name], hints[one.name], one.metadata)
    return kind(**checked)


def _check(key: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """``value`` as ``kind`` and within ``limits``, or AwaresError naming ``key``."""
    if typing.get_origin(kind) is tuple:
        least = limits.get("least", 1)
        if not isinstance(value, list | tuple) or len(value) < least or len(set(map(str, value))) < len(value):
            some = "of at least one value" if least else "of values"
            raise AwaresValueError(f"{key} must be a list {some}, none of them twice, not {value!r}")
        return tuple(_check(key, item, typing.get_args(kind)[0], limits) for item in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise AwaresValueError(f"{key} must be {_KINDS[kind]}, not {value!r}{_hint(value, kind)}")
    if limits.get("choices") and value not in limits["choices"]:
        raise AwaresValueError(f"{key}: unknown {value!r}, choose from {', '.join(limits['choices'])}")
    low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
    if kind in (int, float) and not (math.isfinite(value) and low <= value <= high):
        raise AwaresValueError(f"{key} must lie between {low} and {high}, not {value!r}")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a name", bool: "true or false"}


def _hint(value: Any, kind: Any) -> str:
    """YAML 1.1 reads 1e-5 as text: say what to write instead."""
    if kind is not float or not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    mantissa, _, exponent = value.lower().partition("e")
    mended = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if exponent else value
    if exponent and exponent[0] not in "+-":
        mended = mended.replace("e", "e+")
    return f": YAML reads it as text, write {mended} (with a decimal point and a signed exponent, without quotes)"


def _check_whole(params: Params) -> None:
    """Conditions that bind several keys."""
    seeds = {
        "data.train_seed": params.data.train_seed,
        "data.validation_seed": params.data.validation_seed,
        "evaluation.seed": params.evaluation.seed,
        "base.seed": params.base.seed,
    }
    if len(set(seeds.values())) < len(seeds):
        raise AwaresValueError(f"data seeds must differ, so that no row is seen twice: {seeds}")
    if FREE_BOX in params.crops.offered and len(params.crops.offered) > 1:
        raise AwaresValueError("crops.offered: `box` stands alone, it holds every other region")
    if not {"all", FREE_BOX} & set(params.crops.offered):
        raise AwaresValueError("crops.offered must hold `all`: some evidence spans the whole image")
    if params.protocol.name != "ours" and params.crops.offered != CROP_NAMES:
        raise AwaresValueError(f"protocol.name {params.protocol.name} has fixed regions: crops.offered must be all ten")
    for name, section in (("sft", params.sft), ("grpo", params.grpo)):
        if section.batch_size % section.per_device_batch_size:
            raise AwaresValueError(
                f"{name}.batch_size {section.batch_size} must be a multiple of "
                f"{name}.per_device_batch_size {section.per_device_batch_size}"
            )
    if params.curation.lucky_margin and params.curation.engine != "local":
        raise AwaresValueError(
            f"curation.lucky_margin {params.curation.lucky_margin} needs the logits of curation.engine local: "
            f"{params.curation.engine!r} answers in text alone; set it to 0"
        )
    if params.evaluation.dial_rows < params.evaluation.frontier_rows:
        raise AwaresValueError(
            f"evaluation.dial_rows {params.evaluation.dial_rows} must be at least evaluation.frontier_rows "
            f"{params.evaluation.frontier_rows}: the dial is drawn under the frontier, on the same rows"
        )
    if params.grpo.batch_size % params.grpo.generations:
        raise AwaresValueError(
            f"grpo.batch_size {params.grpo.batch_size} counts completions and must be a multiple of "
            f"grpo.generations {params.grpo.generations}"
        )
