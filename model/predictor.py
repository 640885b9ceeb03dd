"""Predicts class maps of photographs: `Predictor` for one photograph, `predict_folder` for files."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from loss import ieee_float32
from model.evaluator import CLUSTER_ALPHA, HEADS
from model.module import PPAPModule
from utils.errors import LeftOut, UserError, listed
from utils.files import make_folder, write_json
from utils.plots.figures import draw_legend
from utils.plots.mask_files import mask_ids, renamed, result_files, write_contact_sheet, write_results
from utils.progress import Bar
from utils.training.device import accelerator, chosen_precision, is_out_of_memory
from utils.vision import crf, mean_field
from utils.vision.crf import resolve_backend
from utils.vision.images import as_rgb, open_image
from utils.vision.labels import IGNORE
from utils.vision.transforms import RESAMPLING, normalise, resized, to_eight_bit
from utils.vision.upsampling import upsampled_argmax, upsampled_norm

MAX_PASS, MAX_PATCHES = 64**2, 2**18  # patches of one forward pass, and of a photograph
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Predictor:
    """A trained network as a function from a photograph to its class map.

    Args:
        module: the network.
        assignment: class of each cluster, outside [0, n_classes) for none; None if clusters were not matched.
        device: None selects CUDA, then Apple MPS, then the CPU.
        res: shorter side in pixels at which the network sees a photograph; None is `dataset.val_res`.
        head: "cluster" or "linear".
        crf: whether to refine with the CRF of `eval.crf_backend`, or "pydensecrf" or "torch".
        tile: side in pixels of overlapping tiles; None tiles photographs of more than 4,096 patches only,
            and reduces extremely large or thin ones to 262,144 patches.

    Attributes:
        names: name of each id of a class map: a class, or a cluster without a class.
        palette: (red, green, blue) of each id, 0 to 255.
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
        options, labels, patch = module.options, module.labels, module.segmenter.backbone.spec.patch
        self.head, self.tile, self.patch, self._announced = head, tile, patch, False
        self.res = options.dataset.val_res if res is None else res
        if crf not in (False, True, "auto", "pydensecrf", "torch"):
            raise UserError(f"crf is {crf}, must be True, False, auto, pydensecrf or torch")
        self.crf = resolve_backend(crf if isinstance(crf, str) else options.eval.crf_backend) if crf else None
        heads = HEADS if module.evaluator.with_linear else ("cluster",)
        if head not in heads:
            allowed = f"{' or '.join(heads)}; linear needs labelled train data"
            raise UserError(f"head is {head}, must be {allowed}")
        if tile and (tile < patch or tile % patch):
            raise UserError(f"tile is {tile}, must be a multiple of the patch ({patch})")
        if self.res < patch:
            raise UserError(f"res is {res}, must be at least {patch}, one patch")
        if head == "linear":
            assignment = range(labels.n_classes)
        channels = labels.n_classes if head == "linear" else len(module.cluster_probe.clusters)
        if channels > IGNORE:
            raise UserError(f"{channels} clusters, must be at most {IGNORE}: masks have 8 bits")
        self.names, self.palette, ids = mask_ids(labels, assignment, n_clusters=channels)
        self._ids = np.array(ids, dtype=np.uint8)  # of each channel
        self.device = torch.device(device or accelerator())
        self._resampling = RESAMPLING[options.dataset.interpolation]
        # on other devices float16 is unavailable and bfloat16 may be slow
        self._dtype = DTYPES.get(chosen_precision(options, "cuda")) if self.device.type == "cuda" else None
        self.module = module.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """The class map (H, W) uint8 of a photograph, at its size after EXIF rotation.

        The photograph is a file, a PIL image of any mode, or an array (H, W, 3) uint8, RGB.
        """
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
            image = Image.fromarray(image)
        if not isinstance(image, (str, Path, Image.Image)):
            kind, shape = type(image).__name__, getattr(image, "shape", "")
            found = f"{kind} {shape} {getattr(image, 'dtype', '')}".rstrip()
            raise UserError(f"the image is {found}, must be a path, a PIL image or an (H, W, 3) uint8 array")
        rgb = as_rgb(image, "the image") if isinstance(image, Image.Image) else open_image(Path(image))
        size = rgb.height, rgb.width
        scaled = np.asarray(rgb.resize(self._network_size(rgb.size), self._resampling))  # (h', w', 3)
        height, width = scaled.shape[:2]
        # reflection, as repeated edge pixels would look like streaks
        below, right = -height % self.patch, -width % self.patch
        padded = np.pad(scaled, ((0, below), (0, right), (0, 0)), mode="reflect")
        pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].to(self.device)  # (1, 3, H', W')
        probes = {"linear": self.module.linear_probe, "cluster": self.module.cluster_probe}
        with ieee_float32():
            tile = self.tile or self._automatic_tile(pixels)
            code = tiled_code(self._code, pixels, patch=self.patch, tile=tile)  # (1, D, h, w)
            logits = self.module.evaluator.heads(code, **probes)[self.head]  # (1, K, h, w)
        extent = height / self.patch, width / self.patch
        if self.crf:
            logits, extent = self._refined(pixels[..., :height, :width], code, logits), None  # (1, K, h', w')
        _, channels = upsampled_argmax(logits, size, extent)  # (1, H, W)
        return self._ids[channels[0].cpu().numpy()]

    def _network_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(W, H) at which the network sees a photograph: without `tile`, at most `MAX_PATCHES`."""
        width, height = resized(size, self.res)
        shrink = 1 if self.tile else min(1, math.sqrt(MAX_PATCHES * self.patch**2 / (width * height)))
        return math.ceil(width * shrink), math.ceil(height * shrink)

    def _automatic_tile(self, image: Tensor) -> int | None:
        """The tile of an image (1, 3, H, W) that has too many patches for one pass, else None."""
        if math.prod(self.module.segmenter.grid(image)) <= MAX_PASS:
            return None
        if not self._announced:
            print(f"images above {MAX_PASS:,} patches are tiled, above {MAX_PATCHES:,} shrunk; see --tile")
        self._announced = True
        return math.isqrt(MAX_PASS) * self.patch

    def _code(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) uint8 to (1, D, h, w) float32."""
        segmenter = self.module.segmenter
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return segmenter.code(segmenter.tokens(image), segmenter.grid(image)).float()

    def _refined(self, image: Tensor, code: Tensor, logits: Tensor) -> Tensor:
        """The CRF's marginals (1, K, H, W) for an image (1, 3, H, W) uint8 as the network sees it.

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
    """The code (1, D, h, w) of an image (1, 3, H, W), blended from overlapping tiles with Hann windows.

    Logits follow from the blended code: both probes are linear in it, and cosines are divided by its norm.
    Sides of image and tile are multiples of the patch.
    """
    grid = [side // patch for side in image.shape[-2:]]  # (h, w)
    sides = [min(side, tile // patch) if tile else side for side in grid]
    if sides == grid:
        return encode(image)
    # sampled at the centres of the patches, so that no weight is 0
    rows, columns = (torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square() for side in sides)
    window = rows.outer(columns).to(image.device)  # (t_h, t_w)
    total, weight = None, torch.zeros(grid, device=image.device)  # (1, D, h, w), (h, w)
    for top, left in product(*map(_tile_starts, grid, sides)):
        bottom, right = top + sides[0], left + sides[1]
        code = encode(image[..., top * patch : bottom * patch, left * patch : right * patch])
        total = code.new_zeros(1, code.shape[1], *grid) if total is None else total
        total[..., top:bottom, left:right] += window * code
        weight[top:bottom, left:right] += window
    return total / weight


def _tile_starts(length: int, side: int) -> list[int]:
    """First positions of evenly spaced tiles of `side` over `length`, overlapping by at least a quarter."""
    steps = math.ceil((length - side) / (side - side // 4))
    return [round(step * (length - side) / max(1, steps)) for step in range(steps + 1)]


def predict_folder(
    predictor: Predictor, images: Path, out: Path, *, names: str | None = None, flat: bool = False
) -> dict[str, Any]:
    """Writes masks of one photograph or of a folder, at the paths of `result_files`.

    The folder `out` also gets overlays, legend.png, an index.html that shows them all, and legend.json.
    Returns legend.json's content: `ids`, `images` (a count), `left_out` (messages). `names`: see --names.

    Raises:
        LeftOut: some photographs are damaged; the others have masks.
    """
    files = result_files(images, out, flat=flat)
    named = renamed(predictor.names, names) if names else predictor.names
    make_folder(out, named_by="--out")
    counts, done, skipped = np.zeros(len(named), dtype=np.int64), [], []
    for path, written in Bar(files.items(), desc="masks", unit="image"):
        try:
            image = open_image(path)
            classes = predictor(image)  # (H, W)
        except UserError as error:
            skipped.append(str(error))
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            skipped.append(f"{path}: does not fit into memory; set --tile or a smaller --res")
            continue
        write_results(written, image, classes, predictor.palette)
        counts += np.bincount(classes.ravel(), minlength=len(counts))
        done.append(written)
    shares = (100 * counts / max(1, counts.sum())).tolist()
    rows = enumerate(zip(named, predictor.palette, shares, strict=True))
    legend = [{"id": number, "name": n, "colour": c, "share": share} for number, (n, c, share) in rows]
    result = {"ids": legend, "images": len(done), "left_out": skipped}
    write_json(out / "legend.json", result)
    draw_legend(out / "legend.png", legend)
    write_contact_sheet(out, done, legend, skipped)
    print(f"\nresults: {out}; open {out / 'index.html'}")
    if skipped:
        heading = f"{images}: {len(done)} done, {len(skipped)} skipped"
        raise LeftOut(listed(heading, skipped))
    return result
