"""The CUDA path from end to end, and what it waits for, on the null GPU (see tests/README.md)."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_tiny
from tests.cuda.build import build, environment, missing
from tests.cuda.trace import CRF, LOGGED, TRAIN, VALIDATION, pageable_uploads, waits
from utils.config.loading import REPOSITORY

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SCALER = "torch/amp/grad_scaler.py"  # reads found_inf before it changes the weights
WAITS = {TRAIN: 1, LOGGED: 2, VALIDATION: 1}
STEPS, STOP_AT = 8, 6  # 2 epochs of 4 steps
TRAINED = {
    "fp16": ["eval.is_crf=true"],
    "bf16": ["train.precision=bf16"],
    "fp32": ["train.precision=fp32"],
    "deterministic": ["train.deterministic=true"],
    "ram": ["dataset.cache_features=ram"],
    "disk": ["dataset.cache_features=disk"],
    "second": ["gpu_ids=[1]"],
}


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """Runs cases in one process on the null GPU, so that the process of the tests stays on the CPU."""
    folder = tmp_path_factory.mktemp("cuda")
    library = build(folder)

    def run_all(cases):
        (folder / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run(
            [sys.executable, "-m", "tests.cuda.drive", folder / "cases.json", folder / "results.json"],
            cwd=REPOSITORY, env=environment(library, devices=2), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((folder / "results.json").read_text())

    return run_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(drive, folder):
    settings = {
        "train__epoch": 2, "train__print_freq": 3, "train__valid_freq": 4, "dataloader__val_batch_size": 2,
        "eval__batch_size": 2, "eval__pictures": 1, "eval__is_crf": False,
    }  # fmt: skip
    options = write_tiny(folder, **settings)
    (folder / "photographs").mkdir()
    noise = np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photographs/noise.png")

    def case(program, name, *words, **more):
        common = ["--opt", options, "--debug", f"wandb.name={name}"]
        return {"program": program, "words": [*common, *words], **more}

    cases = {name: case("run", name, *words) for name, words in TRAINED.items()}
    cases["second"]["ballast"] = 2**30
    checkpoint = ("--checkpoint", str(folder / "output/fp16/best.ckpt"))
    masks = ("--images", str(folder / "photographs"), "--out", str(folder / "masks"), "--crf", "--tile", "32")
    cases |= {
        "stopped": case("run", "stopped", stop_at=STOP_AT),
        "resumed": case("run", "stopped", "--resume"),
        "mutant": case("run", "mutant", mask_on_cpu=True),
        "evaluated": case("eval", "evaluated", *checkpoint),
        "images": case("eval", "images", *checkpoint, *masks),
        "explained": case("eval", "explained", *checkpoint, "--explain", "0"),
        "measured": case("eval", "measured", *checkpoint, "--measure-sets"),
    }
    return drive(cases)


def trained(result):
    """The number of training steps."""
    return sum(step["phase"] in (TRAIN, LOGGED) for step in result["steps"])


def steady(steps, phase):
    """The steps of a phase without the first ones, which may upload constants."""
    if phase in (TRAIN, LOGGED):
        trained = [step for step in steps if step["phase"] in (TRAIN, LOGGED)][3:]
        return [step for step in trained if step["phase"] == phase]
    # the first batch also keeps the predictions that are drawn
    return [step for step in steps if step["phase"] == phase and step["batch"] > 0]


def lines(events):
    """Events as lines of a message."""
    shown = (f"  {call}, {memory}, {size} B: {line} <- {by}" for call, memory, size, line, by in events)
    return "\n".join(["", *shown])


@pytest.mark.parametrize("name", TRAINED)
def test_training__runs_to_its_end(results, folder, name):
    assert results[name]["error"] is None, results[name]["error"]
    output = folder / "output" / name
    written = {"best.ckpt", "last.ckpt", "metrics.csv", "metrics.json", "report.html", "explanation.png"}
    assert written <= {path.name for path in output.iterdir()}
    phases = [step["phase"] for step in results[name]["steps"]]
    assert trained(results[name]) == STEPS
    metrics = json.loads((output / "metrics.json").read_text())
    refined = "eval.is_crf=true" in TRAINED[name]
    assert (phases.count(CRF), metrics["after_crf"] is not None) == ((3, True) if refined else (0, False))


def test_stopped_run__resumes(results):
    assert results["stopped"]["error"].startswith("Stopped")
    assert results["resumed"]["error"] is None, results["resumed"]["error"]
    before, after = trained(results["stopped"]), trained(results["resumed"])
    assert STOP_AT <= before < STEPS
    assert before + after == STEPS


@pytest.mark.parametrize("name", ["evaluated", "images", "explained", "measured"])
def test_eval_py__runs_to_its_end(results, name):
    assert results[name]["error"] is None, results[name]["error"]
    assert results[name]["peaks"][0] > 0


def test_gpu_ids__uses_and_measures_the_named_device(results):
    """The peak memory of a run does not include what was freed on its device before."""
    others, used = results["second"]["peaks"]
    assert others == 0
    assert used > 0
    assert 0 < results["second"]["result"][0]["peak_memory_gib"] < 0.5


def test_dropout_mask_on_the_cpu__fails(results):
    assert "all tensors to be on the same device" in results["mutant"]["error"]
    assert "mask_on_cpu" in results["mutant"]["error"]


@pytest.mark.parametrize("phase", WAITS)
@pytest.mark.parametrize("name", TRAINED)
def test_step__waits_for_the_device_only_where_it_must(results, name, phase):
    steps = steady(results[name]["steps"], phase)
    assert steps
    for step in steps:
        found = waits(step)
        foreign = [event for event in found if SCALER not in event[4]]
        allowed = WAITS[phase] - (phase != VALIDATION)
        assert len(found) <= WAITS[phase], f"{phase}, batch {step['batch']}, waits at:{lines(found)}"
        assert len(foreign) <= allowed, f"{phase}, batch {step['batch']}, waits at:{lines(foreign)}"


@pytest.mark.parametrize("phase", WAITS)
def test_step__uploads_from_pinned_memory(results, phase):
    for step in steady(results["fp16"]["steps"], phase):
        assert not (found := pageable_uploads(step)), f"{phase}, batch {step['batch']}:{lines(found)}"


def test_step__launches_few_kernels(results):
    for step in steady(results["fp16"]["steps"], TRAIN):
        assert step["launches"] <= 460


@pytest.mark.slow
def test_step_at_coco_shape__launches_and_memory(drive):
    """ViT-S/8, 64 images of 224 pixels, 3,136 anchors in one chunk."""
    found = drive({"coco": {"program": "coco", "words": [3136]}})["coco"]
    assert found["error"] is None, found["error"]
    beyond_weights = (found["peaks"][0] - found["result"]["weights"]) / 2**30
    assert beyond_weights <= 5
    assert found["steps"][-1]["launches"] <= 1000
