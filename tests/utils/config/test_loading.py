import json
from pathlib import Path

import pytest

from dataset import DATA_SETS
from model import build_module
from model.backbone import FrozenViT
from utils.config.loading import (
    FIELDS,
    LEGACY_KEYS,
    as_tree,
    build_options,
    find_option_file,
    flatten,
    load_options,
    missing_files,
    nest,
)
from utils.config.options import Options
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.vision.labels import LabelSpace

VARIANTS = ("ablation.json", "methods.json")
OUR_FILES = sorted(path for path in (REPOSITORY / "json").rglob("*.json") if path.name not in VARIANTS)
PUBLISHED = ("cocostuff8", "cocostuff16", "cityscapes_base", "cityscapes_small", "potsdam")


def mistakes(flat) -> list[str]:
    with pytest.raises(UserError) as error:
        build_options(flat, source="x.json")
    return error.value.mistakes


def test_defaults__are_accepted():
    assert build_options({}, source="x") == Options() == build_options(flatten({"dataset": {}}), source="x")


@pytest.mark.parametrize("method", ["stego", "hp"])
def test_methods_json__equals_the_option_files_for_camvid(method):
    name = f"{method}_camvid"
    variant = json.loads(find_option_file("methods").read_text())[method.upper()] | {"wandb": {"name": name}}
    assert load_options(find_option_file("camvid"), variant) == load_options(find_option_file(name))


@pytest.mark.parametrize("path", OUR_FILES, ids=lambda path: path.name)
def test_our_files__load_and_build(path, monkeypatch):
    options = load_options(path)
    monkeypatch.setattr("model.load_backbone", lambda backbone, weights: "a test")
    labels = LabelSpace.with_spread_colours(tuple(map(str, range(11))))
    if options.dataset.data_type != "directory":
        labels = DATA_SETS[options.dataset.data_type].labels(options.dataset)
    module = build_module(options, labels)
    assert isinstance(module.segmenter.backbone, FrozenViT)


@pytest.mark.parametrize("name", [f"{name}{suffix}.json" for name in PUBLISHED for suffix in ("", "_eval")])
def test_published_files__load_unchanged_and_mean_what_ours_mean(shared, name):
    path = shared / "reference/options" / name
    published = flatten(as_tree(load_options(path)))
    for key, value in flatten(json.loads(path.read_text())).items():
        assert key in (*LEGACY_KEYS, "model.name") or published[key] == value
    ours = flatten(as_tree(load_options(REPOSITORY / "json/server" / name)))
    free = {"wandb.entity", "dataset.data_path"}
    if "potsdam" in name:
        free.add("dataset.crop_type")  # the published code ignores it there, and so do we
    if name.endswith("_eval.json"):  # evaluation reads none of train.*
        free |= {key for key in FIELDS if key.startswith("train.")}
    assert {key for key in FIELDS if published.get(key) != ours.get(key)} <= free


@pytest.mark.parametrize("key", LEGACY_KEYS)
def test_legacy__published_value_is_accepted_and_another_has_no_effect(key):
    build_options({key: LEGACY_KEYS[key]}, source="x")
    assert mistakes({key: 99})[0].startswith(f"{key} is 99, but has no effect")


TOGETHER = [
    ("dataset.rez", 3, "(value 3) is not an option. Did you mean dataset.res?"),
    ("tau", 0.1, "(value 0.1) is not an option. Did you mean training_coeff.tau?"),
    ("datasett.res", 3, "(value 3) is not an option. Did you mean dataset.res?"),
    ("train.epoch", 0, "is 0, must be a whole number, at least 1"),
    ("train.seed", 1.5, "is 1.5, must be a whole number, at least 0, at most 4294967295"),
    ("eval", 5, "(value 5) is not an option."),
    ("optimizer.net.learning_rate", 1, "(value 1) is not an option. Did you mean optimizer.net.lr?"),
    ("model.pretrained.patch", 8, "(value 8) is not an option. Did you mean model.pretrained.dino_patch"),
    ("training_coeff.backend", "torch", "was removed"),
    ("training_coeff.tau", float("nan"), "is NaN, must be a number, above 0, at most 1000000.0"),
    ("train.frozen", "yes", 'is "yes", must be true or false'),
    ("gpu_ids", 3, "is 3, must be a list of whole numbers"),
    ("dataloader.batch_size", "64", 'is "64", must be a whole number, at least 1'),
    ("wandb.tags", [1], "is [1], must be a list of strings or null"),
    ("dataset.res", 225, "is 225, must be a multiple of model.pretrained.dino_patch_size (8)"),
]
REPORTED_ONCE = [
    ({"model.dim": 400}, "model.dim is 400, must be 384"),
    ({"eval.extra_clusters": 2}, "eval.extra_clusters is 2, must be equal to model.extra_clusters (0)"),
    ({"model.pretrained.dino_patch_size": 14, "dataset.val_res": 320},
     "model.pretrained.dino_patch_size is 14, must be one of [8, 16] with model.arch dino"),
    ({"model.arch": "dino3", "model.dim": 96}, 'model.arch is "dino3", must be one of "dino", "dinov2"'),
    ({"model.pretrained.registers": True}, "model.pretrained.registers is true, must be false"),
    ({"dataloader.batch_size": 6, "trainer.devices": 4}, "dataloader.batch_size is 6, must be a multiple"),
    ({"dataset.cache_features": "ram", "dataset.loader_crop_type": "random"},
     'dataset.cache_features is "ram", must be null'),
    ({"training_coeff.products": "split", "training_coeff.similarity_dtype": "float16"},
     'training_coeff.products is "split", must be float32 or float16 with training_coeff.similarity_dtype'),
    ({"method": "stegoo"}, 'method is "stegoo", must be one of "ppap", "stego", "hp", "frozen", or a name'),
    ({"model.arch": "vit", "model.dim": 100}, "model.dim is 100, must be a multiple of"),
    ({"wandb.project": "me/PPAP"}, 'wandb.project is "me/PPAP", must be a name of at most 128 characters'),
    ({"method": "frozen", "model.dim": 70}, "model.dim is 70, must be 384"),
    ({"method": "hp", "dataset.cache_features": "ram"}, 'dataset.cache_features is "ram", must be null'),
    ({"method": "hp", "hp.pool_size": 100}, "hp.pool_size is 100, must be a multiple of dataloader.batch"),
    ({"method": "stego", "train.compare_frozen": True}, "train.compare_frozen is true, must be false"),
    ({"model.arch": {"name": "dino"}}, "model.arch.name"),
    ({"training_coeff.prop_iter": True}, "training_coeff.prop_iter is true, must be a whole number"),
]  # fmt: skip


