"""Runs the user's Python files (option `plugins`) that register data sets, backbones, losses and methods."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import sha256_of

_loaded: dict[str, str] = {}  # path -> SHA-256


def with_absolute_plugins(flat: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Flat options whose `plugins`, if any, are relative to `folder`; one file may be given as a string."""
    names = flat.get("plugins")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list):
        return flat
    return flat | {"plugins": [str((folder / Path(str(name)).expanduser()).resolve()) for name in names]}


def load_plugins(flat: dict[str, Any], *, trusted: bool) -> None:
    """Runs the plugins of flat options, each file once in a process; all must be `trusted`."""
    names = flat.get("plugins", [])
    for name in names if isinstance(names, list) else ():
        path = Path(str(name))
        if name in _loaded:
            continue
        if not path.is_file():
            raise UserError(f"plugins: {name}: no such file; paths in an option file are relative to it")
        if not trusted:
            hint = "if you trust this file, add --trust-plugins, or trust_plugins=True in Python"
            raise UserError(f"plugins: the checkpoint needs the Python file {name}; {hint}")
        if (folder := str(path.parent)) not in sys.path:
            sys.path.append(folder)  # last, so that no file there hides one of ours
        spec = spec_from_file_location(f"plugin_{len(_loaded)}_{path.stem}", path)
        _loaded[name] = sha256_of(path)
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)


def plugin_digests() -> dict[str, str]:
    """SHA-256 of each plugin that runs in this process."""
    return dict(_loaded)


def report_changes(stored: dict[str, str], origin: Path) -> None:
    """Prints which plugins differ from those that `origin` was made with."""
    for name, digest in stored.items():
        if _loaded.get(name, digest) != digest:
            print(f"{name} has changed since {origin} was written")
