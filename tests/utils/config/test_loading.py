import json
import re
from pathlib import Path

import pytest

from dataset import DATA_SETS
from model import build_module
from model.backbone import FrozenViT
from utils.config.loading import (
    REPOSITORY,
    SCHEMA,
    as_tree,
    build_options,
    find_option_file,
    flatten,
    load_options,
    missing_files,
)
from utils.config.options import LEGACY_KEYS, Options
from utils.errors import UserError
from utils.vision.labels import LabelSpace

OUR_FILES = sorted(path for path in (REPOSITORY / "json").rglob("*.json") if path.name != "ablation.json")
PUBLISHED_NAMES = [
    f"{name}{suffix}.json"
    for name in ("cocostuff8", "cocostuff16", "cityscapes_base", "cityscapes_small", "potsdam")
    for suffix in ("", "_eval")
]


def mistakes(flat, **keywords) -> str:
    with pytest.raises(UserError) as error:
        build_options(flat, source="x.json", **keywords)
    return str(error.value)


def test_defaults__are_accepted():
    assert build_options({}, source="x") == Options()


@pytest.mark.parametrize("path", OUR_FILES, ids=lambda path: path.name)
def test_our_files__load_and_build(path, monkeypatch):
    options = load_options(path)
    monkeypatch.setattr("model.load_backbone", lambda backbone, weights: "a test")
    labels = LabelSpace.with_spread_colours(tuple(map(str, range(11))))
    if options.dataset.data_type != "directory":
        labels = DATA_SETS[options.dataset.data_type].labels(options.dataset)
    module = build_module(options, labels)
    assert isinstance(module.segmenter.backbone, FrozenViT)


def test_our_files__cover_the_published_names():
    assert set(PUBLISHED_NAMES) <= {path.name for path in (REPOSITORY / "json/server").iterdir()}


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_published_files__load_unchanged_and_mean_what_ours_mean(shared, name):
    published = flatten(as_tree(load_options(shared / "reference/options" / name)))
    ours = flatten(as_tree(load_options(REPOSITORY / "json/server" / name)))
    free = {"wandb.entity", "dataset.data_path"}
    if "potsdam" in name:
        free.add("dataset.crop_type")  # the published code ignores it there, and so do we
    if name.endswith("_eval.json"):  # evaluation reads none of train.*
        free |= {key for key in SCHEMA if key.startswith("train.")}
    assert {key for key in SCHEMA if published[key] != ours[key]} <= free


def test_published_file__every_value_arrives(shared):
    raw = flatten(json.loads((shared / "reference/options/cityscapes_base.json").read_text()))
    resolved = flatten(as_tree(load_options(shared / "reference/options/cityscapes_base.json")))
    assert {key: value for key, value in raw.items() if key not in LEGACY_KEYS} == {
        key: resolved[key] for key in raw if key not in LEGACY_KEYS
    }


def test_published_format__a_file_with_every_key_of_its_time():
    """The keys of the published cocostuff16.json, legacy ones included, and what they must come to."""
    read = {
        "gpu_ids": [0],
        "output_dir": "./output/",
        "checkpoint": "",
        "wandb.project": "PPAP",
        "wandb.name": "ppap_cocostuff16",
        "dataset.data_type": "cocostuff27",
        "dataset.loader_crop_type": "center",
        "dataset.crop_type": "five",
        "dataset.crop_ratio": 0.5,
        "dataset.res": 224,
        "dataloader.batch_size": 64,
        "dataloader.num_workers": 8,
        "training_coeff.initialcrit_amb": 0.15,
        "training_coeff.initialcrit_pos": 0.55,
        "training_coeff.trainpatchsplit": 4,
        "training_coeff.tau": 0.8,
        "training_coeff.prop_iter": 2,
        "training_coeff.sigma_pos": 3,
        "training_coeff.sigma_amb": 4,
        "model.arch": "dino",
        "model.continuous": True,
        "model.dim": 384,
        "model.extra_clusters": 0,
        "model.pretrained.model_type": "vit_small",
        "model.pretrained.dino_patch_size": 16,
        "model.pretrained.pretrained_weights": None,
        "optimizer.net.name": "adamw",
        "optimizer.net.lr": 1e-3,
        "optimizer.net.weight_decay": 0.01,
        "optimizer.linear.name": "adam",
        "optimizer.linear.lr": 1e-3,
        "optimizer.cluster.name": "adam",
        "optimizer.cluster.lr": 1e-3,
        "train.print_freq": 25,
        "train.valid_freq": 100,
        "train.epoch": 5,
        "train.grad_norm": 10.0,
        "eval.extra_clusters": 0,
        "eval.is_crf": True,
        "eval.is_direct": False,
    }
    resolved = flatten(as_tree(build_options(read | LEGACY_KEYS, source="x")))
    assert {key: resolved[key] for key in read} == read
    ours = flatten(as_tree(load_options(REPOSITORY / "json/server/cocostuff16.json")))
    assert {key: ours[key] for key in read} == read


@pytest.mark.parametrize("key", LEGACY_KEYS)
def test_legacy__published_value_runs_and_another_says_it_has_no_effect(key):
    build_options({key: LEGACY_KEYS[key]}, source="x")
    assert f"{key} is 99, but has no effect" in mistakes({key: 99})


