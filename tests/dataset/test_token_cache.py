import csv
import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import run
from dataset import token_cache as cache
from dataset.base import SegmentationDataset
from utils.errors import UserError
from utils.vision.transforms import Geometry

ABOUT = {"weights": "some digest", "precision": "32-true"}


def encode(image):
    """Two tokens of three channels from (B, 3, H, W)."""
    flat = image.float().flatten(2) / 255  # (B, 3, H*W)
    return torch.stack([flat.mean(dim=2), flat.amax(dim=2)], dim=1)  # (B, 2, 3)


def forbidden(image):
    raise AssertionError("an earlier run has left the tokens behind")


@pytest.fixture
def items(data_of, directory):
    return data_of("directory", directory).train_set


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"


def tokens_of(items, folder, encode=encode, about=ABOUT):
    return cache.cached(
        items, encode, shape=(2, 3), folder=folder, about=about, batch_size=3, workers=0, split="train"
    )


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached__holds_tokens_and_labels_of_each_item(items, folder, kind):
    found = tokens_of(items, folder / "tokens" if kind == "disk" else None)
    assert len(found) == len(items) == 4  # a batch of three and a leftover
    for index in range(4):
        item = found[(7, index)]
        expected = encode(items[index].image[None])[0].half()
        assert torch.equal(item.tokens, expected)
        assert torch.equal(item.label, items[index].label)
        assert item.index == index


def test_cached__a_second_run_reads_what_the_first_has_written(items, folder):
    first = tokens_of(items, folder)
    second = tokens_of(items, folder, forbidden)
    assert torch.equal(first[3].tokens, second[3].tokens)


def test_cached__other_weights_geometry_or_files_are_another_cache(items, folder):
    tokens_of(items, folder)
    for changed in (
        lambda: tokens_of(items, folder, forbidden, ABOUT | {"weights": "another"}),
        lambda: tokens_of(SegmentationDataset(items.source, Geometry(64)), folder, forbidden),
    ):
        with pytest.raises(AssertionError, match="left the tokens"):
            changed()
    path = items.source.images[0]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(AssertionError, match="left the tokens"):
        tokens_of(items, folder, forbidden)


def test_cached__another_label_or_rule_is_another_cache(items, folder):
    tokens_of(items, folder)
    path = items.source.label_path(1)
    before = path.read_bytes()
    path.write_bytes(before + b"\0")
    with pytest.raises(AssertionError, match="left the tokens"):
        tokens_of(items, folder, forbidden)
    items.source.rule = items.source.rule.copy()
    items.source.rule[0] = 2
    with pytest.raises(AssertionError, match="left the tokens"):
        tokens_of(items, folder, forbidden)


def test_cached__rows_do_not_hang_on_the_progress_bar(items, folder, monkeypatch):
    monkeypatch.setattr(cache, "tqdm", functools.partial(cache.tqdm, disable=True))
    found = tokens_of(items, folder)
    assert torch.equal(found[3].tokens, encode(items[3].image[None])[0].half())


@pytest.mark.parametrize("damage", ["truncated", "empty", "no description", "other shape"])
def test_cached__a_damaged_one_is_made_again(items, folder, damage):
    tokens_of(items, folder)
    (made,) = folder.iterdir()
    if damage == "truncated":
        (made / "tokens.npy").write_bytes((made / "tokens.npy").read_bytes()[:-3])
    elif damage == "empty":
        (made / "tokens.npy").write_bytes(b"")
    elif damage == "no description":
        (made / "about.json").unlink()
    else:
        np.save(made / "labels.npy", np.zeros((1, 2, 2), np.uint8))
    again = tokens_of(items, folder)
    assert torch.equal(again[3].tokens, encode(items[3].image[None])[0].half())


