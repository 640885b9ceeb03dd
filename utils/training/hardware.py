"""Which device and which precision a machine offers."""

from __future__ import annotations

import torch

from utils.config.options import Options
from utils.errors import UserError


def accelerator() -> str:
    """CUDA, else Apple MPS, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_precision(options: Options, accelerator: str) -> str:
    """What `train.precision` comes to on a device: "fp16", "bf16" or "fp32".

    Raises:
        UserError: float16 without CUDA.
    """
    chosen = options.train.precision
    if chosen == "auto":
        return "fp16" if accelerator == "cuda" else "fp32"
    if chosen == "fp16" and accelerator != "cuda":
        raise UserError(f"train.precision is fp16, must be auto, fp32 or bf16 on {accelerator}")
    return chosen
