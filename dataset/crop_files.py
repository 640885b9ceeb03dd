"""Prepared crops as files: which there are, what each holds, and the record of what they were made from."""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.base import RawItem, Source, classes_of
from dataset.crops import CROPS, RECORD, crop_boxes, prepared_folder
from utils.config.options import DatasetOptions
from utils.errors import UserError
from utils.files import read_json_object, replacing, write_json
from utils.vision.images import open_image, open_label

IMAGES, LABELS = "img/train", "label/train"
BLOCK = 4096  # bytes that a file takes at least, and a multiple of which it takes
SAMPLES = 8  # images that the disk space is estimated from


@dataclass(frozen=True)
class CropPlan:
    """The crops of a train split and where they go.

    Attributes:
        source: whole images.
        folder: as `dataset.crops.prepared_folder` says.
        kind: `dataset.crop_type`.
        ratio: `dataset.crop_ratio`.
        about: what the folder's record must agree with.
    """

    source: Source
    folder: Path
    kind: str
    ratio: float
    about: dict[str, Any]

    @classmethod
    def of(cls, source: Source, options: DatasetOptions) -> CropPlan:
        """The plan for a source; its `about` holds a digest of the names and, with labels, the class rule."""
        root = Path(options.data_path)
        folder = prepared_folder(root, options.data_type, options.crop_type, options.crop_ratio)
        names = [Path(source.name(index)).relative_to(root).as_posix() for index in range(len(source))]
        text = json.dumps([names, source.rule.tolist() if source.labelled else None])
        about = {
            "data_type": options.data_type,
            "kind": options.crop_type,
            "ratio": options.crop_ratio,
            "images": len(source),
            "labelled": source.labelled,
            "digest": hashlib.sha256(text.encode()).hexdigest(),
        }
        return cls(source, folder, options.crop_type, options.crop_ratio, about)

    def names(self, index: int) -> list[str]:
        """The files of an image below `folder`; labels first: a crop that is there has its label."""
        numbers = range(CROPS * index, CROPS * (index + 1))
        labels = [f"{LABELS}/{number}.png" for number in numbers] if self.source.labelled else []
        return labels + [f"{IMAGES}/{number}.jpg" for number in numbers]


def cut(plan: CropPlan, index: int) -> list[RawItem]:
    """The five crops of an image, their labels as they are stored: class + 1, 0 = ignore.

    Where other images have labels, an image without one gets a label that is all ignored, so that the
    label files are complete: `PreparedCrops` opens one for each crop.

    Raises:
        UserError: the image or its label is missing or damaged, or a value is no class.
    """
    raw = plan.source.read(index)
    boxes = crop_boxes(raw.image.size, plan.ratio, plan.kind, index)
    if not plan.source.labelled:
        return [RawItem(raw.image.crop(box), None) for box in boxes]
    label = Image.new("L", raw.image.size) if raw.label is None else _stored(plan.source, raw.label, index)
    return [RawItem(raw.image.crop(box), label.crop(box)) for box in boxes]


def _stored(source: Source, label: Image.Image, index: int) -> Image.Image:
    return Image.fromarray((classes_of(label, source, index) + 1).astype(np.uint8))


def encoded(plan: CropPlan, index: int) -> dict[str, bytes]:
    """The content of each of an image's files, by name and in the order of `CropPlan.names`.

    Raises:
        UserError: as `cut`.
    """
    crops = cut(plan, index)
    pictures = [(crop.label, "PNG") for crop in crops if crop.label is not None]
    pictures += [(crop.image, "JPEG") for crop in crops]
    contents = []
    for picture, form in pictures:
        picture.info = {}  # a comment of the photograph would be copied into each of its crops
        stream = io.BytesIO()
        picture.save(stream, form)
        contents.append(stream.getvalue())
    return dict(zip(plan.names(index), contents, strict=True))


