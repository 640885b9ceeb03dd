"""PPAPLoss: draws anchors, propagates them and contrasts each with the sets that it reaches."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loss.chunked import ChunkedLoss
from loss.kernels import ieee_float32, with_gradient
from loss.propagation import Boundaries
from utils.training.distributed import all_gather, all_reduce, own_groups, world_size


@dataclass(frozen=True)
class PPAPLossOutput:
    """The loss of a batch and means over its anchors, float32."""

    loss: Tensor  # (), differentiable in z; 0 if no anchor has a positive
    num_positives: Tensor  # (), |P|
    num_negatives: Tensor  # (), size of {v_T . f_j < Psi_T}
    # (4,): Phi_T, Psi_T, m_1 + ... + m_T and the share of anchors without a positive; None if not tracked
    reached: Tensor | None = None

    def statistics(self) -> dict[str, Tensor]:
        """Everything but the loss, () each, under the names that are logged."""
        found = {"num_positives": self.num_positives, "num_negatives": self.num_negatives}
        if self.reached is not None:
            names = ("mean_phi", "mean_psi", "mean_propagation", "without_positives")
            found |= zip(names, self.reached.unbind(), strict=True)
        return found


class PPAPLoss(nn.Module):
    """The contrastive loss of PPAP over the patches of a batch.

    All arithmetic is float32 with TF32 off, also under autocast: a bfloat16 product moves a similarity by up
    to 4e-3 and changes about 1% of P_0.

    Args:
        initialcrit_pos: Phi_0.
        initialcrit_amb: Psi_0.
        prop_iter: T >= 0.
        sigma_pos: > 0; infinity keeps Phi fixed.
        sigma_amb: > 0; infinity keeps Psi fixed.
        trainpatchsplit: a group of s patches gives max(1, s // trainpatchsplit) anchors.
        tau: temperature > 0.
        group_size: consecutive patches that share a draw of anchors and a mean.
        similarity_dtype: what f_j and the proxies are rounded to, float32 or float16.
        products: "float32", "split" or "float16" (implies that `similarity_dtype`); see loss/README.md.
        chunk_size: anchors at a time, at least those of a group; None chooses by device and N.
    """

    def __init__(
        self,
        *,
        initialcrit_pos: float,
        initialcrit_amb: float,
        prop_iter: int,
        sigma_pos: float,
        sigma_amb: float,
        trainpatchsplit: int,
        tau: float,
        group_size: int = 784,
        similarity_dtype: torch.dtype = torch.float32,
        products: str = "float32",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        above_0 = {"tau": tau, "sigma_pos": sigma_pos, "sigma_amb": sigma_amb, "group_size": group_size}
        above_0 |= {"trainpatchsplit": trainpatchsplit, "chunk_size": chunk_size}
        for name, value in above_0.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, must be above 0")
        allowed = ("float32", "float16", "split")[: 2 if similarity_dtype == torch.float16 else 3]
        if products not in allowed:
            raise ValueError(f"products is {products}, must be one of {allowed} with {similarity_dtype}")
        operand = torch.float16 if products == "float16" else similarity_dtype
        self.boundaries = Boundaries(
            initialcrit_pos, initialcrit_amb, prop_iter, sigma_pos, sigma_amb, operand
        )
        self.trainpatchsplit = trainpatchsplit
        self.tau = tau
        self.group_size = group_size
        self.products = products
        self.chunk_size = chunk_size

    def sample_anchors(self, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws anchors without replacement from each group of consecutive patches, with a CPU generator.

        Returns (groups, A_max) int64 on the CPU, indices into the patches; -1 pads the row of a short group.
        """
        groups = -(-patches // self.group_size)
        widest = max(1, min(self.group_size, patches) // self.trainpatchsplit)
        anchors = torch.full((groups, widest), -1, pin_memory=torch.cuda.is_initialized())  # (G, A_max)
        for group in range(groups):
            size = min(self.group_size, patches - group * self.group_size)
            drawn = max(1, size // self.trainpatchsplit)
            order = torch.randperm(size, generator=generator)
            anchors[group, :drawn] = order[:drawn] + group * self.group_size
        return anchors

    def forward(
        self,
        z: Tensor,
        features: Tensor,
        anchors: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PPAPLossOutput:
        """The loss of one batch; the gradient flows through z only.

        With several processes, z and features are this rank's equal slice of the batch, anchors and generator
        are the same on all ranks, and each rank computes its share of the groups. The output is that of the
        whole batch, the gradient this share's part of it (see `utils.training.distributed`).

        Args:
            z: projections, (N, D') of any float dtype, rows in (image, row, column) order, used as given.
            features: criterion features, (B, D, h, w) of any float dtype with B*h*w = N; normalised here.
            anchors: (groups, A_max) int64 indices into the patches of all ranks, -1 = unused; None samples.
            generator: the CPU generator for sampling.

        Raises:
            ValueError: the shapes do not match.
        """
        if z.ndim != 2 or features.ndim != 4 or features[:, 0].numel() != len(z):
            shapes = f"z is {list(z.shape)}, features are {list(features.shape)}"
            raise ValueError(f"{shapes}; must be (N, D') and (B, D, h, w) with N = B*h*w")
        if anchors is None:
            anchors = self.sample_anchors(world_size() * len(z), generator)
        anchors = anchors.to(z.device, non_blocking=z.is_cuda)
        with torch.autocast(z.device.type, enabled=False), ieee_float32():
            z, bank = all_gather(z.float()), all_gather(self.bank(features))  # of all ranks
            chunked = ChunkedLoss(z, bank, self)
            sums = all_reduce(chunked.sums(own_groups(anchors)))  # (8,)
            weight = sums[1].clamp_min(1)  # without any positive: 0 / 1
            loss = with_gradient(sums[0] / weight, [z], [chunked.grad_z.div_(weight)])
            means = sums[2:] / (anchors >= 0).sum()  # (6,), over the anchors
            return PPAPLossOutput(loss, means[0], means[1], means[2:])

    def bank(self, features: Tensor) -> Tensor:
        """f_j of every patch, (B, D, h, w) -> (N, D) float32, unit length, rounded as proxies are."""
        rows = features.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        return F.normalize(rows, dim=1).to(self.boundaries.operand).float()
