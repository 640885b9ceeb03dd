"""Loads and validates options. Flat options are {"section.key": value}, as in overrides and messages."""

import json
import os
import shlex
import typing
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from utils.config.options import DATA_TYPES, LEGACY, REMOVED_KEYS, WITHOUT_FOLDER, Options
from utils.config.plugins import load_plugins, with_absolute_plugins
from utils.errors import UserError, closest
from utils.files import REPOSITORY, read_json_object, weights_file

WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
WORDS |= {list[int]: "a list of whole numbers", list[str]: "a list of strings"}
WEIGHTS = "model.pretrained.pretrained_weights"
FOLDERS = ("json", "json/server", "json/baselines")
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most"}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; empty dicts disappear."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{'a.b': 1} -> {'a': {'b': 1}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[last] = value
    return tree


def _field_tree(group: BaseModel) -> dict[str, Any]:
    fields = type(group).model_fields
    return {k: _field_tree(v.default) if isinstance(v.default, BaseModel) else v for k, v in fields.items()}


FIELDS: dict[str, FieldInfo] = flatten(_field_tree(Options()))
LEGACY_KEYS = flatten(LEGACY)


def is_option(key: str) -> bool:
    """Whether a dotted key is an option, or one of a plugin in `own`."""
    return key in FIELDS or key.startswith("own.")


def find_option_file(name: str, *, beside: Path = Path(), asked: str = "--opt") -> Path:
    """Finds an option file by path or by name in json/ or its subfolders; errors name the flag `asked`."""
    folders = [root / folder for root in (Path(), REPOSITORY) for folder in FOLDERS]
    for folder in (beside, Path(), *folders):
        for path in (folder / name, folder / f"{name}.json"):
            if os.path.isfile(path):
                return path
    known = sorted({path.name for folder in folders for path in folder.glob("*.json")})
    hint = closest(name.removesuffix(".json"), [file.removesuffix(".json") for file in known])
    there = f"in {', '.join(FOLDERS)}.{hint.replace('?', '.json?')} Available: {', '.join(known)}"
    raise UserError(f"{asked} {name}: no such file, and no such name {there}")


def read_option_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads the flat options of a file, merged over those of its `base`; a `description` is ignored."""
    if path in seen:
        raise UserError(f"{path}: base: the option files form a cycle; remove one base")
    tree = read_json_object(path)
    groups = all(isinstance(value, dict) for value in tree.values())
    if tree and groups and tree.keys().isdisjoint(Options.model_fields):
        raise UserError(f"{path}: is not an option file; if it holds variants, give it to --variants")
    base, _ = tree.pop("base", None), tree.pop("description", None)
    flat = with_absolute_plugins(flatten(tree), path.parent)
    if base is None:
        return flat
    base_path = find_option_file(str(base), beside=path.parent, asked=f"{path}: base")
    return read_option_file(base_path, (*seen, path)) | flat


def load_options(path: Path, overrides: dict[str, Any] | None = None) -> Options:
    """Reads an option file, applies overrides, runs plugins and validates the result; see `build_options`."""
    flat = read_option_file(path) | flatten(overrides or {})
    load_plugins(flat, trusted=True)
    return build_options(flat, source=str(path))


def build_options(flat: dict[str, Any], *, source: str) -> Options:
    """Validates flat options and fills in the defaults; the error lists all mistakes in `source`."""
    valid = {key: value for key, value in flat.items() if is_option(key)}
    contradictions = []
    try:
        options = Options.model_validate(nest(valid))
    except ValidationError as error:  # a location is a key, and an index if the value is a list
        failed = {".".join(part for part in each["loc"] if isinstance(part, str)) for each in error.errors()}
        valid = {key: value for key, value in valid.items() if key not in failed}
        try:
            Options.model_validate(nest(valid), context=failed)
        except ValidationError as error:
            contradictions = error.errors()[0]["ctx"]["mistakes"]
    mistakes = [_mistake(key, value) for key, value in flat.items() if key not in valid]
    if mistakes := [*filter(None, mistakes), *contradictions]:
        raise UserError(mistakes, source)
    return options


def _mistake(key: str, value: Any) -> str | None:
    shown = json.dumps(value)
    if key in FIELDS:
        registered = any(isinstance(part, list) for part in FIELDS[key].metadata)
        hint = ", or a name that a file in plugins registers" if registered else ""
        return f"{key} is {shown}, must be {allowed(FIELDS[key])}{hint}"
    if key in LEGACY_KEYS:
        only = json.dumps(LEGACY_KEYS[key])
        wrong = f"{key} is {shown}, but has no effect; delete it or set it to {only}"
        return None if shown == only else wrong
    if key in REMOVED_KEYS:
        return f"{key} was removed ({REMOVED_KEYS[key]}); delete it"
    return f"{key} (value {shown}) is not an option.{closest(key, [*FIELDS, *LEGACY_KEYS])}"


def allowed(field: FieldInfo) -> str:
    """Describes the values that an option may have."""
    kind, kinds = field.annotation, typing.get_args(field.annotation)
    for part in field.metadata:
        if isinstance(part, str):
            return part
    choices = [part for part in field.metadata if isinstance(part, list)]
    if choices or typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(json.dumps, *choices or [kinds]))
    words = [WORDS.get(kinds[0] if NoneType in kinds else kind, "a string")]
    for part in field.metadata:
        words += [f"{word} {getattr(part, name)}" for name, word in BOUNDS.items() if hasattr(part, name)]
    return ", ".join(words) + (" or null" if NoneType in kinds else "")


def download_hint(data_type: str, folder: str) -> str:
    """How to download a published data set; "" for others."""
    if data_type not in DATA_TYPES[: DATA_TYPES.index("directory")]:
        return ""
    name = data_type.rstrip("0123456789")  # cocostuff27 -> cocostuff
    return f"; download it with: python dataset/dataset_download.py {name} --root {shlex.quote(folder)}"


def missing_files(flat: dict[str, Any], *, weights: bool) -> list[str]:
    """Lists a missing data folder and, with `weights`, a missing weights file of flat options."""
    name = flat.get("dataset.data_type", FIELDS["dataset.data_type"].default)
    folder, file = (os.path.expanduser(str(flat.get(key) or "")) for key in ("dataset.data_path", WEIGHTS))
    mistakes, misspelt = [], any(key.endswith("data_path") for key in flat.keys() - FIELDS)
    if weights and file and not weights_file(file).is_file():
        mistakes.append(f"{WEIGHTS} is {file}: no such file; null: the official weights")
    if misspelt or name not in DATA_TYPES or name in WITHOUT_FOLDER or os.path.isdir(folder):
        return mistakes
    hint = download_hint(name, folder or "<folder>")
    problem = f"{folder}: no such folder; name it with --data_path{hint}"
    if not folder:
        problem = f"not set: name the {name} folder with --data_path{hint}"
    elif os.path.exists(folder):
        problem = f"{folder}: a file, must be the folder of the data set"
    return [*mistakes, f"dataset.data_path is {problem}"]


def as_tree(options: Options) -> dict[str, Any]:
    """The options as a JSON tree; infinities become strings that can be read back."""
    return options.model_dump(mode="json")


def with_changes(options: Options, changes: dict[str, Any]) -> Options:
    """A validated copy with some values, by dotted key, replaced."""
    return build_options(flatten(options.model_dump()) | changes, source="the changed options")
