"""The frozen vision transformer: what every backbone has, and the one of DINO and DINOv2.

timm resamples position embeddings differently from DINO (the features differ by 0.2), so the tokens of
`FrozenViT` are assembled here from timm's blocks.
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BackboneSpec:
    """The dimensions of a ViT."""

    dim: int  # D, width of a token
    depth: int  # number of blocks kept
    heads: int
    patch: int  # pixels of a patch's side
    native_res: int  # pixels of the square that the stored position embedding belongs to
    registers: int = 0  # number of register tokens (4 in DINOv2's variants)
    layer_scale: bool = False  # as in DINOv2
    published: str | None = None  # name of its weights in `model.weights.BACKBONES`


class Backbone(nn.Module):
    """A frozen ViT, always in evaluation mode. A subclass defines `tokens` and, for HP, `attention_logits`.

    Attributes:
        spec: with at least `dim`, `depth` and `patch`, see `BackboneSpec`.
        prefix: number of tokens before the patches.
        blocks, norm: the blocks that are kept, and the final norm.
    """

    spec: Any
    prefix: int

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode."""
        return super().train(False)

    def tokens(self, image: Tensor) -> Tensor:
        """Second-last block's tokens, (B, T, D), of a normalised (B, 3, H, W) image.

        H and W must be multiples of the patch.
        """
        raise NotImplementedError

    def apply_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, T, D) after the last block, or the copy of it that is the head of PPAP."""
        return block(tokens)

    def last_features(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch features of the frozen last block after the final norm, (B, D, h, w)."""
        return self.to_map(self.apply_block(self.blocks[-1], tokens, grid), grid)

    def attention_logits(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The last block's attention before softmax, mean over its heads, (B, T, T) float32."""
        raise NotImplementedError

    def to_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final norm of the patch tokens, (B, T, D) -> (B, D, h, w)."""
        patches = self.norm(tokens[:, -grid[0] * grid[1] :])  # (B, h*w, D)
        return patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)

    def token_shape(self, res: int) -> tuple[int, int]:
        """(T, D) of the tokens of a square image of `res` pixels."""
        return self.prefix + (res // self.spec.patch) ** 2, self.spec.dim

    @torch.inference_mode(False)
    def cast(self, dtype: torch.dtype) -> "Backbone":
        """A copy for autocast to `dtype`, which would otherwise cast the same weights in each step."""
        found = copy.deepcopy(self)
        for module in found.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)
        return found

    def digest(self) -> str:
        """SHA-256 of the weights, independent of their file format."""
        digest = hashlib.sha256(repr(self.spec).encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class FrozenViT(Backbone):
    """A plain ViT; its parameters are named as in DINO's and DINOv2's files."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec, self.prefix = spec, 1 + spec.registers
        vit = VisionTransformer(
            img_size=spec.native_res,
            patch_size=spec.patch,
            embed_dim=spec.dim,
            depth=spec.depth,
            num_heads=spec.heads,
            init_values=1e-5 if spec.layer_scale else None,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed  # (1, 1, D), (1, 1 + h0*w0, D)
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, spec.dim))
        self.patch_embed = vit.patch_embed
        self.patch_embed.strict_img_size = False
        self.blocks, self.norm = vit.blocks, vit.norm
        self.requires_grad_(False)
        self.eval()

    def tokens(self, image: Tensor) -> Tensor:
        """See `Backbone`; T = 1 + R + h*w."""
        grid = (image.shape[-2] // self.spec.patch, image.shape[-1] // self.spec.patch)
        tokens = self.patch_embed(image)  # (B, h*w, D)
        cls = self.cls_token.expand(len(tokens), -1, -1)  # (B, 1, D)
        tokens = torch.cat([cls, tokens], dim=1) + self.position_embedding(grid)  # (B, 1 + h*w, D)
        if self.spec.registers:
            registers = self.register_tokens.expand(len(tokens), -1, -1)  # (B, R, D)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)  # (B, 1 + R + h*w, D)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        return tokens

    @torch.no_grad()
    def attention_logits(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Backbone`; the mean of the heads' products is one product of all channels."""
        block = self.blocks[-1]
        with torch.autocast(tokens.device.type, enabled=False):
            queries, keys, _ = block.attn.qkv(block.norm1(tokens.float())).chunk(3, dim=-1)  # (B, T, D) each
            return queries @ keys.transpose(1, 2) * (block.attn.scale / self.spec.heads)

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """The stored embedding, resampled by the rule of DINO, or DINOv2 with registers; (1, 1 + h*w, D)."""
        native = self.spec.native_res // self.spec.patch
        if grid == (native, native):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (native, native)).permute(0, 3, 1, 2).float()
        if self.spec.registers:
            patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True)
        else:
            scale = tuple((side + 0.1) / native for side in grid)  # the offset is DINO's
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")  # (1, D, h, w)
        resampled = patches.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)  # (1, h*w, D)
        return torch.cat([self.pos_embed[:, :1], resampled], dim=1)
