"""What wandb and a file system take as names: mistakes that wandb itself would only find during a run."""

from __future__ import annotations

import json

from utils.config.options import WandbOptions
from utils.files import TOKENS_FOLDER

LONGEST_NAME = 200
LONGEST_TAG = 64
NOT_IN_AN_ID = set("/\\#?%:")


def name_mistake(name: str) -> str | None:
    """Why a run cannot have this name, or None."""
    if name == TOKENS_FOLDER:
        return f"wandb.name is {name}, must be another: dataset.cache_features keeps its files in that folder"
    if name and name not in (".", "..") and not set(name) & set("/\\\0") and len(name) <= LONGEST_NAME:
        return None
    allowed = f"usable as the name of one folder, of at most {LONGEST_NAME} letters"
    return f"wandb.name is {json.dumps(name)}, must be {allowed}"


def wandb_mistakes(chosen: WandbOptions) -> list[str]:
    """What is wrong with `wandb.*`, one line each."""
    mistakes = [mistake] if (mistake := name_mistake(chosen.name)) else []
    long = [tag for tag in chosen.tags or [] if not 0 < len(tag) <= LONGEST_TAG]
    if long:
        mistakes.append(f"wandb.tags holds {json.dumps(long[0])}: a tag has 1 to {LONGEST_TAG} letters")
    if chosen.id is not None and not (0 < len(chosen.id) <= LONGEST_NAME and chosen.id == chosen.id.strip()):
        mistakes.append(f"wandb.id is {json.dumps(chosen.id)}, must be 1 to {LONGEST_NAME} letters; or null")
    elif chosen.id is not None and set(chosen.id) & NOT_IN_AN_ID:
        mistakes.append(f"wandb.id is {chosen.id}, must be without {' '.join(sorted(NOT_IN_AN_ID))}; or null")
    return mistakes
