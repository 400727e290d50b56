"""Read params.yaml into `Params`: the keys at the top and of a profile, the changes of a variant, overrides."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import StrictBool, ValidationError

from awares import registry
from awares.errors import AwaresFileError, AwaresValueError, first_fault
from awares.settings import (
    CROP_NAMES,
    FREE_BOX,
    Base,
    ComparedSystems,
    Count,
    CropSettings,
    Curation,
    Data,
    Distinct,
    Evaluation,
    Grpo,
    Latency,
    Listed,
    Paths,
    Plan,
    ProtocolSettings,
    Report,
    Section,
    Sft,
    Whole,
)  # fmt: skip

MAIN_SYSTEMS = ("full", "half", "no_image", "sft", "awares")  # the rows of Table 1 that the main line fills
# The sections that decide what a stage writes: a variant that changes none of them shares the main line's run.
DECIDES = {"data": {"data"}, "curation": {"data", "crops", "protocol", "curation", "base"}}
DECIDES["sft"] = DECIDES["curation"] | {"sft"}
DECIDES["grpo"] = DECIDES["sft"] | {"grpo"}
SEEDED_STAGES = ("sft", "grpo", "evaluation", "operating_curve", "latency")  # their run folders name the training seed


class Params(Section):
    """All settings of a run.

    ``root``: the folder of params.yaml. ``changed``: the sections that the variant changes. ``unseen``: whether
    ``evaluation.seed`` was changed, so that evaluation draws rows that no stage has seen.
    """

    root: Path
    profile: str
    variant: str
    changed: frozenset[str]
    unseen: StrictBool
    seed: Whole
    seeds: Listed[Whole]
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
        """runs/<profile>/<stage>; below it <variant> (data, curation) or <variant>-s<seed> (SEEDED_STAGES).

        A stage before the first one that the variant changes has the main line's folder. Evaluation on an unseen seed
        has unseen/<variant>-s<seed>-e<evaluation seed>, its operating curve the same name in operating_curve.
        """
        folder = self.path(self.paths.runs) / self.profile / stage
        if stage not in DECIDES and stage not in SEEDED_STAGES:
            return folder
        name = "main" if stage in DECIDES and not self.changed & DECIDES[stage] else self.variant
        if stage in SEEDED_STAGES:
            name = f"{name}-s{self.seed}"
        if stage in ("evaluation", "operating_curve") and self.unseen:
            name = f"{name}-e{self.evaluation.seed}"
            folder = folder.with_name("unseen") if stage == "evaluation" else folder
        return folder / name

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
        """All values that a result depends on as a plain dict: for logs and for the keys of checkpoints."""
        return {key: value for key, value in asdict(self).items() if key not in ("root", "changed", "ablations")}


def load_params(
    profile: str | None = None,
    variant: str = "main",
    overrides: str | Mapping[str, Any] | None = None,
    path: str | Path = "params.yaml",
) -> Params:
    """Read params.yaml into `Params`.

    ``profile`` None or "": the file's own. ``variant``: an entry of ``variants:``, dotted keys to values (a key that
    begins with `profiles.mini.` counts for that profile only). ``overrides``: the same, or its YAML text, e.g.
    ``"{seed: 2, grpo.beta: 0.0}"``; they are applied last. A relative ``path`` is searched in the working folder and
    the folders above. Raises AwaresError that names the dotted key.
    """
    file = find_file(Path(path))
    values = read_yaml(file)
    own_profile, profiles, variants = (values.pop(name, None) for name in ("profile", "profiles", "variants"))
    profile = profile or own_profile
    method, sizes = dict(_flat(values)), dict(_flat(_entry("profile", profile, profiles)))
    if twice := method.keys() & sizes.keys():
        raise AwaresValueError(f"{min(twice)} is at the top and under profiles.{profile}: remove one of them")
    stored = method | sizes
    own, chosen = f"profiles.{profile}.", _entry("variant", variant, variants)
    changes = {key.removeprefix(own): chosen[key] for key in chosen if key.startswith(own) or key[:9] != "profiles."}
    final = stored | changes | parse_overrides(overrides)
    about = {"root": file.parent, "profile": profile, "variant": variant, "changed": {*map(_section_of, changes)}}
    about["unseen"] = final.get("evaluation.seed") != stored.get("evaluation.seed")
    try:
        params = Params(**{**_nested(final), **about})
    except ValidationError as error:
        place = f"{file.name} (profile {profile}, variant {variant}{', overrides' if overrides else ''})"
        raise AwaresValueError(f"{place}: {first_fault(error)}") from error
    if stored["seed"] in params.seeds:
        raise AwaresValueError(f"seeds {[*params.seeds]} are further training seeds: remove seed {stored['seed']}")
    for problem in (*_conflicts(params), *_misplaced(params.ablations, variants)):
        raise AwaresValueError(problem)
    return params


def differences(before: Params, after: Params) -> list[tuple[str, Any, Any]]:
    """The parameters in which two settings differ: (dotted key, before, after), a section in params.yaml's order."""
    written = read_yaml(before.path("params.yaml"))
    places = [key for part in (written, written["profiles"][before.profile]) for key, _ in _flat(part)]
    sections, new = [*before.as_dict()], dict(_flat(after.as_dict()))
    found = [(key, old, new[key]) for key, old in _flat(before.as_dict()) if old != new[key] and key != "variant"]
    return sorted(found, key=lambda one: (sections.index(one[0].partition(".")[0]), [*places, one[0]].index(one[0])))


