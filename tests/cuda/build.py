"""Builds the null GPU: a library that stands in for the CUDA runtime, driver and cuBLAS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("nullgpu.c")
CALLERS = ("c10_cuda", "torch_cuda", "torch_python", "torch_cpu", "caffe2_nvrtc", "torch_cuda_linalg")
SYMBOL = re.compile(r" U (cuda[A-Z]\w*|cu[A-Z][a-z]\w*|cublas\w*)")
OTHER_LIBRARIES = re.compile(r"cu(sparse|solver|fft|rand|File)")
TRITON = (  # what Triton's launcher is linked against
    *("cuOccupancyMaxActiveClusters", "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"),
    *("cuPointerGetAttributes", "cuModuleUnload", "cuCtxGetLimit", "cuCtxSetLimit"),
)


def headers() -> Path | None:
    """The CUDA headers of the triton wheel, or None."""
    found = find_spec("triton")
    folder = found and Path(found.origin).parent / "backends/nvidia/include"
    return folder if folder and (folder / "cuda_runtime_api.h").exists() else None


def missing() -> str | None:
    """Why the null GPU cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the null GPU needs Linux, not {sys.platform}"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    tools = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if tools or headers() is None:
        return f"the null GPU needs {' and '.join(tools) or 'the CUDA headers of the triton wheel'}"
    return None


def build(folder: Path) -> Path:
    """Writes libnullgpu.so to a folder; what torch calls and nullgpu.c does not define returns 0."""
    names, library = set(TRITON), folder / "libnullgpu.so"
    for caller in CALLERS:
        path = Path(torch.__file__).parent / f"lib/lib{caller}.so"
        if path.exists():
            listing = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
            names |= {name for name in SYMBOL.findall(listing) if not OTHER_LIBRARIES.match(name)}
    rest, stub = folder / "rest.c", "__attribute__((weak)) int {}() {{ return 0; }}"
    rest.write_text("\n".join(map(stub.format, sorted(names))))
    flags = ["-O1", "-shared", "-fPIC", "-w", f"-I{headers()}"]
    subprocess.run(["gcc", *flags, SOURCE, rest, "-o", library, "-ldl", "-lpthread"], check=True)
    (folder / "libcuda.so.1").symlink_to(library)  # for Triton
    return library


def environment(library: Path, *, devices: int = 1) -> dict[str, str]:
    """Environment variables of a process that runs on the null GPU."""
    paths = filter(None, (str(library.parent), os.environ.get("LD_LIBRARY_PATH")))
    preload = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": ":".join(paths)}
    return os.environ | preload | {"NULLGPU_COUNT": str(devices), "OMP_NUM_THREADS": "1"}
