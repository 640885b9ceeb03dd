"""What a result was made with: git SHA, package versions, date, hardware."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.training.launch import cores

PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "torchmetrics",
    "timm",
    "scipy",
    "numpy",
    "pydensecrf2",
    "wandb",
)


@cache
def provenance() -> dict[str, object]:
    """{'git_sha', 'versions', 'date'} as plain strings; '-dirty' marks uncommitted changes."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "git_sha": git_sha(),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_sha() -> str:
    """The checkout's commit, or 'unknown' outside one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware() -> dict[str, object]:
    """{'system', 'cpu', 'cores', 'gpu'}: what a run's hours were spent on; None where it cannot be told."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model() or platform.processor() or None,
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
