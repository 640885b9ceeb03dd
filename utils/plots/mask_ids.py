"""What the numbers in a mask mean: ids, names and colours of classes and clusters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json_object
from utils.vision.labels import LabelSpace

MOST_IDS = 256  # that 8 bits hold
NAMES_EXAMPLE = '"0=road,1=car", or a JSON file such as {"0": "road", "1": "car"}'

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskIds:
    """The ids of a mask, from 0.

    Attributes:
        names: one per id; two ids may share one.
        palette: one (red, green, blue) per id, 0 to 255.
        of_prediction: the id of each channel that the network predicts, cluster or class.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    of_prediction: tuple[int, ...]

    def renamed(self, given: dict[int, str]) -> MaskIds:
        """The same ids under other names.

        Raises:
            UserError: an id that does not exist.
        """
        last = len(self.names) - 1
        if unknown := [f"{number}={name}" for number, name in given.items() if number > last]:
            raise UserError([f"--names: {words}: ids are 0 to {last}" for words in unknown])
        return replace(self, names=tuple(given.get(id_, name) for id_, name in enumerate(self.names)))


def class_ids(labels: LabelSpace) -> MaskIds:
    """Of a head that predicts classes: as the data set has them."""
    return MaskIds(labels.names, labels.palette, tuple(range(labels.n_classes)))


def cluster_ids(labels: LabelSpace, n_clusters: int, *, assignment: Sequence[int] | None) -> MaskIds:
    """Of clusters.

    A matched cluster has the id, name and colour of its class. Unmatched ones, the extra clusters, follow
    after the classes in the order of their numbers. Where nothing was ever matched, an id is the cluster's
    number, and colours are the data set's in turn.

    Args:
        labels: the classes.
        n_clusters: K.
        assignment: class of each cluster, -1 for none; None where there were no labels to match with.

    Raises:
        UserError: 8 bits do not hold so many.
    """
    if n_clusters > MOST_IDS:
        raise UserError(f"there are {n_clusters} clusters; a mask of 8 bits holds {MOST_IDS} ids at most")
    palette = with_further_colours(labels.palette, n_clusters)
    if assignment is None:
        names = tuple(f"cluster {cluster}" for cluster in range(n_clusters))
        return MaskIds(names, palette, tuple(range(n_clusters)))
    left = [cluster for cluster, class_id in enumerate(assignment) if class_id < 0]
    names = (*labels.names, *(f"cluster {cluster}" for cluster in left))
    follow = {cluster: labels.n_classes + place for place, cluster in enumerate(left)}
    ids = tuple(follow.get(cluster, class_id) for cluster, class_id in enumerate(assignment))
    return MaskIds(names, palette, ids)


def with_further_colours(palette: Sequence[Colour], count: int) -> tuple[Colour, ...]:
    """The first `count` colours of a palette; where it ends, others that it does not have."""
    spread = LabelSpace.with_spread_colours(tuple(map(str, range(count + len(palette)))))
    unused = [colour for colour in spread.palette[len(palette) :] if colour not in palette]
    return (*palette, *unused)[:count]


def read_names(text: str | None) -> dict[int, str]:
    """Names by id, from --names.

    Args:
        text: "0=road,1=car", or a JSON file; None gives none.

    Raises:
        UserError: neither, or an id that is not a whole number or is given twice.
    """
    if text is None:
        return {}
    if text.endswith(".json"):
        pairs = list(read_json_object(Path(text)).items())
    else:
        words = [word.partition("=") for word in text.split(",")]
        pairs = [(number.strip(), name.strip() if sign else None) for number, sign, name in words]
    mistakes, names = [], {}
    for number, name in pairs:
        if not re.fullmatch(r"[0-9]{1,3}", number) or not isinstance(name, str) or not name:
            mistakes.append(f"--names: {number}: must be an id and a name, as in {NAMES_EXAMPLE}")
        elif int(number) in names:
            mistakes.append(f"--names: id {int(number)} is given twice; keep one")
        else:
            names[int(number)] = name
    if mistakes:
        raise UserError(mistakes)
    return names
