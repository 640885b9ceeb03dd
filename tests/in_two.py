"""What tests/test_distributed.py has two processes compute, and one process for the whole batch.

python -m tests.in_two FOLDER WORD... is python run.py WORD...; then each process writes what it has found
here to FOLDER/<rank>.pt.
"""

import sys
from pathlib import Path
from unittest import mock

import torch

import run
from dataset.base import Batch
from loss import PPAPLoss
from model.methods.base import Progress
from model.methods.hp import HP
from model.probes import ClusterProbe, LinearProbe
from model.segmenter import dropout_mask
from tests.conftest import TINY
from tests.model.methods.conftest import HP_OPTIONS, tiny_segmenter
from utils.config.cli import guarded
from utils.config.loading import build_options
from utils.training.distributed import own_slice, rank, world_size

IMAGES, DIM, GRID, CLASSES = 6, 12, (5, 4), 4
COEFFICIENTS = {
    "initialcrit_pos": 0.25,
    "initialcrit_amb": 0.05,
    "prop_iter": 2,
    "sigma_pos": 3,
    "sigma_amb": 2,
    "trainpatchsplit": 3,
    "tau": 0.5,
}
LOSSES = {  # 120 patches, 60 a process
    "a group an image": {"group_size": 20},
    "groups across processes, the last one short": {"group_size": 50},
    "fewer groups than processes": {"group_size": 784},
    "a chunk a group": {"group_size": 30, "chunk_size": 10},
    "no positive anywhere": {"group_size": 20, "initialcrit_pos": 2, "sigma_pos": float("inf")},
    "no positive in one process": {"group_size": 60, "one_sided": True},
}
IGNORED = {"none": 0, "unequal": 25, "all of one process": 60}  # rows of labels, of 20 an image


def losses(case):
    """Loss, counts and gradient of z for this process's images, the whole batch's where there is but one."""
    settings = COEFFICIENTS | LOSSES[case]
    drawn = torch.Generator().manual_seed(1)
    features = torch.randn(IMAGES, DIM, *GRID, generator=drawn)
    if settings.pop("one_sided", False):  # unlike features, so that anchors of the first half are alone
        settings |= {"initialcrit_pos": 0.999}
        features[IMAGES // 2 :] = features[-1:, :, :1, :1]
    z = torch.randn(IMAGES * GRID[0] * GRID[1], DIM, generator=drawn)
    z = own_slice(torch.nn.functional.normalize(z, dim=1)).clone().requires_grad_()
    output = PPAPLoss(**settings)(z, own_slice(features), generator=torch.Generator().manual_seed(2))
    output.loss.backward()
    counts = torch.stack([output.num_positives, output.num_negatives, *output.reached])
    return {"value": output.loss.detach(), "counts": counts, "sliced": z.grad}


def probes(case):
    """Losses of both probes and their gradients, which add up over processes."""
    drawn = torch.Generator().manual_seed(3)
    code = torch.randn(IMAGES, DIM, *GRID, generator=drawn)
    label = torch.randint(CLASSES, (IMAGES, 20, 16), generator=drawn)
    label.flatten(0, 1)[: IGNORED[case]] = 255  # the first images, so the first process
    torch.manual_seed(4)
    linear, cluster = LinearProbe(DIM, CLASSES), ClusterProbe(DIM, CLASSES)
    both = torch.stack([linear.loss(own_slice(code), own_slice(label)), cluster.loss(own_slice(code))])
    both.sum().backward()
    parameters = [*linear.parameters(), *cluster.parameters()]
    return {
        "value": both.detach(),
        "added": torch.cat([parameter.grad.flatten() for parameter in parameters]),
    }


def dropout():
    """The mask of this process's images."""
    shape = IMAGES // world_size(), DIM
    return {"sliced": dropout_mask(shape, probability=0.4, generator=torch.Generator().manual_seed(5))}


def hidden_positives():
    """HP's pools and, from a step, its losses and the gradients of its head and projection, which add up."""
    segmenter, drawn = tiny_segmenter(), torch.Generator().manual_seed(6)
    images = torch.randint(256, (IMAGES, 3, 16, 16), generator=drawn, dtype=torch.uint8)
    batch = Batch(own_slice(images), torch.zeros(IMAGES // world_size(), 16, 16), torch.arange(IMAGES))
    options = build_options(
        TINY | HP_OPTIONS | {"hp.pool_size": IMAGES, "dataloader.batch_size": IMAGES}, source="a test"
    )
    method = HP(options, segmenter)
    method.prepare(segmenter, [batch], 1)
    draws = method.draws(len(batch.label), (4, 4), 1, dim=segmenter.backbone.spec.dim)
    losses = method(segmenter, batch, draws, Progress(1, 2)).losses
    sum(losses.values()).backward()
    parameters = [*segmenter.trainable(), *method.projection.parameters()]
    return {
        "value": torch.stack(list(losses.values())).detach(),
        "pools": torch.cat([method.pools.agnostic, method.pools.specific], dim=1),
        "added": torch.cat([parameter.grad.flatten() for parameter in parameters]),
    }


def everything():
    """What is to be the same for any number of processes."""
    return {
        **{f"loss, {case}": losses(case) for case in LOSSES},
        **{f"probes, {case}": probes(case) for case in IGNORED},
        "dropout": dropout(),
        "hidden positives": hidden_positives(),
    }


def without_explanation():
    """Skips a figure that takes longer than these runs."""
    return mock.patch("model.callbacks.HtmlReport._explain")


if __name__ == "__main__":
    with without_explanation():
        if status := guarded(lambda: run.main(sys.argv[2:])):
            sys.exit(status)
    assert world_size() == 2
    torch.save(everything(), Path(sys.argv[1]) / f"{rank()}.pt")
