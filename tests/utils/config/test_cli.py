import errno
import re
import signal
import subprocess
import sys

import pytest

import eval as evaluation
import run
from dataset import crop_datasets, dataset_download
from utils.config.cli import guarded, parse_arguments, parse_overrides, plan_jobs
from utils.errors import Interrupted, UserError
from utils.files import REPOSITORY


def jobs(*argv, training=True):
    return plan_jobs(parse_arguments(argv, description="", examples="", training=training))


@pytest.mark.parametrize("program", ["run.py", "eval.py"])
def test_mistyped_option__is_reported_before_torch_is_imported(program):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", program, "--opt", "demo.json", "train.epoc=3"],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "train.epoc (value 3) is not an option. Did you mean train.epoch?" in done.stderr
    assert re.search(r"\| +pydantic$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_overrides__values_and_sweeps_by_hydras_grammar():
    words = ["b=3", "c='x, y'", "d=[1,2]", "e=null", "f=inf", "g=true"]
    words += ["h=0,1,2", "i=range(1,4)", "j='1',2", "k=[1,2],[3]"]
    assert parse_overrides(words)[0] == {
        "b": [3], "c": ["x, y"], "d": [[1, 2]], "e": [None], "f": [float("inf")], "g": [True],
        "h": [0, 1, 2], "i": [1, 2, 3], "j": ["1", 2], "k": [[1, 2], [3]],
    }  # fmt: skip


def test_overrides__unsupported_grammar_is_a_mistake():
    words = ["+a=1", "~a", "a@b=1", "a=glob(*)", "a=(1", "a", "a=range(3,1)", "=", "a=0,,1", "a = 3"]
    for word in words:
        choices, (mistake,) = parse_overrides([word])
        assert choices == {}
        assert mistake.startswith(f"{word}: must be key=value or key=a,b,c, no spaces around =")
    _, (mistake,) = parse_overrides(["train.seed", "=", "3"])
    assert mistake.startswith("train.seed = 3: must be key=value")


def test_jobs__mistakes_of_overrides_file_and_all_runs_come_together(tiny_file):
    words = ["+a=1", "training_coeff.tau=-1,-2", "eval.is_crff=true"]
    with pytest.raises(UserError) as error:
        jobs("--opt", tiny_file(train__epoch=0), *words)
    text = str(error.value)
    for part in ("5 mistakes in ", "+a=1", "tau is -1", "tau is -2", "eval.is_crff", "train.epoch is 0"):
        assert text.count(part) == 1, text


def test_jobs__flags_and_overrides_in_any_order(tiny_file, tmp_path):
    (job,) = jobs("train.seed=3", "--opt", tiny_file(wandb__mode="online"), "--debug", "train.epoch=2",
                  "--frozen", "--checkpoint", "a.ckpt", "--data_path", str(tmp_path), "--resume",
                  "--check")  # fmt: skip
    options = job.options
    assert (options.wandb.mode, options.resume, options.checkpoint) == ("disabled", "auto", "a.ckpt")
    assert (options.train.seed, options.train.epoch, options.train.frozen) == (3, 2, True)
    assert (options.dataset.check_files, options.dataset.data_path) == (True, str(tmp_path))


def test_jobs__sweep_names_runs_and_groups_seeds(tiny_file):
    planned = jobs("--opt", tiny_file(wandb__id="abc"), "training_coeff.prop_iter=0,1", "train.seed=0,1,2")
    assert len({job.options.wandb.name for job in planned}) == 6
    assert {job.base for job in planned} == {"tiny"}
    assert planned[0].options.wandb.name == "tiny-prop_iter=0-seed=0"
    assert planned[0].options.wandb.id == "abc-prop_iter=0-seed=0"
    baseline = run.as_baseline(planned[0].options)
    assert (baseline.wandb.id, baseline.train.frozen) == ("abc-prop_iter=0-seed=0-frozen", True)
    assert {job.setting for job in planned} == {"training_coeff.prop_iter=0", "training_coeff.prop_iter=1"}


def test_jobs__equal_names_are_a_mistake(tiny_file):
    with pytest.raises(UserError, match=r"several runs would be called tiny-lr=0\.001"):
        jobs("--opt", tiny_file(), "optimizer.net.lr=1e-3,0.001")


def test_jobs__of_different_numbers_of_processes_are_a_mistake(tiny_file):
    """The processes of the second job would train the first one again."""
    with pytest.raises(UserError, match="differ in their number of processes"):
        jobs("--opt", tiny_file(), "trainer.devices=1,2")


def test_weights_file__is_needed_for_training_but_not_with_a_checkpoint(tiny_file):
    words = ["--opt", tiny_file(), "model.pretrained.pretrained_weights=gone.pth", "--checkpoint", "a.ckpt"]
    assert len(jobs(*words, training=False)) == len(jobs(*words, "--test")) == 1
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        jobs(*words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "must be a JSON object"),
        ('{"a": {}, "a": {"train": {"epoch": 2}}}', r'mine\.json: .*"a" appears twice'),
        ('{"a": 3}', "must map names to objects of options"),
        ('{"a": {"train": {"seed": 3}}}', "a: train.seed is also set by the command line"),
        ('{"a": {"train": {"sed": 3}}}', "train.sed"),
    ],
)
def test_variants__mistakes_are_named(tiny_file, tmp_path, content, words):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=words):
        jobs("--opt", tiny_file(), "--variants", str(tmp_path / "mine.json"), "train.seed=0,1")


