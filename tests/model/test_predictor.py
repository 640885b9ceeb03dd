"""The class map of a photograph is the prediction of an evaluation, for images of any kind and size."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import eval as evaluation
from model import build_module, load_segmenter
from model.checkpoint import CHECKPOINT_ENTRY, Checkpoint, export
from model.predictor import tiled_code
from tests.conftest import TINY, needs_pydensecrf, write_tiny
from utils.config.cli import guarded
from utils.config.loading import as_tree, build_options, with_changes
from utils.errors import UserError
from utils.vision.labels import LabelSpace
from utils.vision.mean_field import MeanField

LABELS = LabelSpace(("road", "sky", "tree"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
ASSIGNMENT = np.array([2, 0, 1])
CRF = [pytest.param("pydensecrf", marks=needs_pydensecrf), "torch"]


class Recorder(MeanField):
    """Keeps the refined predictions that the evaluator counts."""

    found = None

    def refine(self, *given):
        done = super().refine(*given)
        self.found = done.result()
        return done


def make_module(*, refiner=None, **changes):
    options = build_options(TINY | {key.replace("__", "."): v for key, v in changes.items()}, source="a test")
    return build_module(options, LABELS, pictured=[0], refiner=refiner)


def save(module, path, **about):
    """One of our checkpoints, as training writes it."""
    entry = {
        "class_names": list(LABELS.names),
        "palette": [list(colour) for colour in LABELS.palette],
        "assignment": ASSIGNMENT.tolist(),
        "train_labelled": True,
        "options": as_tree(module.options),
    }
    torch.save({"state_dict": module.state_dict(), CHECKPOINT_ENTRY: entry | about}, path)
    return path


@pytest.fixture(scope="module")
def module():
    return make_module(refiner=Recorder())


@pytest.fixture(scope="module")
def checkpoint(module, tmp_path_factory):
    return save(module, tmp_path_factory.mktemp("run") / "best.ckpt")


def photo(width, height):
    """Blotches, so that an untrained network predicts several classes."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def evaluated(module, image):
    """The evaluator's prediction of an image at `val_res`, whose sides are multiples of the patch."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    segmenter, probes = module.segmenter, {"linear": module.linear_probe, "cluster": module.cluster_probe}
    module.evaluator.reset()
    with torch.no_grad():
        code = segmenter.code(segmenter.tokens(pixels), segmenter.grid(pixels))
    label = torch.zeros(1, *pixels.shape[-2:], dtype=torch.int64)
    module.evaluator.update(code, pixels, label, first=0, **probes)
    return module.evaluator.predictions()[0]


@pytest.mark.parametrize("width", [32, 48])
def test_map__is_the_evaluators_prediction(module, checkpoint, width):
    image = photo(width, 32)
    expected = evaluated(module, image)
    found = load_segmenter(checkpoint)(image)
    assert found.dtype == np.uint8
    assert len(np.unique(found)) > 1
    assert np.array_equal(found, ASSIGNMENT[expected.cluster])
    assert np.array_equal(load_segmenter(checkpoint, head="linear")(image), expected.linear)


def test_map__other_kinds_of_images_are_named(checkpoint):
    segment = load_segmenter(checkpoint)
    for image in (np.zeros((3, 40, 40), np.uint8), np.zeros((40, 40, 3)), torch.zeros(3, 40, 40), [1]):
        with pytest.raises(UserError, match=r"image is .*, must be a path, a PIL image or an \(H, W, 3\)"):
            segment(image)


def test_map__compiles_nothing(module, checkpoint):
    """It would be repeated for photographs of each size."""
    compiled = with_changes(module.options, {"train.compile": True})
    assert not load_segmenter(checkpoint, opt=compiled).module.options.train.compile


@pytest.mark.parametrize("backend", CRF)
def test_map__after_crf_is_the_evaluators(module, checkpoint, backend):
    image = photo(32, 32)
    options = with_changes(module.options, {"eval.crf_backend": backend})
    found = load_segmenter(checkpoint, opt=options, crf=True)(image)
    evaluated(module, image)
    assert np.mean(found == ASSIGNMENT[module.evaluator.refiner.found[0]]) > 0.995
    assert np.array_equal(load_segmenter(checkpoint, crf=backend)(image), found)
    with pytest.raises(UserError, match="crf is cuda, must be"):
        load_segmenter(checkpoint, crf="cuda")
    smaller = load_segmenter(checkpoint, opt=options, crf=True, res=40)
    assert smaller(photo(61, 83)).shape == (83, 61)


def test_map__has_the_size_of_the_image(checkpoint):
    whole, tiled = load_segmenter(checkpoint), load_segmenter(checkpoint, res=45, tile=32)
    for size in ((61, 83), (200, 37), (1, 1), (32, 64)):
        assert whole(photo(*size)).shape == tiled(photo(*size)).shape == size[::-1]


def test_map__of_a_photograph_that_is_turned(checkpoint, tmp_path):
    segment, exif = load_segmenter(checkpoint), Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    photo(40, 33).save(tmp_path / "rotated.png", exif=exif)
    found = segment(Image.open(tmp_path / "rotated.png"))
    assert np.array_equal(found, segment(photo(40, 33).transpose(Image.Transpose.ROTATE_270)))


def test_map__of_a_large_or_thin_photograph_is_tiled(checkpoint, capsys, monkeypatch):
    segment = load_segmenter(checkpoint, res=448)
    small, large = photo(512, 448), photo(800, 448)  # 64 x 56 patches, and 100 x 56
    assert segment(small).shape == (448, 512)
    assert not capsys.readouterr().out
    found = segment(large)
    monkeypatch.setattr("model.predictor.MAX_PATCHES", 2**13)  # the next two are reduced to it
    for size in ((1, 3000), (20_000, 3)):
        assert segment(photo(*size)).shape == size[::-1]
    assert capsys.readouterr().out.count("images above 4,096 patches are tiled") == 1
    assert np.array_equal(found, load_segmenter(checkpoint, res=448, tile=512)(large))


def test_ids__of_matched_extra_and_unmatched_clusters(module, checkpoint, tmp_path):
    matched = load_segmenter(checkpoint)
    assert (matched.names, matched.palette) == (list(LABELS.names), list(LABELS.palette))
    plain = load_segmenter(save(module, tmp_path / "plain.ckpt", assignment=None))
    assert plain.names == ["cluster 0", "cluster 1", "cluster 2"]
    assert np.array_equal(ASSIGNMENT[plain(photo(50, 40))], matched(photo(50, 40)))
    larger = make_module(model__extra_clusters=1, eval__extra_clusters=1)
    extra = load_segmenter(save(larger, tmp_path / "extra.ckpt", assignment=[1, -1, 0, 2]))
    assert extra.names == [*LABELS.names, "cluster 1"]
    assert len(set(extra.palette)) == 4
    clusters = evaluated(larger, photo(32, 32)).cluster
    assert np.array_equal(extra(photo(32, 32)), np.array([1, 3, 0, 2])[clusters])


def test_published__needs_options_and_has_cluster_numbers(module, checkpoint, tmp_path):
    export(Checkpoint(checkpoint, module.state_dict(), {}), path := tmp_path / "ckpt.pth")
    with pytest.raises(UserError, match="opt="):
        load_segmenter(path)
    (options := tmp_path / "options.json").write_text(json.dumps(as_tree(module.options)))
    found = load_segmenter(path, opt=options)
    assert found.names == ["cluster 0", "cluster 1", "cluster 2"]
    assert np.array_equal(ASSIGNMENT[found(photo(50, 40))], load_segmenter(checkpoint)(photo(50, 40)))
    linear = load_segmenter(path, opt=module.options, labels=LABELS, head="linear")
    assert linear.names == list(LABELS.names)


@pytest.mark.parametrize(("argument", "value"), [("head", "linear"), ("tile", 33)])
def test_arguments__mistakes(module, tmp_path, argument, value):
    path = save(module, tmp_path / "unlabelled.ckpt", train_labelled=False, assignment=None)
    with pytest.raises(UserError, match=f"{argument} is {value}, must be"):
        load_segmenter(path, **{argument: value})


def average(image):
    """A code that depends on single patches: tiles do not change it."""
    return F.avg_pool2d(image, 2)


def test_tiles__of_a_local_code_are_the_whole_code():
    image = torch.rand(1, 3, 26, 38, generator=torch.Generator().manual_seed(0))
    for tile in (None, 8, 12, 26, 30):
        torch.testing.assert_close(tiled_code(average, image, patch=2, tile=tile), average(image))


def test_tiles__blend_without_a_seam():
    """The code alternates between 0 and 1 from tile to tile."""
    values = iter(range(100))

    def encode(image):
        return torch.full((1, 1, *(side // 2 for side in image.shape[-2:])), float(next(values) % 2))

    code = tiled_code(encode, torch.zeros(1, 3, 32, 112), patch=2, tile=32)[0, 0]  # (16, 56)
    assert (code.min(), code.max()) == (0, 1)
    assert code.diff(dim=1).abs().max() < 0.5


@pytest.fixture
def run(tmp_path, module):
    """Words of a command for a run with a checkpoint, beside a folder of photographs."""
    path = write_tiny(tmp_path)
    (tmp_path / "output/tiny").mkdir(parents=True)
    save(module, tmp_path / "output/tiny/best.ckpt")
    for name, size in {"a.png": (50, 41), "trip/b.png": (33, 70), "trip/c.jpg": (32, 32)}.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(*size).save(file)
    return ["--opt", path, "--checkpoint", "tiny", "--out", str(tmp_path / "masks"), "--images"]


def test_images__command_line_and_python_agree(run, checkpoint, tmp_path):
    evaluation.main([*run, str(tmp_path / "photos"), "--names", "0=ground", "dataset.data_type=cocostuff27"])
    segment = load_segmenter(checkpoint)
    for name in ("a.png", "trip/b.png", "trip/c.jpg"):
        folder = (tmp_path / "masks" / name).with_suffix("")
        mask = Image.open(folder / "mask.png")
        assert np.array_equal(np.asarray(mask), segment(Image.open(tmp_path / "photos" / name)))
        assert mask.getpalette()[:9] == list(np.ravel(LABELS.palette))
        assert Image.open(folder / "overlay.jpg").size == mask.size
    legend = json.loads((tmp_path / "masks/legend.json").read_text())
    assert [row["name"] for row in legend["ids"]] == ["ground", "sky", "tree"]
    assert sum(row["share"] for row in legend["ids"]) == pytest.approx(100)
    assert (tmp_path / "masks/legend.png").is_file()
    evaluation.main([*run, str(tmp_path / "photos/a.png"), "--res", "48", "--tile", "32", "--head", "linear"])
    linear = load_segmenter(checkpoint, res=48, tile=32, head="linear")
    mask = Image.open(tmp_path / "masks/a/mask.png")
    assert np.array_equal(np.asarray(mask), linear(Image.open(tmp_path / "photos/a.png")))


def test_images__flat_masks_a_contact_sheet_and_a_damaged_photograph(run, tmp_path, capsys):
    (tmp_path / "photos/trip/bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 half a file")
    (tmp_path / "photos/trip").rename(tmp_path / "photos/day 1")
    assert guarded(lambda: evaluation.main([*run, str(tmp_path / "photos"), "--flat"])) == 1
    assert "day 1/bad.jpg: not a readable image" in capsys.readouterr().err
    out, names = tmp_path / "masks", {"a.png", "day 1_b.png", "day 1_c.png", "legend.png"}
    assert {path.name for path in out.glob("*.png")} == names
    assert "bad.jpg" in json.loads((out / "legend.json").read_text())["left_out"][0]
    page = (out / "index.html").read_text()
    for words in ('src="overlays/day%201_b.jpg"', "3 photographs", "day 1/bad.jpg: not a readable image"):
        assert words in page
    assert "<script" not in page


def test_photograph__as_file_picture_and_array(checkpoint, tmp_path):
    predictor = load_segmenter(checkpoint)
    pixels = np.random.default_rng(3).integers(256, size=(40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = predictor(Image.fromarray(pixels))
    for given in (pixels, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(predictor(given), expected)
