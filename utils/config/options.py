"""All options of a run: types, defaults, bounds, descriptions and the rules between them.

The keys are those of the published option files. The defaults are the paper's values for COCO-Stuff with
ViT-S/8, so an option file lists only what differs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)

from utils.files import TOKENS_FOLDER

FROZEN = "-frozen"  # suffix of the baseline's name
LONGEST_NAME = 200  # bytes; a file system allows 255, and suffixes such as -frozen.lock are added
LONGEST_TAG = 64
FIELDS_ONLY = {"fields_only": True}  # validation context: skip the rules between options

# Official backbones: width and heads by size, patch sizes and number of blocks by family.
WIDTH_AND_HEADS = {"vit_small": (384, 6), "vit_base": (768, 12)}
PATCHES = {"dino": (8, 16), "dinov2": (14,)}
FULL_DEPTH = {"dino": 12, "dinov2": 12, "vit": 4}

# Registered names; `register_data_set`, `register_backbone` and `register_loss` extend these lists.
DATA_TYPES = [
    "cocostuff27",
    "cocostuff15",
    "cocostuff3",
    "cityscapes",
    "potsdam",
    "potsdamraw",
    "directory",
    "synthetic",
]
WITHOUT_FOLDER = {"synthetic"}  # data sets that read no files
ARCHS = ["dino", "dinov2", "vit"]
LOSSES = ["ppap"]

# Keys of the published option files that have no effect, with the only value they may have.
LEGACY_KEYS = {
    "dataset.num_neighbors": 7,
    "model.spatial_size": 28,
    "model.name": "STEGO",
    "model.bn_momentum": None,
    "model.bn_eps": None,
    "model.pretrained.name": "dino",
    "model.pretrained.dino_feat_type": "feat",
    "model.pretrained.projection_type": "nonlinear",
    "model.pretrained.dropout": True,
    "train.freeze_encoder_bn": False,
    "train.freeze_all_bn": -1,
    "train.num_accum": 1,
    "eval.n_images": 5,
    "eval.is_visualize": False,
    "eval.is_diff": False,
}
# Keys of earlier versions, with what replaces them; stored options may still hold them.
REMOVED_KEYS = {"training_coeff.backend": "the loss is always computed by torch"}


@dataclass(frozen=True)
class Check:
    """Validator of a value.

    Attributes:
        accepts: whether a value is valid.
        allowed: description of the valid values, or the list of registered names that are valid.
    """

    accepts: Callable[[Any], bool]
    allowed: str | list[str]

    def __call__(self, value: Any) -> Any:
        """Returns the value; raises ValueError if it is invalid."""
        if not self.accepts(value):
            raise ValueError(f"must be {self.allowed}")
        return value


def checked(kind: Any, accepts: Callable[[Any], bool], allowed: str | list[str]) -> Any:
    """The type of an option with a further check."""
    return Annotated[kind, AfterValidator(Check(accepts, allowed))]


def registered(names: list[str]) -> Any:
    """The type of an option that is one of the names in a registry."""
    return checked(Text, lambda name: name in names, names)


def _text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value  # a run may be called 5


def _infinity(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf") else value


def _json_number(value: float) -> float | str:
    return str(value) if math.isinf(value) else value


def _is_folder_name(name: str) -> bool:
    short = len(name.removesuffix(FROZEN).encode(errors="replace")) <= LONGEST_NAME
    return short and name not in ("", ".", "..", TOKENS_FOLDER) and not set(name) & set("/\\\0")


def _is_wandb_id(id: str | None) -> bool:
    return id is None or (_is_folder_name(id) and id == id.strip() and not set(id) & set("#%:?"))


def _are_tags(tags: list[str] | None) -> bool:
    return all(0 < len(tag) <= LONGEST_TAG for tag in tags or ())


def _is_interval(every: str | None) -> bool:
    form = r"\d+|\d+(\.\d+)? *(m|min|minutes?)"
    return every is None or bool(re.fullmatch(form, every) and re.search(r"[1-9]", every))


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float, BeforeValidator(_infinity), PlainSerializer(_json_number, when_used="json")]
FolderName = checked(
    Text, _is_folder_name, f'a folder name of at most {LONGEST_NAME} bytes other than "{TOKENS_FOLDER}"'
)
WandbId = checked(
    Text | None, _is_wandb_id, f"at most {LONGEST_NAME} bytes without / \\ # % : ? and outer spaces, or null"
)
DataType = registered(DATA_TYPES)
Arch = registered(ARCHS)
Loss = registered(LOSSES)
Tags = checked(list[str] | None, _are_tags, f"a list of tags of 1 to {LONGEST_TAG} characters, or null")
Interval = checked(
    Text | None, _is_interval, 'a number of steps, such as 500, or of minutes, such as "15 min", or null'
)


def option(default: Any, description: str, **bounds: float) -> Any:
    """A field with a description and the bounds `ge`, `gt` and `le`."""
    return Field(default, description=description, **bounds)


class Section(BaseModel):
    """A group of options: immutable, without unknown keys, without type coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class WandbOptions(Section):
    """Run name and logging to wandb."""

    project: Text = option("PPAP", "wandb project")
    entity: Text | None = option(None, "wandb user or team; null: your default entity")
    name: FolderName = option("ppap", "name of the run and of its folder in `output_dir`")
    mode: Literal["online", "offline", "disabled"] = option("online", "`--debug` sets disabled")
    tags: Tags = option(None, "wandb tags")
    notes: Text | None = option(None, "wandb notes")
    id: WandbId = option(None, "online: id of the wandb run to resume; null: a new run")
    artifact: bool = option(False, "upload best.ckpt as an artifact")


