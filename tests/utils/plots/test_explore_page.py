"""The page of eval.py --explore gives the numbers of --explain, in node and in a browser."""

import base64
import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional as F

from loss.propagation import Boundaries
from model.explain import explain
from model.explore import COEFFICIENTS, write_page
from model.set_quality import set_quality
from tests.conftest import TINY
from utils.config.cli import parse_overrides
from utils.config.loading import build_options
from utils.files import REPOSITORY
from utils.vision.labels import IGNORE

GRID, IMAGES = (5, 6), 3
EVIL = '</script><script>alert("x")</script>'
SETTINGS = [  # Phi_0, Psi_0, T and both sigmas
    (0.55, 0.2, 2, 3.0, 3.0),
    (0.8, 0.3, 0, 3.0, 3.0),
    (0.6, 0.1, 3, float("inf"), 0.5),
    (0.4, 0.3, 4, 1.0, float("inf")),
    (0.3, 0.6, 1, 2.0, 2.0),  # a patch in both sets is positive
    (0.999, -1.0, 3, 1.0, 1.0),  # the anchor alone
    (-2.0, 2.0, 1, 1.0, 1.0),  # beyond the sliders, only positives
]
ANCHORS = [0, 17, 44, 89]


@pytest.fixture(scope="module")
def bank():
    """Patches about four directions, (N, D)."""
    drawn = torch.Generator().manual_seed(0)
    centres = 1.2 * torch.randn(4, 22, generator=drawn)
    rows = centres[torch.randint(4, (90,), generator=drawn)] + torch.randn(90, 22, generator=drawn)
    return F.normalize(rows, dim=1)


@pytest.fixture(scope="module")
def classes():
    found = torch.randint(4, (90,), generator=torch.Generator().manual_seed(1))
    found[::11] = IGNORE
    return found


@pytest.fixture(scope="module")
def page(bank, classes, tmp_path_factory):
    """The page of three images with labels and a hostile name."""
    path = tmp_path_factory.mktemp("page") / "explore.html"
    images = torch.randint(256, (IMAGES, 3, 40, 48), dtype=torch.uint8)
    ids = base64.b64encode(classes.to(torch.uint8).numpy().tobytes()).decode()
    labels = {"names": [EVIL, "b", "c", "d"], "colours": [(9, 9, 9)] * 4, "ids": ids}
    layers = {"sets": {"colours": [(0, 0, 9), (9, 9, 0), (9, 0, 0)]}, "labels": labels}
    names = ['a"><img src="x">', "b.png", "c.png"]
    options = build_options(TINY | {"training_coeff.sigma_pos": float("inf")}, source="a test")
    write_page(path, bank, images, names, layers=layers, grid=GRID, options=options)
    return path


def expected(bank, classes, anchor, setting):
    """t, Phi, Psi, m and the sizes of the sets at T by --explain; precision, recall and purity."""
    image, patch = divmod(anchor, GRID[0] * GRID[1])
    rolled = bank.view(IMAGES, -1, bank.shape[1]).roll(-image, 0).flatten(0, 1)  # its image is the first
    boundaries = Boundaries(*setting)
    last = explain(rolled, divmod(patch, GRID[1]), grid=GRID, boundaries=boundaries).numbers()[-1]
    del last["in_image"]
    sums = set_quality(bank, classes, anchors=torch.tensor([anchor]), boundaries=boundaries)[-1, :, :3]
    shares = [float(total) if count else None for total, count in sums.T]  # None: not defined
    return [*last.values(), *shares]


def assert_equal(found, wanted):
    assert found[:1] + found[4:7] == wanted[:1] + wanted[4:7]  # exactly
    assert found[1:4] == pytest.approx(wanted[1:4], abs=1e-4)
    for share, right in zip(found[7:], wanted[7:], strict=True):
        assert share == (right if right is None else pytest.approx(right, abs=6e-4))


