"""eval.py --images, as the command line calls it."""

import json

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import run
from model import load_segmenter
from utils.config.cli import guarded
from utils.errors import UserError
from utils.plots.mask_ids import MaskIds


@pytest.fixture
def trained(tiny_file):
    """An option file whose run is trained, on scenes with labels."""
    path = tiny_file(eval__is_crf=False, eval__pictures=0)
    run.main(["--opt", path])
    return path


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    (folder / "trip").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for name, size in (("a.png", (50, 41)), ("trip/b.png", (33, 70)), ("trip/c.png", (32, 32))):
        blotches = Image.fromarray(drawn.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blotches.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def mask(path, *words):
    return evaluation.main(["--opt", path, "--checkpoint", "tiny", *words])


def test_images__command_line_and_python_agree(trained, photographs, tmp_path, capsys):
    out = tmp_path / "masks"
    options = ("--names", "0=ground", "dataset.data_type=cocostuff27")  # no such data set is there
    (done,) = mask(trained, "--images", str(photographs), "--out", str(out), *options)
    assert (done.images, done.left_out) == (3, ())
    assert "images/s" in capsys.readouterr().out
    segment = load_segmenter(tmp_path / "output/tiny/best.ckpt")
    for name in ("a", "trip/b", "trip/c"):
        written = Image.open(out / name / "mask.png")
        assert np.array_equal(np.asarray(written), segment(Image.open(photographs / f"{name}.png")))
        colours = np.array(written.getpalette()).reshape(-1, 3)[: len(segment.palette)]
        assert np.array_equal(colours, segment.palette)
    legend = json.loads((out / "legend.json").read_text())
    assert [row["name"] for row in legend["ids"]] == ["ground", *segment.names[1:]]


def test_images__what_is_asked_for_reaches_the_network(trained, photographs, tmp_path):
    out, file = tmp_path / "masks", photographs / "a.png"
    words = ("--res", "48", "--tile", "32", "--head", "linear", "--crf", "eval.crf_backend=torch")
    mask(trained, "--images", str(file), "--out", str(out), *words)
    segment = load_segmenter(tmp_path / "output/tiny", res=48, tile=32, head="linear", crf="torch")
    assert np.array_equal(np.asarray(Image.open(out / "a/mask.png")), segment(Image.open(file)))


def test_images__a_damaged_one_gives_status_1(trained, photographs, tmp_path, capsys):
    (photographs / "trip/bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 half a file")
    words = ["--opt", trained, "--checkpoint", "tiny", "--images", str(photographs)]
    assert guarded(lambda: evaluation.main([*words, "--out", str(tmp_path / "masks")])) == 1
    told = capsys.readouterr().err
    assert "trip/bad.jpg: not a readable image" in told.split("error:")[1]
    assert "the other 3 images are done" in told
    assert len(list((tmp_path / "masks").rglob("mask.png"))) == 3


def test_images__users_mistakes(trained, photographs, tmp_path):
    images = ("--images", str(photographs))
    for words, told in (
        (("--images", "nowhere", "--out", "x"), "--images is nowhere: no such file or folder"),
        ((*images, "--out", str(tmp_path / "x"), "--names", "99=x"), "--names: 99=x: ids are 0 to"),
        ((*images, "--out", str(tmp_path / "x"), "--tile", "33"), "tile is 33, must be a multiple"),
        ((*images, "--out", str(photographs)), "the folder of the photographs"),
    ):
        with pytest.raises(UserError) as error:
            mask(trained, *words)
        assert told in str(error.value)
    with pytest.raises(UserError, match=r"none of .*nobody.*best.ckpt.* is there"):
        evaluation.main(["--opt", trained, "--checkpoint", "nobody", *images, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_images__a_network_trained_without_labels(tiny_file, photographs, tmp_path, capsys):
    plain = {"dataset.data_type": "directory", "dataset.data_path": str(photographs), "dataset.n_classes": 3}
    path = tiny_file(**{key.replace(".", "__"): value for key, value in plain.items()})
    run.main(["--opt", path, "dataloader.batch_size=3", "eval.is_crf=false", "eval.pictures=0"])
    moved = photographs.rename(tmp_path / "elsewhere")  # and the data set is gone
    (done,) = mask(path, "--images", str(moved), "--out", str(tmp_path / "masks"))
    assert [row["name"] for row in done.legend] == ["cluster 0", "cluster 1", "cluster 2"]
    assert "clusters were matched to no classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="head is linear, which was not trained"):
        mask(path, "--images", str(moved), "--out", str(tmp_path / "masks"), "--head", "linear")
    assert isinstance(load_segmenter(tmp_path / "output/tiny").ids, MaskIds)
