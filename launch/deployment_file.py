"""Reads deployment files, applies overrides, and says what is wrong with them in one message."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from truedag.launch.deployment import Deployment
from truedag.launch.errors import DeploymentError
from truedag.launch.workload import WORKLOADS, open_source
from truedag.model.checkpoint import Checkpoint
from truedag.model.errors import ModelError
from truedag.parallel.errors import DataError

_SHIPPED = Path(__file__).parent / "deployments"
_PATHS = (("workload", "text"), ("workload", "tokenizer"), ("model", "huggingface"), ("weights",))
# A key that stands for others, which take its place before the section is checked.
_STAND_INS: Mapping[tuple[str, ...], tuple[str, ...]] = {("model",): ("huggingface",)}


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-5 is a number, off is a word, and no key stands twice in one place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(problem=f"the key {key} stands twice, again in line {line}")
            seen.add(str(key))
        return super().construct_mapping(node, deep=deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One ``key.path=value`` of a command line."""

    text: str
    path: tuple[str, ...]
    value: object


def shipped_deployments() -> dict[str, Path]:
    """The files that ship with truedag, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"), key=lambda path: path.stem)}


def load_deployment(name_or_path: str, overrides: Sequence[str]) -> tuple[Path, Deployment]:
    """Read a deployment by the name of one that ships or by a file's path; return the file and what it says.

    Raises:
        DeploymentError: there is no such deployment, or it or an override is wrong.
    """
    path = _find(name_or_path)
    values = _read(path)
    _resolve_paths(values, path.parent)
    parsed = [_parse_override(text) for text in overrides]
    for override in parsed:
        _apply(override, values, path)
    _resolve_paths(values, Path.cwd())
    _refuse_truth_values(values, path, parsed)
    try:
        deployment = Deployment.model_validate(values)
    except ValidationError as error:
        raise DeploymentError(_explain(error, path, parsed)) from error
    try:
        open_source(deployment.workload, deployment.model)
    except DataError as error:
        told = {override.path for override in parsed}
        key = next((key for key in ("tokenizer", "token_dtype") if ("workload", key) in told), "text")
        raise DeploymentError(f"{_origin(('workload', key), path, parsed)}: workload.{key}: {error}") from error
    if deployment.weights is not None:
        try:
            Checkpoint(deployment.weights, deployment.model)
        except ModelError as error:
            raise DeploymentError(f"{_origin(('weights',), path, parsed)}: weights: {error}") from error
    return path, deployment


def _find(name_or_path: str) -> Path:
    shipped = shipped_deployments()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise DeploymentError(f"there is no deployment file {name_or_path}")
    raise DeploymentError(
        f"unknown deployment {name_or_path!r}{_did_you_mean(name_or_path, shipped)}; "
        f"those that ship are {', '.join(shipped)}; a file of your own is named by its path, ending in .yaml"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path} cannot be read: {error}") from error
    except yaml.constructor.ConstructorError as error:
        raise DeploymentError(f"{path}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise DeploymentError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise DeploymentError(f"{path} holds no mapping of keys (name, model, strategy, workload, ...)")
    return values


def _parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise DeploymentError(f"override {text!r} is not of the form key.path=value, as in model.num_layers=4")
    try:
        return Override(text=text, path=tuple(key.split(".")), value=yaml.load(value, Loader=_Loader))  # noqa: S506
    except yaml.YAMLError as error:
        raise DeploymentError(f"override {text!r}: the value is no YAML: {error}") from error


def _apply(override: Override, values: dict[str, Any], path: Path) -> None:
    section = values
    for depth, key in enumerate(override.path[:-1], start=1):
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            where = ".".join(override.path[:depth])
            valid = _keys_at(override.path[: depth - 1])
            hint = "" if key in valid else f"; there is no key {where}{_did_you_mean(key, valid)}"
            raise DeploymentError(
                f"override {override.text!r}: {where} is {inner!r} in {path} and has no keys: "
                f"override it as a whole{hint}"
            )
        section = inner
    section[override.path[-1]] = override.value


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make paths absolute: a deployment file means its own folder, a command line the current one."""
    for place in _PATHS:
        section: object = values
        for key in place[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(place[-1]), str):
            section[place[-1]] = str((folder / section[place[-1]]).resolve())


