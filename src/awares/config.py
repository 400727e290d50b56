"""Read params.yaml into `Params`: the keys at the top and of a profile, the changes of a variant, overrides."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from awares import registry
from awares.errors import AwaresFileError, AwaresValueError, validated
from awares.settings import CROP_NAMES, DECIDES, FREE_BOX, Params

_Overrides = str | Mapping[str, Any] | None


def load_params(
    profile: str | None = None, variant: str = "main", overrides: _Overrides = None, path: str | Path = "params.yaml"
) -> Params:
    """Read params.yaml, in the working folder or one above, into `Params`; AwaresError names the dotted key.

    ``profile`` None or "": the file's own. ``variant``: an entry of ``variants:``, dotted keys to values (a key that
    begins with `profiles.mini.` counts for that profile only). ``overrides``: the same, or its YAML text, e.g.
    ``"{seed: 2, grpo.beta: 0.0}"``; they are applied last.
    """
    file = find_file(Path(path))
    values = read_yaml(file)
    if "profiles" not in values:
        raise AwaresValueError(f"{file} is no params.yaml of awares: run from inside the repository")
    own_profile, profiles, variants = (values.pop(name, None) for name in ("profile", "profiles", "variants"))
    profile = profile or own_profile
    method, sizes = _flat(values), _flat(_entry("profile", profile, profiles))
    if twice := method.keys() & sizes.keys():
        raise AwaresValueError(f"{min(twice)} is at the top and under profiles.{profile}: remove one of them")
    stored = method | sizes
    own, chosen = f"profiles.{profile}.", _entry("variant", variant, variants)
    changes = {key.removeprefix(own): chosen[key] for key in chosen if key.startswith(own) or key[:9] != "profiles."}
    final = stored | changes | as_mapping("overrides", overrides or {})
    about = {"root": file.parent, "profile": profile, "variant": variant, "changed": {*map(_section_of, changes)}}
    about["unseen"] = final.get("evaluation.seed") != stored.get("evaluation.seed")
    place = f"{file.name} (profile {profile}, variant {variant}{', overrides' if overrides else ''})"
    params = validated(Params, {**_nested(final), **about}, place)
    if stored["seed"] in params.seeds:
        raise AwaresValueError(f"seeds {[*params.seeds]} are further training seeds: remove seed {stored['seed']}")
    if missing := {*params.plus_seeds} - {stored["seed"], *params.seeds}:
        raise AwaresValueError(f"plus_seeds {sorted(missing)} are neither seed nor in seeds: the main line lacks them")
    for problem in (*_conflicts(params), *_misplaced(params.ablations, variants)):
        raise AwaresValueError(problem)
    return params


def differences(before: Params, after: Params) -> list[tuple[str, Any, Any]]:
    """The parameters in which two settings differ: (dotted key, before, after), in the order of `Params`."""
    old, new = _flat(before.as_dict()), _flat(after.as_dict())
    return [(key, old[key], new[key]) for key in old if old[key] != new[key] and key != "variant"]


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
    return as_mapping(str(file), file.read_bytes())


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for number, (key, _) in enumerate(node.value):
            if key.value in [before.value for before, _ in node.value[:number]]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)


def as_mapping(name: str, value: Any) -> dict[str, Any]:
    """``value``, a mapping or its YAML text; AwaresValueError with ``name`` for anything else."""
    try:
        value = (yaml.load(value, Loader=_UniqueKeys) or {}) if isinstance(value, str | bytes) else value
    except (yaml.YAMLError, RecursionError) as error:
        raise AwaresValueError(f"{name}: not YAML, a mapping such as {{seed: 2, grpo.beta: 0.0}}: {error}") from error
    if not isinstance(value, Mapping):
        raise AwaresValueError(f"{name} must be a mapping of keys to values, not {value!r}")
    return dict(value)


def _entry(kind: str, name: Any, table: Any) -> dict[str, Any]:
    known = as_mapping(f"{kind}s", table)
    if not isinstance(name, str) or name not in known:
        raise AwaresValueError(f"unknown {kind} {name!r}: known are {', '.join(known)}")
    return as_mapping(f"{kind}s.{name}", known[name] or {})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        more = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        if twice := flat.keys() & more.keys():
            raise AwaresValueError(f"{min(twice)} occurs twice: remove one of them")
        flat |= more
    return flat


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
    parts = dotted.split(".")
    return parts[2 if parts[0] == "profiles" else 0]


def _conflicts(params: Params) -> Iterator[str]:
    """Conditions that bind several keys."""
    data, crops, grpo, evaluation = params.data, params.crops, params.grpo, params.evaluation
    if len({data.train_seed, data.validation_seed, evaluation.seed}) < 3:
        yield "data.train_seed, data.validation_seed and evaluation.seed must differ, so that no row is seen twice"
    if crops.offered != (FREE_BOX,) and (FREE_BOX in crops.offered or "all" not in crops.offered):
        yield "crops.offered must be [box], or named regions with `all`: some evidence spans the whole image"
    if params.protocol.name != "ours" and crops.offered != CROP_NAMES:
        yield f"protocol.name {params.protocol.name} has fixed regions: crops.offered must be all ten"
    if crops.geometry == "released" and FREE_BOX in crops.offered:
        yield "crops.geometry released has no free boxes: offer named regions, or use geometry ours"
    if 0 < crops.max_pixels < crops.min_pixels:
        yield f"crops.max_pixels {crops.max_pixels} must be at least crops.min_pixels {crops.min_pixels}"
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
        if first != {"beyond": "grpo", "plus": "systems"}.get(stage, stage):
            yield f"ablations.{stage}: variant {name} first changes {first or 'nothing'}: list it there"
