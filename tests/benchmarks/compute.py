"""The loss and a training step relative to their literal forms and to the hardware."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dataset.base import Batch
from loss import PPAPLoss
from model.methods.ppap import build_criterion
from model.module import PPAPModule
from model.segmenter import dropout_mask
from model.weights import backbone_spec
from tests.benchmarks import literal
from tests.benchmarks.inputs import loss_inputs, n_classes_of, random_batch, random_module, shape_options
from tests.benchmarks.measure import Bench, Cost, Row
from utils.config.loading import with_changes
from utils.config.options import Options
from utils.training.randomness import generator
from utils.vision.transforms import normalise

LITERAL_BATCH = {"cpu": 16, "cuda": 64}  # beyond it an (A, N, D) tensor is too large
LOSS_BATCHES = {"cpu": (4, 8), "cuda": (8, 64)}
GROWTH_BATCHES = (8, 16, 32, 64, 128, 256)
GROWTH_STEPS = range(6)
PRODUCTS = {"ours": "float32", "ours, split": "split", "ours, float16": "float16"}
CHANNELS = {"frozen": None, "ppap": None, "stego": 70, "hp": 512}  # K of the code; None: D
TIMED_ONCE = {"cpu": 64, "cuda": 256}  # a run of a larger batch takes minutes


def with_products(options: Options) -> dict[str, Options]:
    """The options with each value of `training_coeff.products`, by the name of the form."""
    key = "training_coeff.products"
    return {name: with_changes(options, {key: products}) for name, products in PRODUCTS.items()}


def loss_cost(options: Options, patches: int, anchors: int, device: str) -> Cost:
    """Dense products: similarities 1 + T times, sums of positives T times, logits, two for the gradient."""
    chosen, dim = options.training_coeff, options.model.dim
    similarities, sums = (3, 2) if chosen.products == "split" else (1, 1)  # as wide as that many
    products = (1 + chosen.prop_iter) * similarities + chosen.prop_iter * sums + 3
    moved = 4.0 * patches * dim * 3  # features and z read, the gradient written
    operand = torch.float16 if device == "cuda" and chosen.products != "float32" else torch.float32
    return Cost(2.0 * anchors * patches * dim * products, moved, operand)


def loss_rows(
    bench: Bench, variants: dict[str, Options], batch: int, *, case: str, literally: bool
) -> list[Row]:
    """Loss and gradient of one batch; `variants` are options by name of the form, on the same inputs."""
    options, device = next(iter(variants.values())), bench.device.type
    criterion = build_criterion(options)
    inputs = loss_inputs(options, criterion, batch, bench.device)
    anchors = int((inputs.anchors >= 0).sum())

    def ours(criterion: PPAPLoss) -> None:
        inputs.z.grad = None
        criterion(*inputs).loss.backward()

    def by_definition() -> None:
        inputs.z.grad = None
        literal.ppap_loss(*inputs, boundaries=criterion.boundaries, tau=criterion.tau).backward()

    forms = {"literal": by_definition} if literally else {}
    forms |= {name: partial(ours, build_criterion(chosen)) for name, chosen in variants.items()}
    costs = {name: [loss_cost(o, len(inputs.z), anchors, device)] for name, o in variants.items()}
    return bench.compare(case, forms, costs=costs, once=batch > TIMED_ONCE[device])


def bench_loss(bench: Bench, shape: str) -> list[Row]:
    """Loss and gradient, literal and ours with each kind of products."""
    variants, rows = with_products(shape_options(shape)), []
    for batch in LOSS_BATCHES[bench.device.type]:
        rows += loss_rows(bench, variants, batch, case=f"loss, batch {batch}", literally=True)
    return rows


def bench_growth(bench: Bench, shape: str) -> list[Row]:
    """How the loss alone grows with T and with the batch."""
    options = shape_options(shape)
    settings = [(GROWTH_BATCHES[0], steps) for steps in GROWTH_STEPS]
    settings += [(batch, options.training_coeff.prop_iter) for batch in GROWTH_BATCHES]
    rows = []
    for batch, steps in settings:
        changed = {"ours": shape_options(shape, {"training_coeff.prop_iter": steps})}
        rows += loss_rows(bench, changed, batch, case=f"growth, batch {batch}, T = {steps}", literally=False)
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
    anchors = int((build_criterion(options).sample_anchors(batch * patches) >= 0).sum())
    network = Cost(operations, weights + batch * read, operand)
    return [network, loss_cost(options, batch * patches, anchors, device)]


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
    segmenter, grid = module.segmenter, module.segmenter.grid(image)
    tokens = segmenter.backbone.tokens(image)
    code, crit = segmenter.code(tokens, grid), segmenter.features(tokens, grid)  # (B, D, h, w) each
    z = segmenter.project(code)  # (N, D)
    probability, criterion = module.options.model.criterion_dropout, module.method.criterion
    drawn = generator(0, "criterion dropout", 1)
    mask = dropout_mask(crit.shape[:2], probability=probability, generator=drawn)
    crit = (crit * mask.to(image.device)).float()
    anchors = criterion.sample_anchors(len(z), generator(0, "anchors", 1)).to(crit.device)
    with torch.autocast(crit.device.type, enabled=False):
        ppap = literal.ppap_loss(z.float(), crit, anchors, boundaries=criterion.boundaries, tau=criterion.tau)
    code = code.detach()
    return ppap + module.linear_probe.loss(code, label) + module.cluster_probe.loss(code)


def bench_step(bench: Bench, shape: str) -> list[Row]:
    """A training step on images that are on the device already, with each kind of products."""
    rows, device = [], bench.device.type
    for size in {"cpu": [8], "cuda": [8, shape_options(shape).dataloader.batch_size]}[device]:
        options = shape_options(shape, {"dataloader.batch_size": size})
        batch = random_batch(options, bench.device, n_classes_of(options))
        forms, costs = {}, {}
        for name, chosen in with_products(options).items():
            module = random_module(chosen, bench.device)
            optimizer, costs[name] = module.configure_optimizers(), step_costs(chosen, device)
            forms[name] = step_form(module, optimizer, partial(_total, module, batch))
        if size <= LITERAL_BATCH[device]:
            image = normalise(batch.image)
            step = step_form(
                module, optimizer, lambda m=module, i=image, b=batch: literal_losses(m, i, b.label)
            )
            forms["literal"] = step
        rows += bench.compare(f"step, batch {size}", forms, costs=costs, items=size)
    return rows


def bench_methods(bench: Bench, shape: str) -> list[Row]:
    """A training step of each method; STEGO's also reads a neighbour of each image, HP's makes two views."""
    size, width, forms = 8, backbone_spec(shape_options(shape)).dim, {}
    for method, channels in CHANNELS.items():
        changed = {"method": method, "dataloader.batch_size": size, "train.compare_frozen": False}
        changed |= {"model.dim": channels or width, "model.pretrained.dim": width, "hp.pool_size": 256 * size}
        options = shape_options(shape, changed)
        module = random_module(options, bench.device)
        read = with_changes(options, {"dataloader.batch_size": 2 * size}) if method == "stego" else options
        batch = random_batch(read, bench.device, n_classes_of(options))
        step = partial(_total, module, batch)
        forms[method] = step_form(module, module.configure_optimizers(), step)
    return bench.compare(f"methods, batch {size}", forms, items=size)


def _total(module: PPAPModule, batch: Batch) -> torch.Tensor:
    losses, _ = module.losses(batch, step=1)
    return sum(losses.values())
