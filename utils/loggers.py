"""Where scalars go: a CSV file beside the run, always, and wandb."""

from __future__ import annotations

import netrc
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from utils.errors import first_line
from utils.optionfile import as_tree
from utils.options import Options
from utils.provenance import provenance

REACH_SECONDS, WANDB_SECONDS = 3, 20
ATTACHED = ("options.json", "provenance.json")  # files of a run's folder that wandb is given at its start


def build_loggers(options: Options, folder: Path) -> list[Logger]:
    """A CSV file beside the run, and wandb where the options ask for it.

    wandb never waits for a login or a network: where one is missing, or wandb refuses the entity or the
    key, the run is recorded offline.
    """
    loggers: list[Logger] = [CSVLogger(folder.parent, name=folder.name, version="")]
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
    return [*loggers, _wandb_logger(options, folder, "offline")]


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
    return WandbLogger(experiment=opened)


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
