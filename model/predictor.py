"""Class maps of photographs of any size: `Predictor` for one photograph, `predict_folder` for files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.evaluator import CLUSTER_ALPHA, HEADS
from model.module import PPAPModule
from utils.errors import LeftOut, UserError, first_line
from utils.files import make_folder, write_json
from utils.plots.figures import draw_legend
from utils.plots.mask_files import (
    LEGEND,
    LEGEND_DATA,
    MASK,
    OVERLAY,
    class_ids,
    cluster_ids,
    read_names,
    result_folders,
    write_mask,
    write_overlay,
)
from utils.training.device import accelerator, chosen_precision
from utils.vision import crf, mean_field
from utils.vision.crf import resolve_backend
from utils.vision.images import open_image, upright_rgb
from utils.vision.transforms import RESAMPLING, normalise, resized, to_eight_bit
from utils.vision.upsampling import upsampled_argmax, upsampled_norm

CRF_BACKENDS = ("auto", "pydensecrf", "torch")
MIN_TILE = 4  # patches per side, of which a quarter overlaps
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Predictor:
    """A trained network as a function from a photograph to its class map.

    Args:
        module: the network.
        assignment: class of each cluster, outside [0, n_classes) for none; None if clusters were not matched.
        device: such as "cuda:0"; None selects CUDA, then Apple MPS, then the CPU.
        res: shorter side in pixels at which the network sees a photograph; None is `dataset.val_res`.
        head: "cluster" or "linear".
        crf: whether to refine; True uses `eval.crf_backend`, "pydensecrf" or "torch" overrides it.
        tile: side in pixels of overlapping tiles; None passes the whole photograph through the network.

    Attributes:
        ids: ids of a class map with their names and colours.
        names: name of each id: a class, or a cluster without a class.
        palette: (red, green, blue) of each id, 0 to 255.
        unmatched: whether ids are clusters that were not matched to classes.

    Raises:
        UserError: an argument is invalid for this network or machine.
    """

    def __init__(
        self,
        module: PPAPModule,
        *,
        assignment: list[int] | None,
        device: str | torch.device | None = None,
        res: int | None = None,
        head: str = "cluster",
        crf: bool | str = False,
        tile: int | None = None,
    ) -> None:
        options = module.options
        self.head, self.tile, self.patch = head, tile, module.segmenter.backbone.spec.patch
        self.res = options.dataset.val_res if res is None else res
        backend = options.eval.crf_backend if crf is True else crf
        self.crf = resolve_backend(backend) if backend else None
        self.device = torch.device(device or accelerator())
        if mistakes := self._mistakes(with_linear=module.evaluator.with_linear):
            raise UserError(mistakes)
        self.unmatched = head == "cluster" and assignment is None
        if head == "linear":
            self.ids = class_ids(module.labels)
        else:
            n_clusters = len(module.cluster_probe.clusters)
            self.ids = cluster_ids(module.labels, n_clusters, assignment=assignment)
        self.names, self.palette = self.ids.names, self.ids.palette
        self._id_of_channel = np.array(self.ids.of_prediction, dtype=np.uint8)
        self._resampling = RESAMPLING[options.dataset.interpolation]
        # on other devices float16 is unavailable and bfloat16 may be slow
        self._dtype = DTYPES.get(chosen_precision(options, "cuda")) if self.device.type == "cuda" else None
        self.module = module.to(self.device).eval()

    def _mistakes(self, *, with_linear: bool) -> list[str]:
        """Error messages for invalid arguments."""
        found = []
        if self.head not in HEADS:
            found.append(f"head is {self.head}, must be one of {', '.join(HEADS)}")
        elif self.head == "linear" and not with_linear:
            found.append("head is linear, but without labels no linear probe was trained; use cluster")
        if self.res < self.patch:
            found.append(f"res is {self.res}, must be at least {self.patch}, one patch")
        if self.crf and self.crf not in CRF_BACKENDS:
            found.append(f"crf is {self.crf}, must be true, false or one of {', '.join(CRF_BACKENDS)}")
        elif self.crf == "torch" and self.device.type == "mps":
            found.append("the CRF's backend is torch, must be pydensecrf on mps, which lacks an operation")
        elif self.crf == "pydensecrf" and (missing := crf.crf_missing()):
            found.append(f"{missing}; or set eval.crf_backend=torch")
        least = MIN_TILE * self.patch
        if self.tile is not None and (self.tile < least or self.tile % self.patch):
            found.append(f"tile is {self.tile}, must be a multiple of the patch ({self.patch}) from {least}")
        return found

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> np.ndarray:
        """The class map of a photograph of any mode and size, rotated upright by its EXIF orientation.

        Returns:
            (H, W) uint8 ids at the size of the upright photograph; see `names`.

        Raises:
            UserError: the image is damaged or does not fit into memory.
        """
        rgb = upright_rgb(image, "the image")
        try:
            return self._id_of_channel[self._channels(rgb)]
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            raise UserError(
                f"{rgb.width} x {rgb.height} pixels at res {self.res} exceed the memory "
                f"({first_line(error)}); set tile, such as {28 * self.patch}, or a smaller res"
            ) from None

    def _channels(self, rgb: Image.Image) -> np.ndarray:
        """Predicted class or cluster of each pixel, (H, W) uint8."""
        size = rgb.height, rgb.width
        scaled = np.asarray(rgb.resize(resized(rgb.size, self.res), self._resampling))  # (h', w', 3)
        height, width = scaled.shape[:2]
        # reflection, as repeated edge pixels would look like streaks
        below, right = -height % self.patch, -width % self.patch
        padded = np.pad(scaled, ((0, below), (0, right), (0, 0)), mode="reflect")
        pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].to(self.device)  # (1, 3, H', W')
        code = tiled_code(self._code, pixels, patch=self.patch, tile=self.tile)  # (1, D, h, w)
        probes = {"linear": self.module.linear_probe, "cluster": self.module.cluster_probe}
        logits = self.module.evaluator.heads(code, **probes)[self.head]  # (1, K, h, w)
        extent = height / self.patch, width / self.patch
        if self.crf:
            logits, extent = self._refined(pixels[..., :height, :width], code, logits), None  # (1, K, h', w')
        _, channels = upsampled_argmax(logits, size, extent)  # (1, H, W)
        return channels[0].to("cpu", torch.uint8).numpy()

    def _code(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) uint8 to (1, D, h, w) float32."""
        segmenter = self.module.segmenter
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return segmenter.code(segmenter.tokens(image), segmenter.grid(image)).float()

    def _refined(self, image: Tensor, code: Tensor, logits: Tensor) -> Tensor:
        """The CRF's marginals (1, K, H, W) float32 for an image (1, 3, H, W) uint8 as the network sees it.

        At this size the CRF's widths in pixels have the same meaning as in an evaluation.
        """
        height, width = image.shape[-2:]
        padded = [side * self.patch for side in logits.shape[-2:]]
        full = F.interpolate(logits, size=padded, mode="bilinear")[0, :, :height, :width]  # (K, H, W)
        if self.head == "cluster" and not self.module.evaluator.is_direct:
            full = CLUSTER_ALPHA * full / upsampled_norm(code, tuple(padded))[0, :height, :width]
        shown = to_eight_bit(normalise(image))[0].permute(1, 2, 0)  # (H, W, 3)
        if self.crf == "torch":
            return mean_field.refine(shown, [full])[0][None]
        refined = crf.refine(shown.cpu().numpy(), [crf.HeadLogits(full.cpu().numpy())])[0]
        return torch.from_numpy(refined).to(self.device)[None]


