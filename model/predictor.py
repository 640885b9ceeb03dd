"""A trained network as a function of one photograph: `load_segmenter` is the factory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.evaluator import CLUSTER_ALPHA, HEADS
from model.module import PPAPModule
from model.tiles import blended_code, tile_mistake
from utils.errors import UserError, first_line
from utils.plots.mask_ids import MaskIds, class_ids, cluster_ids
from utils.training.hardware import accelerator, chosen_precision
from utils.vision import crf
from utils.vision import mean_field as meanfield
from utils.vision.images import upright_rgb
from utils.vision.transforms import RESAMPLING, normalise, resized, to_eight_bit
from utils.vision.upsampling import upsampled_argmax, upsampled_norm

CRF_BACKENDS = ("pydensecrf", "torch")


@dataclass(frozen=True)
class Asked:
    """How photographs are to be segmented.

    Attributes:
        device: such as "cuda:0"; None takes CUDA, else Apple MPS, else the CPU.
        res: pixels of the shorter side as the network sees it; None is `dataset.val_res`.
        head: "cluster" or "linear".
        crf: whether to refine; or with what, "pydensecrf" or "torch", where `eval.crf_backend` is not meant.
        tile: side of a tile in pixels as the network sees it; None takes photographs whole.
    """

    device: str | torch.device | None = None
    res: int | None = None
    head: str = "cluster"
    crf: bool | str = False
    tile: int | None = None


class PhotoSegmenter:
    """From a photograph of any size to its class map.

    Args:
        module: the network, restored.
        assignment: class of each cluster, -1 for none; None where there were no labels to match with.
        asked: how.

    Attributes:
        ids: what the numbers of a class map mean.
        unmatched: whether they are clusters that no labels were there to match with classes.

    Raises:
        UserError: what is asked for is not to be had.
    """

    def __init__(self, module: PPAPModule, *, assignment: list[int] | None, asked: Asked) -> None:
        options, labels = module.options, module.labels
        self.asked, self.patch = asked, module.segmenter.backbone.spec.patch
        self.res = options.dataset.val_res if asked.res is None else asked.res
        self.backend = options.eval.crf_backend if asked.crf is True else asked.crf
        if self.backend == "auto":
            self.backend = "torch" if crf.crf_missing() else "pydensecrf"
        self.device = torch.device(asked.device or accelerator())
        self._check(with_linear=module.evaluator.with_linear)
        self.unmatched = asked.head == "cluster" and assignment is None
        n_clusters = len(module.cluster_probe.clusters)
        self.ids: MaskIds = (
            class_ids(labels)
            if asked.head == "linear"
            else cluster_ids(labels, n_clusters, assignment=assignment)
        )
        self._of_prediction = np.array(self.ids.of_prediction, dtype=np.uint8)
        self._resampling = RESAMPLING[options.dataset.interpolation]
        # float16 is CUDA's alone, and a run of bfloat16 may go on where that is slow
        precision = chosen_precision(options, "cuda") if self.device.type == "cuda" else "fp32"
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
        self.module = module.to(self.device).eval()

    def _check(self, *, with_linear: bool) -> None:
        asked = self.asked
        mistakes = []
        if asked.head not in HEADS:
            mistakes.append(f"head is {asked.head}, must be one of {', '.join(HEADS)}")
        elif asked.head == "linear" and not with_linear:
            mistakes.append("head is linear, which was not trained, for want of labels; take cluster")
        if self.res < self.patch:
            mistakes.append(f"res is {self.res}, must be at least {self.patch}, one patch")
        if self.backend and self.backend not in CRF_BACKENDS:
            mistakes.append(f"crf is {self.backend}, must be true, false or one of {', '.join(CRF_BACKENDS)}")
        elif self.backend == "torch" and self.device.type == "mps":
            mistakes.append("the CRF's backend is torch, must be pydensecrf on mps, which lacks an operation")
        elif self.backend == "pydensecrf" and (missing := crf.crf_missing()):
            mistakes.append(f"{missing}; or take eval.crf_backend=torch")
        if asked.tile is not None and (mistake := tile_mistake(asked.tile, self.patch)):
            mistakes.append(mistake)
        if mistakes:
            raise UserError(mistakes)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each id: of a class, or of a cluster that no class was found for."""
        return self.ids.names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """(red, green, blue) of each id, 0 to 255."""
        return self.ids.palette

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> np.ndarray:
        """The class map of a photograph.

        Args:
            image: of any mode and size; it is turned upright as its EXIF orientation says.

        Returns:
            (H, W) uint8 ids at the upright photograph's own size; see `names`.

        Raises:
            UserError: the image is damaged, or larger than memory allows.
        """
        rgb = upright_rgb(image, "the image")
        try:
            best = self._best(rgb)
        except (MemoryError, RuntimeError) as error:  # torch raises the latter, on any device
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise UserError(
                f"{rgb.width} x {rgb.height} pixels at res {self.res} take more memory than there is "
                f"({first_line(error)}); give a tile, such as {28 * self.patch}, or a smaller res"
            ) from None
        return self._of_prediction[best]

    def _best(self, rgb: Image.Image) -> np.ndarray:
        """Channel of the strongest logit, (H, W) uint8."""
        size = rgb.height, rgb.width
        seen = np.asarray(rgb.resize(resized(rgb.size, self.res), self._resampling))  # (h', w', 3)
        height, width = seen.shape[:2]
        # mirrored, since a patch of repeated edge pixels has streaks that no photograph has
        below, right = -height % self.patch, -width % self.patch
        padded = np.pad(seen, ((0, below), (0, right), (0, 0)), mode="reflect")
        pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].to(self.device)  # (1, 3, H', W')
        code = blended_code(self._code, pixels, patch=self.patch, tile=self.asked.tile)  # (1, D, h, w)
        probes = {"linear": self.module.linear_probe, "cluster": self.module.cluster_probe}
        logits = self.module.evaluator.heads(code, **probes)[self.asked.head]  # (1, K, h, w)
        if not self.backend:
            extent = height / self.patch, width / self.patch
            return upsampled_argmax(logits, size, extent)[1][0].byte().cpu().numpy()
        refined = self._refined(pixels[..., :height, :width], code, logits)
        return upsampled_argmax(refined[None], size)[1][0].byte().cpu().numpy()

    def _code(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) uint8 to (1, D, h, w) float32."""
        segmenter = self.module.segmenter
        with self._autocast():
            tokens = segmenter.backbone.tokens(normalise(image))
            return segmenter.code(tokens, segmenter.grid(image)).float()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self._dtype) if self._dtype else nullcontext()

    def _refined(self, image: Tensor, code: Tensor, logits: Tensor) -> Tensor:
        """The CRF's marginals at the size that the network sees, where its widths in pixels mean what they do
        in an evaluation: image (1, 3, H, W) uint8 -> (K, H, W) float32.
        """
        height, width = image.shape[-2:]
        padded = [side * self.patch for side in logits.shape[-2:]]
        full = F.interpolate(logits, size=padded, mode="bilinear")[0, :, :height, :width]  # (K, H, W)
        if self.asked.head == "cluster" and not self.module.evaluator.is_direct:
            full = CLUSTER_ALPHA * full / upsampled_norm(code, tuple(padded))[0, :height, :width]
        shown = to_eight_bit(normalise(image))[0].permute(1, 2, 0)  # (H, W, 3)
        if self.backend == "torch":
            return meanfield.refine(shown, [full])[0]
        heads = [crf.HeadLogits(full.cpu().numpy())]
        return torch.from_numpy(crf.refine(shown.cpu().numpy(), heads)[0]).to(self.device)
