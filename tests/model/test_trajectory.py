"""Eight steps of the published training loop: losses, gradient norms, set sizes and final parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader

from dataset.base import Batch
from model.backbone import BackboneSpec, FrozenViT
from model.module import PPAPModule
from model.segmenter import BlockSegmenter
from utils.config.loading import build_options
from utils.vision.labels import LabelSpace

STORED = np.load(Path(__file__).parents[1] / "golden/trajectory.npz")
CONFIG = json.loads(str(STORED["config"]))
NAMES = ("supcon_loss", "linear_loss", "cluster_loss", "grad_norm", "num_positives", "num_negatives")
PUBLISHED = {  # published name -> ours
    "decoder": "segmenter.head",
    "project_head": "segmenter.projection",
    "linear": "linear_probe.classifier",
    "cluster": "cluster_probe",
}


def tensors(prefix):
    names = [name for name in STORED.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(STORED[name]).float() for name in names}


def ours(name):
    part, _, rest = name.partition(".")
    return f"{PUBLISHED[part]}.{rest}"


def published_module():
    """The module at the start of the published run, which also replays its anchors."""
    vit, coefficients = CONFIG["vit"], CONFIG["training_coeff"]
    flat = {f"training_coeff.{name}": value for name, value in coefficients.items()}
    flat |= {f"optimizer.{part}.{k}": v for part, o in CONFIG["optimizer"].items() for k, v in o.items()}
    flat |= {
        "model.arch": "vit",
        "model.dim": vit["dim"],
        "model.criterion_dropout": CONFIG["criterion_dropout"],
        "dataset.data_type": "synthetic",
        "dataset.res": CONFIG["res"],
        "train.grad_norm": CONFIG["grad_norm"],
        "train.print_freq": 1,
    }
    options = build_options(flat, source="the published run")
    sizes = {name: vit[name] for name in ("dim", "depth", "heads", "patch", "native_res")}
    backbone = FrozenViT(BackboneSpec(**sizes))
    backbone.load_state_dict(tensors("backbone/"))
    labels = LabelSpace.with_spread_colours(tuple("abcdef"))
    module = PPAPModule(options, labels, BlockSegmenter(backbone))
    start = {ours(name): value for name, value in tensors("start/").items()}
    assert not module.load_state_dict(start, strict=False).unexpected_keys
    anchors = iter(torch.from_numpy(STORED["anchors"]).long())
    module.method.criterion.sample_anchors = lambda patches, generator: next(anchors)
    return module


def batches():
    """64 images of 28 pixels, each enlarged by repetition, in batches of 8."""
    images, labels = torch.from_numpy(STORED["images"]), torch.from_numpy(STORED["labels"]).long()
    for axis in (-1, -2):
        images = images.repeat_interleave(CONFIG["enlarge"], axis)
        labels = labels.repeat_interleave(CONFIG["enlarge"], axis)
    items = [Batch(*item) for item in zip(images, labels, torch.arange(len(images)), strict=True)]
    return DataLoader(items, CONFIG["batch"])


class Curve(Callback):
    """Collects what the published run has recorded of each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        found = module.scalars | {"grad_norm": module._grad_norm}
        self.rows.append([float(found[name]) for name in NAMES])


def test_training__follows_the_published_run():
    module, curve = published_module(), Curve()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    how = {"max_epochs": 1, "limit_val_batches": 0, "callbacks": [curve], **dict.fromkeys(off, False)}
    Trainer(accelerator="cpu", **how).fit(module, batches())
    found = np.array(curve.rows)
    assert found[:, :3] == pytest.approx(STORED["curve"][:, :3], rel=1e-4)
    assert found == pytest.approx(STORED["curve"], rel=1e-3)
    end, published = module.state_dict(), tensors("end/")
    for part, allowed in (("decoder", 1e-3), ("project_head", 1e-3), ("linear", 1e-4), ("cluster", 1e-4)):
        names = [name for name in published if name.startswith(part)]
        way = torch.cat([(published[name] - start[ours(name)]).flatten() for name in names]).norm()
        apart = torch.cat([(published[name] - end[ours(name)]).flatten() for name in names]).norm()
        assert apart < allowed * way, part
