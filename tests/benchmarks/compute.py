"""The loss and a training step relative to their literal forms and to the hardware."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.module import PPAPModule
from model.segmenter import dropout_mask
from model.weights import backbone_spec
from tests.benchmarks import literal
from tests.benchmarks.inputs import (
    loss_inputs,
    loss_of,
    n_classes_of,
    random_batch,
    random_module,
    shape_options,
)
from tests.benchmarks.measure import Bench, Cost, Row
from utils.config.options import Options
from utils.training.randomness import generator
from utils.vision.transforms import normalise

LITERAL_BATCH = {"cpu": 16, "cuda": 64}  # beyond it an (A, N, D) tensor is too large
LOSS_BATCHES = {"cpu": (4, 8), "cuda": (8, 64)}
GROWTH_BATCHES = (8, 16, 32, 64, 128, 256)
GROWTH_STEPS = range(6)
TIMED_ONCE = {"cpu": 64, "cuda": 256}  # a run of a larger batch takes minutes


def loss_cost(options: Options, patches: int, anchors: int) -> Cost:
    """Dense products: similarities 1 + T times, sums of positives T times, logits, two for the gradient."""
    chosen, dim = options.training_coeff, options.model.dim
    products = 1 + 2 * chosen.prop_iter + 3
    moved = 4.0 * patches * dim * 3  # features and z read, the gradient written
    operand = getattr(torch, chosen.similarity_dtype)
    return Cost(2.0 * anchors * patches * dim * products, moved, operand)


def loss_row(
    bench: Bench, options: Options, batch: int, *, case: str, literally: bool, **changed: int
) -> list[Row]:
    """Loss and gradient of one batch."""
    criterion = loss_of(options, **changed)
    inputs = loss_inputs(options, criterion, batch, bench.device)

    def ours() -> None:
        inputs.z.grad = None
        criterion(*inputs).loss.backward()

    def by_definition() -> None:
        inputs.z.grad = None
        literal.ppap_loss(*inputs, boundaries=criterion.boundaries, tau=criterion.tau).backward()

    forms = {"literal": by_definition, "ours": ours} if literally else {"ours": ours}
    cost = loss_cost(options, len(inputs.z), int((inputs.anchors >= 0).sum()))
    return bench.compare(case, forms, costs={"ours": [cost]}, once=batch > TIMED_ONCE[bench.device.type])


def bench_loss(bench: Bench, shape: str) -> list[Row]:
    """Loss and gradient, literal and ours."""
    options, rows = shape_options(shape), []
    for batch in LOSS_BATCHES[bench.device.type]:
        rows += loss_row(bench, options, batch, case=f"loss, batch {batch}", literally=True)
    return rows


def bench_growth(bench: Bench, shape: str) -> list[Row]:
    """How the loss alone grows with T and with the batch."""
    options = shape_options(shape)
    settings = [(GROWTH_BATCHES[0], steps) for steps in GROWTH_STEPS]
    settings += [(batch, options.training_coeff.prop_iter) for batch in GROWTH_BATCHES]
    rows = []
    for batch, steps in settings:
        changed = shape_options(shape, {"training_coeff.prop_iter": steps})
        rows += loss_row(bench, changed, batch, case=f"growth, batch {batch}, T = {steps}", literally=False)
    return rows


def step_costs(options: Options, device: str, *, cached: bool = False) -> list[Cost]:
    """Products of a step: frozen blocks, the head forward and twice that backward, projection; and the loss.

    With cached tokens, only the last of the frozen blocks runs.
    """
    pretrained, dim, batch = options.model.pretrained, options.model.dim, options.dataloader.batch_size
    patches = (options.dataset.res // pretrained.dino_patch_size) ** 2
    tokens = patches + 1
    block = tokens * (24.0 * dim * dim + 4.0 * tokens * dim)  # linear layers, attention
    blocks = 3 + (1 if cached else backbone_spec(options).depth)  # the head with its gradient, frozen ones
    embedding = 0.0 if cached else 2.0 * tokens * dim * 3 * pretrained.dino_patch_size**2
    operations = batch * (blocks * block + embedding + 3 * 2.0 * tokens * dim * dim)
    weights = 4.0 * 12 * dim * dim * blocks
    read = 2.0 * tokens * dim if cached else 3.0 * options.dataset.res**2
    operand = torch.float16 if device == "cuda" else torch.float32
    anchors = int((loss_of(options).sample_anchors(batch * patches) >= 0).sum())
    network = Cost(operations, weights + batch * read, operand)
    return [network, loss_cost(options, batch * patches, anchors)]


def step_form(module: PPAPModule, optimizer: torch.optim.Optimizer, losses: Callable) -> Callable[..., None]:
    """A whole step: losses, gradient, clipping, update."""
    device = next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def run(*batch: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            total = losses(*batch)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        module.configure_gradient_clipping(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return run


def literal_losses(module: PPAPModule, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The total loss of a step with the literal form of PPAP; (B, 3, H, W) normalised, (B, H, W)."""
    output = module.segmenter(module.segmenter.backbone.tokens(image), module.segmenter.grid(image))
    probability, criterion = module.options.model.criterion_dropout, module.criterion
    drawn = generator(0, "criterion dropout", 1)
    mask = dropout_mask(output.crit.shape[:2], probability=probability, generator=drawn)
    crit = (output.crit * mask.to(image.device)).float()
    anchors = criterion.sample_anchors(len(output.z), generator(0, "anchors", 1)).to(crit.device)
    with torch.autocast(crit.device.type, enabled=False):
        ppap = literal.ppap_loss(
            output.z.float(), crit, anchors, boundaries=criterion.boundaries, tau=criterion.tau
        )
    code = output.code.detach()
    return ppap + module.linear_probe.loss(code, label) + module.cluster_probe.loss(code)


def bench_step(bench: Bench, shape: str) -> list[Row]:
    """A training step on images that are on the device already."""
    rows, device = [], bench.device.type
    for size in {"cpu": [8], "cuda": [8, shape_options(shape).dataloader.batch_size]}[device]:
        options = shape_options(shape, {"dataloader.batch_size": size})
        module = random_module(options, bench.device)
        optimizer = module.configure_optimizers()
        batch = random_batch(options, bench.device, n_classes_of(options))
        ours = step_form(module, optimizer, lambda m=module, b=batch: sum(m.losses(b, step=1)[0].values()))
        forms = {"ours": ours}
        if size <= LITERAL_BATCH[device]:
            image = normalise(batch.image)
            step = step_form(
                module, optimizer, lambda m=module, i=image, b=batch: literal_losses(m, i, b.label)
            )
            forms["literal"] = step
        costs = {"ours": step_costs(options, device)}
        rows += bench.compare(f"step, batch {size}", forms, costs=costs, items=size)
    return rows
