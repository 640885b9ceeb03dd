"""All options of a run and their cross-field rules.

The keys are those of the published option files, the defaults the paper's values for COCO-Stuff with ViT-S/8.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, Literal

from annotated_types import Predicate
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)  # fmt: skip
from pydantic_core import PydanticCustomError

from utils.files import TOKENS_FOLDER

FROZEN = "-frozen"  # suffix of the baseline's name

# Official backbones: width and heads by size, patch sizes and number of blocks by family.
WIDTH_AND_HEADS = {"vit_small": (384, 6), "vit_base": (768, 12)}
PATCHES = {"dino": [8, 16], "dinov2": [14]}
FULL_DEPTH = {"dino": 12, "dinov2": 12, "vit": 4}

# Registered names; `register_data_set`, `register_backbone`, `register_loss` and `register_method` extend
# these lists.
COCOSTUFF = ("cocostuff27", "cocostuff15", "cocostuff3")
DATA_TYPES = [*COCOSTUFF, "cityscapes", "potsdam", "potsdamraw", "directory", "synthetic"]
WITHOUT_FOLDER = {"synthetic"}  # data sets that read no files
ARCHS = ["dino", "dinov2", "vit", "timm"]
LOSSES = ["ppap"]
METHODS = ["ppap", "stego", "hp", "frozen"]
OF_BLOCK = ("ppap", "frozen")  # methods whose head is a block of the backbone, so that model.dim is its width

BUILT_IN = {*DATA_TYPES, *ARCHS, *LOSSES, *METHODS}


def register_name(names: list[str], name: str) -> None:
    """Adds a name to one of these lists, unless it is there; a ValueError if it is built in."""
    if name in BUILT_IN:
        raise ValueError(f"{name} is built in; choose another name")
    if name not in names:
        names.append(name)


# Keys of the published option files that have no effect, with the only value they may have.
LEGACY = {
    "dataset": {"num_neighbors": 7},
    "model": {"spatial_size": 28, "bn_momentum": None, "bn_eps": None},
    "model.pretrained": {"name": "dino", "projection_type": "nonlinear", "dropout": True},
    "model.pretrained.dino_feat_type": "feat",
    "train": {"freeze_encoder_bn": False, "freeze_all_bn": -1, "num_accum": 1},
    "eval": {"n_images": 5, "is_visualize": False, "is_diff": False},
}
# Removed keys and their replacements; stored options may still contain them.
REMOVED_KEYS = {"training_coeff.backend": "the loss is always computed by torch"}


def _is_folder_name(name: str) -> bool:
    short = len(name.removesuffix(FROZEN).encode()) <= 200  # bytes; a file system allows 255
    return short and name not in ("", ".", "..", TOKENS_FOLDER) and not set(name) & set("/\\\0")


def _is_project(name: str) -> bool:
    return len(name) <= 128 and not set(name) & set("/\\#?%:")  # wandb's own rule


def _is_interval(every: str | None) -> bool:
    return every is None or bool(re.fullmatch(r"(?=.*[1-9])\d+((\.\d+)? *(m|min|minutes?))?", every))


# Types with further checks; the last item describes or lists what is allowed.
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]
PathName = Annotated[Text, AfterValidator(os.path.expanduser)]
Number = Annotated[
    float,
    BeforeValidator(lambda value: float(value) if value in ("inf", "-inf") else value),
    PlainSerializer(lambda value: str(value) if math.isinf(value) else value, when_used="json"),
]
FolderName = Annotated[Text, Predicate(_is_folder_name), 'a folder name of at most 200 bytes, not "tokens"']
Project = Annotated[Text, Predicate(_is_project), "a name of at most 128 characters without /\\#?%:"]
Interval = Annotated[Text | None, Predicate(_is_interval), 'steps (500), minutes ("15 min") or null']
Arch = Annotated[Text, Predicate(ARCHS.__contains__), ARCHS]
DataType = Annotated[Text, Predicate(DATA_TYPES.__contains__), DATA_TYPES]
ModelName = Annotated[
    Text | None, AfterValidator(lambda name: None if name == "STEGO" else name)  # in published option files
]
Loss = Annotated[Text, Predicate(LOSSES.__contains__), LOSSES]
Own = Annotated[dict[str, JsonValue], "any keys of your own, such as own.gamma=3"]
MethodName = Annotated[Text, Predicate(METHODS.__contains__), METHODS]


def option(default: Any, description: str, **bounds: float) -> Any:
    """A field with a description and the bounds `ge`, `gt` and `le`."""
    return Field(default, description=description, **bounds)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class WandbOptions(_Section):
    """Run name and logging to wandb."""

    project: Project = option("PPAP", "wandb project")
    entity: Text | None = option(None, "wandb user or team; null: your default entity")
    name: FolderName = option("ppap", "name of the run and of its folder in `output_dir`")
    mode: Literal["online", "offline", "disabled"] = option("online", "wandb mode; `--debug` sets disabled")
    tags: list[str] | None = option(None, "wandb tags")
    notes: Text | None = option(None, "wandb notes")
    id: Text | None = option(None, "online: id of the wandb run to resume; null: a new run")
    artifact: bool = option(False, "upload best.ckpt as an artifact")


class DatasetOptions(_Section):
    """Training and validation data."""

    data_type: DataType = option("cocostuff27", "data set")
    data_path: PathName = option("", "folder of the data set (`--data_path`)")
    loader_crop_type: Literal["center", "random", None] = option("center", "crop to a square; null: resize")
    crop_type: Literal["five", "random", None] = option("five", "crops to train on; null: whole images")
    crop_ratio: Number = option(0.5, "side of each crop relative to the image's", gt=0, le=1)
    res: int = option(224, "training resolution in pixels, a multiple of the patch", ge=1)
    val_res: int = option(320, "evaluation resolution in pixels, a multiple of the patch", ge=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = option("nearest", "of images; labels: nearest")
    n_classes: int | None = option(None, "directory: class count; null: from classes.json", ge=2, le=255)
    class_names: list[str] | None = option(None, "directory: class names; null: from classes.json")
    check_files: bool = option(False, "read all files before the run; stop if any is damaged (`--check`)")
    skip_damaged: bool = option(False, "read all files before the run; skip damaged and missing ones")
    cache_features: Literal["ram", "disk", None] = option(None, "compute the backbone's tokens only once")
    train_images: int = option(512, "synthetic: number of training images", ge=1)
    val_images: int = option(64, "synthetic: number of validation images", ge=1)


class _Dataloader(_Section):
    batch_size: int = option(64, "images per training step, summed over all devices", ge=1)
    val_batch_size: int | None = option(
        None, "images per device and batch in validations during training; null: 8, or 32 on CUDA", ge=1
    )
    num_workers: int = option(8, "data loading processes per device; does not change results", ge=0)


class _Coefficients(_Section):
    initialcrit_pos: Number = option(0.55, "Phi_0, initial positive boundary")
    initialcrit_amb: Number = option(0.2, "Psi_0, initial lower boundary of the ambiguous zone")
    prop_iter: int = option(2, "T, number of propagation steps", ge=0)
    sigma_pos: Number = option(3.0, "damping of the Phi update; inf keeps Phi fixed", gt=0)
    sigma_amb: Number = option(3.0, "damping of the Psi update; inf keeps Psi fixed", gt=0)
    trainpatchsplit: int = option(16, "patches per anchor; a group has at least one anchor", ge=1)
    tau: Number = option(0.8, "temperature", gt=0, le=1e6)
    loss: Loss = option("ppap", "loss")
    group_size: int = option(784, "consecutive patches per group, which has its own anchors", ge=1)
    chunk_size: int | None = option(None, "anchors at a time, at least a group's; null: automatic", ge=1)
    similarity_dtype: Literal["float32", "float16"] = option("float32", "dtype of the similarities' operands")
    products: Literal["float32", "split", "float16"] = option(
        "float32", "operands of the loss's products; split: float32 as two float16 parts"
    )


class _Stego(_Section):
    weight_self: Number = option(0.67, "lambda of self pairs; published as pos_intra_weight")
    weight_knn: Number = option(0.25, "lambda of neighbour pairs; published as pos_inter_weight")
    weight_rand: Number = option(0.63, "lambda of random pairs; published as neg_inter_weight")
    shift_self: Number = option(0.08, "b of self pairs; published as pos_intra_shift")
    shift_knn: Number = option(0.02, "b of neighbour pairs; published as pos_inter_shift")
    shift_rand: Number = option(0.66, "b of random pairs; published as neg_inter_shift")
    pointwise: bool = option(True, "centre the correspondences of each point")
    zero_clamp: bool = option(True, "clamp negative correspondences of the code to 0")
    stabilize: bool = option(False, "clamp correspondences of the code to at most 0.8 (stabalize)")
    feature_samples: int = option(11, "S, samples per side: S x S points of each image", ge=1)
    neg_samples: int = option(5, "number of random images for each image", ge=1)
    num_neighbors: int = option(7, "number of nearest neighbours to draw from", ge=1)
    knn_dropout: Number = option(0.0, "channel dropout of neighbours; published: 0.1", ge=0, le=0.99)


class _HP(_Section):
    rho: Number = option(0.02, "probability that a patch is added to the denominators", gt=0, le=1)
    alpha: Number = option(0.05, "weight of the consistency loss; 0: no second colour view", ge=0)
    pool_size: int = option(2048, "M, entries of the reference pools, a multiple of the batch size", ge=1)
    ema_m: Number = option(0.99, "momentum of the EMA of the head", ge=0, le=1)
    warmup: int = option(1000, "steps before task-specific positives are used", ge=0)
    renew_interval: int = option(100, "steps between renewals of the task-specific pool", ge=1)
    reweighting: bool = option(True, "weight anchors by their number of positives")
    published_colour: bool = option(False, "jitter colours after normalisation, then clamp to [0, 1]")


class _Pretrained(_Section):
    model_type: Literal["vit_small", "vit_base"] = option("vit_small", "size of dino and dinov2")
    dino_patch_size: int = option(8, "patch size in pixels: dino 8 or 16, dinov2 14", ge=1)
    registers: bool = option(False, "dinov2: the variant with register tokens")
    depth: int | None = option(None, "use only the first `depth` blocks; null: all (vit: 4)", ge=2)
    dim: int | None = option(None, "vit: width; null: model.dim", ge=1)
    heads: int = option(3, "vit: number of attention heads", ge=1)
    native_res: int | None = option(None, "vit: image size of the position embedding; null: res", ge=1)
    pretrained_weights: PathName | None = option(None, "local weights file; null: the official weights")


class _Model(_Section):
    arch: Arch = option("dino", "backbone family; vit: any size, without official weights; timm: see name")
    name: ModelName = option(None, "timm: name of the model, such as vit_small_patch16_dinov3")
    continuous: bool = option(True, "true: the code has `dim` channels; false: one channel per class")
    dim: int = option(384, "channels of the code: D, the backbone's width; stego and hp: K, any number", ge=1)
    extra_clusters: int = option(0, "clusters beyond the number of classes", ge=0)
    criterion_dropout: Number = option(0.1, "channel dropout of f; stego, hp: of the head too", ge=0, le=0.99)
    pretrained: _Pretrained = _Pretrained()


class _ProbeOptimizer(_Section):
    name: Literal["adam", "adamw"] = option("adam", "optimizer; adam ignores weight_decay")
    lr: Number = option(1e-3, "learning rate, constant", ge=0, le=1e6)
    weight_decay: Number = option(0.0, "decoupled weight decay, also of biases and norms", ge=0, le=1e6)


class _ClusterOptimizer(_ProbeOptimizer):
    lr: Number = option(5e-3, "learning rate, constant", ge=0, le=1e6)


class _NetOptimizer(_ProbeOptimizer):
    name: Literal["adam", "adamw"] = option("adamw", "optimizer; adam ignores weight_decay")


class _Optimizers(_Section):
    net: _NetOptimizer = _NetOptimizer()
    linear: _ProbeOptimizer = _ProbeOptimizer()
    cluster: _ClusterOptimizer = _ClusterOptimizer()


class TrainOptions(_Section):
    """The training run."""

    epoch: int = option(5, "number of epochs", ge=1)
    max_steps: int | None = option(None, "stop after this many steps; null: after the epochs", ge=1)
    print_freq: int = option(25, "steps between logged scalars", ge=1)
    valid_freq: int = option(100, "steps between validations, in addition to the end of each epoch", ge=1)
    checkpoint_every: Interval = option("15 min", "checkpoint interval; each validation also saves one")
    skip_nonfinite: bool = option(False, "skip and count steps with a non-finite loss instead of stopping")
    grad_norm: Number = option(10.0, "maximum gradient norm of the head and PPAP's projection", gt=0)
    precision: Literal["auto", "fp16", "bf16", "fp32"] = option("auto", "auto: fp16 on CUDA, fp32 elsewhere")
    compile: bool = option(False, "apply torch.compile to backbone and head; eager if that fails")
    deterministic: bool = option(False, "CUDA: deterministic operations only, which are slower")
    seed: int = option(0, "random seed", ge=0, le=2**32 - 1)
    frozen: bool = option(False, "the same as `method=frozen` (`--frozen`)")
    compare_frozen: bool = option(False, "also run the frozen baseline and compare the two")

    @property
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """`checkpoint_every` as (steps, seconds); at most one of them is not None."""
        every = self.checkpoint_every
        if every is None:
            return None, None
        number = every.split("m")[0]
        return (int(number), None) if number == every else (None, 60 * float(number))


class TrainerOptions(_Section):
    """Devices and machines."""

    devices: int = option(1, "devices per machine, one process each (CPU: a share of its cores)", ge=1)
    num_nodes: int = option(1, "number of machines", ge=1)
    strategy: Literal["auto", "ddp"] = option("auto", "auto: ddp if there are several devices")

    @property
    def world_size(self) -> int:
        """Number of processes, one for each device of each machine."""
        return self.devices * self.num_nodes


class _Eval(_Section):
    is_crf: bool = option(True, "also evaluate after CRF refinement")
    is_direct: bool = option(False, "use the code itself as cluster logits")
    flip: bool = option(False, "evaluation of a checkpoint: average the code with that of the mirrored image")
    extra_clusters: int = option(0, "must equal model.extra_clusters", ge=0)
    last_step: bool = option(False, "after training, also evaluate the last step; writes to `last/`")
    batch_size: int = option(16, "images per batch, on each device", ge=1)
    crf_backend: Literal["auto", "pydensecrf", "torch"] = option("auto", "auto: pydensecrf if installed")
    crf_workers: int | None = option(None, "pydensecrf: processes per device; null: its cores", ge=1)
    pictures: int = option(8, "number of validation images in predictions.png; 0: no figure", ge=0, le=64)


class Options(_Section):
    """All options of a run."""

    method: MethodName = option("ppap", "training method; frozen: baseline, the head is never updated")
    gpu_ids: list[int] = option([0], "CUDA device indices; [0]: the first `trainer.devices` GPUs")
    output_dir: PathName = option("./output/", "parent folder of all runs")
    checkpoint: PathName = option("", "checkpoint file, folder or name of a run (`--checkpoint`)")
    plugins: list[str] = option([], "your Python files that register data sets, backbones, losses or methods")
    resume: Literal["auto", None] = option(None, "auto: continue from the last checkpoint (`--resume`)")
    resume_on_other_data: bool = option(False, "resume even if the data changed since the run was started")
    wandb: WandbOptions = WandbOptions()
    dataset: DatasetOptions = DatasetOptions()
    dataloader: _Dataloader = _Dataloader()
    training_coeff: _Coefficients = _Coefficients()
    stego: _Stego = _Stego()
    hp: _HP = _HP()
    model: _Model = _Model()
    optimizer: _Optimizers = _Optimizers()
    train: TrainOptions = TrainOptions()
    trainer: TrainerOptions = TrainerOptions()
    eval: _Eval = _Eval()
    own: Own = option({}, "options for your plugins: options.own['gamma']")

    @property
    def trained_by(self) -> str:
        """The method; `train.frozen` is another way to write "frozen"."""
        return "frozen" if self.train.frozen else self.method

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> "Options":
        """Cross-field validation; the context holds the keys that are wrong by themselves."""
        wrong, mistakes = set(info.context or ()), []
        for key, holds, allowed, *others in _rules(self):
            if not holds and wrong.isdisjoint((key, *others)):
                wrong.add(key)
                mistakes.append(f"{key} is {json.dumps(attrgetter(key)(self))}, must be {allowed}")
        if mistakes:
            raise PydanticCustomError("contradictions", "{mistakes}", {"mistakes": mistakes})
        return self


def _rules(options: Options) -> Iterator[tuple[Any, ...]]:
    """Yields a key, whether its rule holds, what is allowed, and the other keys that the rule reads."""
    model, backbone, data = options.model, options.model.pretrained, options.dataset
    arch, size, extra = model.arch, backbone.model_type, model.extra_clusters
    patch_key, given = "model.pretrained.dino_patch_size", f"with model.arch {arch}"
    if arch in PATCHES:  # an official backbone
        patches, width = PATCHES[arch], WIDTH_AND_HEADS[size][0]
        yield patch_key, backbone.dino_patch_size in patches, f"one of {patches} {given}", "model.arch"
        fits = model.dim == width or not model.continuous or options.trained_by not in OF_BLOCK
        others = "model.arch", "model.pretrained.model_type", "method"
        yield "model.dim", fits, f"{width}, the width of {size}", *others
    if arch != "dinov2":
        yield "model.pretrained.registers", not backbone.registers, f"false {given}", "model.arch"
    if arch in (*PATCHES, "vit"):  # for others it is checked when the backbone is built
        patch = backbone.dino_patch_size
        sizes = {"dataset.res": data.res, "dataset.val_res": data.val_res}
        for key, size in (sizes | {"model.pretrained.native_res": backbone.native_res or patch}).items():
            allowed = f"a multiple of {patch_key} ({patch}): {_nearest(size, patch)}"
            yield key, size % patch == 0, allowed, patch_key
    if arch == "vit":
        key, width = ("model.pretrained.dim", backbone.dim) if backbone.dim else ("model.dim", model.dim)
        heads, allowed = "model.pretrained.heads", f"a multiple of model.pretrained.heads ({backbone.heads})"
        hint = "" if backbone.dim else ", or set model.pretrained.dim"
        yield key, width % backbone.heads == 0, allowed + hint, heads
    if arch == "timm":
        yield "model.name", model.name is not None, f"the name of a model {given}", "model.arch"
    else:
        yield "model.name", model.name is None, f"null {given}, or set model.arch timm", "model.arch"
    batch, processes = options.dataloader.batch_size, options.trainer.world_size
    allowed = f"a multiple of trainer.devices x trainer.num_nodes ({processes}): {_nearest(batch, processes)}"
    yield "dataloader.batch_size", batch % processes == 0, allowed
    same = options.eval.extra_clusters == extra
    yield "eval.extra_clusters", same, f"equal to model.extra_clusters ({extra})", "model.extra_clusters"
    loss, rounded = options.training_coeff, "training_coeff.similarity_dtype"
    possible = (loss.products, loss.similarity_dtype) != ("split", "float16")
    yield "training_coeff.products", possible, f"float32 or float16 with {rounded} float16", rounded
    constant = data.cache_features is None or data.loader_crop_type != "random"
    yield "dataset.cache_features", constant, "null with dataset.loader_crop_type random"
    yield from _method_rules(options)


def _nearest(number: int, divisor: int) -> str:
    below = number - number % divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def _method_rules(options: Options) -> Iterator[tuple[Any, ...]]:
    """The rules of `_rules` that concern the method."""
    method, batch = options.trained_by, options.dataloader.batch_size
    own_loss = options.training_coeff.loss == "ppap" or method in OF_BLOCK
    yield "training_coeff.loss", own_loss, f"ppap with method {method}, which has its own loss", "method"
    compares = method in OF_BLOCK or not options.train.compare_frozen
    alone = f"false with method {method}; run method=frozen by itself"
    yield "train.compare_frozen", compares, alone, "method"
    if method == "hp":
        cached = options.dataset.cache_features is not None and options.hp.alpha > 0
        yield "dataset.cache_features", not cached, "null with method hp, unless hp.alpha is 0", "method"
        allowed = f"a multiple of dataloader.batch_size ({batch})"
        yield "hp.pool_size", options.hp.pool_size % batch == 0, allowed, "dataloader.batch_size", "method"
