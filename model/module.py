"""A method as a LightningModule: training step, validation step, optimizer and checkpoint entry."""

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from loss import ieee_float32
from model.checkpoint import CHECKPOINT_ENTRY, parse_checkpoint
from model.evaluator import Evaluation, Evaluator, Prediction
from model.methods import build_method
from model.methods.base import Progress
from model.methods.ppap import Frozen
from model.monitoring import NonFiniteGuard, SetWatch, Throughput
from model.probes import ClusterProbe, LinearProbe
from model.segmenter import Segmenter
from utils.config.loading import as_tree
from utils.config.options import Options
from utils.config.plugins import plugin_digests
from utils.training.device import upload
from utils.training.distributed import world_size
from utils.training.randomness import seed_globally, seeded
from utils.training.run_dir import provenance
from utils.vision.labels import LabelSpace


class PPAPModule(LightningModule):
    """Segmenter, probes, method and evaluator under Lightning's automatic optimization.

    The initial state depends on `train.seed` alone, so that a run and its frozen baseline start identically.

    Args:
        train_labelled: whether train items have labels; without them there is no linear probe.
        weights: the source of the parameters, for the summary of the run.
        evaluation: `pictured` and `refiner` of the `Evaluator`.
    """

    def __init__(
        self,
        options: Options,
        labels: LabelSpace,
        segmenter: Segmenter,
        *,
        train_labelled: bool = True,
        weights: str = "",
        **evaluation: Any,
    ) -> None:
        super().__init__()
        self.options, self.labels, self.train_labelled = options, labels, train_labelled
        self.weights, self.segmenter = weights, segmenter
        with seeded(options.train.seed, "method"):
            self.method = build_method(options, segmenter)
        self.frozen = isinstance(self.method, Frozen)
        if self.frozen:
            self.segmenter.requires_grad_(False)
        dim, n_clusters = segmenter.code_dim, labels.n_classes + options.model.extra_clusters
        with seeded(options.train.seed, "linear probe"):
            self.linear_probe = LinearProbe(dim, labels.n_classes).requires_grad_(train_labelled)
        with seeded(options.train.seed, "cluster probe"):
            self.cluster_probe = ClusterProbe(dim, n_clusters)
        heads = {"is_direct": options.eval.is_direct, "with_linear": train_labelled}
        self.evaluator = Evaluator(labels.n_classes, n_clusters, **heads, **evaluation)
        self.last_evaluation: Evaluation | None = None
        self.last_predictions: list[Prediction] = []
        self.best, self.score, self.improved = float("-inf"), float("-inf"), False
        self.metrics: dict[str, float] = {}
        self.assignment: list[int] | None = None
        self.scalars: dict[str, Tensor] = {}  # of the last step
        self.logged: dict[str, float] = {}  # those of the last logged step
        self.guard = NonFiniteGuard(skip=options.train.skip_nonfinite)
        self.watch, self.throughput = SetWatch(), Throughput()
        self._grad_norm = torch.tensor(0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on a batch; returns the total loss, (), with a graph.

        The loss is scaled by the number of ranks, as DDP takes the mean of their gradients.
        """
        step = self.global_step + 1
        seed_globally(self.options.train.seed, "step", step)
        with ieee_float32():
            total = self.trainer.estimated_stepping_batches
            losses, statistics = self.losses(batch, step=step, total_steps=total)
        total = sum(losses.values())
        detached = {name: loss.detach() for name, loss in losses.items()}
        # the published train_loss is that of the probes alone
        probes = sum(detached[name] for name in ("linear_loss", "cluster_loss") if name in detached)
        self.scalars = {"total_loss": total.detach(), "train_loss": probes, **detached, **statistics}
        self.throughput.add(world_size() * self.method.images(batch))
        self.guard.observe(detached, step=step)
        if total.device.type == "cpu":  # a GPU would have to be waited for
            self.guard.raise_if_found(self.trainer.datamodule)
        return world_size() * total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Without TF32, as the forward pass."""
        with ieee_float32():
            super().backward(loss, *args, **kwargs)

    def losses(
        self, batch: Any, *, step: int, total_steps: int = 1
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses by name, () each, whose sum is minimised; and statistics of the method."""
        grid, dim = self.segmenter.grid(batch.label), self.segmenter.backbone.spec.dim
        images = self.method.images(batch)
        draws = self.method.draws(images, grid, step, dim=dim)  # before the GPU has anything to do
        for name, value in draws.items():
            draws[name] = upload(value, self.device) if isinstance(value, Tensor) else value
        code, losses, statistics = self.method(self.segmenter, batch, draws, Progress(step, total_steps))
        if self.train_labelled:
            losses["linear_loss"] = self.linear_probe.loss(code.detach(), batch.label[:images])
        losses["cluster_loss"] = self.cluster_probe.loss(code.detach())
        return losses, statistics

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW with the method's parameter groups and the probes'; Adam is AdamW without decay."""
        chosen, parts = self.options.optimizer, self.method.groups(self.segmenter)
        parts.append((list(self.linear_probe.parameters()), chosen.linear))
        parts.append((list(self.cluster_probe.parameters()), chosen.cluster))
        groups = [
            {"params": part, "lr": each.lr, "weight_decay": each.weight_decay * (each.name == "adamw")}
            for part, each in parts
        ]
        return torch.optim.AdamW([group for group in groups if group["params"][0].requires_grad])

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **_kwargs: Any) -> None:
        """Clips only the segmenter's gradient; Lightning calls this after unscaling."""
        if self.guard.skips_step():
            optimizer.zero_grad(set_to_none=True)  # the optimizer then changes nothing
        if not self.frozen:
            largest = self.options.train.grad_norm
            self._grad_norm = torch.nn.utils.clip_grad_norm_(self.segmenter.trainable(), largest)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the published scalars and some others every `print_freq` steps."""
        if batch_idx % self.options.train.print_freq:
            return
        tensors = {**self.scalars, "first_nonfinite_step": self.guard.first_step}
        if not self.frozen:
            trainable = [parameter.detach() for parameter in self.segmenter.trainable()]
            tensors |= {"grad_norm": self._grad_norm, "param_norm": torch.nn.utils.get_total_norm(trainable)}
        values = [torch.as_tensor(value).to(self.device, torch.float32) for value in tensors.values()]
        self.logged = dict(zip(tensors, torch.stack(values).tolist(), strict=True))  # waits for a GPU once
        if self.logged.pop("first_nonfinite_step"):
            self.guard.raise_if_found(self.trainer.datamodule)
        patches = world_size() * self.method.images(batch) * math.prod(self.segmenter.grid(batch.label))
        logged_steps = self.trainer.estimated_stepping_batches // self.options.train.print_freq
        self.watch.add(self.logged, patches=patches, logged_steps=logged_steps)
        scalars = self.logged | {"epoch": self.current_epoch, "net_lr": self.options.optimizer.net.lr}
        if self.guard.skip:
            scalars["skipped_steps"] = self.guard.skipped
        self._write(scalars | self.throughput.scalars(self.device))

    def on_validation_epoch_start(self) -> None:
        """Resets the evaluator."""
        self.guard.raise_if_found(self.trainer.datamodule)
        self.evaluator.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the evaluator; a repeated one only keeps the ranks in step."""
        batches = self.trainer.val_dataloaders.batch_sampler
        number = batches.number(batch_idx)
        if number >= batches.total:
            return
        probes = {"linear": self.linear_probe, "cluster": self.cluster_probe}
        with ieee_float32():
            flip = self.options.eval.flip and self.trainer.state.fn == "validate"
            code = self.segmenter.code_of(batch.inputs, self.segmenter.grid(batch.label), flip=flip)
            self.evaluator.update(code, batch.image, batch.label, first=number * batches.batch_size, **probes)

    def on_validation_epoch_end(self) -> None:
        """Scores the set; `improved` says whether the sum of its metrics is the largest so far."""
        self.last_evaluation, self.last_predictions = self.evaluator.compute(), self.evaluator.predictions()
        self.metrics, self.assignment = self.last_evaluation.metrics(), self.last_evaluation.assignment
        # without labels the newest checkpoint is the best
        self.score = sum(self.metrics.values()) if self.metrics else float(self.global_step)
        self.improved, self.best = self.score > self.best, max(self.score, self.best)
        if self.trainer.state.fn == "fit":
            self._write(self.metrics | {"valid_loss": self.last_evaluation.valid_loss})

    def on_validation_end(self) -> None:
        """Restarts the measurement of images per second."""
        self.throughput.restart()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds classes, matching, options and versions, in plain containers."""
        self.guard.raise_if_found(self.trainer.datamodule)
        checkpoint[CHECKPOINT_ENTRY] = {
            "class_names": list(self.labels.names),
            "palette": [list(colour) for colour in self.labels.palette],
            "assignment": self.assignment,
            "metrics": self.metrics,
            "train_labelled": self.train_labelled,
            "step": self.global_step,
            "epoch": max(0, self.global_step - 1) // self.trainer.num_training_batches,
            "skipped_steps": self.guard.skipped,
            "options": as_tree(self.options),
            "plugins": plugin_digests(),
            **provenance(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Validates the checkpoint of a run that is resumed; restores its last and its best score."""
        entry = parse_checkpoint(Path(self.trainer.ckpt_path), checkpoint).about
        self.best = checkpoint["progress"]["best"]
        self.assignment, self.metrics = entry["assignment"], entry["metrics"]
        self.guard = NonFiniteGuard(skip=self.guard.skip, skipped=entry.get("skipped_steps", 0))

    @torch.no_grad()
    def frozen_tokens(self, inputs: Tensor, trainer: Trainer) -> Tensor:
        """Tokens (B, T, D) of uint8 images (B, 3, H, W), on the device and in the precision of a trainer."""
        self.segmenter.backbone.to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context(), ieee_float32():
            return self.segmenter.tokens(inputs.to(trainer.strategy.root_device))

    @torch.no_grad()
    def frozen_features(self, inputs: Tensor, trainer: Trainer, *, label: Tensor | None = None) -> Tensor:
        """Criterion features (B, D, h, w) without dropout, of images, or of cached tokens and labels."""
        tokens, shown = self.frozen_tokens(inputs, trainer), inputs if label is None else label
        with trainer.precision_plugin.forward_context():
            return self.segmenter.features(tokens, self.segmenter.grid(shown))

    def _write(self, scalars: dict[str, float]) -> None:
        scalars["iters"] = self.global_step
        for logger in self.loggers:
            logger.log_metrics(scalars, step=self.global_step)