def test_mistakes__are_reported_together_with_the_closest_key():
    text = mistakes(
        {
            "dataset.rez": 3,
            "tau": 0.1,
            "train.epoch": 0,
            "train.seed": 1.5,
            "train": 5,
            "training_coeff.tau": float("nan"),
            "eval.is_crf": "yes",
            "gpu_ids": 3,
            "dataloader.batch_size": "64",
            "dataset.res": 225,
        }
    )
    for part in (
        "10 mistakes in x.json",
        "dataset.rez (value 3) is not an option. Did you mean dataset.res?",
        "tau (value 0.1) is not an option. Did you mean training_coeff.tau?",
        "train.epoch is 0, must be a whole number, at least 1",
        "train.seed is 1.5, must be a whole number",
        "train is 5, must be a section",
        "training_coeff.tau is NaN",
        'eval.is_crf is "yes", must be true or false',
        "gpu_ids is 3, must be a list of numbers",
        'dataloader.batch_size is "64", must be a whole number',
        "dataset.res is 225, must be a multiple of the patch (8): 224 or 232",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flat", "part"),
    [
        ({"dataset.val_res": 100}, "dataset.val_res is 100, must be a multiple of the patch (8): 96 or 104"),
        ({"model.dim": 400}, "model.dim is 400, must be 384"),
        ({"eval.extra_clusters": 2}, "must equal model.extra_clusters"),
        ({"wandb.name": "../up"}, "usable as the name of one folder"),
        (
            {"model.pretrained.dino_patch_size": 14, "dataset.val_res": 322},
            "must be 8 or 16 with model.arch dino",
        ),
        ({"model.pretrained.depth": 13}, "at most 12"),
        ({"model.pretrained.registers": True}, "must be false with model.arch dino"),
        ({"model.arch": "vit", "model.dim": 100}, "multiple of heads"),
        ({"wandb.name": "${nowhere}"}, "nowhere"),
        ({"wandb.name": "${bad"}, "wandb.name is"),
        ({"wandb.name": "tokens"}, "keeps its files in that folder"),
        ({"wandb.name": "x" * 300}, "at most 200 letters"),
        ({"train.seed": 10**400}, "train.seed is 1000"),
        ({"training_coeff.initialcrit_pos": 10**400}, "initialcrit_pos is 1000"),
        ({"dataset": 3}, "dataset is 3, must be a section"),
    ],
)
def test_contradictions(flat, part):
    assert part in mistakes(flat)


def test_missing_files__are_reported_with_the_rest(tmp_path):
    flat = {"model.pretrained.pretrained_weights": "no.pth", "dataset.data_path": "", "train.epoch": -1}
    text = mistakes(flat, check_files=True)
    for part in ("no.pth: no such file", "data_path is not set: name", "train.epoch is -1"):
        assert part in text
    assert missing_files(build_options({"dataset.data_type": "synthetic"}, source="x")) == []


def test_empty_section__is_accepted():
    assert build_options({"dataset": {}}, source="x") == Options()


@pytest.mark.parametrize("name", [".", "", "/", "no/where"])
def test_find__what_is_no_file(name, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        find_option_file(name)
    (tmp_path / "a.json").write_text(json.dumps({"base": name or "none"}))
    with pytest.raises(UserError, match=r"\.json: base .*: no such file"):
        load_options(tmp_path / "a.json")


def test_base__is_read_first_and_circles_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"train": {"epoch": 7, "seed": 1}}')
    (tmp_path / "b.json").write_text('{"base": "a.json", "train": {"seed": 2}}')
    options = load_options(tmp_path / "b.json")
    assert (options.train.epoch, options.train.seed) == (7, 2)
    (tmp_path / "a.json").write_text('{"base": "b.json"}')
    with pytest.raises(UserError, match="circle"):
        load_options(tmp_path / "b.json")


@pytest.mark.parametrize("content", ["{", "[]", "{'a': 1}", "\xff"])
def test_file__not_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.json"):
        load_options(tmp_path / "a.json")


def test_find__bare_name_path_and_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the project's own files are found from anywhere
    assert find_option_file("demo.json").name == "demo.json"
    assert find_option_file("cocostuff").parent.name == "server"
    (tmp_path / "mine.json").write_text("{}")
    assert find_option_file("mine.json") == Path("mine.json")
    with pytest.raises(UserError, match=r"Did you mean demo\.json"):
        find_option_file("demmo.json")


def test_tree__reads_back_to_the_same_options():
    options = build_options({"training_coeff.sigma_pos": "inf", "dataset.class_names": ["a"]}, source="x")
    assert build_options(flatten(json.loads(json.dumps(as_tree(options)))), source="x") == options


def test_every_option_is_read_by_something():
    """`section.key` or, where a section was given a shorter name, `chosen.key` with the key's own word."""
    code = "\n".join(
        path.read_text()
        for part in ("run.py", "eval.py", "dataset", "model", "utils")
        for path in ([REPOSITORY / part] if part.endswith(".py") else (REPOSITORY / part).rglob("*.py"))
        if path.name != "options.py"
    )
    holders = r"(?:options|chosen|backbone|group|model)"
    unread = []
    for key in SCHEMA:
        *sections, last = key.split(".")
        holder = rf"(?:{holders}|{'|'.join(sections) or holders})"
        if not re.search(rf"\b{holder}\.{last}\b", code):
            unread.append(key)
    assert unread == []


def test_every_option_says_what_it_means():
    for key, entry in SCHEMA.items():
        assert entry.field.metadata["help"], key
