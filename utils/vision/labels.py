"""Class names and colours of a data set, as used by tables, figures and checkpoints."""

import colorsys
from dataclasses import dataclass

from utils.errors import UserError

IGNORE = 255  # class of ignored pixels, and of clusters without a class; so there are at most 255 classes


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set in the order of their ids.

    Raises:
        UserError: there are more than 255 classes.
    """

    names: tuple[str, ...]  # unique
    palette: tuple[tuple[int, int, int], ...]  # (red, green, blue) of each class, 0 to 255

    def __post_init__(self) -> None:
        if len(self.names) > IGNORE:
            raise UserError(f"{len(self.names)} classes, must be at most {IGNORE}: labels have 8 bits")
        if len(self.names) != len(self.palette) or len(set(self.names)) != len(self.names):
            counts = f"{len(self.names)} names and {len(self.palette)} colours"
            raise ValueError(f"{counts}, must be equally many with unique names: {self.names}")

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @classmethod
    def with_spread_colours(cls, names: tuple[str, ...]) -> "LabelSpace":
        """A label space whose hues differ by the golden ratio, so that neighbours are easy to tell apart."""
        colours = []
        for index in range(len(names)):
            hue = (index * 0.618033988749895) % 1
            saturation, value = (0.85, 0.6, 0.45)[index % 3], (0.95, 0.7)[index % 2]
            colours.append(tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)))
        return cls(tuple(names), tuple(colours))