def test_cached__an_interrupted_one_leaves_nothing(items, folder):
    def breaks(image):
        if len(image) == 1:
            raise KeyboardInterrupt
        return encode(image)

    with pytest.raises(KeyboardInterrupt):
        tokens_of(items, folder, breaks)
    assert not list(folder.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.unfinished import unfinished_folder
with unfinished_folder(Path(sys.argv[1]) / "train-0") as part:
    (part / "tokens.npy").write_bytes(b"half of them")
    print("filling", flush=True)
    sys.stdin.read() if sys.argv[2] == "alive" else os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="no locks")
def test_cached__what_a_killed_run_left_is_removed_and_what_another_writes_is_not(items, folder, capsys):
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(folder)]
    assert subprocess.run([*command, "dead"], stdout=subprocess.PIPE).returncode == -signal.SIGKILL
    (dead,) = folder.iterdir()
    with subprocess.Popen([*command, "alive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alive:
        alive.stdout.readline()
        (other,) = set(folder.iterdir()) - {dead}
        tokens_of(items, folder)
        assert not dead.exists()
        assert (other / "tokens.npy").read_bytes() == b"half of them"
    assert f"removed {dead}: its run was killed" in capsys.readouterr().out
    (made,) = folder.iterdir()  # the other one has ended by itself
    assert sorted(path.name for path in made.iterdir()) == ["about.json", "labels.npy", "tokens.npy"]


def test_cached__claims_its_space_before_it_starts(items, folder, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"cannot be made .*No space left"):
        tokens_of(items, folder, forbidden)
    assert not list(folder.iterdir())


def test_free_memory__heeds_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CGROUP", tmp_path)
    monkeypatch.setattr(cache, "MEMINFO", tmp_path / "meminfo")
    assert cache._free_memory() == 2**62
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    assert cache._free_memory() == 8192
    for name, content in (("max", "max"), ("current", "4000"), ("stat", "inactive_file 100\nactive_file 20")):
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert cache._free_memory() == 8192
    (tmp_path / "memory.max").write_text("5000\n")
    assert cache._free_memory() == 1120


def test_cached__two_runs_at_once_share_the_first_that_is_whole(items, folder):
    def overtaken(image):
        if len(image) == 1:  # the last batch: another run has just finished
            tokens_of(items, folder)
        return encode(image)

    found = tokens_of(items, folder, overtaken)
    assert torch.equal(found[3].tokens, encode(items[3].image[None])[0].half())
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached__too_little_space_is_told_beforehand(items, folder, monkeypatch, kind):
    monkeypatch.setattr(cache, "HEADROOM", 2**60)
    with pytest.raises(UserError, match=r"dataset\.cache_features: train tokens .* GiB, but only"):
        tokens_of(items, folder if kind == "disk" else None, forbidden)


def test_random_crops__refuse_a_cache(tiny_options):
    with pytest.raises(UserError, match=r"cache_features is ram, must be null with .*random"):
        tiny_options(dataset__cache_features="ram", dataset__loader_crop_type="random")


@pytest.mark.parametrize("frozen", [False, True])
def test_training__same_losses_to_the_rounding_of_float16(tiny_file, tmp_path, frozen):
    losses = {}
    for kind in (None, "ram", "disk"):
        path = tiny_file(
            dataset__cache_features=kind, wandb__name=str(kind), train__frozen=frozen, eval__is_crf=False
        )
        run.main(["--opt", path, "dataloader.num_workers=1", "train.print_freq=1"])
        folder = tmp_path / "output" / (f"{kind}-frozen" if frozen else str(kind))
        with (folder / "metrics.csv").open() as lines:
            losses[kind] = [float(row["total_loss"]) for row in csv.DictReader(lines) if row["total_loss"]]
    assert len(losses[None]) == 4
    assert losses["ram"] == losses["disk"]
    np.testing.assert_allclose(losses["ram"], losses[None], rtol=1e-3)
    (kept,) = (tmp_path / "output/tokens").glob("train-*")
    assert json.loads((kept / "about.json").read_text())["tokens"] == [16, 17, 24]
