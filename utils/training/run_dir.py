"""The folder of a run: lock, options, provenance, checkpoints and metrics."""

import json
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from utils.config.loading import as_tree, flatten, is_option
from utils.config.options import Options
from utils.config.plugins import plugin_digests, report_changes
from utils.errors import UserError, first_line
from utils.files import exclusive, make_folder, move_aside, read_json_object, write_json
from utils.training.launch import cores, is_rank_zero
from utils.training.torch_files import read_torch_file, write_torch_file

BEST, LAST, DATA = "best.ckpt", "last.ckpt", "data.json"
MAY_DIFFER = (  # on resume: keys and sections that change where and how fast a run computes, not its result
    "checkpoint", "dataloader.num_workers", "dataset.check_files", "dataset.data_path", "eval.crf_workers",
    "gpu_ids", "output_dir", "plugins", "resume", "train.checkpoint_every", "trainer.", "wandb.",
)  # fmt: skip
LENGTHS = {"train.epoch": "epochs", "train.max_steps": "steps"}  # may increase on resume
PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "timm", "numpy", "scipy", "pydensecrf2",
    "wandb",
)  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """Progress of a run: the entry `progress` of a checkpoint."""

    step: int = 0  # last trained step, from 1
    validated: bool = True  # False if the validation after this step is pending
    best: float = float("-inf")  # largest sum of metrics so far
    score: float = float("-inf")  # sum of metrics of the last validation
    scored_step: int = 0  # step of the last validation
    seconds: float = 0.0  # training time
    wandb_id: str | None = None


