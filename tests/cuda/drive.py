"""Runs commands in one process on the null GPU: python -m tests.cuda.drive CASES RESULTS

CASES is a JSON object of name -> {"program": "run", "eval" or "coco", "words": [...]} and optionally
  stop_at: sends SIGTERM after this training step,
  mask_on_cpu: the dropout mask deliberately stays on the CPU, which must fail on any GPU,
  ballast: bytes to allocate and free on device 1 beforehand, which a run's peak memory must not contain.
RESULTS gets for each case its error, result, steps and peak memory.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import eval
import run
from model.segmenter import criterion_dropout
from tests.benchmarks.inputs import n_classes_of, random_batch, random_module, shape_options
from tests.cuda.trace import Trace
from utils.errors import UserError
from utils.training.device import hardware_settings
from utils.training.trainer import build_trainer

STEPS = 3


def mask_on_cpu(crit: Tensor, *, probability: float, generator: torch.Generator) -> Tensor:
    """Dropout with the mistake that the test must find."""
    return crit * (torch.rand(*crit.shape[:2], 1, 1, generator=generator) >= probability)


def train_at_coco_shape(words: list[int]) -> dict[str, int]:
    """Some steps of ViT-S/8 with random weights on noise, given the chunk size; returns the weights' bytes."""
    (chunk_size,) = words
    options = shape_options("cocostuff", {"train.epoch": 1, "training_coeff.chunk_size": chunk_size})
    cpu = torch.device("cpu")
    module, batch = random_module(options, cpu), random_batch(options, cpu, n_classes_of(options))
    loader = DataLoader([batch] * STEPS, batch_size=None, pin_memory=True)
    build_trainer(options, hardware_settings(options)).fit(module, loader)
    return {"weights": sum(p.numel() * p.element_size() for p in module.parameters())}


PROGRAMS = {"run": run.main, "eval": eval.main, "coco": train_at_coco_shape}


def perform(case: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """Runs a case; an error is part of its result."""

    def stop(trainer: Any) -> None:
        if trainer.state.fn == "fit" and trainer.global_step == case.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    trace.steps, trace.after_step, error, result = [], stop, None, None
    gc.collect()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count())]
    torch.empty(case.get("ballast", 0), dtype=torch.uint8, device="cuda:1")
    dropout = mask_on_cpu if case.get("mask_on_cpu") else criterion_dropout
    try:
        with patch("model.module.criterion_dropout", dropout):
            result = PROGRAMS[case["program"]](case["words"])
    except UserError as mistake:
        error = f"{type(mistake).__name__}: {mistake}"
    except Exception:
        error = traceback.format_exc()
    after = [torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())]
    peaks = [peak - allocated for peak, allocated in zip(after, before, strict=True)]
    return {"error": error, "result": result, "steps": trace.steps, "peaks": peaks}


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), {}
    torch.cuda.init()
    trace = Trace()
    trace.install()
    for name, case in cases.items():
        print(f"\n== {name}", flush=True)
        results[name] = perform(case, trace)
    Path(sys.argv[2]).write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main()
