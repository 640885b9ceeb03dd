import functools
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import crop_files, processes
from dataset.crop_datasets import main
from dataset.crops import crop_boxes
from tests.dataset.files import SIZE, picture, save
from utils.config.cli import guarded
from utils.config.loading import REPOSITORY
from utils.errors import UserError

FOLDER = "cropped/directory_five_crop_0.5"


@pytest.fixture
def words(tiny_file):
    """The words of the command for a folder of photographs."""

    def build(folder, *further, workers=1, **changed):
        chosen = {"dataset__data_type": "directory", "dataset__crop_type": "five"}
        file = tiny_file(**chosen | changed)
        return ["--opt", file, "--data_path", str(folder), "--workers", str(workers), *further]

    return build


@pytest.fixture
def prepared(words, directory):
    main(words(directory))
    return directory


def contents(folder):
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def as_jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return np.asarray(Image.open(stream))


def record_of(folder):
    return json.loads((folder / "crops.json").read_text())


@pytest.mark.parametrize("kind", ["five", "random"])
def test_prepare__files_hold_the_boxes(words, directory, kind):
    main(words(directory, dataset__crop_type=kind))
    folder = directory / f"cropped/directory_{kind}_crop_0.5"
    assert len(list(folder.rglob("*.jpg"))) == len(list(folder.rglob("*.png"))) == 20
    for index in range(4):
        image = Image.open(directory / f"imgs/train/{index}.jpg")
        label = np.asarray(Image.open(directory / f"labels/train/{index}.png")).astype(int)
        expected = np.where(label == 255, 0, label + 1)
        for k, box in enumerate(crop_boxes(image.size, 0.5, kind, index)):
            left, top, right, bottom = box
            stored = Image.open(folder / f"label/train/{5 * index + k}.png")
            assert stored.mode == "L"
            assert np.array_equal(np.asarray(stored), expected[top:bottom, left:right])
            crop = np.asarray(Image.open(folder / f"img/train/{5 * index + k}.jpg"))
            assert np.array_equal(crop, as_jpeg(image.crop(box)))
    assert record_of(folder)["complete"] is True
    main(words(directory, "--check", dataset__crop_type=kind))


def test_prepare__is_what_training_reads(words, directory, data_of, capsys):
    live = data_of("directory", directory, dataset__crop_type="five")
    main(words(directory))
    stored = data_of("directory", directory, dataset__crop_type="five")
    assert f"train crops: 20 in {directory / FOLDER}" in capsys.readouterr().out
    for index in range(20):
        assert torch.equal(live.train_set[index].label, stored.train_set[index].label)


def test_prepare__same_bytes_whatever_the_processes(words, directory):
    found = []
    for workers in (1, 2, 3):
        main(words(directory, workers=workers))
        found.append(contents(directory / FOLDER))
        shutil.rmtree(directory / FOLDER)
    assert len(found[0]) == 41
    assert found[0] == found[1] == found[2]


def test_prepare__without_labels_and_with_some(words, directory, data_of):
    shutil.rmtree(directory / "labels/train")
    main(words(directory))
    assert not (directory / FOLDER / "label").exists()
    main(words(directory, "--check"))
    assert not data_of("directory", directory, dataset__crop_type="five").train_labelled
    other_rule = words(directory, "dataset.n_classes=4", "dataset.class_names=[a,b,c,d]")
    main(other_rule)  # which photographs without labels do not depend on

    save(directory / "labels/train/2.png", np.ones((SIZE[1], SIZE[0])))
    with pytest.raises(UserError, match="labelled is false there, true by"):
        main(words(directory))
    shutil.rmtree(directory / FOLDER)
    main(words(directory))
    values = [set(np.unique(Image.open(directory / FOLDER / f"label/train/{n}.png"))) for n in range(20)]
    assert values == 10 * [{0}] + 5 * [{2}] + 5 * [{0}]
    assert data_of("directory", directory, dataset__crop_type="five").train_labelled


def test_prepare__takes_no_comment_of_the_photograph_along(words, directory):
    Image.open(directory / "imgs/train/0.jpg").save(directory / "imgs/train/0.jpg", comment=b"at the sea")
    main(words(directory))
    assert b"at the sea" in (directory / "imgs/train/0.jpg").read_bytes()
    assert b"at the sea" not in (directory / FOLDER / "img/train/0.jpg").read_bytes()


