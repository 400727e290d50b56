"""Read params.yaml: the keys at the top, those of a profile, the changes of a variant, overrides.

params.yaml has two layers. Keys of the *method* are at the top, section by section. Keys of the *size* of a run are
under ``profiles.<name>.<section>``. A section of `Params` holds both: ``params.sft.tool_turn_weight`` comes from the
top, ``params.sft.batch_size`` from the profile.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ValidationError

from awares import registry
from awares.errors import AwaresFileError, AwaresValueError, first_fault
from awares.settings import (  # noqa: F401  (callers import the sections from here)
    CROP_NAMES,
    DECIDES,
    FREE_BOX,
    SYSTEMS,
    TASKS,
    Base,
    Crops,
    Evaluation,
    Grpo,
    Params,
    Sft,
)


def load_params(
    profile: str | None = None,
    variant: str = "main",
    overrides: str | Mapping[str, Any] | None = None,
    path: str | Path = "params.yaml",
) -> Params:
    """Read params.yaml into `Params`.

    ``profile`` None or "": the file's own ``profile:``. ``variant``: an entry of ``variants:``, a mapping of dotted
    keys to values (with `profiles.<name>.` before a key: for that profile only). ``overrides``: such a mapping or its
    YAML text, e.g. ``"{seed: 2, grpo.beta: 0.0}"``; it is applied last. A relative ``path`` is searched in the working
    folder and the folders above. Raises AwaresError that names the dotted key and where its value comes from.
    """
    file = find_file(Path(path))
    values = read_yaml(file)
    own_profile, profiles, variants = (values.pop(name, None) for name in ("profile", "profiles", "variants"))
    profile = profile or own_profile
    _merge(values, _entry("profile", profile, profiles), f"profiles.{profile}")
    elsewhere = tuple(f"profiles.{name}." for name in profiles if name != profile)
    chosen = _entry("variant", variant, variants)
    changes = {_own_key(key): value for key, value in chosen.items() if not key.startswith(elsewhere)}
    stored = values.get("seed"), _mapping("evaluation", values.get("evaluation")).get("seed")
    sources = {f"variants.{variant}": changes, "overrides": parse_overrides(overrides)}
    for source, keys in sources.items():
        for key, value in keys.items():
            _set(values, key, value, source)
    values |= {"root": file.parent, "profile": profile, "variant": variant, "changed": {*map(_section_of, changes)}}
    try:
        params = Params(**values, unseen=values["evaluation"].get("seed") != stored[1])
    except ValidationError as error:
        key, message = _explain(error)
        source = next((name for name, keys in sources.items() if any(one.startswith(key) for one in keys)), file.name)
        raise AwaresValueError(f"{source}: {message}") from error
    if stored[0] in params.seeds:
        raise AwaresValueError(
            f"seeds {[*params.seeds]} are further training seeds: seed {stored[0]} is not one of them"
        )
    for problem in (*_conflicts(params), *_misplaced(params.ablations, variants)):
        raise AwaresValueError(problem)
    return params


def _merge(values: dict[str, Any], sizes: Mapping[str, Any], place: str) -> None:
    """Add the keys of a profile to those at the top; a key may not be in both."""
    values["threads"] = sizes.get("threads")
    for section in [name for name in sizes if name != "threads"]:
        method, size = _mapping(section, values.get(section, {})), _mapping(f"{place}.{section}", sizes[section])
        if twice := method.keys() & size.keys():
            raise AwaresValueError(f"{section}.{min(twice)} is at the top and under {place}: remove one of them")
        values[section] = {**method, **size}


def _own_key(dotted: str) -> str:
    return re.sub(r"^profiles\.\w+\.", "", dotted)


def _section_of(dotted: str) -> str:
    return _own_key(dotted).partition(".")[0]


def _set(values: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    *path, last = str(dotted).split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise AwaresValueError(f"{source}: unknown key {dotted}: {part} has no keys")
    values[last] = value


def _explain(error: ValidationError) -> tuple[str, str]:
    """The dotted key of the first error, and a sentence. An unknown key goes first: a misspelt key is missing, too."""
    first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
    path = [part for part in first["loc"] if isinstance(part, str)]
    if first["type"] == "unexpected_keyword_argument":
        known = fields(get_type_hints(Params)[path[0]] if path[1:] else Params)
        return ".".join(path), f"unknown key {'.'.join(path)}: known are {', '.join(one.name for one in known)}"
    hints = {
        "missing": ": add it to params.yaml (a size: under every profile)",
        "float_type": ": YAML reads an exponent without decimal point or sign as text, write 1.0e-5 or 1.0e+5",
    }
    return ".".join(path), first_fault(error) + hints.get(first["type"], "")


def _conflicts(params: Params) -> Iterator[str]:
    """Conditions that bind several keys."""
    data, crops, sft, grpo, evaluation = params.data, params.crops, params.sft, params.grpo, params.evaluation
    if len({data.train_seed, data.validation_seed, evaluation.seed}) < 3:
        yield "data.train_seed, data.validation_seed and evaluation.seed must differ, so that no row is seen twice"
    if FREE_BOX in crops.offered and len(crops.offered) > 1:
        yield "crops.offered: `box` must be alone, it covers every other region"
    if not {"all", FREE_BOX} & set(crops.offered):
        yield "crops.offered must contain `all`: some evidence spans the whole image"
    if params.protocol.name != "ours" and crops.offered != CROP_NAMES:
        yield f"protocol.name {params.protocol.name} has fixed regions: crops.offered must be all ten"
    for name, section in (("sft", sft), ("grpo", grpo)):
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


def _misplaced(ablations: Mapping[str, tuple[str, ...]], variants: Mapping[str, Any]) -> Iterator[str]:
    """Ablations that are not listed under the first stage that they change."""
    for stage, names in ablations.items():
        for name in names:
            if name not in variants:
                yield f"ablations.{stage}: unknown variant {name!r}: known are {', '.join(variants)}"
                continue
            sections = {*map(_section_of, _entry("variant", name, variants))}
            first = next((one for one in ("curation", "sft", "grpo") if sections & DECIDES[one]), None)
            if first == "curation" and "grpo" in sections:
                first = "systems"
            if first != stage:
                yield f"ablations.{stage}: variant {name} first changes {first or 'nothing'}: list it there"


def differences(before: Params, after: Params) -> list[tuple[str, Any, Any]]:
    """The parameters in which two settings differ: (dotted key, before, after)."""
    pairs = zip(_flat(before.as_dict()), _flat(after.as_dict()), strict=True)
    return [(key, old, new) for (key, old), (_, new) in pairs if old != new and key != "variant"]


def overrides_of(params: Params) -> dict[str, Any]:
    """Overrides with which `load_params` returns these settings again, whatever params.yaml says."""
    kept = {key: value for key, value in params.as_dict().items() if key not in ("profile", "variant", "unseen")}
    return dict(_flat(kept))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def parse_overrides(overrides: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Dotted key -> value, from a mapping or its YAML text; no text means no override."""
    try:
        values = yaml.safe_load(overrides) if isinstance(overrides, str) else overrides
    except yaml.YAMLError as error:
        raise AwaresValueError(f'overrides are not YAML: {error}. Write e.g. "{{seed: 2, grpo.beta: 0.0}}"') from error
    return _mapping("overrides", values or {})


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
    try:
        return _mapping(file.name, yaml.safe_load(file.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise AwaresValueError(f"{file.name} is not YAML: {error}") from error


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise AwaresValueError(f"{key} must be a mapping of keys to values, not {value!r}")
    return dict(value)


def _entry(kind: str, name: Any, table: Any) -> dict[str, Any]:
    """Entry ``name`` of the table of profiles or variants, itself a mapping."""
    known = _mapping(f"{kind}s", table)
    if name not in known:
        raise AwaresValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}")
    return _mapping(f"{kind}s.{name}", known[name] or {})
