"""Untrusted and truncated files: reading them runs no code and gives an error that names the file."""

import os
import pickle

import pytest
import torch
from PIL import Image
<<<<<<< HEAD
from safetensors.torch import save_file

from model.checkpoint import read_checkpoint
from model.weights import read_state
from utils.config.loading import load_options
from utils.errors import UserError
from utils.vision.images import open_image


class MakesFolder:
    """Unpickling it makes a folder."""
=======
from safetensors.torch import save as save_tensors

from dataset.base import classes_of
from dataset.image_folder import ImageFolder
from dataset.image_folder import labels as directory_labels
from model import build_module
from model.checkpoint import read_checkpoint, restore
from model.module import CHECKPOINT_ENTRY
from model.weights import clean_state, load_strictly, read_state
from utils.config.cli import parse_overrides
from utils.config.loading import SCHEMA, build_options, flatten, load_options
from utils.config.options import DatasetOptions, Options
from utils.errors import UserError
from utils.plots.mask_ids import read_names
from utils.training.checkpointing import Progress, read_progress
from utils.vision.images import open_image, open_label
from utils.vision.labels import IGNORE, LabelSpace

SECONDS = 10  # that one input may take
MEMORY = 4 * 2**30  # bytes that reading may add to the process
LABELS = LabelSpace.with_spread_colours(("a", "b", "c"))
SIZE = (12, 8)  # width, height
PIXELS = np.random.default_rng(0).integers(0, 3, (SIZE[1], SIZE[0])).astype(np.uint8)


