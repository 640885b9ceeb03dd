"""Loads and validates options from an option file and overrides; reports all mistakes at once.

Files and models are nested; `{"section.key": value}` is the form of overrides and of error messages.
"""

from __future__ import annotations

import json
import math
import os
import typing
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo

from utils.config.options import (
    FIELDS_ONLY,
    LEGACY_KEYS,
    REMOVED_KEYS,
    WITHOUT_FOLDER,
    Options,
    Section,
    contradictions,
)
from utils.errors import UserError, closest
from utils.files import REPOSITORY, find_checkpoint, read_json_object, weights_file

OPTION_FOLDERS = (Path("json"), Path("json/server"))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; empty dicts disappear."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{'a.b': 1} -> {'a': {'b': 1}}; a value in the place of a section wins over the section's keys."""
    tree: dict[str, Any] = {}
    for key in sorted(flat, key=lambda key: key.count("."), reverse=True):
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = flat[key]
    return tree


def find_option_file(name: str, *, beside: Path | None = None, asked: str = "--opt") -> Path:
    """Finds an option file by path, or by name in json/ or json/server/ of this folder or the project.

    Args:
        name: with or without '.json'.
        beside: a folder to search first.
        asked: what named the file, for the error message.

    Raises:
        UserError: there is no such file.
    """
    folders = [root / folder for root in (Path(), REPOSITORY) for folder in OPTION_FOLDERS]
    for place in [*([beside / name] if beside else []), Path(name), *(folder / name for folder in folders)]:
        for candidate in (place, Path(f"{place}.json")):
            if os.path.isfile(candidate):
                return candidate
    known = {path.name for folder in folders for path in folder.glob("*.json")}
    raise UserError(
        f"{asked} {name}: no such file, and no such name in json/ or json/server/.{closest(name, known)} "
        f"Available: {', '.join(sorted(known))}"
    )


def read_option_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Flat options of a file, on top of those of the file that its `base` names.

    Raises:
        UserError: not a JSON object, or bases that form a cycle.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: base: the option files form a cycle; remove one base")
    tree = read_json_object(path)
    base = tree.pop("base", None)
    if base is None:
        return flatten(tree)
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {json.dumps(base)}, must be the name of an option file")
    found = find_option_file(base, beside=path.parent, asked=f"{path}: base")
    return read_option_file(found, (*seen, path.resolve())) | flatten(tree)


def load_options(
    path: Path, overrides: dict[str, Any] | None = None, *, check_files: bool = False
) -> Options:
    """Reads an option file, applies overrides and validates the result; see `build_options`."""
    flat = read_option_file(path) | flatten(overrides or {})
    return build_options(flat, source=str(path), check_files=check_files)


def build_options(
    flat: dict[str, Any], *, source: str, check_files: bool = False, stored: bool = False
) -> Options:
    """Validates options and fills in the defaults.

    Args:
        flat: values by dotted key.
        source: where they come from, for the error message.
        check_files: whether files that the options name must exist.
        stored: whether the options were written by an earlier version; removed keys are ignored then.

    Raises:
        UserError: lists all mistakes.
    """
    mistakes, kept = [], {}
    for key, value in flat.items():
        if key in REMOVED_KEYS:
            mistakes += [] if stored else [f"{key} was removed ({REMOVED_KEYS[key]}); delete it"]
        elif key not in LEGACY_KEYS:
            kept[key] = value
        elif value != LEGACY_KEYS[key]:
            only = json.dumps(LEGACY_KEYS[key])
            mistakes.append(f"{key} is {json.dumps(value)}, but has no effect; delete it or set it to {only}")
    failed: set[str] = set()
    try:
        options = Options.model_validate(nest(kept), context=FIELDS_ONLY)
    except ValidationError as error:
        failed = _failed_keys(error, kept)
        valid = {key: value for key, value in kept.items() if key not in failed}
        options = Options.model_validate(nest(valid), context=FIELDS_ONLY)
        # a value in the place of a section: report it alone, not the keys of that section
        named = [key for key in kept if not any(key.startswith(f"{other}.") for other in failed)]
        mistakes += [_mistake(key, kept[key]) for key in named if key in failed]
    mistakes += contradictions(options, failed)
    if check_files and "dataset.data_type" not in failed:
        mistakes += missing_files(options)
    if mistakes:
        raise UserError(mistakes, source)
    return options


def _failed_keys(error: ValidationError, flat: dict[str, Any]) -> set[str]:
    """The keys of `flat` that an error is about; a location is a key, a section or an item of a list."""
    places = [[part for part in each["loc"] if isinstance(part, str)] for each in error.errors()]
    return {key for key in flat for place in places if key.split(".")[: len(place)] == place}


def _mistake(key: str, value: Any) -> str:
    """One line about an invalid or unknown key."""
    shown = json.dumps(value)
    if key in FIELDS:
        return f"{key} is {shown}, must be {allowed(FIELDS[key])}"
    if any(name.startswith(f"{key}.") for name in FIELDS):
        return f"{key} is {shown}, must be a section {{...}} of options"
    return f"{key} (value {shown}) is not an option.{closest(key, [*FIELDS, *LEGACY_KEYS])}"


def option_fields(section: type[Section] = Options, prefix: str = "") -> dict[str, FieldInfo]:
    """The fields of all options by dotted key."""
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            fields |= option_fields(type(field.default), f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


FIELDS = option_fields()


def option_table() -> list[tuple[str, Any, str, str]]:
    """(key, default, description, allowed values) of all options."""
    return [(key, field.default, field.description, allowed(field)) for key, field in FIELDS.items()]


def allowed(field: FieldInfo) -> str:
    """The values that an option may have, in words."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        list[int]: "a list of whole numbers",
        list[str]: "a list of strings",
    }
    kind, choices = field.annotation, None
    kinds = typing.get_args(kind)
    for part in field.metadata:
        if isinstance(part, AfterValidator):
            choices = part.func.allowed
    if typing.get_origin(kind) is typing.Literal:
        choices = kinds
    if isinstance(choices, str):
        return choices
    if choices:
        return "one of " + ", ".join(map(json.dumps, choices))
    text = names.get(kinds[0] if NoneType in kinds else kind, "a string")
    for part in field.metadata:
        for bound, word in (("ge", "at least"), ("gt", "above"), ("le", "at most")):
            if getattr(part, bound, -math.inf) != -math.inf:
                text += f", {word} {getattr(part, bound)}"
    return text + (" or null" if NoneType in kinds else "")


def missing_files(options: Options) -> list[str]:
    """One line for each file or folder that the options name and that does not exist."""
    mistakes = []
    weights = options.model.pretrained.pretrained_weights
    if weights is not None and not os.path.isfile(weights_file(weights)):
        mistakes.append(
            f"model.pretrained.pretrained_weights is {weights}: no such file; null: the official weights"
        )
    if options.checkpoint:
        try:
            find_checkpoint(options.checkpoint, options.output_dir)
        except UserError as error:
            mistakes.append(str(error))
    kind = options.dataset.data_type
    if kind not in WITHOUT_FOLDER and not options.dataset.data_path:  # the data set checks the folder itself
        mistakes.append(f"dataset.data_path is not set: name the folder of the {kind} data with --data_path")
    return mistakes


def as_tree(options: Options) -> dict[str, Any]:
    """The options as a JSON tree; infinities are the strings that the reader accepts."""
    return options.model_dump(mode="json")


def with_changes(options: Options, changes: dict[str, Any]) -> Options:
    """A copy with some values, by dotted key, replaced and all of them validated."""
    return build_options(flatten(options.model_dump()) | changes, source="the changed options")
