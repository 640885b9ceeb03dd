"""PPAP as a LightningModule: what a training step and a validation step are."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from model.criterion import build_criterion
from model.evaluator import Evaluation, Evaluator
from model.nonfinite import NonFinite
from model.probes import ClusterProbe, LinearProbe
from model.scalars import Pace, StepLosses, plain_numbers
from model.segmenter import Segmenter, criterion_dropout
from utils.config.loading import as_tree
from utils.config.options import Options
from utils.errors import UserError
from utils.training.checkpointing import Progress
from utils.training.distributed import world_size
from utils.training.provenance import provenance
from utils.training.randomness import generator, seeded
from utils.training.schedule import Schedule
from utils.vision.labels import LabelSpace
from utils.vision.transforms import normalise

CHECKPOINT_ENTRY = "ppap"


class PPAPModule(LightningModule):
    """Segmenter, probes, loss and evaluator under Lightning's automatic optimization.

    The trainable state is made from `train.seed` alone, so that a run and its frozen baseline start equal.

    Args:
        options: all options.
        labels: class names and colours, which travel in checkpoints.
        segmenter: the network, its backbone filled.
        train_labelled: whether train items have labels; without them there is no linear probe.
    """

    def __init__(
        self, options: Options, labels: LabelSpace, segmenter: Segmenter, *, train_labelled: bool = True
    ) -> None:
        super().__init__()
        self.options, self.labels, self.train_labelled = options, labels, train_labelled
        self.segmenter = segmenter
        self.frozen = options.train.frozen
        self.dim = segmenter.backbone.spec.dim
        n_clusters = labels.n_classes + options.model.extra_clusters
        with seeded(options.train.seed, "linear probe"):
            self.linear_probe = LinearProbe(self.dim, labels.n_classes)
        with seeded(options.train.seed, "cluster probe"):
            self.cluster_probe = ClusterProbe(self.dim, n_clusters)
        self.criterion = build_criterion(options)
        self.evaluator = Evaluator(
            labels.n_classes, n_clusters, is_direct=options.eval.is_direct, with_linear=train_labelled
        )
        untrained = segmenter.trainable() if self.frozen else []
        for parameter in [*untrained, *(() if train_labelled else self.linear_probe.parameters())]:
            parameter.requires_grad_(False)
        self.restored_from: str | None = None
        self.restored_step: int | None = None
        self.last_evaluation: Evaluation | None = None
        self.score = float("-inf")
        self.scored: dict[str, Any] = {"assignment": None, "metrics": {}}
        self.schedule = Schedule(per_epoch=1, epochs=1, valid_freq=1)
        self.nonfinite = NonFinite(skip=options.train.skip_nonfinite)
        self._done = self._before = 0  # steps of an earlier start; Lightning's first batch is the one after
        self._grad_norm = torch.tensor(0.0)
        self._losses: StepLosses | None = None
        self._batch_index = 0
        self._pace = Pace()

    @property
    def iters(self) -> int:
        """Global step, from 1, of the batch in hand."""
        return self._before + self._batch_index + 1

    def follow(self, schedule: Schedule, progress: Progress) -> int:
        """Takes its place in a run.

        A validation that an earlier start did not come to is reached by its last step once more, of which
        only the batch is loaded.

        Args:
            schedule: of all steps.
            progress: of an earlier start.

        Returns:
            How many steps the sampler is to leave out.
        """
        self.schedule, self._done = schedule, progress.step
        self._before = progress.step if progress.validated else progress.step - 1
        self._batch_index = -1  # until there is a batch, `iters` is the step before
        return self._before

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch: images (B, 3, H, W) uint8 or tokens, labels (B, H, W); returns the total loss.

        Of several processes each has its slice of the global batch; their gradients are parts of one sum,
        of which DDP takes the mean. Where an earlier start has trained on the batch, nothing is changed.
        """
        self._batch_index = batch_idx
        if self._trained:
            return self._no_loss()
        losses = self.losses(batch, step=self.iters)
        self._losses = losses.detach()
        self._pace.images += world_size() * len(batch.label)
        self.nonfinite.note(self._losses, step=self.iters)
        if losses.total.device.type == "cpu" or self._shown(self.iters):
            self.nonfinite.stop_if_met(self._names)  # on a GPU this waits for the step, so not each time
        self.log("loss", losses.total.detach(), prog_bar=True, logger=False)
        return world_size() * losses.total

    @property
    def _trained(self) -> bool:
        """Whether an earlier start has trained on the batch in hand."""
        return self.iters <= self._done

    def _no_loss(self) -> Tensor | None:
        """A loss that changes nothing: None, which Lightning takes from a single process alone."""
        if world_size() == 1:
            return None
        return 0 * sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)

    def _shown(self, step: int) -> bool:
        """Whether a step's scalars are logged: the first of an epoch, and each `print_freq` after it."""
        return (step - 1) % self.schedule.per_epoch % self.options.train.print_freq == 0

    def _names(self, step: int) -> list[str]:
        """The images of a step's batch."""
        data = self.trainer.datamodule
        return [] if data is None else data.names(step)

    def losses(self, batch: Any, *, step: int) -> StepLosses:
        """PPAP plus linear plus cluster loss; the probes read the code detached."""
        seed = self.options.train.seed
        tokens, grid = self._tokens(batch)
        if self.frozen:
            with torch.no_grad():
                code, ppap = self.segmenter.code(tokens, grid), None  # (B, D, h, w)
        else:
            output = self.segmenter.from_tokens(tokens, grid)
            code = output.code
            crit = criterion_dropout(
                output.crit,
                probability=self.options.model.criterion_dropout,
                generator=generator(seed, "criterion dropout", step),
            )
            ppap = self.criterion(output.z, crit, generator=generator(seed, "anchors", step))
        cluster = self.cluster_probe.loss(code.detach())
        linear = self.linear_probe.loss(code.detach(), batch.label) if self.train_labelled else None
        parts = (None if ppap is None else ppap.loss, linear, cluster)
        total = sum(part for part in parts if part is not None)
        return StepLosses(total, cluster, linear, ppap)

    def _tokens(self, batch: Any) -> tuple[Tensor, tuple[int, int]]:
        """What the second-last block gives, (B, T, D), and the patch grid; the batch may have it already."""
        if batch.image is None:
            return batch.inputs.float(), self.segmenter.grid(batch.label)
        image = normalise(batch.image)
        return self.segmenter.backbone.tokens(image), self.segmenter.grid(image)

    def encode(self, image: Tensor, trainer: Trainer) -> Tensor:
        """Tokens (B, T, D) of images (B, 3, H, W) uint8, on the device and in the precision of a trainer."""
        device = trainer.strategy.root_device
        with trainer.precision_plugin.forward_context():
            return self.segmenter.backbone.to(device).tokens(normalise(image.to(device)))

    def frozen_features(self, image: Tensor, trainer: Trainer) -> Tensor:
        """Criterion features (B, D, h, w) without dropout, likewise."""
        tokens = self.encode(image, trainer)
        with trainer.precision_plugin.forward_context():
            return self.segmenter.backbone.last_features(tokens, self.segmenter.grid(image))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW of three groups; Adam is AdamW without decay."""
        chosen = self.options.optimizer
        groups = [] if self.frozen else [(self.segmenter.trainable(), chosen.net)]
        if self.train_labelled:
            groups.append((list(self.linear_probe.parameters()), chosen.linear))
        groups.append((list(self.cluster_probe.parameters()), chosen.cluster))
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": group.lr,
                    "weight_decay": group.weight_decay if group.name == "adamw" else 0.0,
                }
                for parameters, group in groups
            ]
        )

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **_keywords: Any
    ) -> None:
        """Clips head and projection alone; Lightning calls this after unscaling."""
        if self._trained or self.nonfinite.skips():
            optimizer.zero_grad(set_to_none=True)  # so that the step changes nothing
        if not self.frozen:
            self._grad_norm = torch.nn.utils.clip_grad_norm_(
                self.segmenter.trainable(), self.options.train.grad_norm
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the published scalars, and what they leave out, every `print_freq` steps."""
        if self._trained or not self._shown(self.iters):
            return
        scalars = {
            "epoch": self.schedule.epoch(self.iters),
            "iters": self.iters,
            "net_lr": self.options.optimizer.net.lr,
            **self._losses.scalars(),
        }
        if not self.frozen:
            trainable = [parameter.detach() for parameter in self.segmenter.trainable()]
            scalars |= {
                "grad_norm": self._grad_norm,
                "param_norm": torch.nn.utils.get_total_norm(trainable),
            }
        if self.nonfinite.skip:
            scalars["skipped_steps"] = self.nonfinite.skipped
        plain = plain_numbers(scalars)  # on a GPU this waits for the step, so the pace is a true one
        self._write(plain | self._pace.scalars(self.device))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the evaluator; one that only keeps this process in step with others is left out."""
        batches = self.trainer.val_dataloaders.batch_sampler
        number = batches.number(batch_idx)
        if number >= batches.total:
            return
        self.evaluator.update(
            self.segmenter.code(*self._tokens(batch)),
            batch.image,
            batch.label,
            linear=self.linear_probe,
            cluster=self.cluster_probe,
            first=number * batches.batch_size,
        )

    def on_validation_epoch_start(self) -> None:
        """Starts counting afresh."""
        self.nonfinite.stop_if_met(self._names)
        self._pace.pause()
        self.evaluator.reset()

    def on_validation_epoch_end(self) -> None:
        """Scores the set; `score`, the sum of the metrics that exist, chooses the best checkpoint."""
        self.last_evaluation = self.evaluator.compute()
        self.evaluator.gather_pictures()
        metrics = self.last_evaluation.metrics()
        shown = {name: metrics[name] for name in ("Cluster_Accuracy", "Cluster_mIoU") if name in metrics}
        self.log_dict(shown, prog_bar=True, logger=False)
        scores = self.last_evaluation.cluster
        self.scored = {"assignment": list(scores.assignment) if scores else None, "metrics": metrics}
        # without a metric the newest wins
        self.score = sum(metrics.values()) if metrics else float(self.iters)
        if self.trainer.state.fn == "fit":
            self._write({**metrics, "iters": self.iters, "valid_loss": self.last_evaluation.valid_loss})

    def on_validation_end(self) -> None:
        """What the callbacks have spent on checkpoints and pictures is no training time either."""
        self._pace.resume()

    def _write(self, scalars: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(scalars, step=self.iters)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a checkpoint is about, in plain containers: classes, matching, options, versions."""
        checkpoint[CHECKPOINT_ENTRY] = {
            "class_names": list(self.labels.names),
            "palette": [list(colour) for colour in self.labels.palette],
            **self.scored,
            "train_labelled": self.train_labelled,
            "step": self.iters,
            "epoch": self.schedule.epoch(self.iters),
            "skipped_steps": self.nonfinite.skipped,
            "options": as_tree(self.options),
            **provenance(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the last scores of the run that goes on."""
        entry = checkpoint[CHECKPOINT_ENTRY]
        self.scored = {"assignment": entry["assignment"], "metrics": entry["metrics"]}
        self.nonfinite.skipped = entry.get("skipped_steps", 0)


def check_channels(options: Options, *, n_classes: int, dim: int) -> None:
    """Holds the options' idea of the code's channels against the backbone's width.

    Args:
        options: all options.
        n_classes: of the data set.
        dim: D, the backbone's width.

    Raises:
        UserError: they differ, or `eval.is_direct` asks for other than one channel a cluster.
    """
    wanted, key = options.model.dim, "model.dim"
    if not options.model.continuous:
        wanted, key = n_classes, "model.continuous: false asks for D = n_classes, which"
    if wanted != dim:
        raise UserError(f"{key} is {wanted}, must be {dim}, the backbone's width")
    n_clusters = n_classes + options.model.extra_clusters
    if options.eval.is_direct and dim != n_clusters:
        raise UserError(
            f"eval.is_direct takes the code's {dim} channels as cluster logits, so there must be {dim} "
            f"clusters, not {n_clusters}; set eval.is_direct false"
        )