def written(save):
    """The bytes that a function writes into a file."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def saved(content):
    """The bytes of a checkpoint."""
    return written(lambda file: torch.save(content, file))


def pictures():
    """Ending and bytes of images of many formats and modes."""
    grey = Image.fromarray(PIXELS * 80)
    modes = [("PNG", m) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    modes += [("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P")]
    modes += [("TIFF", mode) for mode in ("L", "CMYK", "F", "I;16")]
    found = []
    for form, mode in modes:
        deep = Image.fromarray(PIXELS.astype(np.uint16) * 9000)
        image = deep if mode == "I;16" else grey.convert(mode)
        found.append((".png", written(lambda file, i=image, f=form: i.save(file, f))))
    bomb = bytearray(written(lambda file: grey.save(file, "PNG")))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)  # what the header claims
    return [*found, (".png", bytes(bomb))]


def checkpoints(module):
    """Ending and bytes of checkpoints, whole and with odd entries."""
    state = module.state_dict()
    name = next(iter(state))
    states = [
        state,
        {name: state[name]},
        state | {name: state[name].to(torch.complex64)},
        state | {name: torch.full_like(state[name], float("nan"))},
        state | {name: state[name].to_sparse()},
        {5: 6},
    ]
    abouts = [{"class_names": LABELS.names}, {}, {"class_names": 5}, {"class_names": [5]}, 7]
    contents = [{"state_dict": s, CHECKPOINT_ENTRY: a} for s in states for a in abouts]
    return [(".ckpt", written(lambda file, c=c: torch.save(c, file))) for c in contents] + [
        (".ckpt", written(lambda file: torch.save(contents[0], file, _use_new_zipfile_serialization=False)))
    ]


@st.composite
def damaged(draw, originals):
    """Ending and bytes of a file after up to four changes, or as it is."""
    ending, content = draw(st.sampled_from(originals))
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        change = draw(st.sampled_from(("flip", "cut", "extend", "splice", "zero", "swap")))
        place = draw(st.integers(0, max(0, min(len(content) - 1, 2**14))))
        place = max(0, len(content) - 1 - place) if draw(st.booleans()) else place
        length = draw(st.integers(1, 64))
        if change == "flip" and content:
            content[place] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del content[place:]
        elif change == "extend":
            content += draw(st.binary(max_size=64))
        elif change == "splice":
            content[place:place] = draw(st.binary(max_size=64))
        elif change == "zero":
            content[place : place + length] = bytes(len(content[place : place + length]))
        elif change == "swap":
            content[:place], content[place:] = content[place:], content[:place]
    return ending, bytes(content)


WORDS = st.text(max_size=20) | st.sampled_from(
    ["${wandb.name}", "${", "???", "inf", "nan", "x" * 5000, "a\0b", "\ud800", "5" * 5000, "${oc.env:NONE}"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*SCHEMA, "base", "model", "n_classes", "classes", "ignore", "0"]) | WORDS
TREES = st.dictionaries(KEYS, VALUES, max_size=5).map(lambda tree: (".json", json.dumps(tree).encode()))
ODD_JSON = st.sampled_from(
    [b"\xef\xbb\xbf{}", b"[" * 10**5, b'{"a":' * 10**5, '{"train": {}}'.encode("utf-16"), b"", b"{}",
     b"\xff\xfe", b"[1]", b"1e999", b'{"train": 5, "train": {"seed": 1}}', b"9" * 10**5]
).map(lambda content: (".json", content))  # fmt: skip
VALID_JSON = damaged([(".json", Path(__file__).parent.parent.joinpath("json/demo.json").read_bytes())])
JSON = TREES | ODD_JSON | VALID_JSON


def read_picture(path):
    image = open_image(path)
    assert (image.mode, min(image.size) > 0) == ("RGB", True)


def read_label(path):
    label = open_label(path, SIZE)
    assert (label.mode, label.size) == ("L", SIZE)


def read_directory(path):
    """The label as a data set reads it, values outside the rule included."""
    root = path.parent / "directory"
    for folder in ("imgs/train", "labels/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(root / "imgs/train/fuzzed.png")
    (root / "labels/train/fuzzed.png").write_bytes(path.read_bytes())
    source = ImageFolder(DatasetOptions(data_type="directory", data_path=str(root), n_classes=2), "train")
    classes = classes_of(source.read(0).label, source, 0)
    assert classes.shape == PIXELS.shape
    assert np.isin(classes, (0, 1, IGNORE)).all()


def read_options(path):
    assert isinstance(load_options(path, check_files=True), Options)


def read_classes(path):
    root = path.parent / "classes"
    root.mkdir(exist_ok=True)
    (root / "classes.json").write_bytes(path.read_bytes())
    directory_labels(DatasetOptions(data_type="directory", data_path=str(root), n_classes=2))


def read_mask_names(path):
    assert all(isinstance(name, str) for name in read_names(str(path)).values())


@contextmanager
def limits():
    """Time and memory for one input; what goes beyond raises in it."""

    def late(*_):
        pytest.fail(f"took more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(strategy, read, *, folder, count):
    """Reads `count` inputs; all but a value or our error that names the file fails."""

    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def each(file):
        ending, content = file
        path = folder / f"fuzzed{ending}"
        path.write_bytes(content)
        with limits():
            try:
                read(path)
                message = path.name
            except UserError as error:
                message = str(error)
        words = ("fuzzed", "classes.json", "labelled_train.txt", "--names", "dataset.n_classes")
        assert any(word in message for word in words), message

    each()


def kinds(module):
    """Name -> what is fuzzed and how it is read."""

    def read_module(path):
        restore(module, read_checkpoint(path))

    def read_weights(path):
        load_strictly(module, clean_state(read_state(path), 2), str(path))

    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    progress = {"progress": Progress(step=3).as_entry()}
    resumable = [(".ckpt", saved(progress))]
    resumable += [(".ckpt", saved({"progress": odd})) for odd in (3, {"step": "x"})]
    weights = [(".safetensors", save_tensors(state))]
    weights += [(".pth", written(lambda file: torch.save({"teacher": state}, file)))]
    return {
        "options": (JSON, read_options),
        "classes": (JSON, read_classes),
        "names": (JSON, read_mask_names),
        "image": (damaged(pictures()), read_picture),
        "label": (damaged(pictures()), read_label),
        "directory": (damaged(pictures()), read_directory),
        "checkpoint": (damaged(checkpoints(module)), read_module),
        "weights": (damaged(weights), read_weights),
        "progress": (damaged(resumable), read_progress),
    }


KINDS = (
    *("options", "classes", "names", "image", "label", "directory"),
    *("checkpoint", "weights", "progress"),
)


@pytest.fixture
def module(tiny_options):
    torch.manual_seed(0)
    return build_module(tiny_options(), LABELS)


@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind, module, tmp_path):
    fuzz(*kinds(module)[kind], folder=tmp_path, count=50)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eleven_thousand(kind, module, tmp_path):
    fuzz(*kinds(module)[kind], folder=tmp_path, count=1000)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(KEYS, VALUES).map(lambda pair: f"{pair[0]}={pair[1]}") | WORDS, max_size=3))
def test_command_line(words):
    overrides = parse_overrides(words)
    chosen = {key: values[0] for key, values in overrides.choices.items()}
    try:
        build_options(flatten(chosen), source="the command line")
        message = "the command line"
    except UserError as error:
        message = str(error)
    assert "the command line" in message


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "${nowhere}"])
@pytest.mark.parametrize(
    "key", ["base", "checkpoint", "dataset.data_path", "model.pretrained.pretrained_weights"]
)
def test_names_that_no_file_can_have(key, name, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps({key: name}))
    with pytest.raises(UserError):
        load_options(tmp_path / "odd.json", check_files=True)


class Touch:
    """A pickle of it makes a file when it is loaded in full."""
>>>>>>> dataset

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("read", [read_checkpoint, read_state])
def test_weights__run_no_code(read, form, tmp_path):
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    if form == "plain":
        path.write_bytes(pickle.dumps(MakesFolder(made)))
    else:
        torch.save({"teacher": MakesFolder(made)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"evil\.pth"):
        read(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("a.png", lambda path: Image.new("RGB", (64, 64), "red").save(path), open_image),
        ("a.jpg", lambda path: Image.effect_noise((64, 64), 50).save(path), open_image),
        ("a.ckpt", lambda path: torch.save({"state_dict": {"a": torch.ones(999)}}, path), read_checkpoint),
        ("a.pth", lambda path: torch.save({"a": torch.ones(999)}, path), read_state),
        ("a.safetensors", lambda path: save_file({"a": torch.ones(999)}, path), read_state),
        ("a.json", lambda path: path.write_text('{"train": {"epoch": 3}}'), load_options),
    ],
)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_truncated_file__is_named(name, write, read, kept, tmp_path):
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=name):
        read(path)
