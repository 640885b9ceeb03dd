"""The PPAP loss by its definition, anchor by anchor in float64; shares no code."""

from dataclasses import dataclass

import torch


@dataclass
class OracleResult:
    loss: torch.Tensor
    num_positives: float
    num_negatives: float
    reached: list[float]  # means of Phi_T, Psi_T, m_1 + ... + m_T; share of anchors without a positive
    margin: float  # least distance of a compared similarity from its boundary


def unit(rows):
    return rows / (rows * rows).sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)


def oracle_propagation(f, i, *, initialcrit_pos, initialcrit_amb, prop_iter, sigma_pos, sigma_amb, **_):
    """v_T . f_j (N,), Phi_T, Psi_T and m_1 + ... + m_T of an anchor i, and the least margin."""
    v, phi, psi, path = f[i], initialcrit_pos, initialcrit_amb, 0.0
    similarity = (f * v).sum(dim=1)  # (N,)
    margins = [similarity - phi]
    for _ in range(prop_iter):
        inside = similarity > phi
        if inside.any():
            moved_to = unit(f[inside].mean(dim=0))
            m = 1 - float((v * moved_to).sum())
            v, path, phi, psi = moved_to, path + m, phi - m / sigma_pos, psi + m / sigma_amb
            similarity = (f * v).sum(dim=1)
            margins.append(similarity - phi)
    margins.append(similarity - psi)
    return similarity, phi, psi, path, float(torch.stack(margins).abs().min())


def oracle_loss(z, features, anchors, *, tau, **coefficients):
    f = unit(features.double().permute(0, 2, 3, 1).flatten(0, 2))
    weighted = torch.zeros((), dtype=torch.float64)
    weight, counts, reached, margins = 0, [], [], []
    for group in anchors.tolist():
        drawn = [i for i in group if i >= 0]
        terms = []
        for i in drawn:
            similarity, phi, psi, path, margin = oracle_propagation(f, i, **coefficients)
            others = torch.arange(len(f)) != i
            positives, below = (similarity > phi) & others, similarity < psi
            counts.append([int(positives.sum()), int(below.sum())])
            reached.append([phi, psi, path, not positives.any()])
            margins.append(margin)
            if positives.any():
                logits = z @ z[i] / tau
                total = logits[positives | (below & others)].logsumexp(dim=0)
                terms.append(-tau / 0.07 * (logits[positives] - total).mean())
        if terms:
            weighted = weighted + len(drawn) * sum(terms) / len(terms)
            weight += len(drawn)
    loss = weighted / weight if weight else 0 * z.sum()
    counts, reached = (torch.tensor(each, dtype=torch.float64).mean(dim=0) for each in (counts, reached))
    return OracleResult(loss, *counts.tolist(), reached.tolist(), min(margins))
