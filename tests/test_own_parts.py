"""Methods, losses, backbones and data sets of a user's own, and the files that they come from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import run
from model import (
    Backbone,
    Method,
    MethodOutput,
    build_module,
    load_segmenter,
    register_backbone,
    register_loss,
    register_method,
)
from model.weights import build_backbone, load_backbone
from utils.config import options as registered
from utils.config import plugins
from utils.config.cli import parse_arguments, plan_jobs
from utils.errors import UserError
from utils.training.run_dir import RunDir
from utils.vision.labels import LabelSpace

pytestmark = pytest.mark.usefixtures("own_names")

LABELS = LabelSpace.with_spread_colours(("plain", "rows", "columns", "diagonals"))
WHITE = torch.full((40, 56, 3), 255, dtype=torch.uint8).numpy()


class Prototypes(Method):
    """Draws the code to prototypes, which are trained; its buffer has the size of an option."""

    def __init__(self, options, segmenter):
        super().__init__(options, segmenter)
        self.prototypes = nn.Parameter(torch.randn(3, segmenter.code_dim))
        self.register_buffer("queue", torch.zeros(options.training_coeff.group_size))

    def forward(self, segmenter, batch, draws, progress):
        code = segmenter.code(segmenter.tokens(batch.inputs), segmenter.grid(batch.label))
        loss = torch.einsum("bdhw,kd->bkhw", code, self.prototypes).square().mean()
        return MethodOutput(code, {"own_loss": self.options.own["weight"] * loss}, {"share": 0.5})


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, z, features):
        return (self.scale * z).square().sum()


def test_method__is_seeded_and_its_parameters_are_trained(tiny_file, tiny_options, tmp_path):
    register_method("prototypes", Prototypes)
    chosen = {"method": "prototypes", "own__weight": 2.0, "train__compare_frozen": False}
    first, second = (build_module(tiny_options(**chosen), LABELS).method.prototypes for _ in range(2))
    assert torch.equal(first, second)
    run.main(["--opt", tiny_file(**chosen), "eval.is_crf=false"])
    segment = load_segmenter(tmp_path / "output/tiny")  # with the options that its state depends on
    assert segment.module.method.prototypes.shape == first.shape
    assert not torch.equal(segment.module.method.prototypes, first)
    assert segment(WHITE).shape == WHITE.shape[:2]


def test_loss__with_a_parameter_is_trained_and_restored(tiny_file, tiny_options, tmp_path):
    (tmp_path / "mine.py").touch()
    register_loss("scaled", lambda options: Scaled())
    chosen = {"training_coeff__loss": "scaled", "plugins": "mine.py"}  # or a list
    before = build_module(tiny_options(training_coeff__loss="scaled"), LABELS).method.criterion.loss.scale
    run.main(["--opt", tiny_file(**chosen), "eval.is_crf=false"])
    after = load_segmenter(tmp_path / "output/tiny").module.method.criterion.loss.scale
    assert before != after
    registered.LOSSES.remove("scaled")
    plugins._loaded.clear()  # as in a new process
    with pytest.raises(UserError, match=r"mine\.py; if you trust this file"):
        load_segmenter(tmp_path / "output/tiny")


@pytest.mark.parametrize(
    ("register", "built_in"),
    [(register_loss, "ppap"), (register_method, "ppap"), (register_backbone, "timm")],
)
def test_register__replaces_names_of_ones_own_only(register, built_in):
    for _ in range(2):  # as in a notebook
        register("mine", None)
    with pytest.raises(ValueError, match=f"{built_in} is built in"):
        register(built_in, None)


class Hybrid(Backbone):
    """A convolution and a block, with parts named as the prefixes and heads of published files."""

    def __init__(self):
        super().__init__()
        self.spec, self.prefix = SimpleNamespace(dim=24, depth=2, patch=16), 0
        self.backbone, self.head = nn.Conv2d(3, 24, 16, 16), nn.Linear(24, 24)
        self.blocks, self.norm = nn.ModuleList([nn.Identity(), nn.Linear(24, 24)]), nn.LayerNorm(24)
        self.requires_grad_(False)

    def tokens(self, image):
        return self.head(self.backbone(image).flatten(2).transpose(1, 2))  # (B, h*w, D)


def test_backbone__of_another_form(tiny_options, tmp_path):
    register_backbone("hybrid", lambda options: Hybrid())
    segmenter = build_module(tiny_options(model__arch="hybrid"), LABELS).segmenter
    image = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    assert segmenter.code_of(image, (2, 3)).shape == (1, 24, 2, 3)
    torch.save(segmenter.backbone.state_dict(), tmp_path / "own.pth")
    load_backbone(fresh := Hybrid(), str(tmp_path / "own.pth"))
    assert fresh.digest() == segmenter.backbone.digest()
    with pytest.raises(UserError, match="res is 40, must be a multiple of 16, the patch size of model"):
        build_backbone(tiny_options(model__arch="hybrid", dataset__res=40))


def jobs(*words):
    return plan_jobs(parse_arguments(words, description="", examples="", training=True))


def test_own_options__are_swept_and_compared_on_resume(tiny_file, tiny_options):
    planned = jobs("--opt", tiny_file(own__name="a"), "own.weight=1,2.5", "own.deep.list=[1,2]")
    first, second = (job.options for job in planned)
    assert first.own == {"name": "a", "weight": 1, "deep": {"list": [1, 2]}}
    assert second.wandb.name == "tiny-weight=2.5"
    run_dir = RunDir(first)
    run_dir.prepare(first, [], {})
    run_dir.check_options(first)
    for changed in (second, tiny_options()):
        with pytest.raises(UserError, match=r"own\.weight was 1, is (2\.5|null)"):
            run_dir.check_options(changed)


def test_plugins__of_variants_and_files_beside_them(tiny_file, tmp_path):
    """Paths are relative to the file of the variants, and a plugin may import what lies beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_constants.py").write_text("NAME = 'from a file'\n")
    text = "from model import register_loss\nfrom own_constants import NAME\nregister_loss(NAME, None)\n"
    (folder / "mine.py").write_text(text)
    (folder / "variants.json").write_text('{"a": {"plugins": ["mine.py"]}}')
    (job,) = jobs("--opt", tiny_file(), "--variants", str(folder / "variants.json"))
    assert job.options.plugins == [str(folder / "mine.py")]
    assert "from a file" in registered.LOSSES
