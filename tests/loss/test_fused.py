"""The Triton path of the loss: its cases in Triton's interpreter and on a GPU, and what its compiler says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loss import PPAPLoss
from loss.propagation import Boundaries
from tests.loss.test_ppap import COEFFICIENTS, clustered_batch

CASES = Path(__file__).with_name("fused_cases.py")
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have


def run_cases(**environment):
    """pytest on the cases in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", minversion="3.3")
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)],
        cwd=CASES.parents[2],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_cases__interpreted():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_cases__compiled():
    run_cases()


def test_backend__names_the_key_where_the_device_is_none_of_its():
    launch = pytest.importorskip("loss.launch")
    if launch.INTERPRETED:
        pytest.skip("interpreted")
    z, features = clustered_batch()
    with pytest.raises(ValueError, match=r'backend is "triton".*training_coeff\.backend\) to "torch"'):
        PPAPLoss(**COEFFICIENTS, backend="triton")(z, features)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        PPAPLoss(**COEFFICIENTS, backend="cuda")


def test_backend__names_the_key_where_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("fused", "launch", "kernels"):
        monkeypatch.delitem(sys.modules, f"loss.{name}", raising=False)
        monkeypatch.delattr(f"loss.{name}", raising=False)
    z, features = clustered_batch()
    with pytest.raises(ValueError, match=r'cannot be imported.*training_coeff\.backend\) to "torch"'):
        PPAPLoss(**COEFFICIENTS, backend="triton")(z, features)


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **settings: self.launches.append((self.kernel, arguments, settings))


def launches_of(monkeypatch, *, dim, operand):
    """What a step launches at D = `dim`."""
    launch = pytest.importorskip("loss.launch")
    from loss.fused import fused_sums

    if launch.INTERPRETED:
        pytest.skip("interpreted")
    launches = []
    for name in ("threshold_kernel", "gather_kernel", "contrast_kernel", "gradient_kernel"):
        monkeypatch.setattr(launch.kernels, name, Recorder(getattr(launch.kernels, name), launches))
    rows, anchors = torch.zeros(64, dim), torch.arange(32).view(2, 16)
    boundaries = Boundaries(0.55, 0.2, 1, sigma_pos=3, sigma_amb=3)
    fused_sums(rows, rows, anchors, boundaries=boundaries, tau=0.8, operand=operand, with_grad=True)
    return launches


TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64"}


def compiled(kernel, arguments, settings, *, capability):
    """The kernel for a GPU of that capability, without one."""
    import triton
    from triton.backends.compiler import GPUTarget

    constants = {key: value for key, value in settings.items() if key != "num_warps"}
    types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
    types += ["constexpr"] * len(constants)
    signature = dict(zip(kernel.arg_names, types, strict=True))
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": settings["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "dim", "operand"),
    [(80, 384, torch.float32), (90, 768, torch.float32), (90, 384, torch.float16)],
)
def test_kernels__fit_a_gpu(capability, dim, operand, monkeypatch, tmp_path):
    """Shared memory is there, and no loop lives in spilled registers."""
    triton = pytest.importorskip("triton", minversion="3.3")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "ptxas").exists():
        pytest.skip("this Triton has no ptxas")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of(monkeypatch, dim=dim, operand=operand)
    assert len(launches) == 6  # two of the thresholds, the sum, the term, both gradients
    for kernel, arguments, settings in launches:
        found = compiled(kernel, arguments, settings, capability=capability)
        name = f"{kernel.__name__} {settings}"
        assert found.metadata.shared <= SHARED_MEMORY[capability], name
        if (tools / "cuobjdump").exists():
            (tmp_path / "cubin").write_bytes(found.asm["cubin"])
            command = [tools / "cuobjdump", "-res-usage", tmp_path / "cubin"]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert int(re.search(r"STACK:(\d+)", usage)[1]) <= 64, name  # bytes a thread
