"""A photograph's class map is what an evaluation predicts, at any size and of any kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from model import build_module, load_segmenter
from model.checkpoint import CheckpointFile, export
from model.module import CHECKPOINT_ENTRY
from utils.config.loading import as_tree
from utils.errors import UserError
from utils.vision.crf import crf_missing
from utils.vision.labels import LabelSpace
from utils.vision.mean_field import MeanField

LABELS = LabelSpace(("road", "sky", "tree"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
CRF = [
    pytest.param("pydensecrf", marks=pytest.mark.skipif(bool(crf_missing()), reason="pydensecrf2")),
    "torch",
]


def save(module, path, **about):
    """One of our checkpoints, as training writes it."""
    entry = {
        "class_names": list(LABELS.names),
        "palette": [list(colour) for colour in LABELS.palette],
        "assignment": [2, 0, 1],
        "train_labelled": True,
        "options": as_tree(module.options),
    }
    torch.save({"state_dict": module.state_dict(), CHECKPOINT_ENTRY: entry | about}, path)
    return path


@pytest.fixture
def module(tiny_options):
    return build_module(tiny_options(), LABELS)


@pytest.fixture
def checkpoint(module, tmp_path):
    return save(module, tmp_path / "best.ckpt")


def photo(width, height, seed=0):
    """Blotches, so that an untrained network says more than one thing."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def evaluated(module, image, head, *, pool=None):
    """What the evaluator predicts for a square image at `val_res`: (H, W) clusters or classes."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    evaluator = module.evaluator
    evaluator.reset()
    evaluator.pictured, found = frozenset([0]), []
    if pool is not None:
        evaluator.pool = pool
        finished = pool.finished

        def kept(**how):
            for label, predictions in finished(**how):
                found.append(predictions)
                yield label, predictions

        pool.finished = kept
    probes = {"linear": module.linear_probe, "cluster": module.cluster_probe}
    with torch.no_grad():
        code = module.segmenter.code(
            module.segmenter.backbone.tokens(_normalised(pixels)), module.segmenter.grid(pixels)
        )
        evaluator.update(code, pixels, torch.zeros(1, *pixels.shape[-2:], dtype=torch.int64), **probes)
    if pool is not None:
        return np.asarray(found[0][("cluster", "linear").index(head)])
    return getattr(evaluator.pictures[0], head).numpy()


def _normalised(pixels):
    from utils.vision.transforms import normalise

    return normalise(pixels)


@pytest.mark.parametrize("head", ["cluster", "linear"])
def test_map__is_the_evaluators_prediction(module, checkpoint, head):
    image = photo(32, 32)
    found = load_segmenter(checkpoint, head=head)(image)
    table = np.array([2, 0, 1] if head == "cluster" else [0, 1, 2])
    expected = table[evaluated(module, image, head)]
    assert found.dtype == np.uint8
    assert len(np.unique(found)) > 1
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("backend", CRF)
def test_map__after_crf_is_the_evaluators(module, checkpoint, backend):
    image = photo(32, 32)
    found = load_segmenter(checkpoint, crf=backend)(image)
    table = np.array([2, 0, 1])
    expected = table[evaluated(module, image, "cluster", pool=MeanField())]
    assert np.mean(found == expected) > 0.995
    odd = load_segmenter(checkpoint, crf=backend, res=40)(photo(61, 83))
    assert odd.shape == (83, 61)


@pytest.mark.parametrize("size", [(61, 83), (200, 37), (9, 5), (1, 1), (32, 64)])
def test_map__has_the_images_own_size(checkpoint, size):
    assert load_segmenter(checkpoint)(photo(*size)).shape == size[::-1]
    assert load_segmenter(checkpoint, res=45, tile=32)(photo(*size)).shape == size[::-1]


def test_map__padding_is_cropped_and_says_nothing_of_what_lies_beyond(module, checkpoint):
    """On a side that the patch divides nothing is padded: 32 x 48 at res 32 is one plain forward pass."""
    image = photo(48, 32)
    found = load_segmenter(checkpoint)(image)
    assert np.array_equal(found, np.array([2, 0, 1])[evaluated(module, image, "cluster")])


def test_map__of_other_kinds_of_images(checkpoint, tmp_path):
    segment = load_segmenter(checkpoint)
    grey = photo(40, 33).convert("L")
    expected = segment(grey.convert("RGB"))
    assert np.array_equal(segment(grey), expected)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 17)
    assert np.array_equal(segment(deep), expected)
    clear = photo(40, 33).convert("RGBA")
    clear.putalpha(40)
    assert np.array_equal(segment(clear), segment(photo(40, 33)))


def test_map__is_upright(checkpoint, tmp_path):
    segment = load_segmenter(checkpoint)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo(40, 33).save(tmp_path / "turned.png", exif=exif)
    upright = photo(40, 33).transpose(Image.Transpose.ROTATE_270)
    found = segment(Image.open(tmp_path / "turned.png"))
    assert found.shape == (40, 33)
    assert np.array_equal(found, segment(upright))


def test_tiles__small_images_are_taken_whole(checkpoint):
    image = photo(70, 70)
    whole = load_segmenter(checkpoint, res=64)(image)
    assert np.array_equal(load_segmenter(checkpoint, res=64, tile=64)(image), whole)
    tiled = load_segmenter(checkpoint, res=64, tile=32)(image)
    assert tiled.shape == whole.shape


def test_ids__are_the_checkpoints_and_stay(checkpoint, module, tmp_path):
    one, two = load_segmenter(checkpoint), load_segmenter(str(checkpoint))
    assert (one.names, one.palette, one.unmatched) == (LABELS.names, LABELS.palette, False)
    assert np.array_equal(one(photo(50, 40)), two(photo(50, 40)))
    bare = load_segmenter(save(module, tmp_path / "bare.ckpt", assignment=None))
    assert (bare.names, bare.unmatched) == (("cluster 0", "cluster 1", "cluster 2"), True)
    assert np.array_equal(np.array([2, 0, 1])[bare(photo(50, 40))], one(photo(50, 40)))


def test_published__needs_options_and_keeps_cluster_numbers(module, checkpoint, tmp_path):
    export(CheckpointFile(checkpoint, module.state_dict(), {}), tmp_path / "ckpt.pth")
    with pytest.raises(UserError, match=r"a published checkpoint carries no options.*opt="):
        load_segmenter(tmp_path / "ckpt.pth")
    found = load_segmenter(tmp_path / "ckpt.pth", opt=module.options)
    assert found.names == ("cluster 0", "cluster 1", "cluster 2")
    mapped = np.array([2, 0, 1])[found(photo(50, 40))]
    assert np.array_equal(mapped, load_segmenter(checkpoint)(photo(50, 40)))
    linear = load_segmenter(tmp_path / "ckpt.pth", opt=module.options, labels=LABELS, head="linear")
    assert linear.names == LABELS.names


def test_unmatched__clusters_follow_after_the_classes(tiny_options, tmp_path):
    module = build_module(tiny_options(model__extra_clusters=1, eval__extra_clusters=1), LABELS)
    segment = load_segmenter(save(module, tmp_path / "more.ckpt", assignment=[1, -1, 0, 2]))
    assert segment.names == (*LABELS.names, "cluster 1")
    clusters = evaluated(module, photo(32, 32), "cluster")
    assert np.array_equal(segment(photo(32, 32)), np.array([1, 3, 0, 2])[clusters])


def test_asked__mistakes_come_together(module, tmp_path):
    path = save(module, tmp_path / "unlabelled.ckpt", train_labelled=False, assignment=None)
    with pytest.raises(UserError) as error:
        load_segmenter(path, head="linear", res=3, crf="gauss", tile=33)
    assert len(error.value.mistakes) == 4
    assert "head is linear, which was not trained, for want of labels" in str(error.value)
    assert load_segmenter(path)(photo(20, 20)).shape == (20, 20)


def test_asked__a_resolution_of_zero_is_a_mistake(checkpoint):
    with pytest.raises(UserError, match="res is 0, must be at least 8, one patch"):
        load_segmenter(checkpoint, res=0)


def test_memory__names_tiles(checkpoint, monkeypatch):
    segment = load_segmenter(checkpoint)

    def full(image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(segment, "_best", full)
    with pytest.raises(UserError, match="give a tile, such as 224"):
        segment(photo(20, 20))