def parse_overrides(overrides: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Dotted key -> value, from a mapping or its YAML text; no text means no override."""
    return _parse("overrides", overrides) if isinstance(overrides, str) else _mapping("overrides", overrides or {})


def find_file(path: Path) -> Path:
    """``path`` in the working folder or the nearest folder above that has it; AwaresError if none has."""
    for folder in [Path.cwd(), *Path.cwd().parents]:
        if (folder / path).is_file():
            return (folder / path).resolve()
    raise AwaresFileError(f"{path}: no such file here or in a folder above; run from inside the repository")


def read_yaml(file: Path, named_by: str = "") -> dict[str, Any]:
    """The mapping in a YAML file, or AwaresError. ``named_by``: the parameter that names the file, for the message."""
    if not file.is_file():
        raise AwaresFileError(f"{file}: no such file{f'; {named_by} names it' if named_by else ''}")
    return _parse(file.name, file.read_text(encoding="utf-8"))


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        return _mapping(name, yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise AwaresValueError(f"{name}: not YAML, a mapping such as {{seed: 2, grpo.beta: 0.0}}: {error}") from error


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise AwaresValueError(f"{key} must be a mapping of keys to values, not {value!r}")
    return dict(value)


def _entry(kind: str, name: Any, table: Any) -> dict[str, Any]:
    known = _mapping(f"{kind}s", table)
    if name not in known:
        raise AwaresValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}")
    return _mapping(f"{kind}s.{name}", known[name] or {})


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for dotted, value in flat.items():
        *path, last = str(dotted).split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise AwaresValueError(f"unknown key {dotted}: {part} is a value and has no keys")
        section[last] = value
    return values


def _section_of(dotted: str) -> str:
    return re.sub(r"^profiles\.\w+\.", "", dotted).partition(".")[0]


def _conflicts(params: Params) -> Iterator[str]:
    """Conditions that bind several keys."""
    data, crops, grpo, evaluation = params.data, params.crops, params.grpo, params.evaluation
    if len({data.train_seed, data.validation_seed, evaluation.seed}) < 3:
        yield "data.train_seed, data.validation_seed and evaluation.seed must differ, so that no row is seen twice"
    if crops.offered != (FREE_BOX,) and (FREE_BOX in crops.offered or "all" not in crops.offered):
        yield "crops.offered must be [box], or named regions with `all`: some evidence spans the whole image"
    if params.protocol.name != "ours" and crops.offered != CROP_NAMES:
        yield f"protocol.name {params.protocol.name} has fixed regions: crops.offered must be all ten"
    for name, section in (("sft", params.sft), ("grpo", grpo)):
        if section.batch_size % section.per_device_batch_size:
            yield f"{name}.batch_size must be a multiple of per_device_batch_size {section.per_device_batch_size}"
    if grpo.batch_size % grpo.generations:
        yield f"grpo.batch_size counts completions: it must be a multiple of grpo.generations {grpo.generations}"
    if params.curation.lucky_margin and params.curation.engine != "local":
        yield "curation.lucky_margin needs logits, which only curation.engine local has: set it to 0"
    if registry.judge.builtin.get(evaluation.judge) == registry.SERVED:
        yield f"evaluation.judge {evaluation.judge} needs a server: choose a local judge"
    if evaluation.dial_rows < evaluation.frontier_rows:
        yield "evaluation.dial_rows must be at least evaluation.frontier_rows: both are drawn on the same rows"


def _misplaced(ablations: Mapping[str, tuple[str, ...]], variants: Any) -> Iterator[str]:
    """Ablations that are not listed under the first stage that they change."""
    for stage, name in [(stage, name) for stage, names in ablations.items() for name in names]:
        sections = {*map(_section_of, _entry(f"ablations.{stage} variant", name, variants))}
        first = next((one for one in ("curation", "sft", "grpo") if sections & DECIDES[one]), None)
        first = "systems" if first == "curation" and "grpo" in sections else first
        if first != stage:
            yield f"ablations.{stage}: variant {name} first changes {first or 'nothing'}: list it there"
