"""Images of a validation for wandb."""

from collections.abc import Mapping, Sequence

import numpy as np
import wandb

from utils.vision.labels import IGNORE, LabelSpace


def prediction_images(
    names: Sequence[str],
    photographs: np.ndarray,
    *,
    maps: Sequence[Mapping[str, np.ndarray]],
    labels: LabelSpace,
) -> list[wandb.Image]:
    """The photographs (H, W, 3) uint8, each with its class maps as masks that can be switched.

    `maps` holds for each image title -> class ids (H, W), 255 = none. A wandb.Table would block the run while
    the server is unreachable.
    """
    class_labels = dict(enumerate(labels.names)) | {IGNORE: "none"}
    images = []
    for name, photograph, class_maps in zip(names, photographs, maps, strict=True):
        masks = {
            title: {"mask_data": ids.astype(np.uint8), "class_labels": class_labels}
            for title, ids in class_maps.items()
        }
        images.append(wandb.Image(photograph, file_type="jpg", masks=masks, caption=name))
    return images
