import errno
import json

import pytest

from utils.config.cli import guarded, parse_arguments, parse_overrides, plan_jobs
from utils.config.evaluation_flags import read_patch
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


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; {}"),
        (
            OSError(errno.ENOSPC, "No space left", "a.png"),
            2,
            "error: a.png: No space left; mend that, then {}",
        ),
    ],
)
def test_guarded__advice_is_the_program_s_own(capsys, error, status, told):
    def main():
        raise error

    assert guarded(main) == status
    assert capsys.readouterr().err == told.format("go on with --resume") + "\n"
    assert guarded(main, then="try again") == status
    assert capsys.readouterr().err == told.format("try again") + "\n"


def variants_file(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_variants__each_is_a_run_of_every_seed(tiny_file, tmp_path):
    two = {"as it is": {}, "no steps": {"training_coeff": {"prop_iter": 0}}}
    path = variants_file(tmp_path, two)
    found = jobs("--opt", tiny_file(), "--variants", path, "train.seed=0,1")
    assert [(job.setting, job.options.training_coeff.prop_iter, job.options.train.seed) for job in found] == [
        ("as it is", 2, 0), ("as it is", 2, 1), ("no steps", 0, 0), ("no steps", 0, 1),
    ]  # fmt: skip
    assert found[3].options.wandb.name == "tiny-no_steps-seed=1"
    assert {job.base for job in found} == {"tiny"}


def test_variants__mistakes_are_named(tiny_file, tmp_path):
    for content, words in (
        ([], "must hold an object"),
        ({}, "holds no variant"),
        ({"a": 3}, "a: is 3, must be an object of options"),
        ({"a": {"train": {"seed": 3}}}, "a: train.seed is set by the command line too"),
        ({"a": {"train": {"sed": 3}}}, "train.sed"),
        ({"a" * 300: {}}, "wandb.name is"),
    ):
        with pytest.raises(UserError, match=words):
            jobs("--opt", tiny_file(), "--variants", variants_file(tmp_path, content), "train.seed=0,1")


def test_variants__of_one_name_are_refused(tiny_file, tmp_path):
    path = variants_file(tmp_path, {"a b": {}, "a_b": {}})
    with pytest.raises(UserError, match=r"wandb.name tiny-a_b is that of 2 runs; rename variants"):
        jobs("--opt", tiny_file(), "--variants", path)


def test_variants__that_are_shipped_fit_every_option_file_of_its_kind(monkeypatch):
    monkeypatch.setattr("utils.config.loading.missing_files", lambda options: [])
    for base in ("demo.json", "camvid.json", "cocostuff.json"):
        found = jobs("--opt", base, "--variants", "ablation.json")
        assert len({job.options.wandb.name for job in found}) == len(found) > 8
        unzoned = next(job.options for job in found if job.setting == "no ambiguous zone")
        assert unzoned.training_coeff.initialcrit_amb >= unzoned.training_coeff.initialcrit_pos


@pytest.mark.parametrize("text", ["3", "1,2,3", "a,b", "-1,2", "1.5,2", ""])
def test_patch__malformed(tiny_file, text):
    with pytest.raises(UserError, match="must be row,col on the patch grid"):
        jobs("--opt", tiny_file(), "--explain", "0", f"--patch={text}", training=False)


def test_patch__read():
    assert read_patch(None) is None
    assert read_patch("12, 20") == (12, 20)


def test_explain__flags_that_do_not_go_together(tiny_file):
    with pytest.raises(UserError, match="which belongs to --explain: add --explain IMAGE"):
        jobs("--opt", tiny_file(), "--patch", "1,2", training=False)
    with pytest.raises(UserError) as error:
        jobs("--opt", tiny_file(), "--explain", "", "--measure-sets", "--patch=1", "+a=1", training=False)
    assert len(error.value.mistakes) == 4


def test_explain__needs_no_checkpoint_and_is_evals_own(tiny_file):
    (job,) = jobs("--opt", tiny_file(checkpoint="nowhere"), "--explain", "0", training=False)
    assert job.options.checkpoint == ""
    with pytest.raises(SystemExit):
        jobs("--opt", tiny_file(), "--explain", "0", training=True)


def test_images__flags_that_do_not_go_together(tiny_file):
    with pytest.raises(UserError) as error:
        jobs("--opt", tiny_file(), "--crf", "--res", "64", "--out", "x", training=False)
    assert error.value.mistakes == [
        "--out is x, which belongs to --images: add --images PATH",
        "--res is 64, which belongs to --images: add --images PATH",
        "--crf is given, which belongs to --images: add --images PATH",
    ]
    words = ("--images", "a", "--explain", "0", "--names", "x", "train.seed=0,1")
    with pytest.raises(UserError) as error:
        jobs("--opt", tiny_file(), *words, training=False)
    text = str(error.value)
    for part in (
        "--explain and --images are different",
        "--out is missing",
        "--names: x",
        "leave out sweeps",
    ):
        assert part in text


@pytest.mark.parametrize("flag", ["--res", "--tile"])
def test_images__a_flag_of_zero_is_one_that_is_given(tiny_file, flag):
    with pytest.raises(UserError, match=f"{flag} is 0, which belongs to --images"):
        jobs("--opt", tiny_file(), flag, "0", training=False)


def test_images__need_no_data_set_and_are_evals_own(tiny_file):
    words = ("--opt", tiny_file(dataset__data_type="directory"), "--images", "a", "--out", "b")
    assert len(jobs(*words, training=False)) == 1
    with pytest.raises(SystemExit):
        jobs(*words, training=True)