class RunDir:
    """<output_dir>/<wandb.name>. Only rank zero locks and writes it."""

    def __init__(self, options: Options) -> None:
        self.path = Path(options.output_dir) / options.wandb.name
        self.best, self.last = self.path / BEST, self.path / LAST
        self._metrics = self.path / "metrics.json"

    def lock(self) -> AbstractContextManager[None]:
        """Locks the folder until the block or process ends; raises a UserError if another run holds it."""
        if not is_rank_zero():
            return nullcontext()
        make_folder(self.path.parent)
        return exclusive(self.path, advice=", or choose another wandb.name or output_dir")

    def final_metrics(self) -> dict[str, Any] | None:
        """The content of metrics.json if the run is finished: an evaluation alone has no `train_hours`."""
        result = read_json_object(self._metrics) if self._metrics.exists() else {}
        return result if "train_hours" in result else None

    def write_metrics(self, result: dict[str, Any]) -> None:
        """Writes metrics.json."""
        write_json(self._metrics, result)

    def prepare(self, options: Options, damaged: Sequence[str], inventory: dict[str, Any]) -> None:
        """Creates the folder of a new run with options, provenance, damaged files and the data's inventory.

        An earlier run of that name is moved aside.
        """
        if not is_rank_zero():
            return
        if (earlier := move_aside(self.path)) is not None:
            print(f"moved the earlier run in {self.path} to {earlier}")
        make_folder(self.path)
        write_json(self.path / "options.json", as_tree(options))
        write_json(self.path / "provenance.json", provenance() | {"plugins": plugin_digests()})
        write_json(self.path / DATA, inventory)
        if damaged:
            write_json(self.path / "left_out.json", list(damaged))

    def check_options(self, options: Options) -> dict[str, int]:
        """Raises a UserError if an option that affects the result differs from the run in this folder.

        A longer run is allowed: returns the earlier values of `LENGTHS` that increase.
        """
        path, origin = self.path / "options.json", self.path / "provenance.json"
        if not path.exists():
            return {}
        if origin.exists():
            report_changes(read_json_object(origin).get("plugins", {}), origin)
        before, now = flatten(as_tree(Options())) | flatten(read_json_object(path)), flatten(as_tree(options))
        longer = [key for key in LENGTHS if (before[key] or math.inf) < (now[key] or math.inf)]
        differing = [
            f"{key} was {json.dumps(before.get(key))}, is {json.dumps(value)}"
            for key, value in (dict.fromkeys(filter(is_option, before)) | now).items()
            if before.get(key) != value and not key.startswith((*MAY_DIFFER, *longer))
        ]
        if differing:
            fix = "use its options, or start a new run under another wandb.name"
            raise UserError(differing, f"the command line, compared with {path} ({fix})")
        return {key: before[key] for key in longer}

    def extend(self, options: Options, longer: dict[str, int]) -> None:
        """Stores the options of a run that becomes longer; `longer` is the result of `check_options`.

        The metrics of a finished run are kept as metrics-<epochs>-epochs.json or metrics-<steps>-steps.json.
        """
        for key, before in longer.items() if is_rank_zero() else ():
            now = flatten(as_tree(options))[key] or "unlimited"
            print(f"{self.path}: {before} {LENGTHS[key]} become {now}")
            if self._metrics.exists():
                self._metrics.rename(self.path / f"metrics-{before}-{LENGTHS[key]}.json")
            write_json(self.path / "options.json", as_tree(options))

    def resume_point(self, options: Options) -> tuple[Path | None, Progress]:
        """The checkpoint to resume from and its progress: best.ckpt if last.ckpt is damaged, None if new."""
        if options.resume is None:
            return None, Progress()
        whole = {}
        for path in filter(Path.exists, (self.last, self.best)):
            try:
                content = read_torch_file(path)
                whole[path] = content, _progress(content, path)
            except UserError as error:
                print(f"{error}; skipping this checkpoint")
        if not whole:
            print(f"{self.path}: no checkpoint to resume from, starting a new run")
            return None, Progress()
        path, (content, progress) = next(iter(whole.items()))
        if self.best not in whole and progress.best > -math.inf and is_rank_zero():
            progress = self._replace_best(content, progress)
        print(f"resuming after step {progress.step:,} from {path}")
        return path, progress

    def _replace_best(self, content: dict[str, Any], progress: Progress) -> Progress:
        """Writes the content of last.ckpt to best.ckpt; its score counts if it was validated at its step."""
        own = progress.score if progress.scored_step == progress.step else -math.inf
        content["progress"]["best"] = own
        for path in (self.best, self.last):
            write_torch_file(content, path)
        print(f"{self.best} is damaged or missing; step {progress.step:,} takes its place")
        return replace(progress, best=own)

    def check_data(self, inventory: dict[str, Any], options: Options) -> None:
        """Raises a UserError if a resumed run would continue on other data than it was started on."""
        stored = self.path / DATA
        if options.resume is None or options.resume_on_other_data or not (is_rank_zero() and stored.exists()):
            return
        before, now = (
            {f"{split}: {name}": f"{size:,}" for split, files in each.items() for name, size in files.items()}
            for each in (read_json_object(stored), inventory)
        )
        if changed := sorted(before.items() ^ now.items()):
            name = changed[0][0]
            sizes = f"size {before.get(name, 'none')} then, {now.get(name, 'none')} now"
            raise UserError(
                f"{self.path}: the data changed since the run was started ({name}: {sizes}); "
                "restore it, set resume_on_other_data=true to continue anyway, or choose another wandb.name"
            )


def _progress(content: Any, path: Path) -> Progress:
    try:
        return Progress(**content["progress"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: the entry progress is invalid ({first_line(error)})") from None


@cache
def provenance() -> dict[str, Any]:
    """{'git_sha', 'versions', 'date', 'hardware'}; '-dirty' marks uncommitted changes."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        sha = subprocess.check_output(describe, cwd=Path(__file__).parent, text=True, stderr=subprocess.PIPE)
    except (OSError, subprocess.SubprocessError):
        sha = "unknown"
    info = Path("/proc/cpuinfo")  # on Linux `platform.processor()` is often empty
    model = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    hardware = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model[1] if model else platform.processor() or None,
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"git_sha": sha.strip(), "versions": versions, "date": date, "hardware": hardware}
