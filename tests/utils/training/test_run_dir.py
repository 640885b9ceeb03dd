import math

import pytest
import torch

from utils.errors import UserError
from utils.training.run_dir import RunDir


def save(path, step, **progress):
    torch.save({"progress": {"step": step, **progress}, "weights": torch.zeros(1000)}, path)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("scored_step", "best"), [(9, 150.0), (7, -math.inf)])
@pytest.mark.parametrize("missing", [True, False])
def test_resume_point__replaces_a_best_that_is_lost(tiny_options, capsys, scored_step, best, missing):
    """The score of the last checkpoint counts if it is of its own step."""
    run_dir = RunDir(options := tiny_options(resume="auto"))
    run_dir.prepare(options, [], {})
    save(run_dir.last, 9, best=170.0, score=150.0, scored_step=scored_step)
    if not missing:
        save(run_dir.best, 7)
        damage(run_dir.best)
    path, progress = run_dir.resume_point(options)
    assert (path, progress.step, progress.best) == (run_dir.last, 9, best)
    for path in (run_dir.best, run_dir.last):
        assert torch.load(path, weights_only=True)["progress"]["best"] == best
    assert f"{run_dir.best} is damaged or missing; step 9 takes its place" in capsys.readouterr().out


def test_lock__in_a_folder_that_cannot_be_written(tiny_options):
    with (
        pytest.raises(UserError, match=r"/proc/ppap: cannot be written .*choose another output_dir"),
        RunDir(tiny_options(output_dir="/proc/ppap")).lock(),
    ):
        pass