def test_restart__writes_what_is_lacking_and_nothing_else(words, prepared, capsys):
    folder = prepared / FOLDER
    whole = contents(folder)
    (folder / "img/train/7.jpg").unlink()
    (folder / "label/train/11.png").write_bytes(b"")  # as a crash of the machine leaves it
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    capsys.readouterr()
    main(words(prepared))
    assert "10 crops of 4 images are there, 10 are to be written" in capsys.readouterr().out
    assert contents(folder) == whole
    changed = {
        path.name for path in folder.rglob("*.jpg") if path.stat().st_mtime_ns != before.get(path.name)
    }
    assert changed == {f"{number}.jpg" for number in (*range(5, 10), *range(10, 15))}
    main(words(prepared))
    assert "nothing to do" in capsys.readouterr().out


def started(arguments, folder):
    """A process group of its own that prepares crops, once some are there."""

    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
        with open(folder / "said", "w") as said:
            sys.stdout = sys.stderr = said
            sys.exit(guarded(functools.partial(main, arguments)))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + 60
    while not list((folder / FOLDER).glob("img/train/*.jpg")):
        assert process.is_alive(), "ended before a crop was there"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_restart__after_the_process_ended(words, directory, data_of, how, monkeypatch):
    """SIGKILL of the first process alone; SIGINT of all of them, as Ctrl-C sends it."""
    many(directory, 60)
    slow = crop_files.encoded
    monkeypatch.setattr(crop_files, "encoded", lambda *given: (time.sleep(0.1), slow(*given))[1])
    process = started(words(directory, workers=2), directory)
    if how == "killed":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if how == "killed" else 130)
    if how == "interrupted":
        assert "the same command goes on" in (directory / "said").read_text()
        assert "Traceback" not in (directory / "said").read_text()
    assert 0 < len(list((directory / FOLDER).glob("img/train/*.jpg"))) < 300
    assert record_of(directory / FOLDER)["complete"] is False
    gone(process.pid)
    with pytest.raises(UserError, match=r"not complete .* python dataset/crop_datasets\.py --opt"):
        data_of("directory", directory, dataset__crop_type="five")
    with pytest.raises(UserError, match="not complete; the same command without --check"):
        main(words(directory, "--check"))
    monkeypatch.undo()
    main(words(directory))
    main(words(directory, "--check"))
    assert len(contents(directory / FOLDER)) == 601
    assert len(data_of("directory", directory, dataset__crop_type="five").train_set) == 300


def many(directory, count):
    for number in range(4, count):
        for part in ("imgs/train/{}.jpg", "labels/train/{}.png"):
            shutil.copy(directory / part.format(0), directory / part.format(number))


def gone(group):
    """Waits until no process of the group is left: the workers of a killed one end themselves."""
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def test_prepare__worker_that_dies_is_no_hang(words, directory, monkeypatch):
    monkeypatch.setattr(processes, "_work", die)
    with pytest.raises(UserError, match="a worker process died"):
        main(words(directory, workers=2))
    assert record_of(directory / FOLDER)["complete"] is False


def die(index):
    os._exit(9)


def test_prepare__damaged_images_are_named_after_the_others(words, directory):
    image = directory / "imgs/train/1.jpg"
    good = image.read_bytes()
    image.write_bytes(good[:300])
    save(directory / "labels/train/3.png", np.full((SIZE[1], SIZE[0]), 7))
    with pytest.raises(UserError) as error:
        main(words(directory))
    assert str(error.value).startswith("2 of 4 images without crops; mend these")
    assert f"{image}: not a readable image" in str(error.value)
    assert "labels/train/3.png: the label holds 7, must hold 0 to 2, 255" in str(error.value)
    assert len(contents(directory / FOLDER)) == 21
    assert record_of(directory / FOLDER)["complete"] is False
    image.write_bytes(good)
    save(directory / "labels/train/3.png", np.full((SIZE[1], SIZE[0]), 2))
    main(words(directory))
    main(words(directory, "--check"))


def test_prepare__damaged_images_may_be_left_out(words, directory, data_of, capsys):
    (directory / "imgs/train/1.jpg").write_bytes(b"no picture")
    main(words(directory, "dataset.skip_damaged=true"))
    assert "1 of 4 images without crops:\n  - " in capsys.readouterr().out
    record = record_of(directory / FOLDER)
    assert record["complete"] is True
    assert record["missing"] == [1]
    main(words(directory, "--check"))
    stored = data_of("directory", directory, dataset__crop_type="five")
    assert [path.stem for path in stored.train_set.source.images] == [
        str(n) for n in range(20) if n not in range(5, 10)
    ]


