"""From an option file and overrides to checked `Options`; every mistake is reported at once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config.contradictions import contradictions, missing_files
from utils.config.options import (
    LEGACY_KEYS,
    Options,
)
from utils.errors import UserError, closest, first_line
from utils.files import REPOSITORY, read_json_object

OPTION_FOLDERS = (Path("json"), Path("json/server"))


@dataclasses.dataclass(frozen=True)
class Key:
    """One option of the schema: its dataclass field and its plain type."""

    field: dataclasses.Field
    type: Any
    optional: bool

    @property
    def default(self) -> Any:
        """What a value is where no file names it."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        meta = self.field.metadata
        if meta["choices"]:
            return "one of " + ", ".join(json.dumps(choice) for choice in meta["choices"])
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        text = names.get(self.type) or f"a list of {'numbers' if self.type == list[int] else 'strings'}"
        bounds = (("at least", meta["least"]), ("above", meta["above"]), ("at most", meta["most"]))
        text += "".join(f", {word} {bound}" for word, bound in bounds if bound not in (None, -math.inf))
        return text + (" or null" if self.optional else "")

    def admits(self, value: Any) -> bool:
        """Whether a value has the type and lies in the range."""
        meta = self.field.metadata
        if value is None:
            return self.optional
        if self.type in (list[int], list[str]):
            (inner,) = typing.get_args(self.type)
            return isinstance(value, list) and all(type(item) is inner for item in value)
        if not _has_type(value, self.type):
            return False
        if meta["choices"]:
            return value in meta["choices"]
        if self.type in (int, float):
            try:
                number = self.type(value)
            except OverflowError:  # a whole number beyond what a float holds
                return False
            return (
                number == number  # not NaN
                and (meta["least"] is None or number >= meta["least"])
                and (meta["above"] is None or number > meta["above"])
                and (meta["most"] is None or number <= meta["most"])
            )
        return True


def _has_type(value: Any, expected: type) -> bool:
    if expected is float:
        return type(value) in (int, float) or value in ("inf", "-inf")
    if expected is str:  # a run may be called 5
        return type(value) in (str, int, float)
    return type(value) is expected


def schema(section: type = Options, prefix: str = "") -> dict[str, Key]:
    """All keys in their dotted form, in the order of the dataclasses."""
    keys: dict[str, Key] = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            keys |= schema(kind, f"{prefix}{field.name}.")
            continue
        parts = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
        plain = next(part for part in parts if part is not NoneType)
        keys[prefix + field.name] = Key(field, plain, NoneType in parts)
    return keys


SCHEMA = schema()
SECTIONS = {key.rsplit(".", depth)[0] for key in SCHEMA for depth in range(1, key.count(".") + 1)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists and empty dicts are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def find_option_file(name: str, *, beside: Path | None = None, asked: str = "--opt") -> Path:
    """A path, or a bare name found in json/ or json/server/ of the current folder or of the project.

    Args:
        name: what the user gave; '.json' may be left out.
        beside: a folder that is looked into first.
        asked: what asked for it.

    Raises:
        UserError: no such file; names the nearest.
    """
    folders = [root / folder for root in (Path(), REPOSITORY) for folder in OPTION_FOLDERS]
    places = ([beside / name] if beside else []) + [Path(name), *(folder / name for folder in folders)]
    for place in places:
        for candidate in (place, Path(f"{place}.json")):
            if os.path.isfile(candidate):  # unlike Path.is_file, no error where a name is too long
                return candidate
    known = {path.name for folder in folders for path in folder.glob("*.json")}
    raise UserError(
        f"{asked} {name}: no such file, and not a name in json/ or json/server/.{closest(name, known)} "
        f"There are: {', '.join(sorted(known))}"
    )


def read_option_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The flat keys of an option file on top of those of the file that its `base` names.

    Raises:
        UserError: not JSON, not an object, or a circle of bases.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: base: the files name each other in a circle; remove one base")
    tree = read_json_object(path)
    base = tree.pop("base", None)
    if base is None:
        return flatten(tree)
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {json.dumps(base)}, must name an option file")
    found = find_option_file(base, beside=path.parent, asked=f"{path}: base")
    below = read_option_file(found, (*seen, path.resolve()))
    return below | flatten(tree)


def build_options(flat: dict[str, Any], *, source: str, check_files: bool = False) -> Options:
    """Checks every key and value and fills in the defaults.

    Args:
        flat: dotted keys and values, from an option file and overrides.
        source: what to call their origin in an error.
        check_files: whether the files and folders that the options name must be there.

    Raises:
        UserError: all mistakes together.
    """
    mistakes = []
    config = OmegaConf.structured(Options)
    for key, value in flat.items():
        if key in SECTIONS and value == {}:
            continue
        if key in LEGACY_KEYS:
            if value != LEGACY_KEYS[key]:
                only = json.dumps(LEGACY_KEYS[key])
                given = json.dumps(value)
                mistakes.append(f"{key} is {given}, but has no effect; remove it or leave it at {only}")
        elif key not in SCHEMA:
            mistakes.append(_unknown(key, value))
        elif not SCHEMA[key].admits(value):
            mistakes.append(f"{key} is {json.dumps(value)}, must be {SCHEMA[key].allowed}")
        else:
            try:
                OmegaConf.update(config, key, value)
            except OmegaConfBaseException as error:  # a ${...} that is not one
                mistakes.append(f"{key} is {json.dumps(value)}: {first_line(error)}")
    try:
        options = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a ${...} that leads nowhere
        raise UserError([*mistakes, first_line(error)], source) from None
    reported = tuple(f"{line.split()[0]} " for line in mistakes)
    further = contradictions(options) + (missing_files(options) if check_files else [])
    mistakes += [line for line in further if not line.startswith(reported)]
    if mistakes:
        raise UserError(mistakes, source)
    return options


def _unknown(key: str, value: Any) -> str:
    if key in SECTIONS:
        return f"{key} is {json.dumps(value)}, must be a section {{...}} of keys"
    parent = key.rsplit(".", 1)[0]
    if parent in SCHEMA:
        return f"{parent} holds {{...}}, must be {SCHEMA[parent].allowed}"
    return f"{key} (value {json.dumps(value)}) is not an option.{closest(key, [*SCHEMA, *LEGACY_KEYS])}"


def load_options(
    path: Path, overrides: dict[str, Any] | None = None, *, check_files: bool = False
) -> Options:
    """Reads an option file, puts overrides on top and checks all of it.

    Raises:
        UserError: all mistakes together.
    """
    flat = read_option_file(path) | flatten(overrides or {})
    return build_options(flat, source=str(path), check_files=check_files)


def as_tree(options: Options) -> dict[str, Any]:
    """The resolved options as plain JSON: infinities as the strings that the reader takes back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    return plain(dataclasses.asdict(options))
