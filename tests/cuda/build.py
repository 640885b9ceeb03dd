"""Builds the null GPU, which replaces the CUDA runtime, driver and cuBLAS, and runs programs on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from utils.config.loading import REPOSITORY

CALLERS = ("c10_cuda", "torch_cuda", "torch_python", "torch_cpu", "caffe2_nvrtc", "torch_cuda_linalg")
SYMBOL = re.compile(r" U ((?!cu(?:sparse|solver|fft|rand|File))(?:cuda[A-Z]|cu[A-Z][a-z]|cublas)\w*)")
TRITON = (  # called by Triton's launcher
    *("cuOccupancyMaxActiveClusters", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"),
    *("cuPointerGetAttributes", "cuModuleUnload", "cuCtxGetLimit", "cuCtxSetLimit"),
)
# as a module, processes that it spawns would import it, and torch, again
DRIVE = "from tests.cuda.drive import main; main()"
STUB = "__attribute__((weak)) int {}() {{ return 0; }}"


def headers() -> Path | None:
    """The CUDA headers of the triton wheel, or None."""
    found = find_spec("triton")
    folder = found and Path(found.origin).parent / "backends/nvidia/include"
    return folder if folder and (folder / "cuda_runtime_api.h").exists() else None


def missing() -> str | None:
    """Why the null GPU cannot be built here, or None."""
    needed = {
        "Linux": sys.platform == "linux",
        "torch with CUDA": torch.version.cuda is not None,
        "gcc": shutil.which("gcc"),
        "nm": shutil.which("nm"),
        "the CUDA headers of the triton wheel": headers(),
    }
    lacking = [name for name, found in needed.items() if not found]
    return f"the null GPU needs {', '.join(lacking)}" if lacking else None


def build(folder: Path) -> Path:
    """Writes libnullgpu.so to a folder; what torch calls and nullgpu.c does not define returns 0."""
    names, rest, library = set(TRITON), folder / "rest.c", folder / "libnullgpu.so"
    for caller in CALLERS:
        path = Path(torch.__file__).parent / f"lib/lib{caller}.so"
        if path.exists():
            listing = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
            names.update(SYMBOL.findall(listing))
    rest.write_text("\n".join(map(STUB.format, sorted(names))))
    sources = [Path(__file__).with_name("nullgpu.c"), rest]
    flags = ["-O1", "-shared", "-fPIC", "-w", f"-I{headers()}"]
    subprocess.run(["gcc", *flags, *sources, "-o", library, "-ldl", "-lpthread"], check=True)
    (folder / "libcuda.so.1").symlink_to(library)  # for Triton
    return library


def run_cases(cases: dict[str, Any], folder: Path, *, devices: int) -> dict[str, Any]:
    """Runs cases, as drive.py describes, in one process on the null GPU; `folder` is empty at first."""
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    paths = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    preload = {"LD_PRELOAD": str(build(folder)), "LD_LIBRARY_PATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", DRIVE, given, results],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env=os.environ | preload | {"NULLGPU_COUNT": str(devices), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(results.read_text())