def test_record__of_other_crops_is_an_error_that_says_both_sides(words, prepared):
    save(prepared / "imgs/train/9.jpg", picture(9))
    for argument in ((), ("--check",), ("--dry-run",)):
        with pytest.raises(UserError) as error:
            main(words(prepared, *argument))
        assert "images is 4 there, 5 by the options and the data" in str(error.value)
        assert f"move {prepared / FOLDER} away" in str(error.value)
    (prepared / "imgs/train/9.jpg").rename(prepared / "imgs/train/3.jpg")  # as many, but other names
    (prepared / "imgs/train/2.jpg").rename(prepared / "imgs/train/2a.jpg")
    with pytest.raises(
        UserError, match=r'1 mistake in (.|\n)*digest is "[0-9a-f]{64}" there, "[0-9a-f]{64}"'
    ):
        main(words(prepared))
    (prepared / "imgs/train/2a.jpg").rename(prepared / "imgs/train/2.jpg")
    main(words(prepared))
    with pytest.raises(UserError, match="digest is"):  # another rule
        main(words(prepared, "dataset.n_classes=4", "dataset.class_names=[a,b,c,d]"))


def test_record__folder_of_the_published_code_is_left_alone(words, prepared, data_of, capsys):
    (prepared / FOLDER / "crops.json").unlink()
    before = contents(prepared / FOLDER)
    with pytest.raises(UserError, match=r"holds crops but no crops\.json"):
        main(words(prepared))
    assert len(data_of("directory", prepared, dataset__crop_type="five").train_set) == 20
    main(words(prepared, "--check"))
    assert "no record: not made here" in capsys.readouterr().out
    assert contents(prepared / FOLDER) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_check__finds_what_is_wrong(words, prepared, workers, capsys):
    folder = prepared / FOLDER
    main(words(prepared, "--check", workers=workers))
    assert "40 files in" in capsys.readouterr().out
    (folder / "img/train/3.jpg").unlink()
    shutil.copy(folder / "img/train/0.jpg", folder / "img/train/20.jpg")
    damaged = folder / "img/train/6.jpg"
    damaged.write_bytes(damaged.read_bytes()[:400])
    label = np.array(Image.open(folder / "label/train/12.png"))
    label[0, :2] = 3 - label[0, :2]
    save(folder / "label/train/12.png", label)
    save(folder / "img/train/19.jpg", picture(0))
    before = contents(folder)
    with pytest.raises(UserError) as error:
        main(words(prepared, "--check", workers=workers))
    assert str(error.value).startswith(f"{folder}: wrong in 5 places")
    for line in (
        r"img/train/3\.jpg: missing",
        r"img/train/20\.jpg: no crop has this name",
        r"img/train/6\.jpg: not a readable image",
        r"label/train/12\.png: 2 pixels differ",
        r"img/train/19\.jpg: is \(60, 44\) \(width, height\), must be \(30, 22\)",
    ):
        assert re.search(line, str(error.value))
    assert contents(folder) == before


def test_check__lists_the_first_twenty(words, prepared):
    shutil.rmtree(prepared / FOLDER / "img")
    shutil.rmtree(prepared / FOLDER / "label")
    with pytest.raises(UserError) as error:
        main(words(prepared, "--check"))
    lines = str(error.value).splitlines()
    assert "wrong in 40 places" in lines[0]
    assert len(lines) == 22
    assert lines[-1] == "  - ... and 20 more"


def test_dry_run__writes_nothing(words, directory, capsys):
    dry_run = words(directory, "--dry-run")
    before = contents(directory)
    main(dry_run)
    said = capsys.readouterr().out
    assert f"{directory / FOLDER}: 0 crops of 4 images are there, 20 are to be written" in said
    assert re.search(r"about 0\.2 MB needed, [\d,.]+ MB free", said)  # 40 files, a block each
    assert contents(directory) == before
    assert not (directory / "cropped").exists()


