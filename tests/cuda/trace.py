"""Records waits for the device, copies and kernel launches of each step on the null GPU."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytorch_lightning.loops.evaluation_loop import _EvaluationLoop
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from utils.config.loading import REPOSITORY

TRAIN, LOGGED, VALIDATION, CRF = "train step", "logged train step", "validation batch", "CRF batch"
OWN_FOLDER = f"{Path(__file__).parent}{os.sep}"
Event = tuple[str, str, int, str, str]  # call, memory, bytes, line of the project, line that called CUDA


class Trace:
    """What Lightning's steps ask of the device: `steps` has the phase, batch, events and launches of each."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.nullgpu_launches.restype = ctypes.c_long
        self.steps: list[dict[str, Any]] = []
        self.after_step: Callable[[Any], None] = lambda trainer: None
        self._events: list[Event] = []
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)(self._report)

    def install(self) -> None:
        """Starts recording."""
        torch.backends.cudnn.enabled = False  # the null GPU has no cuDNN
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.library.nullgpu_set_report(self._callback)
        self._wrap(_TrainingEpochLoop, "advance", _train_phase)
        self._wrap(_EvaluationLoop, "_evaluation_step", _validation_phase)

    def _report(self, call: bytes, size: int, pinned: int) -> None:
        memory = "pinned" if pinned else "pageable"
        self._events.append((call.decode(), memory, size, *_lines()))

    def _wrap(self, loop: type, method: str, phase: Callable[[Any], str]) -> None:
        original = getattr(loop, method)

        def recorded(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self._events, before = [], self.library.nullgpu_launches()
            result = original(self_, *args, **kwargs)
            step = {"phase": phase(self_), "batch": self_.batch_progress.current.ready - 1}
            launches = self.library.nullgpu_launches() - before
            self.steps.append(step | {"events": self._events, "launches": launches})
            self._events = []
            self.after_step(self_.trainer)
            return result

        setattr(loop, method, recorded)


def _train_phase(loop: Any) -> str:
    frequency = loop.trainer.lightning_module.options.train.print_freq
    return TRAIN if loop.batch_idx % frequency else LOGGED


def _validation_phase(loop: Any) -> str:
    return VALIDATION if loop.trainer.lightning_module.evaluator.refiner is None else CRF


def _lines() -> tuple[str, str]:
    """The innermost line of the project, and the innermost of all; "-" in a thread without Python code."""
    frame, ours, innermost = sys._getframe(), "-", "-"
    while frame is not None and ours == "-":
        name = frame.f_code.co_filename
        if not name.startswith((OWN_FOLDER, "<")):
            path = Path(name)
            inside = path.is_relative_to(REPOSITORY) and "site-packages" not in path.parts
            shown = str(path.relative_to(REPOSITORY)) if inside else name.split("site-packages/")[-1]
            line = f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"
            innermost = line if innermost == "-" else innermost
            ours = line if inside else ours
        frame = frame.f_back
    return ours, innermost


def waits(step: dict[str, Any]) -> list[Event]:
    """The calls of a step that wait for the device."""
    return [event for event in step["events"] if not event[0].startswith("cudaMemcpyAsync")]


def pageable_uploads(step: dict[str, Any]) -> list[Event]:
    """The copies of a step to the device that are not from pinned memory, and so are not asynchronous."""
    return [event for event in step["events"] if event[0].endswith("to device") and event[1] == "pageable"]


def table(steps: list[dict[str, Any]]) -> str:
    """Events and launches per step, by phase."""
    phases, lines = defaultdict(list), []
    for step in steps:
        phases[step["phase"]].append(step)
    for phase, same in phases.items():
        launches = median(step["launches"] for step in same)
        lines.append(f"{phase}: {len(same)}, kernel launches {launches:g}")
        counts, sizes = Counter(), Counter()
        for call, memory, size, ours, caller in (event for step in same for event in step["events"]):
            key = call, memory if "Memcpy" in call else "", ours, caller if caller != ours else ""
            counts[key] += 1
            sizes[key] += size
        for key, count in counts.most_common():
            call, memory, ours, caller = key
            size = f"{sizes[key] // count:,} B"
            lines.append(f"{count / len(same):7.2f}x {call:<26} {memory:<8} {size:>14}  {ours}  {caller}")
    return "\n".join(lines)
