"""Runs cases in one process on the null GPU; `main` takes the paths of two JSON files, cases and results.

Cases are an object of name -> {"program": "run", "eval" or "coco", "words": [...]} and optionally
  stop_at: sends SIGTERM after this training step,
  mask_on_cpu: leaves the dropout mask on the CPU,
  freed: bytes to allocate and free on device 1 beforehand.
Results are error, result, steps and peak memory of each; an event of a step is a wait or a copy:
[call, memory, bytes, innermost line of the project, innermost line of all].
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pytorch_lightning.loops.evaluation_loop import _EvaluationLoop
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor
from torch.utils.data import DataLoader

import eval
import run
from tests.benchmarks.inputs import n_classes_of, random_batch, random_module, shape_options
from utils.config.loading import REPOSITORY
from utils.errors import UserError
from utils.training.device import reset_peak_memory, upload
from utils.training.trainer import build_trainer

TRAIN, LOGGED, VALIDATION, CRF = "train step", "logged train step", "validation batch", "CRF batch"


class Trace:
    """Records the events and kernel launches of Lightning's steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.stop_at: int | None = None
        self._library, self._events = ctypes.CDLL(None), []
        report = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
        self._report = report(self._add_event)  # kept, as ctypes does not
        self._library.nullgpu_set_report(self._report)
        self._wrap(_TrainingEpochLoop, "advance")
        self._wrap(_EvaluationLoop, "_evaluation_step")

    def _add_event(self, call: bytes, size: int, pinned: int) -> None:
        memory = ("pageable", "pinned")[pinned] if size else "-"
        self._events.append([call.decode(), memory, size, *innermost_lines()])

    def _wrap(self, loop: type, method: str) -> None:
        original: Callable[..., Any] = getattr(loop, method)

        def recorded(loop: Any, *args: Any, **kwargs: Any) -> None:
            self._events, before = [], self._library.nullgpu_launches()
            original(loop, *args, **kwargs)
            launches, batch = self._library.nullgpu_launches() - before, loop.batch_progress.current.ready - 1
            step = {"phase": phase_of(loop, batch), "batch": batch, "launches": launches}
            self.steps.append(step | {"events": self._events})
            self._events = []
            if isinstance(loop, _TrainingEpochLoop) and loop.global_step == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(loop, method, recorded)


def phase_of(loop: Any, batch: int) -> str:
    module = loop.trainer.lightning_module
    if isinstance(loop, _TrainingEpochLoop):
        return TRAIN if batch % module.options.train.print_freq else LOGGED
    return VALIDATION if module.evaluator.refiner is None else CRF


def innermost_lines() -> tuple[str, str]:
    """The innermost line of the project, and of all code; "-" if there is none, as in autograd's threads."""
    frame, lines = sys._getframe(), []
    while frame is not None:
        name = frame.f_code.co_filename.removeprefix(f"{REPOSITORY}{os.sep}")
        if frame.f_code.co_filename != __file__:
            shown = name.split("site-packages/")[-1]
            lines.append(
                (shown == name and name[0] not in "/<", f"{shown}:{frame.f_lineno} {frame.f_code.co_name}")
            )
        frame = frame.f_back
    return next((line for ours, line in lines if ours), "-"), lines[0][1] if lines else "-"


def upload_without_masks(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.is_floating_point() else upload(tensor, device)


def train_at_coco_shape(words: list[int]) -> dict[str, int]:
    """Steps of ViT-S/8 with random weights on noise, given the chunk size; returns the weights' size."""
    options = shape_options("cocostuff", {"train.epoch": 1, "training_coeff.chunk_size": words[0]})
    cpu = torch.device("cpu")
    module, batch = random_module(options, cpu), random_batch(options, cpu, n_classes_of(options))
    loader = DataLoader([batch] * 3, batch_size=None, pin_memory=True)
    build_trainer(options).fit(module, loader)
    return {"weights": sum(value.nbytes for value in module.parameters())}


PROGRAMS = {"run": run.main, "eval": eval.main, "coco": train_at_coco_shape}


def perform(case: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """Runs a case; an error is part of its result."""
    trace.steps, trace.stop_at, error, result = [], case.get("stop_at"), None, None
    gc.collect()
    devices = range(torch.cuda.device_count())
    reset_peak_memory()
    before = [torch.cuda.memory_allocated(device) for device in devices]
    if "freed" in case:
        torch.empty(case["freed"], dtype=torch.uint8, device="cuda:1")
    uploads = upload_without_masks if case.get("mask_on_cpu") else upload
    try:
        with patch("model.module.upload", uploads):
            result = PROGRAMS[case["program"]](case["words"])
    except UserError as mistake:
        error = f"{type(mistake).__name__}: {mistake}"
    except Exception:
        error = traceback.format_exc()
    peaks = [torch.cuda.max_memory_allocated(device) - before[device] for device in devices]
    return {"error": error, "result": result, "steps": trace.steps, "peaks": peaks}


def main() -> None:
    torch.backends.cudnn.enabled = False  # the null GPU has none
    torch.backends.cuda.enable_cudnn_sdp(False)
    trace, cases, results = Trace(), json.loads(Path(sys.argv[1]).read_text()), {}
    for name, case in cases.items():
        print(f"\n== {name}", flush=True)
        results[name] = perform(case, trace)
    Path(sys.argv[2]).write_text(json.dumps(results, default=str))
