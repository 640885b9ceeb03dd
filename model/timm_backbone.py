"""Plain and rotary ViTs of timm as backbones, such as DINOv3 and EVA."""

from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model.backbone import Backbone
from utils.errors import UserError, closest, first_line
from utils.vision.transforms import MEAN, STD

MODULES = ["vision_transformer", "deit", "eva"]  # those of timm whose models are plain or rotary ViTs


class TimmViT(Backbone):
    """A ViT of timm, or its first `depth` blocks and its final norm.

    The final norm of a model that pools patches before it normalises, such as EVA, is `fc_norm`, here applied
    to each patch. Images get the mean and standard deviation that the model was trained with.
    """

    def __init__(self, name: str, depth: int | None = None) -> None:
        super().__init__()
        known = timm.list_models(module=MODULES) + timm.list_models(module=MODULES, include_tags=True)
        if name not in known:
            wanted = f"a plain or rotary ViT of timm ({', '.join(MODULES)})"
            raise UserError(f"model.name is {name}, must be {wanted}.{closest(name, known)}")
        self.vit = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        blocks = len(self.vit.blocks)
        if depth and depth > blocks:
            raise UserError(f"model.pretrained.depth is {depth}, must be at most {blocks} with {name}")
        self.vit.prune_intermediate_layers([(depth or blocks) - 1], prune_head=False)
        patch, depth = self.vit.feature_info[-1]["reduction"], len(self.vit.blocks)
        self.spec = SimpleNamespace(name=name, dim=self.vit.embed_dim, depth=depth, patch=patch)
        self.prefix = self.vit.num_prefix_tokens
        mean, std = (torch.tensor(self.vit.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        ours = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]  # (3, 1, 1) each
        self.register_buffer("scale", ours[1] / std, persistent=False)
        self.register_buffer("shift", (ours[0] - mean) / std, persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def blocks(self) -> nn.Module:
        """The blocks that are kept."""
        return self.vit.blocks

    @property
    def norm(self) -> nn.Module:
        """The final norm; some models have none."""
        return self.vit.fc_norm if isinstance(self.vit.norm, nn.Identity) else self.vit.norm

    def tokens(self, image: Tensor) -> Tensor:
        """See `Backbone`."""
        (found,) = self.vit.forward_intermediates(
            image * self.scale + self.shift,
            indices=[self.spec.depth - 2],
            return_prefix_tokens=self.prefix > 0,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat(found[::-1], dim=1) if self.prefix else found  # (B, T, D)

    def apply_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Backbone`; with the rotary position embedding of the grid."""
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return block(tokens)
        embedding = rope.get_embed(shape=grid)  # (h*w, R), of mixed type one for each block
        return block(tokens, rope=embedding[self.spec.depth - 1] if self.vit.rope_mixed else embedding)

    @torch.no_grad()
    def attention_logits(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Backbone`; a block with parallel attentions has none."""
        with torch.autocast(tokens.device.type, enabled=False), _Attention() as attention:
            self.apply_block(self.blocks[-1], tokens.float(), grid)
        ((queries, keys),) = attention.seen  # (B, heads, T, D / heads) each
        return (queries @ keys.transpose(2, 3)).mean(dim=1) * queries.shape[-1] ** -0.5

    def converted(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """timm's conversion of the state dict in a file, whose names may be those of the original code."""
        convert = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
        if isinstance(self.vit, eva.Eva):
            convert = eva.checkpoint_filter_fn
        try:
            with redirect_stdout(None):  # timm prints each bias of DINOv3's file that its model does not have
                return convert(state, self.vit)
        except Exception as error:  # of resampling and renaming, which have no common base
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{source} does not fit model.name {self.spec.name} ({reason})") from None

    def official_state(self) -> dict[str, Tensor]:
        """The weights that timm downloads or has in its cache."""
        try:
            return timm.create_model(self.spec.name, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # those of timm, the hub and the network have no common base
            raise UserError(
                f"model.name is {self.spec.name}: timm cannot load its weights ({first_line(error)}); "
                "set model.pretrained.pretrained_weights to a local file"
            ) from None


class _Attention(TorchFunctionMode):
    """Records queries and keys, after norms and rotation, of all attention computed in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.seen.append(args[:2])
        return function(*args, **(kwargs or {}))
