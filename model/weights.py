"""Builds the backbone that the options describe and loads its weights, from a file or a published address."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.backbone import Backbone, BackboneSpec, FrozenViT
from model.timm_backbone import TimmViT
from utils.config.options import ARCHS, FULL_DEPTH, WIDTH_AND_HEADS, Options, register_name
from utils.download import DownloadError, download
from utils.errors import UserError
from utils.files import exclusive, sha256_of, weights_file
from utils.training.torch_files import read_torch_file

NATIVE_RES = {"dino": 224, "dinov2": 518}  # pixels
WRAPPERS = ("teacher", "target_encoder", "model", "state_dict")  # of files that hold more
PREFIXES = r"^(module\.|backbone\.)+"  # of parameters' names
DROPPED = ("head.", "fc.fc", "fc.bn", "mask_token", "dino_head.", "ibot_head.", "decoder_")  # heads
# endings of their names; other entries, such as buffers of your own backbone, may have any dtype
PARAMETERS = ("weight", "bias", "gamma", "clusters", "cls_token", "pos_embed", "register_tokens")
PARAMETERS += ("gamma_1", "gamma_2", "reg_token")  # timm's
DINO = "https://dl.fbaipublicfiles.com/dino"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
BACKBONES = {  # the paper uses the 300-epoch S/8 file, which is not torch.hub's dino_vits8
    "dino vit_small/8": f"{DINO}/dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth",
    "dino vit_small/16": f"{DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino vit_base/8": f"{DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dino vit_base/16": f"{DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dinov2 vit_small/14": f"{DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2 vit_small/14 registers": f"{DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dinov2 vit_base/14": f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2 vit_base/14 registers": f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
}
SHA256 = {  # as checked by public projects, such as finegrain's refiners; none is published for DINO
    "dinov2_vits14_pretrain.pth": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vits14_reg4_pretrain.pth": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "dinov2_vitb14_pretrain.pth": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitb14_reg4_pretrain.pth": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
}
_builders: dict[str, Callable[[Options], Backbone]] = {
    "timm": lambda options: TimmViT(options.model.name, options.model.pretrained.depth)
}


def register_backbone(name: str, build: Callable[[Options], Backbone]) -> None:
    """Makes your own backbone available as `model.arch=<name>`.

    Args:
        name: must not be built in; registering a name again replaces it.
        build: takes all options, returns a `FrozenViT` or another `Backbone`; if
            `model.pretrained.pretrained_weights` is set, they are loaded into it afterwards.
    """
    register_name(ARCHS, name)
    _builders[name] = build


def build_backbone(options: Options) -> Backbone:
    """The backbone that `model.*` describes, without its weights."""
    build = _builders.get(options.model.arch)
    backbone = build(options) if build else FrozenViT(backbone_spec(options))
    patch, sizes = backbone.spec.patch, {"res": options.dataset.res, "val_res": options.dataset.val_res}
    wanted = f"must be a multiple of {patch}, the patch size of model.arch {options.model.arch}"
    if wrong := [f"dataset.{key} is {size}, {wanted}" for key, size in sizes.items() if size % patch]:
        raise UserError(wrong)
    return backbone


def backbone_spec(options: Options) -> BackboneSpec:
    """The dimensions of the backbone that `model.*` describes."""
    arch, chosen = options.model.arch, options.model.pretrained
    depth = chosen.depth or FULL_DEPTH[arch]
    if arch == "vit":
        native = chosen.native_res or options.dataset.res
        width = chosen.dim or options.model.dim
        return BackboneSpec(width, depth, chosen.heads, chosen.dino_patch_size, native)
    dim, heads = WIDTH_AND_HEADS[chosen.model_type]
    registers = " registers" if chosen.registers else ""
    return BackboneSpec(
        dim=dim,
        depth=depth,
        heads=heads,
        patch=chosen.dino_patch_size,
        native_res=NATIVE_RES[arch],
        registers=4 if chosen.registers else 0,
        layer_scale=arch == "dinov2",
        published=f"{arch} {chosen.model_type}/{chosen.dino_patch_size}{registers}",
    )


def load_backbone(backbone: Backbone, weights: str | None) -> str:
    """Loads a weights file, or the published weights if `weights` is None; returns what was loaded."""
    depth, published = backbone.spec.depth, getattr(backbone.spec, "published", None)
    if weights or published:
        path = weights_file(weights) if weights else published_file(published)
        state, source = read_state(path), str(path)
    elif isinstance(backbone, TimmViT):
        state, source = backbone.official_state(), f"timm's weights of {backbone.spec.name}"
    else:
        return "random weights (the backbone is untrained)"
    found = _size(state)
    if isinstance(backbone, TimmViT):
        stripped = {re.sub(PREFIXES, "", name): value for name, value in state.items()}
        state, backbone = backbone.converted(stripped, source), backbone.vit
    if state.keys() != backbone.state_dict().keys():
        state = clean_state(state, depth)
        blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        if 0 < blocks < depth:
            allowed = f"at most {blocks}, the number of blocks in {source}"
            raise UserError(f"model.pretrained.depth is {depth}, must be {allowed}")
    load_strictly(backbone, state, source, found=found)
    return source


def published_file(name: str) -> Path:
    """torch.hub's cached file of a published backbone, downloaded if necessary and checked by SHA-256."""
    path = hub_file(name)
    url, sha256 = BACKBONES[name], SHA256.get(path.name)
    if path.is_file():  # without a lock, as the cache may be read-only
        if sha256 not in (None, sha256_of(path)):
            raise UserError(f"{path}: its SHA-256 is not {sha256}; delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path):
        if path.is_file():  # another process has finished it
            return path
        print(f"downloading {url}", flush=True)
        try:
            download([url], path, sha256=sha256)
        except DownloadError as error:
            hint = f"save it as {path}, or set model.pretrained.pretrained_weights to a file"
            raise UserError(f"download the file elsewhere and {hint}; {error.mistakes[0]}") from None
    return path


def hub_file(name: str) -> Path:
    """Where torch.hub caches a published backbone."""
    return Path(torch.hub.get_dir(), "checkpoints", BACKBONES[name].rsplit("/", 1)[-1])


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth or .safetensors file: bare, or under one of `WRAPPERS`."""
    state = read_torch_file(path)
    for key in WRAPPERS:
        state = state.get(key, state) if isinstance(state, dict) else state
    return checked_state(state, f"{path}: the state dict, bare or under {', '.join(WRAPPERS)}")


def checked_state(state: Any, source: str) -> dict[str, Tensor]:
    """A state dict as read; a UserError names the first entry that cannot be a parameter."""
    if not isinstance(state, dict):
        raise UserError(f"{source} is of type {type(state).__name__}, must be a dict of tensors")
    for name, value in state.items():
        valid = isinstance(name, str) and isinstance(value, Tensor)
        if valid and name.endswith(PARAMETERS):
            valid = value.layout == torch.strided and value.is_floating_point()
            valid = valid and bool(value.float().isfinite().all())
        if not valid:
            raise UserError(f"{source}: {name} must be a dense tensor of numbers, without NaN and infinity")
    return state


def clean_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Renames published parameters to ours; drops prefixes, heads and blocks beyond `depth`."""
    clean = {}
    for name, value in state.items():
        name = re.sub(PREFIXES, "", name)
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # DINOv2's training keeps chunks
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith(DROPPED) or (block and int(block[1]) >= depth):
            continue
        clean[name] = value
    return clean


def load_strictly(
    module: torch.nn.Module, state: dict[str, Tensor], source: str, *, found: str | None = None
) -> None:
    """Loads a state dict; a UserError lists differences and both sizes; `found` replaces that of `state`."""
    wanted, differing = module.state_dict(), []
    for name in sorted(state.keys() | wanted.keys()):
        given, must = (list(each[name].shape) if name in each else "missing" for each in (state, wanted))
        differing += [f"{name} is {given}, must be {must}"] if given != must else []
    if differing:
        more = [f"and {len(differing) - 3} more"] if len(differing) > 3 else []
        sides = f"{source} ({found or _size(state)}) does not fit the options ({_size(wanted)})"
        hint = "compare model.* and the data set with those that the file was made for"
        raise UserError(f"{sides}; {hint}: " + "; ".join([*differing[:3], *more]))
    module.load_state_dict(state)


def _size(state: dict[str, Tensor]) -> str:
    """Width and number of blocks of the backbone in a state dict."""
    places = ("cls_token", "pos_embed")
    widths = [value.shape[-1] for name, value in state.items() if name.endswith(places) and value.ndim]
    blocks = {found[0] for name in state if (found := re.search(r"\bblocks\.([\d.]+)", name))}
    return f"width {widths[0] if widths else 'unknown'}, {len(blocks)} blocks"
