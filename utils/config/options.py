"""Every option, its type, default, allowed values and meaning; the README's table is tested against this.

The key names are those of the published option files. Defaults are the paper's COCO-Stuff ViT-S/8 values,
so that an option file holds only what differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

INFINITY = float("inf")

# The official backbones, which the checks of the options and the builder of the network both need.
WIDTH_AND_HEADS = {"vit_small": (384, 6), "vit_base": (768, 12)}
PATCHES = {"dino": (8, 16), "dinov2": (14,)}
FULL_DEPTH = {"dino": 12, "dinov2": 12, "vit": 4}

# What the registries hold, by name; registering one of your own adds to these.
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
WITHOUT_FOLDER = {"synthetic"}  # data sets that read no file
ARCHS = ["dino", "dinov2", "vit"]
LOSSES = ["ppap"]

# Keys of the published option files that nothing reads, at the one value they may have.
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


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field that carries its meaning and its allowed values.

    Args:
        default: the default value; a list is copied.
        help: one line for the README and for error messages.
        choices: the only values allowed.
        least: smallest value allowed.
        above: bound that the value must exceed.
        most: largest value allowed.
    """
    metadata = {"help": help, "choices": choices, "least": least, "above": above, "most": most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class WandbOptions:
    """Where a run reports to."""

    project: str = option("PPAP", "wandb project")
    entity: str | None = option(None, "wandb user or team; null is your default one")
    name: str = option("ppap", "name of the run, and of its folder below `output_dir`")
    mode: str = option("online", "`--debug` sets disabled", choices=("online", "offline", "disabled"))
    tags: list[str] | None = option(None, "words to find the run by")
    notes: str | None = option(None, "what the run is about")
    id: str | None = option(None, "online: the wandb run to go on with; null starts one")
    artifact: bool = option(False, "upload best.ckpt as an artifact")


@dataclass
class DatasetOptions:
    """What is trained on."""

    data_type: str = option(
        "cocostuff27",
        "data set",
        choices=DATA_TYPES,
    )
    data_path: str = option("", "folder of the data set (`--data_path`)")
    loader_crop_type: str | None = option(
        "center", "train crop; null squashes the image to a square", choices=("center", "random", None)
    )
    crop_type: str | None = option(
        "five", "train on five crops of each image; null takes whole images", choices=("five", "random", None)
    )
    crop_ratio: float = option(0.5, "size of such a crop, as a share of each side", above=0, most=1)
    res: int = option(224, "train resolution in pixels, a multiple of the patch", least=1)
    val_res: int = option(320, "evaluation resolution in pixels, a multiple of the patch", least=1)
    interpolation: str = option(
        "nearest",
        "how images are resized (labels: always nearest)",
        choices=("nearest", "bilinear", "bicubic"),
    )
    n_classes: int | None = option(
        None, "directory: number of classes; null: as classes.json says", least=2, most=255
    )
    class_names: list[str] | None = option(None, "directory: class names; null: as classes.json says")
    check_files: bool = option(
        False, "read every file before the run, and stop there if one is damaged (`--check`)"
    )
    skip_damaged: bool = option(
        False, "read every file before the run, and leave out those that are damaged or missing"
    )
    cache_features: str | None = option(
        None,
        "compute the backbone's tokens once: in memory, or in files below `<output_dir>/tokens`",
        choices=("ram", "disk", None),
    )
    train_images: int = option(512, "synthetic: number of train scenes", least=1)
    val_images: int = option(64, "synthetic: number of validation scenes", least=1)


@dataclass
class DataloaderOptions:
    """How it is read."""

    batch_size: int = option(64, "images per training step, on all devices together", least=1)
    val_batch_size: int = option(8, "images per validation batch while training, on each device", least=1)
    num_workers: int = option(
        8, "processes that decode images for a device; no result depends on it", least=0
    )


@dataclass
class CoefficientOptions:
    """The coefficients of the PPAP loss."""

    initialcrit_pos: float = option(0.55, "Phi_0, the tight initial boundary", least=-INFINITY)
    initialcrit_amb: float = option(0.2, "Psi_0, lower edge of the ambiguous zone at first", least=-INFINITY)
    prop_iter: int = option(2, "T, relocations of the proxy anchor", least=0)
    sigma_pos: float = option(3.0, "how little Phi moves; inf holds it", above=0)
    sigma_amb: float = option(3.0, "how little Psi moves; inf holds it", above=0)
    trainpatchsplit: int = option(16, "a group of s patches gives s // trainpatchsplit anchors", least=1)
    tau: float = option(0.8, "temperature", above=0, most=1e6)
    loss: str = option("ppap", "loss of the projections", choices=LOSSES)
    group_size: int = option(784, "consecutive patches that share a draw of anchors", least=1)
    chunk_size: int | None = option(
        None, "torch: anchors held against the patches at a time; null chooses", least=1
    )
    similarity_dtype: str = option(
        "float32", "operands of the thresholded products", choices=("float32", "float16")
    )
    backend: str = option(
        "torch", "what computes the loss; triton: kernels for CUDA", choices=("torch", "triton")
    )


@dataclass
class PretrainedOptions:
    """The frozen backbone."""

    model_type: str = option("vit_small", "size of dino, dinov2", choices=("vit_small", "vit_base"))
    dino_patch_size: int = option(8, "patch in pixels: dino 8 or 16, dinov2 14", least=1)
    registers: bool = option(False, "dinov2: the variant with register tokens")
    depth: int | None = option(None, "keep the first `depth` blocks; null keeps all (vit: 4)", least=2)
    heads: int = option(3, "vit: attention heads", least=1)
    native_res: int | None = option(None, "vit: pixels of the position embedding; null is res", least=1)
    pretrained_weights: str | None = option(None, "local weights file instead of the official address")


@dataclass
class ModelOptions:
    """The network."""

    arch: str = option("dino", "backbone family; vit is built by dimensions, untrained", choices=ARCHS)
    continuous: bool = option(True, "false: the code has one channel per class instead of `dim`")
    dim: int = option(384, "D, channels of the code; the backbone's width", least=1)
    extra_clusters: int = option(0, "centroids beyond the number of classes", least=0)
    criterion_dropout: float = option(0.1, "channel dropout of the criterion features", least=0, most=0.99)
    pretrained: PretrainedOptions = field(default_factory=PretrainedOptions)


@dataclass
class NetOptimizerOptions:
    """Optimizer of head and projection."""

    name: str = option("adamw", "adam ignores the decay", choices=("adam", "adamw"))
    lr: float = option(1e-3, "learning rate, constant", least=0, most=1e6)
    weight_decay: float = option(0.0, "decoupled decay, on biases and norms too", least=0, most=1e6)


@dataclass
class LinearOptimizerOptions:
    """Optimizer of the linear probe."""

    name: str = option("adam", "adam ignores the decay", choices=("adam", "adamw"))
    lr: float = option(1e-3, "learning rate of the linear probe", least=0, most=1e6)
    weight_decay: float = option(0.0, "its decay, with adamw", least=0, most=1e6)


@dataclass
class ClusterOptimizerOptions:
    """Optimizer of the cluster probe."""

    name: str = option("adam", "adam ignores the decay", choices=("adam", "adamw"))
    lr: float = option(5e-3, "learning rate of the cluster probe", least=0, most=1e6)
    weight_decay: float = option(0.0, "its decay, with adamw", least=0, most=1e6)


@dataclass
class OptimizerOptions:
    """One AdamW with three parameter groups."""

    net: NetOptimizerOptions = field(default_factory=NetOptimizerOptions)
    linear: LinearOptimizerOptions = field(default_factory=LinearOptimizerOptions)
    cluster: ClusterOptimizerOptions = field(default_factory=ClusterOptimizerOptions)


@dataclass
class TrainOptions:
    """The training run."""

    epoch: int = option(5, "epochs", least=1)
    print_freq: int = option(25, "steps between logged scalars", least=1)
    valid_freq: int = option(100, "steps between validations, besides each epoch's end", least=1)
    checkpoint_every: str | None = option(
        "15 min", "steps (500) or minutes (15 min) between checkpoints, besides each validation's"
    )
    skip_nonfinite: bool = option(
        False, "leave out a step whose loss is not finite, and count it, instead of stopping"
    )
    grad_norm: float = option(10.0, "gradient norm at which head and projection are clipped", above=0)
    precision: str = option(
        "auto", "auto: fp16 on CUDA, fp32 elsewhere", choices=("auto", "fp16", "bf16", "fp32")
    )
    compile: bool = option(False, "torch.compile backbone and head; where that fails they run as they are")
    deterministic: bool = option(False, "on CUDA: only operations that give the same bits each time; slower")
    seed: int = option(0, "seed of everything random", least=0, most=2**32 - 1)
    frozen: bool = option(False, "baseline: the head is never updated (`--frozen`)")
    compare_frozen: bool = option(False, "also run that baseline and show both side by side")


@dataclass
class TrainerOptions:
    """What a run is spread over."""

    devices: int = option(
        1, "processes of a machine, each with a device (CPU: some cores) of its own", least=1
    )
    num_nodes: int = option(1, "machines", least=1)
    strategy: str = option(
        "auto", "how they work together; auto: ddp where there are several", choices=("auto", "ddp")
    )


@dataclass
class EvalOptions:
    """The final evaluation."""

    is_crf: bool = option(True, "also evaluate after CRF refinement")
    is_direct: bool = option(False, "take the code itself as cluster logits")
    extra_clusters: int = option(0, "must equal model.extra_clusters", least=0)
    last_step: bool = option(False, "after training, also evaluate the last step's weights, in `last`")
    batch_size: int = option(16, "images per batch, on each device", least=1)
    crf_backend: str = option(
        "pydensecrf",
        "what refines: processes, or torch on the device of the network",
        choices=("pydensecrf", "torch"),
    )
    crf_workers: int | None = option(
        None, "pydensecrf: CRF processes for a device; null: one per core in all", least=1
    )
    pictures: int = option(8, "validation images in predictions.png; 0 draws none", least=0, most=64)


@dataclass
class Options:
    """All options of a run."""

    gpu_ids: list[int] = option(
        [0], "the CUDA devices of a machine; [0] is the first `trainer.devices`; ignored elsewhere"
    )
    output_dir: str = option("./output/", "folder that holds the folders of the runs")
    checkpoint: str = option("", "file, folder or run to load (`--checkpoint`)")
    resume: str | None = option(
        None, "auto: go on where an earlier start of this run stopped (`--resume`)", choices=("auto",)
    )
    wandb: WandbOptions = field(default_factory=WandbOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    dataloader: DataloaderOptions = field(default_factory=DataloaderOptions)
    training_coeff: CoefficientOptions = field(default_factory=CoefficientOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