def test_variants__that_are_shipped_fit_every_option_file_of_its_kind(monkeypatch):
    monkeypatch.setattr("utils.config.cli.missing_files", lambda *_, **__: [])
    with pytest.raises(UserError, match=r"ablation\.json: is not an option file; .* --variants"):
        jobs("--opt", "ablation.json")
    for base in ("demo.json", "camvid.json", "cocostuff.json"):
        found = jobs("--opt", base, "--variants", "ablation.json")
        assert len({job.options.wandb.name for job in found}) == len(found) > 8
        unzoned = next(job.options for job in found if job.setting == "no ambiguous zone")
        assert unzoned.training_coeff.initialcrit_amb >= unzoned.training_coeff.initialcrit_pos


@pytest.mark.parametrize(
    "words",
    [["--explain", "0", "--patch", "1"], ["--explain", "0", "--measure-sets"], ["--crf"], ["--images", "a"]],
)
def test_evaluation_flags__that_do_not_go_together(tiny_file, words):
    with pytest.raises(SystemExit):
        jobs("--opt", tiny_file(), *words, training=False)


@pytest.mark.parametrize("code", [signal.SIGUSR1, signal.SIGTERM])
def test_guarded__other_processes_leave_sigusr1_to_the_first(monkeypatch, code):
    """srun ends all processes as soon as one fails, and the first one has to save."""

    def main():
        raise Interrupted(128 + code)

    assert guarded(main) == 128 + code
    monkeypatch.setenv("RANK", "1")
    assert guarded(main) == (0 if code == signal.SIGUSR1 else 128 + code)


def test_opt__is_needed_unless_a_checkpoint_is_named():
    for words, training in (([], True), (["--checkpoint", "a.ckpt"], True), ([], False)):
        with pytest.raises(SystemExit):
            jobs(*words, training=training)
    assert len(jobs("--export", "out.pth", "--checkpoint", "a.ckpt", training=False)) == 1


def test_guarded__names_the_file_on_a_full_disk(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left", "a.png")

    assert guarded(main) == 2
    assert capsys.readouterr().err == "error: a.png: No space left; fix this, then rerun with --resume\n"


def test_print_options__is_an_option_file(capsys, tmp_path):
    run.main(["--opt", "demo.json", "train.seed=7", "--print-options"])
    (tmp_path / "again.json").write_text(capsys.readouterr().out)
    assert jobs("--opt", str(tmp_path / "again.json")) == jobs("--opt", "demo.json", "train.seed=7")


def test_words__home_and_both_spellings_of_data_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    for words in (["--data-path=~/a"], ["--data_path", "~/a"], ["dataset.data_path=~/a"]):
        (job,) = jobs("--opt", "camvid.json", *words, "model.pretrained.pretrained_weights=null")
        assert job.options.dataset.data_path == f"{tmp_path}/a"
    with pytest.raises(UserError, match=r"data_path is .*/b: no such folder"):
        jobs("--opt", "camvid.json", "--data_path", "~/b")
    with pytest.raises(UserError, match=r"^1 mistake in .*\n.*data_path .*is not an option"):
        jobs("--opt", "camvid.json", "data_path=~/a", "model.pretrained.pretrained_weights=null")


@pytest.mark.parametrize("program", [run, evaluation, crop_datasets, dataset_download])
def test_help__ends_with_examples_and_where_to_read_on(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    *_, examples, where = capsys.readouterr().out.strip().split("\n\n")
    assert examples.count(f"python {program.__name__.replace('.', '/')}.py") == 3
    assert "README.md" in where
