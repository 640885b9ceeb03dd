"""The loss and a training step relative to their literal forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dataset.base import Batch
from model.methods.ppap import build_criterion
from model.module import PPAPModule
from model.segmenter import dropout_mask
from model.weights import backbone_spec
from tests.benchmarks import literal
from tests.benchmarks.inputs import loss_inputs, n_classes_of, random_batch, random_module, shape_options
from tests.benchmarks.measure import Bench, Row
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


def bench_loss(bench: Bench, shape: str) -> list[Row]:
    """Loss and gradient, literal and ours with each kind of products."""
    options, rows = shape_options(shape), []
    chosen = build_criterion(options)
    for batch in LOSS_BATCHES[bench.device.type]:
        inputs = loss_inputs(options, batch, bench.device)
        losses = {"literal": partial(literal.ppap_loss, boundaries=chosen.boundaries, tau=chosen.tau)}
        losses |= {name: build_criterion(changed) for name, changed in with_products(options).items()}
        forms = {name: partial(loss_and_gradient, loss, *inputs) for name, loss in losses.items()}
        rows += bench.compare(f"loss, batch {batch}", forms)
    return rows


def bench_growth(bench: Bench, shape: str) -> list[Row]:
    """How the loss alone grows with T and with the batch."""
    settings = [(GROWTH_BATCHES[0], steps) for steps in GROWTH_STEPS]
    settings += [(batch, shape_options(shape).training_coeff.prop_iter) for batch in GROWTH_BATCHES]
    rows = []
    for batch, steps in settings:
        options = shape_options(shape, {"training_coeff.prop_iter": steps})
        inputs = loss_inputs(options, batch, bench.device)
        forms = {"ours": partial(loss_and_gradient, build_criterion(options), *inputs)}
        once = batch > TIMED_ONCE[bench.device.type]
        rows += bench.compare(f"growth, batch {batch}, T = {steps}", forms, once=once)
    return rows


def loss_and_gradient(loss: Callable, z: torch.Tensor, *inputs: torch.Tensor) -> None:
    """As a training step computes them; a loss may return an output with statistics."""
    z.grad = None
    found = loss(z, *inputs)
    getattr(found, "loss", found).backward()


def step_form(module: PPAPModule, losses: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """A whole step: losses, gradient, clipping, update."""
    optimizer, device = module.configure_optimizers(), next(module.parameters()).device
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
        batch, forms = random_batch(options, bench.device, n_classes_of(options)), {}
        for name, chosen in with_products(options).items():
            module = random_module(chosen, bench.device)
            forms[name] = step_form(module, partial(total_loss, module, batch))
        if size <= LITERAL_BATCH[device]:
            losses = partial(literal_losses, module, normalise(batch.image), batch.label)
            forms["literal"] = step_form(module, losses)
        rows += bench.compare(f"step, batch {size}", forms, items=size)
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
        forms[method] = step_form(module, partial(total_loss, module, batch))
    return bench.compare(f"methods, batch {size}", forms, items=size)


def total_loss(module: PPAPModule, batch: Batch) -> torch.Tensor:
    """The sum that a step minimises."""
    losses, _ = module.losses(batch, step=1)
    return sum(losses.values())