class DatasetOptions(Section):
    """Training and validation data."""

    data_type: DataType = option("cocostuff27", "data set")
    data_path: Text = option("", "folder of the data set (`--data_path`)")
    loader_crop_type: Literal["center", "random", None] = option("center", "crop to a square; null: resize")
    crop_type: Literal["five", "random", None] = option("five", "crops to train on; null: whole images")
    crop_ratio: Number = option(0.5, "side of such a crop relative to the image's", gt=0, le=1)
    res: int = option(224, "training resolution in pixels, a multiple of the patch", ge=1)
    val_res: int = option(320, "evaluation resolution in pixels, a multiple of the patch", ge=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = option(
        "nearest", "resizing of images (labels: always nearest)"
    )
    n_classes: int | None = option(None, "directory: class count; null: from classes.json", ge=2, le=255)
    class_names: list[str] | None = option(None, "directory: class names; null: from classes.json")
    check_files: bool = option(False, "read all files before the run; stop if any is damaged (`--check`)")
    skip_damaged: bool = option(False, "read all files before the run; skip damaged and missing ones")
    cache_features: Literal["ram", "disk", None] = option(
        None, "compute the backbone's tokens once and keep them in memory or in `<output_dir>/tokens`"
    )
    train_images: int = option(512, "synthetic: number of training images", ge=1)
    val_images: int = option(64, "synthetic: number of validation images", ge=1)


class DataloaderOptions(Section):
    """Batches and workers."""

    batch_size: int = option(64, "images per training step, summed over all devices", ge=1)
    val_batch_size: int = option(8, "images per validation batch during training, on each device", ge=1)
    num_workers: int = option(8, "data loading processes per device; does not change results", ge=0)


class CoefficientOptions(Section):
    """Coefficients of the PPAP loss."""

    initialcrit_pos: Number = option(0.55, "Phi_0, initial positive boundary", ge=-math.inf)
    initialcrit_amb: Number = option(0.2, "Psi_0, initial lower boundary of the ambiguous zone", ge=-math.inf)
    prop_iter: int = option(2, "T, number of propagation steps", ge=0)
    sigma_pos: Number = option(3.0, "damping of the Phi update; inf keeps Phi fixed", gt=0)
    sigma_amb: Number = option(3.0, "damping of the Psi update; inf keeps Psi fixed", gt=0)
    trainpatchsplit: int = option(16, "a group of s patches gives s // trainpatchsplit anchors", ge=1)
    tau: Number = option(0.8, "temperature", gt=0, le=1e6)
    loss: Loss = option("ppap", "loss of the projections")
    group_size: int = option(784, "consecutive patches that anchors are drawn from together", ge=1)
    chunk_size: int | None = option(None, "anchors per block of similarities; null: automatic", ge=1)
    similarity_dtype: Literal["float32", "float16"] = option("float32", "dtype of the similarities' operands")


class PretrainedOptions(Section):
    """The frozen backbone."""

    model_type: Literal["vit_small", "vit_base"] = option("vit_small", "size of dino and dinov2")
    dino_patch_size: int = option(8, "patch size in pixels: dino 8 or 16, dinov2 14", ge=1)
    registers: bool = option(False, "dinov2: the variant with register tokens")
    depth: int | None = option(None, "use only the first `depth` blocks; null: all (vit: 4)", ge=2)
    heads: int = option(3, "vit: number of attention heads", ge=1)
    native_res: int | None = option(None, "vit: pixels of the position embedding; null: res", ge=1)
    pretrained_weights: Text | None = option(None, "local weights file; null: the official weights")


class ModelOptions(Section):
    """The network."""

    arch: Arch = option("dino", "backbone family; vit: any size, without official weights")
    continuous: bool = option(True, "true: the code has `dim` channels; false: one channel per class")
    dim: int = option(384, "D, width of the backbone and of the code", ge=1)
    extra_clusters: int = option(0, "clusters beyond the number of classes", ge=0)
    criterion_dropout: Number = option(0.1, "channel dropout of the criterion features", ge=0, le=0.99)
    pretrained: PretrainedOptions = PretrainedOptions()


class ProbeOptimizerOptions(Section):
    """Optimizer of the linear probe; the defaults of the others build on it."""

    name: Literal["adam", "adamw"] = option("adam", "adam: no weight decay")
    lr: Number = option(1e-3, "learning rate, constant", ge=0, le=1e6)
    weight_decay: Number = option(0.0, "decoupled weight decay, also of biases and norms", ge=0, le=1e6)


class ClusterOptimizerOptions(ProbeOptimizerOptions):
    """Optimizer of the cluster probe."""

    lr: Number = option(5e-3, "learning rate, constant", ge=0, le=1e6)


class NetOptimizerOptions(ProbeOptimizerOptions):
    """Optimizer of the head and the projection."""

    name: Literal["adam", "adamw"] = option("adamw", "adam: no weight decay")


class OptimizerOptions(Section):
    """One AdamW with three parameter groups."""

    net: NetOptimizerOptions = NetOptimizerOptions()
    linear: ProbeOptimizerOptions = ProbeOptimizerOptions()
    cluster: ClusterOptimizerOptions = ClusterOptimizerOptions()


class TrainOptions(Section):
    """The training run."""

    epoch: int = option(5, "number of epochs", ge=1)
    print_freq: int = option(25, "steps between logged scalars", ge=1)
    valid_freq: int = option(100, "steps between validations, in addition to the end of each epoch", ge=1)
    checkpoint_every: Interval = option(
        "15 min", "steps (500) or minutes (15 min) between checkpoints, in addition to each validation"
    )
    skip_nonfinite: bool = option(False, "skip and count steps with a non-finite loss instead of stopping")
    grad_norm: Number = option(10.0, "clips the gradient norm of the head and the projection", gt=0)
    precision: Literal["auto", "fp16", "bf16", "fp32"] = option("auto", "auto: fp16 on CUDA, fp32 elsewhere")
    compile: bool = option(False, "torch.compile backbone and head; eager if that fails")
    deterministic: bool = option(False, "CUDA: deterministic operations only, which are slower")
    seed: int = option(0, "random seed", ge=0, le=2**32 - 1)
    frozen: bool = option(False, "baseline: the head is never updated (`--frozen`)")
    compare_frozen: bool = option(False, "also run that baseline and compare the two")

    @property
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """`checkpoint_every` as (steps, seconds); at most one of them is not None."""
        every = self.checkpoint_every
        if every is None:
            return None, None
        number = every.split("m")[0]
        return (int(number), None) if number == every else (None, 60 * float(number))


class TrainerOptions(Section):
    """Devices and machines."""

    devices: int = option(1, "devices per machine, one process each (CPU: a share of its cores)", ge=1)
    num_nodes: int = option(1, "number of machines", ge=1)
    strategy: Literal["auto", "ddp"] = option("auto", "auto: ddp if there are several devices")

    @property
    def world_size(self) -> int:
        """Number of processes, one for each device of each machine."""
        return self.devices * self.num_nodes


class EvalOptions(Section):
    """The final evaluation."""

    is_crf: bool = option(True, "also evaluate after CRF refinement")
    is_direct: bool = option(False, "use the code itself as cluster logits")
    extra_clusters: int = option(0, "must equal model.extra_clusters", ge=0)
    last_step: bool = option(False, "after training, also evaluate the last step's weights, in `last`")
    batch_size: int = option(16, "images per batch, on each device", ge=1)
    crf_backend: Literal["auto", "pydensecrf", "torch"] = option(
        "auto", "pydensecrf: CPU processes; torch: the network's device; auto: pydensecrf if installed"
    )
    crf_workers: int | None = option(None, "pydensecrf: processes per device; null: all cores", ge=1)
    pictures: int = option(8, "number of validation images in predictions.png; 0: no picture", ge=0, le=64)


class Options(Section):
    """All options of a run."""

    gpu_ids: list[int] = option([0], "CUDA devices; [0]: the first `trainer.devices`")
    output_dir: Text = option("./output/", "folder that holds the runs' folders")
    checkpoint: Text = option("", "checkpoint file, folder or name of a run (`--checkpoint`)")
    resume: Literal["auto", None] = option(None, "auto: continue from the last checkpoint (`--resume`)")
    wandb: WandbOptions = WandbOptions()
    dataset: DatasetOptions = DatasetOptions()
    dataloader: DataloaderOptions = DataloaderOptions()
    training_coeff: CoefficientOptions = CoefficientOptions()
    model: ModelOptions = ModelOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    train: TrainOptions = TrainOptions()
    trainer: TrainerOptions = TrainerOptions()
    eval: EvalOptions = EvalOptions()

    @model_validator(mode="after")
    def _is_consistent(self, info: ValidationInfo) -> Options:
        if info.context is not FIELDS_ONLY and (mistakes := contradictions(self)):
            raise ValueError("; ".join(mistakes))
        return self


def contradictions(options: Options, failed: Collection[str] = ()) -> list[str]:
    """Cross-field validation.

    Args:
        options: values that are valid one by one.
        failed: keys that are wrong already; rules about one of them are skipped.

    Returns:
        One line for each broken rule that is not a consequence of an earlier one.
    """
    wrong, mistakes = set(failed), []

    def require(holds: bool, key: str, allowed: str, *others: str) -> None:
        """Reports a key unless the rule holds or a key that it depends on is wrong."""
        if not holds and wrong.isdisjoint((key, *others)):
            wrong.add(key)
            mistakes.append(f"{key} is {json.dumps(attrgetter(key)(options))}, must be {allowed}")

    _check_backbone(options, require)
    _check_run(options, require)
    return mistakes


def _check_backbone(options: Options, require: Callable[..., None]) -> None:
    model, backbone, data = options.model, options.model.pretrained, options.dataset
    arch, patch, heads = model.arch, backbone.dino_patch_size, backbone.heads
    given = f"with model.arch {arch}"
    patch_key, depth_key = "model.pretrained.dino_patch_size", "model.pretrained.depth"
    if arch in PATCHES:  # an official backbone
        width, full = WIDTH_AND_HEADS[backbone.model_type][0], FULL_DEPTH[arch]
        patches = " or ".join(map(str, PATCHES[arch]))
        require(patch in PATCHES[arch], patch_key, f"{patches} {given}", "model.arch")
        require((backbone.depth or 0) <= full, depth_key, f"at most {full} {given}", "model.arch")
        if model.continuous:
            of_width = f"{width}, the width of {backbone.model_type}"
            require(model.dim == width, "model.dim", of_width, "model.arch", "model.pretrained.model_type")
    if arch != "dinov2":
        require(not backbone.registers, "model.pretrained.registers", f"false {given}", "model.arch")
    of_patch = f"a multiple of the patch ({patch})"
    if arch == "vit":
        of_heads = f"a multiple of model.pretrained.heads ({heads})"
        require(model.dim % heads == 0, "model.dim", of_heads, "model.pretrained.heads")
        native_res = backbone.native_res or patch
        require(native_res % patch == 0, "model.pretrained.native_res", of_patch, patch_key)
    for key, res in (("dataset.res", data.res), ("dataset.val_res", data.val_res)):
        require(res % patch == 0, key, f"{of_patch}: {_nearest(res, patch)}", patch_key)


def _check_run(options: Options, require: Callable[..., None]) -> None:
    data, extra = options.dataset, options.model.extra_clusters
    same = f"equal to model.extra_clusters ({extra})"
    require(options.eval.extra_clusters == extra, "eval.extra_clusters", same, "model.extra_clusters")
    if data.loader_crop_type == "random":
        why = "null with dataset.loader_crop_type random, which changes the images each epoch"
        require(data.cache_features is None, "dataset.cache_features", why)
    batch, processes = options.dataloader.batch_size, options.trainer.world_size
    multiple = (
        f"a multiple of trainer.devices x trainer.num_nodes ({processes}): {_nearest(batch, processes)}"
    )
    require(batch % processes == 0, "dataloader.batch_size", multiple, "trainer.devices", "trainer.num_nodes")


def _nearest(value: int, step: int) -> str:
    """The multiples of `step` around a value."""
    low = value // step * step
    return f"{low} or {low + step}" if low else str(step)