def test_node__numbers_of_explain(page, bank, classes):
    if (node := shutil.which("node")) is None:
        pytest.skip("no node on this machine")
    (content,) = re.findall(r'id="content">(.*?)</script>', page.read_text(encoding="utf-8"))
    jobs = [(anchor, setting) for anchor in ANCHORS for setting in SETTINGS]
    given = json.dumps([(anchor, dict(zip(COEFFICIENTS, setting, strict=True))) for anchor, setting in jobs])
    driver = f"""
        const content = {content}, bank = await unpackFeatures(content.features);
        const classes = bytes(content.layers.labels.ids);
        console.log(JSON.stringify({given}.map(([anchor, coefficients]) => {{
          const steps = propagate(bank, content.features.count, anchor, coefficients);
          const {{ phi, psi, moved, zones }} = steps.at(-1);
          const counts = countsOf(zones).subarray(0, 3), shares = quality(zones, classes, anchor);
          return [steps.length - 1, phi, psi, moved, ...counts, ...shares];
        }})));"""
    script = (REPOSITORY / "utils/plots/explore.js").read_text(encoding="utf-8") + driver
    command = [node, "--input-type=module"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (anchor, setting), found in zip(jobs, json.loads(done.stdout), strict=True):
        assert_equal(found, expected(bank, classes, anchor, setting))


DRIVER = """
async function drive(jobs) {
  const frame = document.querySelector("iframe"), found = [];
  const page = await new Promise((resolve) => {
    const timer = setInterval(() => {
      if (!frame.contentDocument?.querySelector("#steps td")) return;
      clearInterval(timer);
      resolve(frame.contentDocument);
    }, 20);
  });
  const { MouseEvent, KeyboardEvent, Event } = frame.contentWindow, find = (id) => page.getElementById(id);
  const images = page.querySelectorAll(".patches");
  const numbers = () => [...find("steps").rows].at(-1).innerText.split("\\t");
  const press = (image, key) => image.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  const first = { numbers: numbers(), words: find("words").textContent };
  for (const [image, row, column, setting] of jobs) {
    const area = images[image].getBoundingClientRect();
    const clientX = area.left + (column + 0.5) / 6 * area.width;
    const clientY = area.top + (row + 0.5) / 5 * area.height;
    images[image].dispatchEvent(new MouseEvent("click", { clientX, clientY }));
    for (const [key, position] of Object.entries(setting)) {
      find(key).value = position;
      find(key).dispatchEvent(new Event("input"));
    }
    found.push({ numbers: numbers(), words: find("words").textContent });
  }
  press(images[1], "Enter");
  press(images[1], "ArrowUp");
  press(images[1], "ArrowUp");
  press(images[1], "ArrowLeft");
  const moved = { where: find("where").textContent, numbers: numbers() };
  find("play").click();
  const played = [find("time").textContent];
  await new Promise((resolve) => setTimeout(resolve, 3000));
  played.push(find("time").textContent, find("play").textContent);
  page.querySelector("input[value=labels]").click();
  const labels = find("names").innerText, counts = find("counts").innerText;
  const shape = [page.documentElement.scrollWidth, page.querySelectorAll("[tabindex='0']").length];
  document.body.textContent = JSON.stringify({ first, found, moved, played, labels, counts, shape });
}
"""


def in_browser(page, jobs, tmp_path):
    """What the driver finds in the page, which is 390 pixels wide."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    source = html.escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe style="width: 390px; height: 844px; border: 0" srcdoc="{source}"></iframe>'
    outer = tmp_path / "outer.html"
    script = f"<script>{DRIVER}\ndrive({json.dumps(jobs)});</script>"
    outer.write_text(f'<meta charset="utf-8"><body>{frame}{script}', encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, outer.as_uri()], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    (body,) = re.findall(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    return json.loads(html.unescape(body))


def number(cell):
    if cell == "–":
        return None
    return float(cell[:-1]) / 100 if cell.endswith("%") else float(cell)


def slider_positions(setting):
    phi, psi, steps, *sigmas = setting
    logs = [2.01 if sigma == float("inf") else round(math.log10(sigma), 2) for sigma in sigmas]
    return dict(zip(COEFFICIENTS, (phi, psi, steps, *logs), strict=True))


def test_browser__numbers_of_explain_by_clicks_sliders_and_keys(page, bank, classes, tmp_path):
    chosen = [(anchor, setting) for anchor in ANCHORS for setting in SETTINGS[:5]]
    jobs = [
        (anchor // 30, anchor % 30 // 6, anchor % 6, slider_positions(setting)) for anchor, setting in chosen
    ]
    seen = in_browser(page, jobs, tmp_path)
    stored = build_options(TINY, source="a test").training_coeff
    opened = [getattr(stored, key) for key in COEFFICIENTS[:3]] + [float("inf"), stored.sigma_amb]
    numbers = [number(cell) for cell in seen["first"]["numbers"]]
    assert_equal(numbers, expected(bank, classes, GRID[0] // 2 * GRID[1] + GRID[1] // 2, opened))
    assert "training_coeff.sigma_pos=inf" in seen["first"]["words"]
    for (anchor, setting), found in zip(chosen, seen["found"], strict=True):
        numbers = [number(cell) for cell in found["numbers"]]
        assert_equal(numbers, expected(bank, classes, anchor, setting))
        assert parse_overrides(found["words"].split())[0] == {
            f"training_coeff.{key}": [value] for key, value in zip(COEFFICIENTS, setting, strict=True)
        }
    # the anchor 89, row 4 and column 5, was placed in the second image and moved up twice and to the left
    assert seen["moved"]["where"].startswith("row 2, column 4 of b.png")
    moved = [number(cell) for cell in seen["moved"]["numbers"]]
    assert_equal(moved, expected(bank, classes, 30 + 2 * 6 + 4, chosen[-1][1]))
    assert seen["played"] == ["0", "1", "Play"]  # T is 1
    assert EVIL in seen["labels"]
    assert f"positives {moved[4]:.0f} (" in seen["counts"]
    width, focusable = seen["shape"]
    assert width <= 390
    assert focusable == IMAGES
