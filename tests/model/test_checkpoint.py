import json
import os
from pathlib import Path

import pytest
import torch

import run
from dataset import DATA_SETS
from model import PPAPModule, build_module
from model.backbone import FrozenViT
from model.checkpoint import CHECKPOINT_ENTRY, PUBLISHED, Checkpoint, export, read_checkpoint, stored_options
from model.segmenter import BlockSegmenter
from model.weights import backbone_spec
from utils.config.loading import as_tree, load_options
from utils.errors import UserError
from utils.files import find_checkpoints
from utils.vision.labels import LabelSpace

EXPERIMENTS = {
    "cocostuff_vits8": "cocostuff.json",
    "cocostuff_vits16": "cocostuff16.json",
    "cityscapes_vitb8": "cityscapes_base.json",
    "potsdam_vitb8": "potsdam.json",
}
LABELS = LabelSpace.with_spread_colours(("a", "b", "c"))


def exported(module, path, **about):
    export(Checkpoint(Path("best.ckpt"), module.state_dict(), about), path)
    return path


def test_published_format__round_trip_and_other_forms(tiny_options, tmp_path):
    module, path = build_module(tiny_options(), LABELS), tmp_path / "ckpt.pth"
    checkpoint = read_checkpoint(exported(module, path))
    loaded = build_module(tiny_options(train__seed=5), LABELS, checkpoint=checkpoint)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    two = LabelSpace.with_spread_colours(("a", "b"))
    with pytest.raises(UserError, match=r"ckpt\.pth \(.*\) does not fit .*is \[3, 24\], must be \[2, 24\]"):
        build_module(tiny_options(), two, checkpoint=checkpoint)
    content = torch.load(path, weights_only=True)
    net = {f"module.{name}": value for name, value in content["net_model_state_dict"].items()}
    torch.save(content | {"net_model_state_dict": net}, path)  # of DataParallel
    assert read_checkpoint(path).state.keys() == checkpoint.state.keys()
    torch.save(dict.fromkeys(PUBLISHED), path)
    with pytest.raises(UserError, match=r"ckpt\.pth: net_model_state_dict is of type NoneType"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_export__entries_keys_and_shapes_of_the_released_files(shared, name, tmp_path, monkeypatch):
    listed = json.loads((shared / "reference/checkpoint_keys.json").read_text())[name]
    options = load_options(Path("json/server") / EXPERIMENTS[name])
    labels = DATA_SETS[options.dataset.data_type].labels(options.dataset)
    module = PPAPModule(options, labels, BlockSegmenter(FrozenViT(backbone_spec(options))))
    content = {}
    monkeypatch.setattr("model.checkpoint.write_torch_file", lambda written, path: content.update(written))
    metrics = {"Cluster_mIoU": 12.5, "Linear_mIoU": 30.0}
    exported(module, tmp_path / "ckpt.pth", step=300, epoch=2, metrics=metrics)
    assert set(content) == set(listed["top_level"])
    found = [content[key] for key in ("iter", "epoch", "best", "net_optimizer_state_dict")]
    assert found == [300, 2, 42.5, None]
    for part in PUBLISHED:
        assert {key: list(value.shape) for key, value in content[part].items()} == listed[part]


def test_find__order_of_names_and_places(tmp_path):
    folder = tmp_path / "output" / "run"
    folder.mkdir(parents=True)
    for name in ("ckpt.pth", "best.pth", "best.ckpt"):
        (folder / name).touch()
        assert find_checkpoints("run", str(tmp_path / "output"))[0] == folder / name
        assert find_checkpoints(str(folder), "elsewhere")[0] == folder / name
    for name, output_dir in ((str(folder / "best.pth"), "elsewhere"), ("run/best.pth", str(folder.parent))):
        assert find_checkpoints(name, output_dir) == [folder / "best.pth"]
    with pytest.raises(UserError, match=r"runs in .*: run"):
        find_checkpoints("ran", str(tmp_path / "output"))
    with pytest.raises(UserError, match="no checkpoint is named"):
        find_checkpoints("", str(tmp_path))


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"ppap": {}}])
def test_read__neither_format(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt: neither"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("class_names", None, "ppap.class_names"),
        ("class_names", ["a", "b"], "ppap: .*2 names and 3 colours"),
        ("palette", [[1, 2, 3], [1, 2, 3.5], [1, 2, 300]], "ppap.palette.1.2"),
        ("assignment", [0, 1], "ppap: .*2 entries for 3 clusters"),
        ("options", {"model": {"dim": torch.ones(1)}}, "ppap.options.model"),
        ("step", "last", "ppap.step"),
        ("state", [], "state_dict is of type list"),
        ("state", {0: torch.ones(1)}, "0 must be a dense tensor"),
        ("state", {"cluster_probe.clusters": torch.ones(())}, "ppap: .*3 entries for 1 clusters"),
        ("state", {"a.bias": 1}, "a.bias must be a dense tensor"),
        ("state", {"a.bias": torch.ones(2, dtype=torch.int64)}, "a.bias must be a dense tensor"),
        ("state", {"a.bias": torch.eye(2).to_sparse()}, "a.bias must be a dense tensor"),
        ("state", {"a.bias": torch.tensor([1.0, torch.nan])}, "a.bias must be .* without NaN"),
        ("state", {"a.bias": torch.tensor([torch.inf])}, "a.bias must be .* without NaN and infinity"),
    ],
)
def test_read__an_entry_of_the_wrong_form_is_named(tiny_options, tmp_path, key, value, named):
    module = build_module(tiny_options(), LABELS)
    entry = {"palette": [list(colour) for colour in LABELS.palette], "options": as_tree(module.options)}
    entry |= {"class_names": list(LABELS.names), "assignment": [0, 1, 2]}
    state = value if key == "state" else module.state_dict()
    torch.save({"state_dict": state, CHECKPOINT_ENTRY: entry | {key: value}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"x\.ckpt: .*{named}"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_export__writes_to_a_file_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(UserError, match=f"--export is {path}"):
            export(Checkpoint(Path("best.ckpt"), {}, {}), path)
    assert not Path(os.devnull).is_file()


def test_build__other_classes_are_named(tiny_options):
    content = Checkpoint(Path("best.ckpt"), {}, {"class_names": ("x", "y")})
    with pytest.raises(UserError, match=r"2 classes x, y.*\(synthetic\) has the 3 classes a, b, c"):
        build_module(tiny_options(), LABELS, checkpoint=content)


def test_resume__an_entry_of_the_wrong_form_is_named(tiny_file, tmp_path, no_figures):
    words = ["--opt", tiny_file(), "eval.is_crf=false"]
    run.main(words)
    last = tmp_path / "output/tiny/last.ckpt"
    content = torch.load(last, weights_only=True)
    content[CHECKPOINT_ENTRY]["assignment"] = "none"
    torch.save(content, last)
    with pytest.raises(UserError, match=r"last\.ckpt: ppap\.assignment"):
        run.main([*words, "--resume", "train.epoch=2"])


def test_removed_key__is_dropped_from_the_options_of_a_checkpoint():
    stored = {"training_coeff": {"backend": "auto", "tau": 0.5}}
    assert stored_options(Checkpoint(Path("best.ckpt"), {}, {"options": stored})) == {
        "training_coeff.tau": 0.5
    }
