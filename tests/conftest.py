import csv
import json
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.config import options, plugins
from utils.config.loading import build_options, nest
from utils.vision.crf import crf_missing

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_pydensecrf = pytest.mark.skipif(crf_missing() is not None, reason=str(crf_missing()))

TINY = {  # seconds, not minutes: 4 steps of 4 scenes of 32 pixels
    "wandb.name": "tiny",
    "wandb.mode": "disabled",
    "dataset.data_type": "synthetic",
    "dataset.crop_type": None,
    "dataset.res": 32,
    "dataset.val_res": 32,
    "dataset.train_images": 16,
    "dataset.val_images": 6,
    "dataloader.batch_size": 4,
    "dataloader.num_workers": 0,
    "training_coeff.group_size": 16,
    "training_coeff.trainpatchsplit": 4,
    "model.arch": "vit",
    "model.dim": 24,
    "model.pretrained.depth": 2,
    "train.epoch": 1,
    "train.print_freq": 2,
    "train.valid_freq": 3,
    "eval.crf_workers": 1,
    "eval.pictures": 0,
}


HEAD = {"model.dim": 10, "model.pretrained.dim": 24}
METHODS = {  # what the other methods change
    "stego": {"method": "stego", **HEAD},
    "hp": {"method": "hp", **HEAD, "hp.pool_size": 8, "hp.warmup": 2, "hp.renew_interval": 3},
}


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def staged(tmp_path_factory):
    """wandb stages the files of tables in a folder of the user's otherwise."""
    os.environ["WANDB_DATA_DIR"] = str(tmp_path_factory.mktemp("wandb"))


@pytest.fixture
def golden():
    def load(name: str) -> SimpleNamespace:
        """Arrays of a golden file as tensors, float16 as float32; other entries as they are."""
        entries = dict(np.load(GOLDEN / f"{name}.npz"))
        for key, value in entries.items():
            value = value.astype(np.float32) if value.dtype == np.float16 else value
            entries[key] = str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
        return SimpleNamespace(**entries)

    return load


def tiny(folder: Path, **overrides) -> dict:
    """Flat options of a run of seconds with its output in a folder; keys with '__' for '.'."""
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return TINY | {"output_dir": str(folder / "output")} | changed


@pytest.fixture
def tiny_options(tmp_path):
    return lambda **overrides: build_options(tiny(tmp_path, **overrides), source="a test")


@pytest.fixture
def tiny_file(tmp_path):
    return partial(write_tiny, tmp_path)


def write_tiny(folder: Path, **overrides) -> str:
    """An option file of a run of seconds, whose output lies beside it."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(nest(tiny(folder, **overrides))))
    return str(path)


def scalars_of(folder: Path, name: str, *, where: str | None = None) -> list[float]:
    """A column of metrics.csv, of the rows that have a value of it, or of `where`."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[where or name]]


@contextmanager
def without_figures():
    """Skips the figures of evaluations, which take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.results.write_pictures", lambda *_, **__: None)
        yield


@pytest.fixture
def no_figures():
    with without_figures():
        yield


@pytest.fixture
def own_names(monkeypatch):
    """Names that a test registers are unknown to the next one, and so are plugins."""
    monkeypatch.setattr(plugins, "_loaded", {})
    lists = [options.METHODS, options.LOSSES, options.ARCHS, options.DATA_TYPES]
    before = [list(names) for names in lists]
    yield
    for names, kept in zip(lists, before, strict=True):
        names[:] = kept


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared reference folder is not beside this checkout")
    return SHARED
