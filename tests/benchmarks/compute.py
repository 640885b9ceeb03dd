"""The loss and a training step against their literal forms and against the hardware."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loss import PPAPLoss
from model.module import PPAPModule
from model.segmenter import criterion_dropout
from model.weights import backbone_spec
from tests.benchmarks import literal
from tests.benchmarks.inputs import (
    LossInputs,
    loss_inputs,
    loss_of,
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
TIMED_ONCE = {"cpu": 64, "cuda": 256}  # a larger batch takes minutes a run
GROWTH_STEPS = range(6)


def loss_cost(options: Options, inputs: LossInputs) -> Cost:
    """Dense products: similarities 1 + T times, sums of positives T times, logits, two for the gradient."""
    chosen = options.training_coeff
    patches, dim = inputs.z.shape
    anchors = int((inputs.anchors >= 0).sum())
    products = 1 + 2 * chosen.prop_iter + 3
    operations = 2.0 * anchors * patches * dim * products
    moved = 4.0 * patches * dim * 3  # features and z read, the gradient written
    return Cost(operations, moved, getattr(torch, chosen.similarity_dtype))


def loss_form(criterion: PPAPLoss, inputs: LossInputs) -> Callable[[], None]:
    """Forward and gradient, as a training step asks for them."""

    def run() -> None:
        inputs.z.grad = None
        criterion(inputs.z, inputs.features, inputs.anchors).loss.backward()

    return run


def literal_loss_form(criterion: PPAPLoss, inputs: LossInputs) -> Callable[[], None]:
    """The same by the literal form."""

    def run() -> None:
        inputs.z.grad = None
        literal.ppap_loss(
            inputs.z, inputs.features, inputs.anchors, boundaries=criterion.boundaries, tau=criterion.tau
        ).backward()

    return run


def bench_loss(bench: Bench, shape: str) -> list[Row]:
    """Loss and gradient, literal and ours."""
    rows = []
    for batch in LOSS_BATCHES[bench.device.type]:
        options = shape_options(shape)
        criterion = loss_of(options)
        inputs = loss_inputs(options, criterion, batch, bench.device)
        forms = {"literal": literal_loss_form(criterion, inputs), "ours": loss_form(criterion, inputs)}
        costs = {"ours": [loss_cost(options, inputs)]}
        rows += bench.compare(f"loss, batch {batch}", forms, costs=costs)
    return rows


def bench_growth(bench: Bench, shape: str) -> list[Row]:
    """How the loss alone grows with the batch and with T."""
    rows = []
    settings = [{"batch": GROWTH_BATCHES[0], "prop_iter": steps} for steps in GROWTH_STEPS]
    settings += [{"batch": batch} for batch in GROWTH_BATCHES]
    for setting in settings:
        batch, changed = setting["batch"], {k: v for k, v in setting.items() if k != "batch"}
        options = shape_options(shape)
        criterion = loss_of(options, **changed)
        inputs = loss_inputs(options, criterion, batch, bench.device)
        name = f"growth, batch {batch}, T = {options.training_coeff.prop_iter}"
        forms = {"ours": loss_form(criterion, inputs)}
        costs = {"ours": [loss_cost(options, inputs)]}
        repeats = 0 if batch > TIMED_ONCE[bench.device.type] else None
        rows += bench.compare(name, forms, costs=costs, repeats=repeats)
    return rows


def network_cost(options: Options, operand: torch.dtype, *, cached: bool = False) -> Cost:
    """Products of a step: frozen blocks, the head forward and twice that backward, the projection.

    Args:
        options: of the step.
        operand: of the products.
        cached: whether the tokens are there already, so that of the frozen blocks only the last runs.
    """
    pretrained, dim, batch = options.model.pretrained, options.model.dim, options.dataloader.batch_size
    tokens = (options.dataset.res // pretrained.dino_patch_size) ** 2 + 1
    block = tokens * (24.0 * dim * dim + 4.0 * tokens * dim)  # linear layers, attention
    blocks = 3 + (1 if cached else backbone_spec(options).depth)  # the head with its gradient, frozen ones
    embedding = 0.0 if cached else 2.0 * tokens * dim * 3 * pretrained.dino_patch_size**2
    projection = 3 * 2.0 * tokens * dim * dim
    operations = batch * (blocks * block + embedding + projection)
    weights = 4.0 * 12 * dim * dim * blocks
    read = 2.0 * tokens * dim if cached else 3.0 * options.dataset.res**2
    return Cost(operations, weights + batch * read, operand)


def step_form(module: PPAPModule, optimizer: torch.optim.Optimizer, losses: Callable) -> Callable[[], None]:
    """A whole step: losses, gradient, clipping, update."""
    device = next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            total = losses()
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        module.configure_gradient_clipping(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return run


def literal_losses(module: PPAPModule, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The total loss of a step with the literal form of PPAP; (B, 3, H, W) normalised, (B, H, W)."""
    output = module.segmenter(module.segmenter.backbone.tokens(image), module.segmenter.grid(image))
    options = module.options
    crit = criterion_dropout(
        output.crit,
        probability=options.model.criterion_dropout,
        generator=generator(0, "criterion dropout", 1),
    )
    anchors = module.criterion.sample_anchors(len(output.z), generator(0, "anchors", 1)).to(crit.device)
    with torch.autocast(crit.device.type, enabled=False):
        ppap = literal.ppap_loss(
            output.z.float(),
            crit.float(),
            anchors,
            boundaries=module.criterion.boundaries,
            tau=module.criterion.tau,
        )
    code = output.code.detach()
    return ppap + module.linear_probe.loss(code, label) + module.cluster_probe.loss(code)


def bench_step(bench: Bench, shape: str) -> list[Row]:
    """A training step on images that are on the device already."""
    rows = []
    device = bench.device.type
    sizes = {"cpu": (8,), "cuda": (8, shape_options(shape).dataloader.batch_size)}[device]
    for size in dict.fromkeys(sizes):
        options = shape_options(shape, dataloader={"batch_size": size})
        module = random_module(options, bench.device)
        optimizer = module.configure_optimizers()
        batch = random_batch(options, bench.device, module.labels.n_classes)
        forms = {"ours": step_form(module, optimizer, lambda m=module, b=batch: m.losses(b, step=1).total)}
        if size <= LITERAL_BATCH[device]:
            image = normalise(batch.image)
            forms["literal"] = step_form(
                module, optimizer, lambda m=module, i=image, b=batch: literal_losses(m, i, b.label)
            )
        operand = torch.float16 if device == "cuda" else torch.float32
        costs = {"ours": [network_cost(options, operand), step_loss_cost(options)]}
        rows += bench.compare(f"step, batch {size}", forms, costs=costs, items=size)
    return rows


def step_loss_cost(options: Options) -> Cost:
    """The loss's part of a step."""
    side = options.dataset.res // options.model.pretrained.dino_patch_size
    patches = options.dataloader.batch_size * side * side
    anchors = loss_of(options).sample_anchors(patches)
    return loss_cost(
        options, LossInputs(torch.empty(patches, options.model.dim, device="meta"), None, anchors)
    )
