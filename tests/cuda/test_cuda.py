"""The CUDA path from end to end, and what it waits for, on the null GPU (see tests/README.md)."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import METHODS, write_tiny
from tests.cuda.build import missing, run_cases
from tests.cuda.drive import CRF, LOGGED, TRAIN, VALIDATION
from utils.vision.crf import crf_missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

STEPS, STOP_AT = 8, 6  # 2 epochs of 4 steps
SETTINGS = {"train__epoch": 2, "train__print_freq": 3, "train__valid_freq": 4, "eval__is_crf": False}
SETTINGS |= {"dataloader__val_batch_size": 2, "eval__batch_size": 2, "eval__pictures": 0}
PICTURES = "eval.pictures=1"  # figures take half of the time of such a run
OTHERS = {name: [f"{key}={value}" for key, value in changed.items()] for name, changed in METHODS.items()}
TRAINED = {
    "deterministic": ["train.deterministic=true"],  # first: torch 2.6 reads cuBLAS's setting only once
    "fp16": [PICTURES, *([] if crf_missing() else ["eval.is_crf=true"])],
    "bf16": ["train.precision=bf16"],
    "fp32": ["train.precision=fp32"],
    "ram": [PICTURES, "dataset.cache_features=ram"],
    "disk": ["dataset.cache_features=disk"],
    "second": ["gpu_ids=[1]"],
    **OTHERS,
    **{f"deterministic_{name}": ["train.deterministic=true", *words] for name, words in OTHERS.items()},
}
REFINED = [] if crf_missing() else ["--crf"]  # the CRF in torch needs a device that computes
SCALER = "torch/amp/grad_scaler.py"  # reads found_inf before the optimizer's step
WAITS = {TRAIN: [SCALER], LOGGED: [SCALER, "on_train_batch_end"], VALIDATION: []}  # where a step waits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_runs")


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """All cases, run in another process: this one has no GPU."""
    options = write_tiny(folder, **SETTINGS)
    (folder / "photographs").mkdir()
    noise = np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photographs/noise.png")

    def case(program, name, *words, **more):
        common = ["--opt", options, "--debug", f"wandb.name={name}"]
        return {"program": program, "words": [*common, *words], **more}

    cases = {name: case("run", name, *words) for name, words in TRAINED.items()}
    cases["second"]["freed"] = 2**30
    checkpoint = ("--checkpoint", str(folder / "output/fp16/best.ckpt"))
    masks = ("--images", str(folder / "photographs"), "--out", str(folder / "masks"), "--tile", "32")
    cases |= {
        "stopped": case("run", "stopped", stop_at=STOP_AT),
        "resumed": case("run", "stopped", "--resume"),
        "mutant": case("run", "mutant", mask_on_cpu=True),
        "evaluated": case("eval", "evaluated", *checkpoint),
        "images": case("eval", "images", *checkpoint, *masks, *REFINED),
        "explained": case("eval", "explained", *checkpoint, "--explain", "0"),
        "measured": case("eval", "measured", *checkpoint, "--measure-sets"),
    }
    return run_cases(cases, tmp_path_factory.mktemp("cuda"), devices=2)


def phases(result, *wanted):
    return [step for step in result["steps"] if step["phase"] in wanted]


def steady(result, phase):
    """Steps of a phase without the first, which may upload constants and keep predictions to be drawn."""
    if phase == VALIDATION:
        return [step for step in phases(result, VALIDATION) if step["batch"] > 0]
    return [step for step in phases(result, TRAIN, LOGGED)[3:] if step["phase"] == phase]


def listed(step, events):
    shown = (f"{call}, {memory}: {line} <- {caller}" for call, memory, _, line, caller in events)
    return "\n  ".join([f"{step['phase']}, batch {step['batch']}:", *shown])


@pytest.mark.parametrize("name", TRAINED)
def test_training__runs_to_its_end(results, folder, name):
    assert results[name]["error"] is None, results[name]["error"]
    output = folder / "output" / name
    written = {"best.ckpt", "last.ckpt", "metrics.csv", "metrics.json", "report.html"}
    drawn = {"explanation.png", "predictions.png"} if PICTURES in TRAINED[name] else set()
    assert written | drawn <= {path.name for path in output.iterdir()}
    assert len(phases(results[name], TRAIN, LOGGED)) == STEPS
    metrics = json.loads((output / "metrics.json").read_text())  # its scores count memory that nothing wrote
    refined = metrics["after_crf_missing"] is None
    assert refined == ("eval.is_crf=true" in TRAINED[name]) == bool(phases(results[name], CRF))


def test_stopped_run__resumes(results):
    assert results["stopped"]["error"].startswith("Stopped")
    assert results["resumed"]["error"] is None, results["resumed"]["error"]
    before, after = (len(phases(results[name], TRAIN, LOGGED)) for name in ("stopped", "resumed"))
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
    assert "crit * mask" in results["mutant"]["error"]


@pytest.mark.parametrize("phase", WAITS)
@pytest.mark.parametrize("name", TRAINED)
def test_step__waits_for_the_device_only_where_it_must(results, name, phase):
    scaled = name not in ("bf16", "fp32")
    allowed = [place for place in WAITS[phase] if scaled or place != SCALER]
    assert steady(results[name], phase)
    for step in steady(results[name], phase):
        waits = [event for event in step["events"] if not event[0].startswith("cudaMemcpyAsync")]
        assert len(waits) == len(allowed), listed(step, waits)
        assert all(place in event[4] for place, event in zip(allowed, waits, strict=True)), listed(
            step, waits
        )


@pytest.mark.parametrize("phase", WAITS)
@pytest.mark.parametrize("name", ["fp16", "ram", "stego", "hp"])
def test_step__uploads_from_pinned_memory(results, name, phase):
    """A copy from pageable memory blocks the host, also if `non_blocking`."""
    for step in steady(results[name], phase):
        uploads = [event for event in step["events"] if event[0].endswith("to device")]
        pageable = [event for event in uploads if event[1] == "pageable"]
        assert not pageable, listed(step, pageable)


def test_step__launches_few_kernels(results):
    """422; 440 if frozen weights are cast in each step."""
    assert max(step["launches"] for step in steady(results["fp16"], TRAIN)) <= 430


@pytest.mark.slow
@pytest.mark.parametrize(("eager", "launches"), [("0", 900), ("1", 930)])
def test_step_at_coco_shape__launches_and_memory(tmp_path, monkeypatch, eager, launches):
    """ViT-S/8, 64 images of 224 pixels, 3,136 anchors in one chunk."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", eager)
    case = {"program": "coco", "words": [3136]}
    found = run_cases({"coco": case}, tmp_path, devices=1)["coco"]
    assert found["error"] is None, found["error"]
    beyond_weights = (found["peaks"][0] - found["result"]["weights"]) / 2**30
    assert beyond_weights <= 5
    assert found["steps"][-1]["launches"] <= launches
