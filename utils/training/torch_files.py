"""Reads and writes `torch.save` files: integrity-checked, without executing code, atomic."""

import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from utils.errors import UserError, first_line
from utils.files import replacing

_numpy_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [  # published checkpoints contain them; NumPy 1 and 2 differ in the path of a scalar
    Namespace,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
]


def read_torch_file(path: Path) -> Any:
    """The content of a .safetensors file or, read with weights_only, of a `torch.save` file.

    All CRCs are checked; files from before torch 1.6 and .safetensors have none.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch advises to load the file unsafely
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {found[1]} instead of tensors and plain containers" if found else "damaged"
    except Exception as error:  # a damaged file can raise almost any exception
        reason = f"{type(error).__name__}: {first_line(error)}"
    raise UserError(
        f"{path}: not a readable checkpoint or weights file ({reason}); download or write it again"
    )


def write_torch_file(content: Any, path: Path) -> None:
    """`torch.save` that leaves either the complete new file or the old one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=True) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        hint = "the previous file is intact: free some space or choose another folder"
        raise UserError(f"{path}: cannot be written ({first_line(error)}); {hint}") from None
