import re

import pytest

from utils.config.loading import FIELDS, with_changes
from utils.errors import UserError
from utils.files import REPOSITORY


def test_with_changes__is_validated_and_keeps_the_rest(tiny_options):
    options = tiny_options(training_coeff__sigma_pos="inf")
    changed = with_changes(options, {"train.epoch": 7, "wandb.id": "x"})
    assert (changed.train.epoch, changed.wandb.id, options.train.epoch) == (7, "x", 1)
    assert with_changes(changed, {"train.epoch": 1, "wandb.id": None}) == options
    with pytest.raises(UserError, match=r"train\.epoch is 0"):
        with_changes(options, {"train.epoch": 0})


@pytest.mark.parametrize(
    ("every", "interval"),
    [(None, (None, None)), (500, (500, None)), ("500", (500, None)), ("15 min", (None, 900)),
     ("0.5m", (None, 30)), ("1 minute", (None, 60))],
)  # fmt: skip
def test_checkpoint_interval__steps_or_seconds(tiny_options, every, interval):
    assert tiny_options(train__checkpoint_every=every).train.checkpoint_interval == interval


@pytest.mark.parametrize(
    ("key", "values", "allowed"),
    [
        ("train.checkpoint_every", ["", "0", "0 min", "1.5", "15 s", "-1", "min"], "steps"),
        (
            "wandb.name",
            ["", "..", "../up", "tokens", "x" * 201, "é" * 101],
            "a folder name of at most 200 bytes",
        ),
    ],
)
def test_text__of_another_form_is_a_mistake(tiny_options, key, values, allowed):
    for value in values:
        with pytest.raises(UserError, match=rf"{key} is .*must be {allowed}"):
            tiny_options(**{key: value})


def test_run_name__may_be_a_number_and_leaves_room_for_the_baseline(tiny_options):
    for name in ("é" * 100, "x" * 200 + "-frozen", 5, 0.5):
        assert tiny_options(wandb__name=name).wandb.name == str(name)


def test_every_option_is_read_by_something():
    """By its name: sections travel under other names, and some as a whole."""
    parts = ("run.py", "eval.py", "dataset/*.py", "model/**/*.py", "loss/*.py", "utils/**/*.py")
    files = [path for part in parts for path in REPOSITORY.glob(part) if path.name != "options.py"]
    code = "\n".join(path.read_text() for path in files)
    keys = {*FIELDS} - {"train.checkpoint_every"}  # which is read through its property
    assert [key for key in keys if not re.search(rf"\b{key.rsplit('.', 1)[-1]}\b", code)] == []
