"""Every data set and every experiment of the paper on miniatures, through run.main and eval.main."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import run
from dataset import DATA_SETS, crop_datasets, dataset_download
from model.backbone import FrozenViT
from model.weights import backbone_spec, hub_file
from tests.dataset import miniatures
from tests.dataset.files import picture
from tests.utils.server import coco_pages, serving, targets_at
from utils.config.loading import find_option_file, load_options
from utils.config.options import FULL_DEPTH
from utils.errors import UserError
from utils.plots.tables import METRICS

pytestmark = pytest.mark.usefixtures("no_figures")

MAKERS = {
    "cocostuff27": miniatures.make_cocostuff,
    "cocostuff15": miniatures.make_cocostuff,
    "cocostuff3": miniatures.make_cocostuff,
    "cityscapes": miniatures.make_cityscapes,
    "potsdam": miniatures.make_potsdam,
    "potsdamraw": miniatures.make_potsdam,
    "directory": miniatures.make_directory,
    "synthetic": lambda root, counts: root,
}
PUBLISHED = ("cocostuff8", "cocostuff16", "cityscapes_base", "cityscapes_small", "potsdam")
RELEASED = [  # names of the file and of its options
    ("cocostuff_vits16", "cocostuff16"),
    pytest.param("cocostuff_vits8", "cocostuff8", marks=pytest.mark.slow),
    pytest.param("cityscapes_vitb8", "cityscapes_base", marks=pytest.mark.slow),
    pytest.param("potsdam_vitb8", "potsdam", marks=pytest.mark.slow),
]
SMALL = ["dataset.res=32", "dataset.val_res=32", "dataloader.batch_size=4", "dataloader.num_workers=0"]
SMALL += ["train.epoch=1", "eval.pictures=0"]


@pytest.mark.parametrize("data_type", DATA_SETS)
def test_data_set__trains_and_evaluates(data_type, tiny_file, tmp_path, capsys):
    root = MAKERS[data_type](tmp_path, counts=(6, 2))
    crop = "random" if DATA_SETS[data_type].cropped else "five"
    chosen = {"data_type": data_type, "data_path": str(root), "crop_type": crop}
    changed = {f"dataset__{key}": value for key, value in chosen.items()}
    (trained,) = run.main(["--opt", tiny_file(**changed, eval__crf_backend="torch")])
    assert (capsys.readouterr().out.count("crop_type is ignored") == 1) == (crop == "five")
    assert set(trained["before_crf"]) == set(trained["after_crf"]) == {*METRICS}
    assert trained["images"] == (6 if data_type in ("synthetic", "potsdamraw") else 2)
    names = DATA_SETS[data_type].labels(load_options(tmp_path / "tiny.json").dataset).names
    assert list(trained["class_iou"]["before_crf"]["cluster"]) == list(names)


def test_own_photographs__of_all_kinds_train_without_labels(tiny_file, tmp_path, capsys):
    """A folder as it comes: nested, mixed sizes and modes, turned, a video, and one file that is damaged."""
    photos = tmp_path / "photos"
    for number, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK")):
        image = Image.fromarray(picture(number).astype(np.uint8)).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        (photos / f"day {number}").mkdir(parents=True)
        image = image.resize((40 + 10 * number, 90 - 10 * number))
        image.save(photos / f"day {number}" / ("photo.jpg" if mode == "CMYK" else "photo.png"), exif=exif)
    (photos / "walk.mp4").write_bytes(b"no image")
    (photos / "broken.jpg").write_bytes(b"no image")
    changed = {"dataset__data_type": "directory", "dataset__data_path": str(photos), "dataset__n_classes": 3}
    path = tiny_file(**changed, dataset__crop_type="five", dataset__skip_damaged=True)
    (trained,) = run.main(["--opt", path])
    assert trained["before_crf"] is None
    assert trained["step"] == 5 * 5 // 4
    assert "1 .mp4; extract the frames" in capsys.readouterr().out
    (left_out,) = json.loads((tmp_path / "output/tiny/left_out.json").read_text())
    assert "broken.jpg: not a readable image" in left_out
    with pytest.raises(UserError, match=r"1 of 6 images or labels are damaged;(.|\n)*broken\.jpg"):
        run.main(["--opt", path, "--check", "dataset.skip_damaged=false", "wandb.name=checked"])
    assert not (tmp_path / "output/checked").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder with a random file for every DINO backbone that is asked for."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)

    def fill(options):
        spec = backbone_spec(options)
        shapes = {name: value.shape for name, value in FrozenViT(spec).state_dict().items()}
        torch.save(random_state(shapes), hub_file(spec.published))

    return fill


def random_state(shapes):
    drawn = torch.Generator().manual_seed(0)
    return {name: torch.randn(tuple(shape), generator=drawn).mul_(0.05) for name, shape in shapes.items()}


def test_cocostuff__from_nothing_to_the_first_step(hub, tmp_path, monkeypatch, capsys):
    """Download, crops and a training step by the commands that each program names for the next."""
    source = miniatures.make_cocostuff(tmp_path / "source", counts=(4, 1))
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        server.pages.update(coco_pages(source))
        root = str(tmp_path / "cocostuff")
        dataset_download.main(["cocostuff", "--root", root], targets=targets_at(server))
    said = capsys.readouterr().out.split("next:")[1].split("\n")
    crop, train = (shlex.split(line)[2:] for line in said if "python" in line)
    crop_datasets.main([*crop, "--workers", "0"])
    hub(load_options(find_option_file("cocostuff.json"), {"model.pretrained.depth": 2}))
    (trained,) = run.main([*train, "--debug", "model.pretrained.depth=2", *SMALL])
    assert trained["step"] == 4 * 5 // 4
    assert "20 items to train on" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_options__train_unchanged(shared, name, hub, tmp_path, monkeypatch):
    """The files as published, but for the folder; the network has two blocks, which no option says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FULL_DEPTH, "dino", 2)
    path = shared / f"reference/options/{name}.json"
    options = load_options(path)
    hub(options)
    whole = options.dataset.data_type == "potsdam"
    root = MAKERS[options.dataset.data_type](tmp_path / "data", counts=(64 if whole else 13, 1))
    (trained,) = run.main(["--opt", str(path), "--data_path", str(root), "--debug"])
    assert set(trained["after_crf"]) == {*METRICS}


@pytest.mark.parametrize(("released", "named"), RELEASED)
def test_released_checkpoints__are_evaluated(shared, released, named, tmp_path, monkeypatch):
    """A file with the names and shapes of a released one, by its evaluation file on small images."""
    monkeypatch.chdir(tmp_path)
    listed = json.loads((shared / "reference/checkpoint_keys.json").read_text())[released]
    path = shared / f"reference/options/{named}_eval.json"
    options = load_options(path)
    content = {
        key: random_state(listed[key]) if isinstance(listed.get(key), dict) else None
        for key in listed["top_level"]
    }
    folder = tmp_path / options.output_dir / options.checkpoint
    folder.mkdir(parents=True)
    torch.save(content, folder / "ckpt.pth")
    root = MAKERS[options.dataset.data_type](tmp_path / "data", counts=(1, 1))
    words = ["--opt", str(path), "--data_path", str(root), "--debug", *SMALL, "eval.crf_workers=1"]
    (evaluated,) = evaluation.main(words)
    assert evaluated["checkpoint"].endswith(f"{options.checkpoint}/ckpt.pth")
    assert set(evaluated["after_crf"]) == {*METRICS}
