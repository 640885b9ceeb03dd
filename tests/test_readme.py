"""The READMEs describe the program: options, option files, commands, links and examples.

`python -m tests.test_readme` rewrites the option table in json/README.md.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
import run
from dataset import crop_datasets, dataset_download
from model.checkpoint import read_checkpoint
from tests.conftest import scalars_of
from utils.config import options, plugins
from utils.config.cli import parse_arguments, plan_jobs
from utils.config.loading import FIELDS, REPOSITORY, allowed, find_option_file, load_options
from utils.errors import UserError
from utils.files import sha256_of

FOLDERS = ("", "json", "dataset", "model", "loss", "tests", "tests/golden")
READMES = [REPOSITORY / folder / "README.md" for folder in FOLDERS]
TEXTS = {path: path.read_text(encoding="utf-8") for path in READMES}
JOINED = re.sub(r"\\\n\s*", "", "\n".join(TEXTS.values()))  # continuation lines joined
OPTIONS = REPOSITORY / "json/README.md"
VARIANTS = {"ablation.json", "methods.json"}
WRITTEN = {  # JSON files that the program writes or reads beside option files
    "metrics.json", "options.json", "provenance.json", "data.json", "classes.json", "other.json",
    "left_out.json", "explain.json", "suggest.json", "legend.json", *VARIANTS,
}  # fmt: skip


def section(path: Path, heading: str) -> str:
    """The text below a heading, up to the next one of the second level."""
    return TEXTS[path].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_readme__is_short_and_its_lines_have_at_most_120_characters():
    assert TEXTS[READMES[0]].count("\n") <= 250
    lines = [line for text in TEXTS.values() for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


def with_option_table(text: str) -> str:
    """json/README.md with the option table of the schema."""
    lines = ["| key | default | meaning | allowed |", "| --- | --- | --- | --- |"]
    for key, field in FIELDS.items():
        lines.append(f"| `{key}` | `{json.dumps(field.default)}` | {field.description} | {allowed(field)} |")
    before, _, rest = text.partition("<!-- options -->\n")
    return before + "\n".join(["<!-- options -->", *lines, ""]) + rest[rest.index("<!-- /options -->") :]


def test_option_table__is_the_schema():
    text = TEXTS[OPTIONS]
    assert text == with_option_table(text), "run python -m tests.test_readme"


def commands(pattern: str) -> list[str]:
    """Every command that matches, in code blocks and in the text, without its comment."""
    return sorted({line.split("#")[0].strip() for line in re.findall(pattern, JOINED)})


PROGRAMS = [line for line in commands(r"python ((?:run|eval)\.py [^\n`&]+)") if "plugins=" not in line]


@pytest.mark.parametrize("line", PROGRAMS)
def test_commands__parse(line, tmp_path, monkeypatch):
    """Flags, keys and option files exist; placeholders stand for existing files and folders."""
    (tmp_path / "w.pth").touch()
    line = re.sub(r"<[a-z]+>", str(tmp_path), line.replace("<weights>", str(tmp_path / "w.pth")))
    program, *words = shlex.split(line)
    monkeypatch.setattr("utils.config.cli.missing_files", lambda *_, **__: [])
    assert plan_jobs(parse_arguments(words, description="", examples="", training=program == "run.py"))


@pytest.mark.parametrize("line", commands(r"python dataset/([^\n`#&]+)"))
def test_preparation_commands__parse(line, tmp_path):
    program, *words = shlex.split(re.sub(r"<[a-z]+>", str(tmp_path), line))
    if program == "dataset_download.py":
        assert dataset_download.parse_arguments(words).root == str(tmp_path)
    else:
        assert program == "crop_datasets.py"
        assert crop_datasets.chosen_options(crop_datasets.parse_arguments(words)).dataset.crop_type


def test_option_files__are_those_in_the_readmes():
    named = set(re.findall(r"[a-z0-9_]+\.json", JOINED)) - WRITTEN
    for name in named:
        load_options(find_option_file(name))
    ours = {path.name for path in (REPOSITORY / "json").rglob("*.json") if not path.stem.endswith("_eval")}
    assert ours - VARIANTS <= named
    assert all(name in JOINED for name in VARIANTS)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links__lead_somewhere(path):
    """Relative links and pictures exist, and so do the headings that they name."""
    text = re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_loss_example__runs():
    (example,) = python_blocks(section(REPOSITORY / "loss/README.md", "Use"))
    found = {}
    exec(example, found)
    assert found["out"].loss > 0


OWN_PARTS = section(REPOSITORY / "model/README.md", "Your own data set, backbone or loss")
QUICK = ["train.epoch=1", "train.print_freq=1", "train.compare_frozen=false", "dataloader.num_workers=0"]
QUICK += ["eval.is_crf=false", "eval.pictures=0", "--debug"]


@pytest.fixture
def own_parts(tmp_path, monkeypatch, own_names):
    """The examples as files in the working folder, and the command lines that use them, by program."""
    for name, example in zip(("loss_only.py", "mine.py"), python_blocks(OWN_PARTS), strict=True):
        (tmp_path / name).write_text(example)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python (\w+\.py .+)", re.sub(r"\\\n\s*", "", OWN_PARTS))
    return [shlex.split(command) for command in commands]


def test_own_loss__is_followed_to_masks(own_parts, tmp_path):
    (_, *train), (_, *write), _ = own_parts
    run.main([*train, *QUICK, "dataset.train_images=32", "dataset.val_images=4"])
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (80, 64), (90, 120, 30)).save(tmp_path / "photographs/a.jpg")
    write = [{"<photographs>": "photographs", "<masks>": "masks"}.get(word, word) for word in write]
    evaluation.main(write)
    assert Image.open("masks/a/mask.png").size == (80, 64)
    plugins._loaded.clear()  # as in a new process
    options.LOSSES.remove("agreement")
    with pytest.raises(UserError, match=r"loss_only\.py; if you trust this file, add --trust-plugins"):
        evaluation.main([word for word in write if word != "--trust-plugins"])


def test_own_parts__train_as_the_readme_says(own_parts, tmp_path):
    """The example is run as it stands: a data set, a backbone and a loss of your own."""
    _, _, (_, *train) = own_parts
    (metrics,) = run.main([*train, *QUICK, "dataset.res=64", "dataset.val_res=64"])
    assert list(metrics["class_iou"]["before_crf"]["cluster"]) == ["rows", "columns"]
    assert metrics["images"] == 64
    assert all(0 < loss < 20 for loss in scalars_of(tmp_path / "output/mine", "supcon_loss"))
    stored = read_checkpoint(tmp_path / "output/mine/best.ckpt").about["plugins"]
    assert stored == {str(tmp_path / "mine.py"): sha256_of(tmp_path / "mine.py")}


def test_own_method__trains_as_the_readme_says(tmp_path, monkeypatch, own_names):
    text = section(REPOSITORY / "model/README.md", "Your own method")
    (example,) = python_blocks(text)
    (tmp_path / "relations.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"python run\.py (.+)", re.sub(r"\\\n\s*", "", text))
    run.main([*shlex.split(command), *QUICK[1:], "dataset.train_images=32", "dataset.val_images=4"])
    losses = scalars_of(tmp_path / "output/relations", "relation_loss")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    OPTIONS.write_text(with_option_table(TEXTS[OPTIONS]), encoding="utf-8")
