"""Loggers of a run: metrics.csv in its folder, and wandb."""

import csv
import os
import shlex
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from requests.utils import get_netrc_auth

from utils.config.loading import as_tree
from utils.config.options import Options
from utils.errors import UserError, first_line
from utils.files import move_aside
from utils.training.launch import is_rank_zero
from utils.training.run_dir import provenance

INIT_SECONDS, FINISH_SECONDS = 20, 600  # timeouts for wandb to reach its server, and to finish uploading


class StepWandbLogger(WandbLogger):
    """Logs with the training step, so that wandb ignores points repeated after a resume."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Adds a point."""
        self.experiment.log(dict(metrics), step=wandb_step(step, validation="valid_loss" in metrics))


def wandb_step(step: int, *, validation: bool) -> int:
    """The step given to wandb, which drops rows of earlier steps.

    A validation has a separate step, because a stop may interrupt it. 3 * step + 2 is left for the final
    pictures, so that extending a run loses no point.
    """
    return 3 * step + validation


def build_loggers(
    options: Options, folder: Path, *, step: int = 0, wandb_id: str | None = None
) -> list[Logger]:
    """metrics.csv and, if enabled, wandb on rank zero; no loggers on the other ranks.

    wandb never blocks a run: without login or network the run is recorded offline. `step` and `wandb_id` are
    those of the resumed run; `wandb.id` takes precedence. WANDB_MODE and `wandb offline` restrict "online".
    """
    if not is_rank_zero():
        return []
    loggers: list[Logger] = [csv_logger(folder, step=step)]
    mode, run_id = options.wandb.mode, options.wandb.id or wandb_id
    if mode == "online":
        mode = wandb.setup().settings.mode
    if mode == "disabled":
        return loggers
    if mode == "online":
        problem = "not logged in (wandb login)"
        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        if os.environ.get("WANDB_API_KEY") or get_netrc_auth(server):  # otherwise wandb prompts for a login
            try:
                return [*loggers, _start_wandb(options, folder, run_id, mode="online")]
            except wandb.errors.Error as error:
                problem = first_line(error)
        print(f"wandb: {problem}; recording offline")
    return [*loggers, _start_wandb(options, folder, run_id, mode="offline")]


def csv_logger(folder: Path, *, step: int) -> CSVLogger:
    """A logger for metrics.csv that keeps existing rows up to `step`.

    A file that was edited is moved aside, and logging starts anew.
    """
    path, rows = folder / "metrics.csv", []
    try:
        rows = [row for row in _logged_rows(path) if int(row["step"]) <= step]
    except FileNotFoundError:
        if step:
            print(f"{path} is missing; starting a new one")
    except (ValueError, KeyError, csv.Error):
        print(f"{path} is malformed: moved to {move_aside(path)}; starting a new one")
    logger = CSVLogger(folder.parent, name=folder.name, version="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that it replaces the file
        for row in rows:
            logger.log_metrics(row, step=int(row["step"]))
        logger.save()
    return logger


def _logged_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of metrics.csv: the last one may be cut off.

    Raises:
        KeyError, ValueError, csv.Error: the file is not as Lightning writes it.
    """
    text = path.read_text(encoding="ascii")  # not with a spreadsheet's byte order mark
    rows = [row for row in csv.DictReader(text.splitlines(), strict=True) if None not in row.values()]
    for row in rows:
        for cell in filter(None, (row["step"], *row.values())):
            float(cell)
    return rows


def _start_wandb(options: Options, folder: Path, run_id: str | None, *, mode: str) -> WandbLogger:
    try:
        run = wandb.init(
            **options.wandb.model_dump(include={"project", "entity", "name", "tags", "notes"}),
            id=run_id,
            resume="allow" if run_id is not None and mode == "online" else None,
            reinit="finish_previous",
            config=as_tree(options) | provenance(),
            job_type=options.trained_by,
            mode=mode,
            dir=str(folder),
            settings=wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True),
        )
    except (wandb.errors.UsageError, ValueError) as error:  # of a project, tag or id
        raise UserError(f"wandb refuses an option wandb.*: {' '.join(str(error).split())}") from None
    run.define_metric("iters")
    run.define_metric("*", step_metric="iters")
    attach(run, folder, ["options.json", "provenance.json"])
    parts = shlex.quote(str(Path(run.dir).parent.parent))  # also those before a resume
    offline = f"upload with: wandb sync {parts}/offline-run-*-{run.id}"
    print(f"wandb: {run.url if mode == 'online' else offline}")
    return StepWandbLogger(experiment=run)


def attach(run: wandb.Run, folder: Path, names: Sequence[str]) -> None:
    """Gives wandb copies of files; its links would break if the folder were moved before an upload."""
    for name in names:
        if (folder / name).exists():
            run.save(shutil.copy(folder / name, run.dir), base_path=run.dir, policy="now")


def wandb_runs(loggers: Sequence[Logger]) -> list[wandb.Run]:
    """The wandb run among some loggers, or an empty list."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
