import pytest

import run
from utils.config.cli import parse_arguments, plan_jobs
from utils.errors import UserError


def test_wandb_options__mistakes_are_told_together(tiny_options):
    with pytest.raises(UserError) as caught:
        tiny_options(wandb__tags=["good", "x" * 65], wandb__id="a/b", wandb__name="..")
    told = str(caught.value)
    assert 'wandb.tags holds "xxx' in told
    assert "wandb.id is a/b, must be without" in told
    assert "wandb.name is" in told
    for tags, id in ((None, None), ([], "abc-1"), (["a tag"], "x=1")):
        tiny_options(wandb__tags=tags, wandb__id=id)
    with pytest.raises(UserError, match=r"wandb\.id is \"\", must be 1 to 200 letters"):
        tiny_options(wandb__id="")


def test_wandb_id__every_run_of_a_sweep_has_its_own(tiny_file):
    words = ["--opt", tiny_file(wandb__id="abc"), "train.seed=0,1"]
    jobs = plan_jobs(parse_arguments(words, description="", training=True))
    assert [job.options.wandb.id for job in jobs] == ["abc-seed=0", "abc-seed=1"]
    assert run.as_baseline(jobs[0].options).wandb.id == "abc-seed=0-frozen"