def write_crops(plan: CropPlan, index: int) -> str | None:
    """Writes the crops of an image, each whole or not at all.

    Returns:
        What is wrong with the image, or None.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        files = encoded(plan, index)
    except UserError as damage:
        return str(damage)
    for name, content in files.items():
        try:
            with replacing(plan.folder / name) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise unwritable(plan.folder, error) from None
    return None


def check_crops(plan: CropPlan, index: int) -> list[str]:
    """What is wrong with the stored crops of an image; sizes and labels are held against the source."""
    try:
        crops = cut(plan, index)
    except UserError as damage:
        return [str(damage)]
    problems = []
    for name in plan.names(index):
        crop = crops[int(Path(name).stem) % CROPS]
        path = plan.folder / name
        try:
            if not path.is_file():
                raise UserError(f"{path}: missing")
            if name.startswith(LABELS):
                stored = np.asarray(open_label(path, crop.image.size))
                wrong = int((stored != np.asarray(crop.label)).sum())
                problems += [f"{path}: {wrong} pixels differ from the source's label"] if wrong else []
            elif (size := open_image(path).size) != crop.image.size:
                problems.append(f"{path}: is {size} (width, height), must be {crop.image.size}")
        except UserError as damage:
            problems.append(str(damage))
    return problems


def stored_files(plan: CropPlan) -> dict[str, int]:
    """Size in bytes of each file in the folders of crops and labels, by name below `CropPlan.folder`."""
    found = {}
    for part in (LABELS, IMAGES):
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(plan.folder / part) as entries:
            found |= {f"{part}/{entry.name}": entry.stat(follow_symlinks=False).st_size for entry in entries}
    return found


def unfinished(plan: CropPlan) -> list[int]:
    """The images that lack a file; a crash of the machine can leave files empty, which count as lacking."""
    found = {name for name, size in stored_files(plan).items() if size}
    return [index for index in range(len(plan.source)) if not found.issuperset(plan.names(index))]


def expected_bytes(plan: CropPlan, indices: list[int]) -> int:
    """Disk space that the crops of these images will take, estimated from a few of them."""
    taken = []
    for index in indices[:: max(1, len(indices) // SAMPLES)][:SAMPLES]:
        with suppress(UserError):  # a damaged image is reported when its turn comes
            taken.append(sum(-(-len(content) // BLOCK) * BLOCK for content in encoded(plan, index).values()))
    return sum(taken) * len(indices) // len(taken) if taken else 0


def read_record(plan: CropPlan) -> dict[str, Any] | None:
    """The folder's record, or None where there is none.

    Raises:
        UserError: it is that of other crops.
    """
    path = plan.folder / RECORD
    if not path.is_file():
        return None
    record = read_json_object(path)
    differing = [
        f"{key} is {json.dumps(record.get(key))} there, {json.dumps(value)} by the options and the data"
        for key, value in plan.about.items()
        if record.get(key) != value
    ]
    if differing:
        meaning = "the crops are others (digest: of the images' names and the class rule)"
        mend = f"restore what they were made from, or move {plan.folder} away and run again"
        raise UserError(differing, f"{path}, {meaning}; {mend}")
    return record


def read_own_record(plan: CropPlan) -> dict[str, Any] | None:
    """The record of a folder that is to be written into; None for a new folder.

    Raises:
        UserError: the folder holds other crops, or crops without a record.
    """
    record = read_record(plan)
    if record is None and stored_files(plan):
        raise UserError(
            f"{plan.folder}: holds crops but no {RECORD}, so other code made it; train with it as it is, or "
            "move it away and run again"
        )
    return record


def write_record(plan: CropPlan, *, complete: bool, missing: list[int]) -> None:
    """Says what the folder holds, or is to hold: with `complete` false `PreparedCrops` refuses it.

    Args:
        plan: of the crops.
        complete: whether all are written.
        missing: images that have no crops though the folder is complete.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_json(plan.folder / RECORD, {"complete": complete, **plan.about, "missing": missing})
        for part in (IMAGES, LABELS) if plan.source.labelled else (IMAGES,):
            (plan.folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(plan.folder, error) from None


def unwritable(folder: Path, error: OSError) -> UserError:
    """The error for a folder that cannot be written."""
    return UserError(
        f"{folder}: cannot be written ({error.strerror or error}); make room or give the right to write, "
        "then the same command goes on"
    )
