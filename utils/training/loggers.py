"""Where scalars go: a CSV file beside the run, always, and wandb.

A run that goes on from a checkpoint has in both what was logged up to it, and nothing twice.
"""

from __future__ import annotations

import csv
import netrc
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from utils.config.loading import as_tree, with_changes
from utils.config.options import Options
from utils.errors import UserError, first_line
from utils.files import replacing
from utils.training.checkpointing import Progress
from utils.training.launch import is_rank_zero
from utils.training.provenance import provenance

CSV = ExperimentWriter.NAME_METRICS_FILE
REACH_SECONDS, WANDB_SECONDS = 3, 20
ATTACHED = ("options.json", "provenance.json")  # files of a run's folder that wandb is given at its start


class WholeRows(ExperimentWriter):
    """Lightning's writer of metrics.csv, which replaces the file as a whole.

    Args:
        log_dir: folder of the file.
        rows: that the file begins with.
    """

    def __init__(self, log_dir: str, rows: Sequence[dict[str, Any]]) -> None:
        self.hparams: dict[str, Any] = {}
        self.log_dir = log_dir
        self.metrics_file_path = os.path.join(log_dir, self.NAME_METRICS_FILE)
        self.metrics, self.saved = list(rows), 0

    def save(self) -> None:
        """Writes all rows, under the keys that any of them has.

        Raises:
            UserError: they cannot be written.
        """
        if self.saved == len(self.metrics):
            return
        path = Path(self.metrics_file_path)
        try:
            with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=sorted(set().union(*self.metrics)))
                writer.writeheader()
                writer.writerows(self.metrics)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); what was saved before is intact: free some "
                "space, then go on with --resume"
            ) from None
        self.saved = len(self.metrics)


class RunCSVLogger(CSVLogger):
    """metrics.csv beside a run.

    Args:
        folder: of the run.
        rows: that an earlier start has logged.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__(folder.parent, name=folder.name, version="")
        self._rows = rows

    @property
    @rank_zero_experiment
    def experiment(self) -> WholeRows:
        """The writer."""
        if self._experiment is None:
            self._experiment = WholeRows(self.log_dir, self._rows)
        return self._experiment


class StepWandbLogger(WandbLogger):
    """wandb's step is the run's own: a point that is there already is not added a second time."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Adds a point."""
        self.experiment.log(dict(metrics), step=step)


def build_loggers(options: Options, folder: Path, progress: Progress | None = None) -> list[Logger]:
    """A CSV file beside the run, and wandb where the options ask for it.

    wandb never waits for a login or a network: where one is missing, or wandb refuses the entity or the
    key, the run is recorded offline. Of several processes the first alone has any.

    Args:
        options: all options.
        folder: of the run.
        progress: what an earlier start had come to; None for a run that starts.
    """
    if not is_rank_zero():
        return []
    progress = progress or Progress()
    rows = rows_until(folder / CSV, progress.step)
    loggers: list[Logger] = [RunCSVLogger(folder, rows)]
    if options.wandb.id is None and progress.wandb_id is not None:
        options = with_changes(options, {"wandb.id": progress.wandb_id})
    mode = options.wandb.mode
    if mode == "disabled":
        return loggers
    obstacle = wandb_obstacle() if mode == "online" else None
    if mode == "online" and obstacle is None:
        try:
            return [*loggers, _wandb_logger(options, folder, mode)]
        except wandb.errors.Error as error:
            obstacle = first_line(error)
    if obstacle:
        print(f"wandb: {obstacle}; recording offline in {folder} (wandb sync uploads it later)")
    _set_aside(folder, options.wandb.id)
    offline = _wandb_logger(options, folder, "offline")
    for row in rows:  # wandb cannot go on with a file, so the new one has all of the run
        offline.log_metrics({key: value for key, value in row.items() if key != "step"}, step=row["step"])
    return [*loggers, offline]


def rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a metrics.csv up to a step, without the cells that are empty; none where it is missing."""
    if step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            {key: int(cell) if cell.isdigit() else float(cell) for key, cell in row.items() if cell}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row["step"] <= step]


def _set_aside(folder: Path, id: str | None) -> None:
    """Renames what earlier starts of a run have recorded offline, so that `wandb sync` finds it once."""
    for earlier in (folder / "wandb").glob(f"offline-run-*-{id}"):
        earlier.rename(earlier.with_name(earlier.name.replace("offline", "superseded", 1)))


def _wandb_logger(options: Options, folder: Path, mode: str) -> WandbLogger:
    chosen = options.wandb
    if wandb.run is not None:  # wandb would go on writing into it
        wandb.run.finish()
    opened = wandb.init(
        project=chosen.project,
        entity=chosen.entity,
        name=chosen.name,
        tags=chosen.tags,
        notes=chosen.notes,
        id=chosen.id,
        resume="allow" if chosen.id is not None and mode == "online" else None,
        config=as_tree(options) | provenance(),
        mode=mode,
        dir=str(folder),
        settings=wandb.Settings(init_timeout=WANDB_SECONDS, silent=True),
    )
    opened.define_metric("iters")
    opened.define_metric("*", step_metric="iters")
    attach(opened, folder, ATTACHED)
    return StepWandbLogger(experiment=opened)


def attach(opened: wandb.Run, folder: Path, names: Sequence[str]) -> None:
    """Gives wandb copies of those of some files of a run's folder that are there.

    wandb itself would link to them, which fails once the folder is moved before an upload.
    """
    for name in names:
        if (folder / name).exists():
            copied = shutil.copy(folder / name, opened.dir)
            opened.save(copied, base_path=opened.dir, policy="now")


def wandb_runs(loggers: Sequence[Logger]) -> list[wandb.Run]:
    """The wandb run among some loggers, or none."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def close_loggers(loggers: Sequence[Logger]) -> None:
    """Ends a wandb run, so that the next run of a sweep gets one of its own."""
    for opened in wandb_runs(loggers):
        opened.finish()


def wandb_obstacle() -> str | None:
    """Why wandb cannot be reached at once, or None."""
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        known = netrc.netrc().authenticators(address.hostname) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if not known and not os.environ.get("WANDB_API_KEY"):
        return "not logged in (wandb login)"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return None  # only the proxy can tell, within wandb's own limit of time
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=REACH_SECONDS).close()
    except OSError:
        return f"{address.hostname} cannot be reached"
    return None
