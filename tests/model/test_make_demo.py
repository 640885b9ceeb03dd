"""The script that makes the demo's weights; tests/model/test_suggest.py measures those in the repository."""

import runpy
import sys

from model.backbone import FrozenViT
from model.weights import backbone_spec, load_backbone
from utils.config.loading import find_option_file, load_options
from utils.files import REPOSITORY


def test_script__writes_weights_that_the_demo_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script changes it
    script = runpy.run_path(str(REPOSITORY / "model/weights/make_demo.py"))
    script["main"](tmp_path / "demo.safetensors", scenes=6, steps=3, batch_size=2)
    backbone = FrozenViT(backbone_spec(load_options(find_option_file("demo.json"))))
    load_backbone(backbone, str(tmp_path / "demo.safetensors"))
