"""What propagation did for one anchor, as arrays: what a picture and a table of it are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ZONES = ("positives", "ambiguous", "negatives")
POSITIVE, AMBIGUOUS, NEGATIVE, ITSELF = range(4)  # values of `Explanation.zones`


@dataclass(frozen=True)
class Explanation:
    """One anchor's proxy at t = 0..T in a bank of B images of h x w patches.

    Attributes:
        anchor: (image, row, column) of the anchor's patch.
        similarity: v_t . f_j, (T + 1, B, h, w) float32.
        zones: (T + 1, B, h, w) uint8: POSITIVE, AMBIGUOUS, NEGATIVE, or ITSELF at the anchor, which is in
            no set; where Psi_t lies above Phi_t a patch of both sets is POSITIVE.
        phi: Phi_t, (T + 1,) float32.
        psi: Psi_t, (T + 1,) float32.
        moved: m_t, how far the proxy went to become v_t, (T + 1,) float32; 0 at t = 0.
    """

    anchor: tuple[int, int, int]
    similarity: np.ndarray
    zones: np.ndarray
    phi: np.ndarray
    psi: np.ndarray
    moved: np.ndarray

    @property
    def steps(self) -> int:
        """T."""
        return len(self.phi) - 1

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.zones.shape[2:]

    def counts(self, image: int | None = None) -> np.ndarray:
        """Patches in each of `ZONES` for t = 0..T, (T + 1, 3) int64, of one image or of the bank."""
        zones = self.zones if image is None else self.zones[:, image]
        flat = zones.reshape(len(zones), -1)  # (T + 1, patches)
        return np.stack([(flat == zone).sum(axis=1) for zone in range(len(ZONES))], axis=1)

    def nearest(self, count: int) -> list[int]:
        """The other images nearest to the final proxy, by the sum of v_T . f_j over their positives.

        Images without a positive come last, by the sum over all their patches.
        """
        similarity = self.similarity[-1].reshape(self.similarity.shape[1], -1)  # (B, h * w)
        positive = self.zones[-1].reshape(similarity.shape) == POSITIVE
        mass = np.where(positive, similarity, 0).sum(axis=1)  # (B,)
        order = np.lexsort((-similarity.sum(axis=1), -mass)).tolist()
        return [image for image in order if image != self.anchor[0]][:count]

    def numbers(self) -> list[dict[str, Any]]:
        """For t = 0..T: boundaries, m_t, and the counts of the sets in the bank and in the anchor's image."""
        bank, own = self.counts(), self.counts(self.anchor[0])
        return [
            {
                "t": t,
                "phi": self.phi[t].item(),
                "psi": self.psi[t].item(),
                "moved": self.moved[t].item(),
                **dict(zip(ZONES, bank[t].tolist(), strict=True)),
                "in_image": dict(zip(ZONES, own[t].tolist(), strict=True)),
            }
            for t in range(self.steps + 1)
        ]
