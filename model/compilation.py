"""torch.compile with a way back: what cannot be compiled runs as it is, and says why.

The way back is the forward pass's; a gradient that cannot be compiled stops the run with torch's own message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from model.segmenter import Segmenter
from utils.errors import first_line

UNCOMPILED = "train.compile: {name} run as they are ({reason})"


def compile_segmenter(segmenter: Segmenter) -> None:
    """Compiles the frozen blocks and the head in place, each for the shapes it meets; names stay the same."""
    backbone = segmenter.backbone
    backbone.encode = compiled(backbone.encode, "frozen blocks")
    backbone.last_features = compiled(backbone.last_features, "criterion features")
    segmenter.code = compiled(segmenter.code, "codes")


def compiled(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function through torch.compile, from the first failure to compile on as it is.

    Args:
        function: of tensors.
        name: what to call it where it cannot be compiled.
    """
    try:
        quick = torch.compile(function, dynamic=False)
    except RuntimeError as error:  # not on this system, or not for this Python
        print(UNCOMPILED.format(name=name, reason=first_line(error)))
        return function
    failed = False

    def run(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return quick(*arguments)
            except TorchDynamoException as error:
                failed = True
                reason = getattr(error, "inner_exception", error)  # the backend's own
                print(UNCOMPILED.format(name=name, reason=first_line(reason)))
        return function(*arguments)

    return run
