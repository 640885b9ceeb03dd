"""Pages of eval.py --explore hold the bank of --explain, its labels and the masks' clusters."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import eval as evaluation
from dataset import build_data
from dataset.synthetic import NAMES
from model import build_module, load_segmenter
from model.explain import build_bank, frozen_bank
from model.explore import pack_features
from model.set_quality import patch_classes
from tests.dataset.files import picture, save
from tests.model.test_predictor import make_module
from tests.model.test_predictor import save as save_checkpoint
from utils.errors import UserError
from utils.vision.transforms import Geometry


def unpacked(features):
    """The bank (N, D) of `pack_features`, with rows of unit length."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(features["codes"])), dtype=np.uint8)
    low, middle, high = planes.reshape(3, len(features["scales"]), -1).astype(np.int64)  # (D, N) each
    codes = low + (middle << 8) + (high << 16)
    signed = np.where(codes % 2, -(codes + 1) // 2, codes // 2).T  # (N, D)
    return F.normalize(torch.from_numpy(signed * np.array(features["scales"])), dim=1).float()


def content_of(page):
    (text,) = re.findall(r'id="content">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text)


def ids_of(layer):
    return torch.frombuffer(bytearray(base64.b64decode(layer["ids"])), dtype=torch.uint8)


def drawn_bank(patches=600, dim=48):
    """Correlated features, as those of a backbone."""
    drawn = torch.Generator().manual_seed(0)
    mixed = torch.randn(dim, dim, generator=drawn) * torch.logspace(0, -2, dim)
    return F.normalize(torch.randn(patches, dim, generator=drawn) @ mixed.T + 0.3, dim=1)


@pytest.mark.parametrize(("limit", "error"), [(10**6, 2e-6), (40_000, 1e-4)])
def test_features__similarities_survive_within_the_limit(limit, error):
    bank = drawn_bank()
    features = pack_features(bank, limit=limit)
    assert len(features["codes"]) * 3 / 4 <= limit + 2
    rows = unpacked(features)
    assert (rows @ rows.T - bank @ bank.T).abs().max() < error


def test_command__page_of_a_validation_image(tiny_file, tiny_options, tmp_path, capsys):
    page = tmp_path / "new/explore.html"
    path = tiny_file(training_coeff__sigma_amb="inf")
    evaluation.main(["--opt", path, "--explore", "2", "--out", str(page)])
    assert str(page) in capsys.readouterr().out
    content, options = content_of(page), tiny_options()
    data = build_data(options, train=False)
    module = build_module(options, data.labels)
    images, names = build_bank(data, "2", size=4)
    rows, bank = unpacked(content["features"]), frozen_bank(module, images, module.method.criterion)
    torch.testing.assert_close(rows @ rows.T, bank @ bank.T, rtol=0, atol=2e-6)
    assert content["grid"] == [4, 4]
    assert content["anchor"] == 2 * 4 + 2  # as --explain, the centre of the image
    assert (content["coefficients"]["initialcrit_pos"], content["coefficients"]["prop_iter"]) == (0.55, 2)
    assert float(content["coefficients"]["sigma_amb"]) == float("inf")
    labels = content["layers"]["labels"]
    split = {data.validation_set.name(index): data.validation_set[index].label for index in range(6)}
    expected = patch_classes(torch.stack([split[name] for name in names]), 8, n_classes=len(NAMES))
    assert torch.equal(ids_of(labels).long(), expected)
    assert labels["names"] == list(data.labels.names)
    assert list(content["layers"]) == ["sets", "labels"]
    text = page.read_text(encoding="utf-8")  # nothing from elsewhere
    assert not re.search(r"https?://|url\(|@import|<link|fetch\(|import\(", text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)', text))
    assert len(text) < 100_000


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    for number in range(6):
        save(folder / f"{number}.png", picture([number]))
    return folder


def test_command__photographs_without_a_data_set(photographs, tiny_file, tmp_path, capsys):
    page = tmp_path / "explore.html"
    path = tiny_file(dataset__data_type="directory")
    evaluation.main(["--opt", path, "--explore", str(photographs), "--out", str(page)])
    assert "showing 4 of 6 images" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'data-name="(.*?)"', text) == ["0.png", "1.png", "3.png", "4.png"]
    assert list(content_of(page)["layers"]) == ["sets"]
    evaluation.main(["--opt", path, "--explore", str(photographs / "5.png"), "--out", str(page)])
    assert content_of(page)["features"]["count"] == 16
    (photographs / "0.png").write_bytes(b"no image")
    evaluation.main(["--opt", path, "--explore", str(photographs), "--out", str(page)])
    assert "0.png: not a readable image" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'data-name="(.*?)"', text) == ["1.png", "3.png", "4.png"]


def test_command__checkpoint_adds_clusters(photographs, tmp_path):
    checkpoint, page = save_checkpoint(make_module(), tmp_path / "best.ckpt"), tmp_path / "explore.html"
    words = ["--checkpoint", str(checkpoint), "--explore", str(photographs / "5.png"), "--out", str(page)]
    evaluation.main(words)
    clusters, predictor = content_of(page)["layers"]["clusters"], load_segmenter(checkpoint)
    image, _ = Geometry(32)(Image.open(photographs / "5.png"), None)
    expected = patch_classes(torch.from_numpy(predictor(image))[None], 8, n_classes=3)
    assert torch.equal(ids_of(clusters).long(), expected)
    assert clusters["names"] == ["road", "sky", "tree"]


def test_command__mistakes(tiny_file, tmp_path, monkeypatch):
    path, page, empty = tiny_file(), str(tmp_path / "explore.html"), tmp_path / "empty"
    empty.mkdir()
    for source, out, words in (
        ("0", str(tmp_path), "--out is .*: a folder, must be a file"),
        ("99", page, "--explore is 99, must be"),
        ("nowhere", page, "--explore is nowhere, must be an image"),
        (str(empty), page, "must be an image, a folder of images, or the index"),
    ):
        with pytest.raises(UserError, match=words):
            evaluation.main(["--opt", path, "--explore", source, "--out", out])
    monkeypatch.setattr("model.explore.MAX_BYTES", 20_000)
    with pytest.raises(UserError, match="64 patches do not fit"):
        evaluation.main(["--opt", path, "--explore", "0", "--out", page])
