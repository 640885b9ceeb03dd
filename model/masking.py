"""eval.py --images: masks of photographs with the network of a checkpoint."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from model import load_segmenter
from utils.config.options import Options
from utils.plots.mask_ids import read_names
from utils.plots.photographs import Masked, find_photographs, write_masks
from utils.training.trainer import device_settings
from utils.vision.labels import LabelSpace


def mask(options: Options, arguments: Namespace, *, labels: LabelSpace | None) -> Masked:
    """Writes coloured masks of photographs.

    Args:
        options: all options.
        arguments: `images`, `out`, `res`, `head`, `crf`, `tile`, `names` of the command line.
        labels: classes for a published checkpoint; see `load_segmenter`.

    Raises:
        UserError: no such photographs or checkpoint, what is asked for is not to be had, or `out` cannot be
            written.
    """
    out = Path(arguments.out)
    photographs = find_photographs(Path(arguments.images), out)
    device = device_settings(options)
    number = f":{device['devices'][0]}" if device["accelerator"] == "cuda" else ""
    segment = load_segmenter(
        options.checkpoint,
        opt=options,
        labels=labels,
        device=device["accelerator"] + number,
        res=arguments.res,
        head=arguments.head or "cluster",
        crf=arguments.crf,
        tile=arguments.tile,
    )
    ids = segment.ids.renamed(read_names(arguments.names))
    if segment.unmatched:
        print("clusters were matched to no classes (no labels, or a published checkpoint): ids are numbers")
    return write_masks(segment, photographs, out=out, ids=ids)