def _refuse_truth_values(values: Mapping[str, Any], path: Path, overrides: Sequence[Override]) -> None:
    """Refuse true, false, inf and nan where a number must stand: Python takes them for numbers."""
    for section, inner in values.items():
        fields = _fields(Deployment).get(section)
        if not isinstance(inner, dict):
            continue
        allowed = {name: member for part in _members(fields) for name, member in _fields(part).items()}
        for key, value in inner.items():
            members = _members(allowed.get(key))
            is_truth = isinstance(value, bool) and bool not in members and (int in members or float in members)
            if is_truth or (isinstance(value, float) and not math.isfinite(value)):
                origin = _origin((section, key), path, overrides)
                raise DeploymentError(f"{origin}: {section}.{key}={value!r}: must be a finite number")


def _explain(error: ValidationError, path: Path, overrides: Sequence[Override]) -> str:
    problems = [_explain_one(details, path, overrides) for details in error.errors(include_url=False)]
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} things are wrong:", *problems])


def _explain_one(details: ErrorDetails, path: Path, overrides: Sequence[Override]) -> str:
    full = tuple(str(part) for part in details["loc"])
    # Inside a workload, pydantic names its kind too.
    location = full[:1] + full[2:] if full[:1] == ("workload",) and full[1:2] != () and full[1] in WORKLOADS else full
    key = ".".join(location)
    origin = _origin(location, path, overrides)
    match details["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            valid = _keys_at(full[:-1])
            within = f"in {'.'.join(location[:-1])}" if location[:-1] else "at the top"
            of_kind = f" of kind {full[1]}" if full != location else ""
            return (
                f"{origin}: unknown key {key}{_did_you_mean(location[-1], valid)}; "
                f"valid {within}{of_kind}: {', '.join(valid)}"
            )
        case "missing":
            return f"{origin}: {key} is missing"
        case "union_tag_invalid":
            origin = _origin((*location, "kind"), path, overrides)
            return f"{origin}: {key}.kind={details['ctx']['tag']!r}: must be one of {', '.join(WORKLOADS)}"
        case "dataclass_type" | "model_type" | "model_attributes_type":
            valid = _keys_at(full)
            return f"{origin}: {key}={details['input']!r}: must hold keys, of {', '.join(valid)}"
        case "value_error":
            message = str(details["ctx"]["error"])
            return f"{origin}: {key}: {message}" if key else f"{origin}: {message}"
        case _:
            return f"{origin}: {key}={details['input']!r}: {details['msg'][0].lower()}{details['msg'][1:]}"


def _origin(location: tuple[str, ...], path: Path, overrides: Sequence[Override]) -> str:
    """What to mend: the overrides that say something at or inside the location, else the file."""
    guilty = [
        repr(override.text)
        for override in overrides
        if override.path[: len(location)] == location or location[: len(override.path)] == override.path
    ]
    return f"{'override' if len(guilty) == 1 else 'overrides'} {', '.join(guilty)} of {path}" if guilty else str(path)


def _keys_at(location: Sequence[str]) -> list[str]:
    """The valid keys of the section at a location; none where there is no such section."""
    sections: list[object] = [Deployment]
    rest = tuple(location)
    if rest[:1] == ("workload",) and rest[1:2] != () and rest[1] in WORKLOADS:
        sections, rest = [WORKLOADS[rest[1]]], rest[2:]
    for key in rest:
        sections = [member for section in sections for member in _members(_fields(section).get(key))]
    names = [name for section in sections for name in _fields(section)]
    return list(dict.fromkeys([*names, *_STAND_INS.get(tuple(location), ())]))


def _fields(section: object) -> Mapping[str, object]:
    """The fields of a section and their types."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    if isinstance(section, type) and dataclasses.is_dataclass(section):
        hints = get_type_hints(section)
        return {field.name: hints[field.name] for field in dataclasses.fields(section)}
    return {}


def _members(annotation: object) -> list[object]:
    """The types that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for choice in get_args(annotation) for member in _members(choice)]
    return [annotation]


def _did_you_mean(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