def test_prepare__full_disk_and_unwritable_folder(words, directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
        with pytest.raises(UserError, match=r"about 0\.2 MB are needed, 0\.0 MB are free"):
            main(words(directory))
    assert not (directory / "cropped").exists()

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(crop_files.Path, "write_bytes", full)
        for workers in (1, 2):
            with pytest.raises(UserError, match=rf"{FOLDER}: cannot be written \(No space left"):
                main(words(directory, workers=workers))
    shutil.rmtree(directory / "cropped")
    (directory / "cropped").touch()
    with pytest.raises(UserError, match=rf"{FOLDER}: cannot be written"):
        main(words(directory))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset__crop_type": None}, "dataset.crop_type is null: training takes whole images"),
        ({"dataset__data_type": "synthetic"}, "its images are made on the fly"),
        *(
            ({"dataset__data_type": name}, f"dataset.data_type is {name}: it trains on whole images")
            for name in ("cocostuff15", "cocostuff3", "potsdam", "potsdamraw")
        ),
    ],
)
def test_refusal__nothing_is_to_be_prepared(words, directory, changed, message):
    with pytest.raises(UserError, match=message):
        main(words(directory, **changed))


def test_refusal__mistakes_in_the_words_come_together(words, tmp_path):
    arguments = words(tmp_path / "nowhere", "dataset.crop_ratio=0.4,0.5", "dataset.seed=1", workers=0)
    with pytest.raises(UserError) as error:
        main(arguments)
    assert "dataset.crop_ratio is given 2 values" in str(error.value)
    assert "dataset.seed" in str(error.value)
    assert "--workers is 0, must be at least 1" in str(error.value)
    with pytest.raises(UserError, match=r"nowhere holds no image"):
        main(words(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such file"):
        main(["--opt", "cocostuf.json"])


def test_prepare__cocostuff_and_cityscapes(words, tmp_path):
    coco, cities = tmp_path / "coco", tmp_path / "cities"
    (coco / "curated/train2017").mkdir(parents=True)
    (coco / "curated/train2017/Coco164kFull_Stuff_Coarse.txt").write_text("b\na\n")
    fine = np.resize([0, 1, 181, 255], (SIZE[1], SIZE[0]))  # classes 9, 11, 24, none
    for name in "ab":
        save(coco / f"images/train2017/{name}.jpg", picture(ord(name)))
        save(coco / f"annotations/train2017/{name}.png", fine)
    main(words(coco, dataset__data_type="cocostuff27"))
    folder = coco / "cropped/cocostuff27_five_crop_0.5"
    assert set(np.unique(Image.open(folder / "label/train/0.png"))) == {0, 10, 12, 25}
    first = np.asarray(Image.open(folder / "img/train/0.jpg"))  # the list's order, not the names'
    assert np.array_equal(first, as_jpeg(Image.open(coco / "images/train2017/b.jpg").crop((0, 0, 30, 22))))

    save(cities / "leftImg8bit/train/ulm/x_leftImg8bit.png", picture(0))
    ids = np.resize([0, 7, 33], (SIZE[1], SIZE[0]))
    save(cities / "gtFine/train/ulm/x_gtFine_labelIds.png", ids)
    main(words(cities, dataset__data_type="cityscapes"))
    main(words(cities, "--check", dataset__data_type="cityscapes"))
    folder = cities / "cropped/cityscapes_five_crop_0.5"
    assert set(np.unique(Image.open(folder / "label/train/4.png"))) == {0, 1, 27}


def test_command__as_a_file_from_anywhere_and_as_a_module(words, directory, tmp_path_factory):
    """Both at once: most of their time goes into importing torch."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folders = [elsewhere / "file", elsewhere / "module"]
    for folder in folders:
        shutil.copytree(directory, folder)
    forms = [[str(REPOSITORY / "dataset/crop_datasets.py")], ["-m", "dataset.crop_datasets"]]
    places = [elsewhere, REPOSITORY]
    running = [
        subprocess.Popen(
            [sys.executable, *form, *words(folder, workers=2)],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for form, place, folder in zip(forms, places, folders, strict=True)
    ]
    for process, folder in zip(running, folders, strict=True):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert f"20 crops are in {folder / FOLDER}" in said
    assert contents(folders[0]) == contents(folders[1])
    mistaken = subprocess.run(
        [sys.executable, *forms[0], "--opt", "cocostuf.json"], cwd=elsewhere, capture_output=True, text=True
    )
    assert mistaken.returncode == 2
    assert "Did you mean cocostuff.json?" in mistaken.stderr


def test_training__crops_of_other_images_are_refused(prepared, data_of):
    """A photograph that came after the crops; without the photographs the crops are taken as they are."""
    save(prepared / "imgs/train/9.jpg", picture(9))
    with pytest.raises(UserError, match="images is 4 there, 5 by the options and the data"):
        data_of("directory", prepared, dataset__crop_type="five")
    for path in (prepared / "imgs/train").iterdir():
        path.unlink()
    assert len(data_of("directory", prepared, dataset__crop_type="five").train_set) == 20
