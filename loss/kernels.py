"""Matrix products with float32 results, of float32 operands or, on tensor cores, of float16 ones."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**12  # scale of a vector that is split, so that lo does not underflow
TENSOR_CORES = "dtype_out" in torch.ops.aten.addmm.overloads()  # torch >= 2.8; float16 to float32, on CUDA


def matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None, beta: float = 0, alpha: float = 1) -> Tensor:
    """beta * out + alpha * a @ b, (A, N) float32, of operands of one dtype; float32 sums in any case."""
    out = a.new_empty(len(a), b.shape[1], dtype=torch.float32) if out is None else out  # (A, N)
    if TENSOR_CORES and a.is_cuda and a.dtype == torch.float16:
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    return out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


def operands(rows: Tensor, products: str, *, left: bool = False) -> Tensor:
    """Unit vectors (N, D) float32 as the right or left operand of `PPAPLoss.products`.

    "split" gives (N, 3 D) float16: lo.hi + hi.lo + hi.hi, as a large sum would round the small terms off.
    """
    if products != "split":
        return rows.half() if products == "float16" else rows
    high = (UNIT * rows).half()
    low = (UNIT * rows - high).half()
    return torch.cat([low, high, high] if left else [high, low, high], dim=1)


def compare(proxies: Tensor, bank: Tensor, operand: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Similarities (A, N) float32 of proxies (A, D), rounded to `operand`, and the bank's `operands`."""
    if bank.shape[1] == proxies.shape[1]:
        return matmul(proxies.to(operand).to(bank.dtype), bank.T, out=out)
    return matmul(operands(proxies, "split", left=True), bank.T, out=out, alpha=UNIT**-2)