def tiled_code(
    encode: Callable[[Tensor], Tensor], image: Tensor, *, patch: int, tile: int | None = None
) -> Tensor:
    """The code of an image, blended from overlapping tiles with Hann windows.

    Logits follow from the blended code: both probes are linear in it, and cosines are divided by its norm.

    Args:
        encode: (1, 3, H, W) to the code (1, D, h, w) float32.
        image: (1, 3, H, W), sides multiples of the patch.
        patch: in pixels.
        tile: side of a tile in pixels, a multiple of the patch; None encodes the image at once.

    Returns:
        (1, D, h, w) float32; without blending if the image is not larger than a tile.
    """
    grid = [side // patch for side in image.shape[-2:]]  # (h, w)
    sides = [min(side, tile // patch) if tile else side for side in grid]
    if sides == grid:
        return encode(image)
    rows, columns = (tile_starts(n, side) for n, side in zip(grid, sides, strict=True))
    window = _hann(sides[0]).outer(_hann(sides[1])).to(image.device)  # (t_h, t_w)
    total, weight = None, torch.zeros(grid, device=image.device)  # (h, w)
    for top in rows:
        for left in columns:
            bottom, right = top + sides[0], left + sides[1]
            code = encode(image[..., top * patch : bottom * patch, left * patch : right * patch])
            if total is None:
                total = code.new_zeros(*code.shape[:2], *grid)  # (1, D, h, w)
            total[..., top:bottom, left:right] += window * code
            weight[top:bottom, left:right] += window
    return total / weight


def tile_starts(length: int, side: int) -> list[int]:
    """First positions of evenly spaced tiles of `side` over `length`, overlapping by at least a quarter."""
    if side >= length:
        return [0]
    steps = -(-(length - side) // (side - side // 4))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]


def _hann(side: int) -> Tensor:
    """Hann window (side,), sampled at the centres of the patches so that no weight is 0."""
    return torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square()


def predict_folder(
    predictor: Predictor, images: Path, out: Path, *, names: str | None = None
) -> dict[str, Any]:
    """Writes mask.png and overlay.jpg for each photograph, and a legend; earlier results are replaced.

    Args:
        predictor: photograph -> class map.
        images: a photograph, or a folder that is searched recursively.
        out: folder for results; see `result_folders`.
        names: --names, which replace names in the legend.

    Returns:
        The content of legend.json: `ids` (see `MaskIds.legend`), `images` (a count), `left_out` (messages).

    Raises:
        LeftOut: some photographs are damaged; the others have masks.
        UserError: there are no photographs, or `names` or `out` is invalid.
    """
    folders = result_folders(images, out)
    ids = predictor.ids.renamed(read_names(names))
    make_folder(out, named_by="--out")
    if predictor.unmatched:
        print("clusters were not matched to classes (no labels, or a published checkpoint): ids are numbers")
    counts, skipped, start = np.zeros(len(ids.names), dtype=np.int64), [], perf_counter()
    for path, folder in tqdm(folders.items(), desc="masks", unit="image"):
        try:
            image = open_image(path)
            classes = predictor(image)
        except UserError as error:
            skipped.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            tqdm.write(f"skipped: {skipped[-1]}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_mask(folder / MASK, classes, ids)
        write_overlay(folder / OVERLAY, image, classes, ids=ids)
        counts += np.bincount(classes.ravel(), minlength=len(counts))
    done = len(folders) - len(skipped)
    print(f"\n{done} images, {done / (perf_counter() - start):.2f} images/s\n\nresults: {out}")
    result = {"ids": ids.legend(counts), "images": done, "left_out": skipped}
    write_json(out / LEGEND_DATA, result)
    draw_legend(out / LEGEND, result["ids"])
    if skipped:
        raise LeftOut(skipped, f"{images}; the other {done} images are done")
    return result
