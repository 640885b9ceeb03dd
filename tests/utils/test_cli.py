import pytest

from utils.cli import guarded, parse_arguments, parse_overrides, plan_jobs
from utils.errors import UserError


def jobs(*argv, training=True):
    return plan_jobs(parse_arguments(argv, description="", training=training))


def test_overrides__values_by_hydras_grammar():
    assert parse_overrides(["a.b=3", "c='x, y'", "d=[1,2]", "e=null", "f=inf", "g=true"]).choices == {
        "a.b": [3],
        "c": ["x, y"],
        "d": [[1, 2]],
        "e": [None],
        "f": [float("inf")],
        "g": [True],
    }


def test_overrides__choice_and_range_sweeps():
    assert parse_overrides(["a=0,1,2", "b=range(1,4)", "c=choice('x',2)", "d=[1,2],[3]"]).choices == {
        "a": [0, 1, 2],
        "b": [1, 2, 3],
        "c": ["x", 2],
        "d": [[1, 2], [3]],
    }


@pytest.mark.parametrize(
    "word",
    [
        "+a=1", "++a=1", "~a", "a@b=1", "a=glob(*)", "a=interval(0,1)", "a=shuffle(1,2)", "a=(1", "a",
        "a=range(3,1)", "a=range(1,4,0)", "a=range(0.0,1.0,0)", "a=tag(t,choice(1,2))",
    ],
)  # fmt: skip
def test_overrides__what_else_the_grammar_has_is_our_error(word):
    overrides = parse_overrides([word])
    (mistake,) = overrides.mistakes
    assert mistake.startswith(f"{word}: ")
    assert overrides.choices == {}


def test_overrides__errors_show_how_to_quote_and_come_together():
    mistakes = parse_overrides(["+a=1", "b=(", "c=1", "c=2"]).mistakes
    assert len(mistakes) == 3
    assert """'key="a, b"'""" in mistakes[0]
    assert "c is given twice" in mistakes[2]


def test_jobs__mistakes_of_overrides_file_and_all_runs_come_together(tiny_file):
    words = ["+a=1", "training_coeff.tau=-1,-2", "eval.is_crff=true"]
    with pytest.raises(UserError) as error:
        jobs("--opt", tiny_file(train__epoch=0), *words)
    text = str(error.value)
    for part in ("+a=1", "tau is -1", "tau is -2", "eval.is_crff", "train.epoch is 0"):
        assert text.count(part) == 1, text
    assert "5 mistakes in " in text


def test_jobs__flags(tiny_file, tmp_path):
    (tmp_path / "some.ckpt").touch()
    some = str(tmp_path / "some.ckpt")
    (job,) = jobs("--opt", tiny_file(wandb__mode="online"), "--debug", "--frozen", "--checkpoint", some,
                  "--data_path", str(tmp_path), "train.seed=3")  # fmt: skip
    options = job.options
    assert options.wandb.mode == "disabled"
    assert options.train.frozen
    assert options.checkpoint == some
    assert options.dataset.data_path == str(tmp_path)
    assert options.train.seed == 3
    assert not job.evaluate_only
    assert jobs("--opt", tiny_file(), "--test")[0].evaluate_only


def test_jobs__flags_and_overrides_in_any_order(tiny_file):
    (job,) = jobs("train.seed=1", "--opt", tiny_file(), "train.epoch=2", "--debug", "train.valid_freq=9")
    assert (job.options.train.seed, job.options.train.epoch, job.options.train.valid_freq) == (1, 2, 9)


def test_jobs__sweep_names_runs_and_groups_seeds(tiny_file):
    planned = jobs("--opt", tiny_file(), "training_coeff.prop_iter=0,1", "train.seed=0,1,2")
    assert len(planned) == 6
    assert len({job.options.wandb.name for job in planned}) == 6
    assert planned[0].options.wandb.name == "tiny-prop_iter=0-seed=0"
    assert {job.setting for job in planned} == {"training_coeff.prop_iter=0", "training_coeff.prop_iter=1"}


def test_jobs__a_mistake_in_one_run_stops_all_before_the_first(tiny_file):
    with pytest.raises(UserError, match=r"training_coeff\.tau is -1"):
        jobs("--opt", tiny_file(), "training_coeff.tau=0.5,-1")


def test_guarded__message_and_status_two(capsys):
    def main():
        raise UserError(["first", "second"], "a file")

    assert guarded(main) == 2
    assert capsys.readouterr().err == "error: 2 mistakes in a file:\n  - first\n  - second\n"