def test_mistakes__are_reported_together_with_the_closest_key():
    found = mistakes({key: value for key, value, _ in TOGETHER})
    for mistake, (key, _, part) in zip(found, TOGETHER, strict=True):
        assert mistake.startswith(f"{key} {part}")


@pytest.mark.parametrize(("flat", "part"), REPORTED_ONCE)
def test_mistake__is_reported_once_without_its_consequences(flat, part):
    (mistake,) = mistakes(flatten(flat))
    assert mistake.startswith(part)


@pytest.mark.parametrize("flat", [{"method": "frozen"}, {"train.frozen": True}])
def test_method__frozen_may_be_written_in_two_ways(flat):
    assert build_options(flat, source="x").trained_by == "frozen"


def test_missing_files__folder_and_weights(monkeypatch, tmp_path):
    key, path = "model.pretrained.pretrained_weights", "dataset.data_path"
    assert missing_files({key: "no.pth"}, weights=True) == [
        f"{key} is no.pth: no such file; null: the official weights",
        f"{path} is not set: name the cocostuff27 folder with --data_path; download it with: "
        "python dataset/dataset_download.py cocostuff --root '<folder>'",
    ]
    assert missing_files({path: __file__}, weights=True)[0].endswith(
        "a file, must be the folder of the data set"
    )
    assert missing_files({path: "/none", key: "no.pth"}, weights=False) == [
        f"{path} is /none: no such folder; name it with --data_path; download it with: "
        "python dataset/dataset_download.py cocostuff --root /none"
    ]
    own = {path: "/none", "dataset.data_type": "directory"}
    assert missing_files(own, weights=False) == [f"{path} is /none: no such folder; name it with --data_path"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert missing_files({path: "~"}, weights=True) == []
    for name in ("synthetic", "unknown"):
        assert missing_files({"dataset.data_type": name}, weights=True) == []


def test_find__bare_name_path_and_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the project's own files are found from anywhere
    assert find_option_file("demo.json").name == "demo.json"
    assert find_option_file("cocostuff").parent.name == "server"
    (tmp_path / "mine.json").write_text("{}")
    assert find_option_file("mine.json") == Path("mine.json")
    with pytest.raises(UserError, match=r"Did you mean demo\.json"):
        find_option_file("demmo.json")
    with pytest.raises(UserError, match=r"no such name in json, json/server, json/baselines\. Available"):
        find_option_file("nosuch.json")


def test_base__is_read_first_and_cycles_are_errors(tmp_path):
    (tmp_path / "a.json").write_text('{"train": {"epoch": 7, "seed": 1}}')
    (tmp_path / "b.json").write_text('{"base": "a.json", "train": {"seed": 2}}')
    options = load_options(tmp_path / "b.json", {"train.print_freq": 9})
    assert (options.train.epoch, options.train.seed, options.train.print_freq) == (7, 2, 9)
    for content, words in (('{"base": "b.json"}', "cycle"), ('{"base": "none"}', "no such file")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=words):
            load_options(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [("", ""), ("{", ""), ("[]", ""), ("\xff", ""), ('{"a": {"b": 1, "b": 1}}', '"b" appears twice')],
)
def test_file__that_cannot_be_read_is_named(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=rf"a\.json.*{words}"):
        load_options(tmp_path / "a.json")


def test_tree__reads_back_to_the_same_options():
    flat = {"training_coeff.sigma_pos": "inf", "dataset.class_names": ["a"], "own.b.c": 1}
    options = build_options(flat, source="x")
    assert options.training_coeff.sigma_pos == float("inf")
    flat = flatten(json.loads(json.dumps(as_tree(options))))
    assert build_options(flat, source="x") == options
    assert nest(flat) == as_tree(options)
