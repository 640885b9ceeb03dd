"""What the losses share: products and their precision, compiled elementwise passes, precomputed gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

UNIT = 2.0**12  # scale of a vector that is split, so that lo does not underflow
TENSOR_CORES = "dtype_out" in torch.ops.aten.addmm.overloads()  # torch >= 2.8; float16 to float32, on CUDA
COMPILED_ELEMENTS = 2**22  # compiling takes seconds, which smaller tensors do not repay


def matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None, beta: float = 0, alpha: float = 1) -> Tensor:
    """beta * out + alpha * a @ b, (A, N) float32, of operands of one dtype; float32 sums in any case."""
    out = a.new_empty(len(a), b.shape[1], dtype=torch.float32) if out is None else out  # (A, N)
    if TENSOR_CORES and a.is_cuda and a.dtype == torch.float16:
        return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    return out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)


def operands(rows: Tensor, products: str, *, left: bool = False) -> Tensor:
    """Unit vectors (N, D) float32 as the right or left operand of `PPAPLoss.products`.

    "split" gives (N, 3 D) float16: lo.hi + hi.lo + hi.hi; a large sum would absorb small terms added later.
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


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Applies torch.compile if the first argument is a large CUDA tensor; runs eagerly if that fails."""

    @cache
    def compiled() -> Callable[..., Any]:
        torch._dynamo.config.suppress_errors = True
        return torch.compile(function)

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        large = first.is_cuda and first.numel() >= COMPILED_ELEMENTS
        return (compiled() if large else function)(first, *others)

    return run


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Disables TF32 in float32 matrix products and convolutions: it would move patches across a boundary."""
    cudnn, precision = torch.backends.cudnn, "highest"
    settings = [(cudnn, "allow_tf32", False)]
    if hasattr(cudnn, "fp32_precision"):  # torch >= 2.9; where a user sets it, reading the older ones raises
        operators = (cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        settings = [(operator, "fp32_precision", "ieee") for operator in operators]
    with suppress(RuntimeError):
        precision = torch.get_float32_matmul_precision()
    with ExitStack() as restored:
        for place, name, value in settings:
            restored.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        restored.callback(torch.set_float32_matmul_precision, precision)  # called first, as it sets others
        torch.set_float32_matmul_precision("highest")
        yield


def with_gradient(loss: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The loss, (), differentiable in the inputs with gradients that were computed along with it."""
    return _WithGradient.apply(loss, grads, *inputs)


class _WithGradient(Function):
    @staticmethod
    def forward(ctx, loss: Tensor, grads: Sequence[Tensor], *_inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        return None, None, *(grad_loss * grad for grad in ctx.saved_tensors)
