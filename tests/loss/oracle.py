"""The PPAP loss by its definition, anchor by anchor and patch by patch in float64; shares no code."""

import math
from dataclasses import dataclass

import torch


@dataclass
class OracleResult:
    loss: torch.Tensor
    num_positives: float
    num_negatives: float
    reached: list[float]  # means of Phi_T, Psi_T, m_1 + ... + m_T; share of anchors without a positive
    margin: float  # least distance of a compared similarity from its boundary


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def unit(a):
    length = math.sqrt(dot(a, a))
    return [float(x) / max(length, 1e-12) for x in a]


def oracle_loss(z, features, anchors, *, phi0, psi0, steps, sigma_pos, sigma_amb, tau):
    batch, dim, height, width = features.shape
    f = []
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                f.append(unit([features[image, d, row, column] for d in range(dim)]))
    n = len(f)
    z = z.double()
    margin = math.inf
    weighted = torch.zeros((), dtype=torch.float64)
    weight = positives_seen = negatives_seen = drawn_total = 0
    reached = [0.0] * 4
    for group in anchors.tolist():
        drawn = [i for i in group if i >= 0]
        drawn_total += len(drawn)
        terms = []
        for i in drawn:
            phi, psi, v, path = phi0, psi0, f[i], 0.0
            similarity = [dot(v, f[j]) for j in range(n)]
            margin = min([margin, *(abs(s - phi) for s in similarity)])
            inside = [j for j in range(n) if similarity[j] > phi]
            for _ in range(steps):
                if inside:
                    mean = [sum(f[j][d] for j in inside) / len(inside) for d in range(dim)]
                    moved_to = unit(mean)
                    m = 1 - dot(v, moved_to)
                else:
                    moved_to, m = v, 0.0
                path += m
                phi -= m / sigma_pos
                psi += m / sigma_amb
                v = moved_to
                similarity = [dot(v, f[j]) for j in range(n)]
                margin = min([margin, *(abs(s - phi) for s in similarity)])
                inside = [j for j in range(n) if similarity[j] > phi]
            margin = min([margin, *(abs(s - psi) for s in similarity)])
            positives = [j for j in inside if j != i]
            below = [j for j in range(n) if similarity[j] < psi]
            positives_seen += len(positives)
            negatives_seen += len(below)
            reached = [a + b for a, b in zip(reached, (phi, psi, path, not positives), strict=True)]
            if not positives:
                continue
            everyone = sorted(set(positives) | {j for j in below if j != i})
            logits = {j: torch.dot(z[i], z[j]) / tau for j in everyone}
            total = torch.logsumexp(torch.stack([logits[j] for j in everyone]), dim=0)
            terms.append(-tau / 0.07 * sum(logits[p] - total for p in positives) / len(positives))
        if terms:
            weighted = weighted + len(drawn) * sum(terms) / len(terms)
            weight += len(drawn)
    loss = weighted / weight if weight else weighted + 0 * z.sum()
    counts = (positives_seen / drawn_total, negatives_seen / drawn_total)
    return OracleResult(loss, *counts, [total / drawn_total for total in reached], margin)
