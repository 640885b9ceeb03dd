"""The backbones that are published: what they are called, where their files lie, how these are checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from utils.config.options import FULL_DEPTH, WIDTH_AND_HEADS
from utils.download.transfer import FetchError, Patience, Wanted, fetch
from utils.errors import UserError, first_line
from utils.files import sha256_of
from utils.plots.tables import markdown

DINO = "https://dl.fbaipublicfiles.com/dino"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
PATIENCE = Patience(tries=4)
NATIVE_RES = {"dino": 224, "dinov2": 518}


@dataclass(frozen=True)
class OfficialBackbone:
    """A published weights file.

    Attributes:
        name: what it is called.
        arch: `model.arch`.
        model_type: `model.pretrained.model_type`.
        patch: `model.pretrained.dino_patch_size`, in pixels.
        registers: `model.pretrained.registers`.
        address: where it lies.
        sha256: of the file, where it is publicly known; else names and shapes alone are checked.
    """

    name: str
    arch: str
    model_type: str
    patch: int
    address: str
    registers: bool = False
    sha256: str | None = None

    @property
    def file(self) -> Path:
        """Where torch.hub keeps it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.address.rsplit("/", 1)[-1]

    def row(self) -> list[str]:
        """Its line in a table under `COLUMNS`."""
        width, _ = WIDTH_AND_HEADS[self.model_type]
        numbers = (self.patch, width, FULL_DEPTH[self.arch], 4 if self.registers else 0)
        return [self.name, *map(str, numbers), "yes" if self.file.is_file() else "no"]

    @property
    def options(self) -> str:
        """The overrides that choose it."""
        width, _ = WIDTH_AND_HEADS[self.model_type]
        chosen = "model.pretrained"
        words = [f"model.arch={self.arch}", f"model.dim={width}", f"{chosen}.model_type={self.model_type}"]
        words.append(f"{chosen}.dino_patch_size={self.patch}")
        return " ".join(words + ([f"{chosen}.registers=true"] if self.registers else []))


COLUMNS = ("backbone", "patch", "width", "blocks", "registers", "downloaded")
# SHA-256 of the DINOv2 files as public projects pin them (finegrain's refiners among them); those of the
# DINO files are published nowhere that we know. The 300-epoch S/8 file is the paper's.
BACKBONES = (
    OfficialBackbone(
        "DINO ViT-S/8, 300 epochs",
        "dino",
        "vit_small",
        8,
        f"{DINO}/dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth",
    ),
    OfficialBackbone(
        "DINO ViT-S/16",
        "dino",
        "vit_small",
        16,
        f"{DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ),
    OfficialBackbone(
        "DINO ViT-B/8", "dino", "vit_base", 8, f"{DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"
    ),
    OfficialBackbone(
        "DINO ViT-B/16",
        "dino",
        "vit_base",
        16,
        f"{DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    OfficialBackbone(
        "DINOv2 ViT-S/14",
        "dinov2",
        "vit_small",
        14,
        f"{DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
        sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    OfficialBackbone(
        "DINOv2 ViT-S/14, registers",
        "dinov2",
        "vit_small",
        14,
        f"{DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        registers=True,
        sha256="f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    OfficialBackbone(
        "DINOv2 ViT-B/14",
        "dinov2",
        "vit_base",
        14,
        f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    OfficialBackbone(
        "DINOv2 ViT-B/14, registers",
        "dinov2",
        "vit_base",
        14,
        f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        registers=True,
        sha256="73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
)


def described() -> str:
    """All of them: a table, then address, check and options of each."""
    parts = [markdown(COLUMNS, [backbone.row() for backbone in BACKBONES])]
    for backbone in BACKBONES:
        checked = f"SHA-256 {backbone.sha256}" if backbone.sha256 else "names and shapes on loading"
        lines = (f"address: {backbone.address}", f"checked: {checked}", f"options: {backbone.options}")
        parts.append("\n  ".join([backbone.name, *lines]))
    return "\n\n".join(parts)


def official_backbone(arch: str, model_type: str, patch: int, *, registers: bool) -> OfficialBackbone:
    """The one that options describe; every combination that they allow is published.

    Args:
        arch: `model.arch`, "dino" or "dinov2".
        model_type: "vit_small" or "vit_base".
        patch: in pixels.
        registers: the variant with register tokens.
    """
    wanted = (arch, model_type, patch, registers)
    return next(b for b in BACKBONES if (b.arch, b.model_type, b.patch, b.registers) == wanted)


def official_file(backbone: OfficialBackbone) -> Path:
    """The cached file of a published backbone, downloaded with a progress bar if it is not there.

    It lies in torch.hub's checkpoints folder and is checked by SHA-256 where the digest is known. A download
    that was cut goes on where it was; under the file's own name it is only when it is whole.

    Raises:
        UserError: it cannot be fetched, or is damaged.
    """
    path = backbone.file
    if path.is_file():
        if backbone.sha256 and sha256_of(path) != backbone.sha256:
            raise UserError(
                f"{path}: its SHA-256 is not {backbone.sha256}; delete it, and it is fetched again"
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.parent.with_name(f".{path.name}.lock")
        with FileLock(lock):  # of several processes one fetches it, and the others wait
            if not path.is_file():
                print(f"{backbone.name}: from {backbone.address}")
                fetch([backbone.address], path, wanted=Wanted(sha256=backbone.sha256), patience=PATIENCE)
    except (FetchError, OSError) as error:
        reason = error.mistakes[0] if isinstance(error, FetchError) else first_line(error)
        raise UserError(
            f"{reason}; fetch it elsewhere and put it at {path}, or name a file with "
            "model.pretrained.pretrained_weights"
        ) from None
    return path
