import json

import numpy as np
import pytest

from dataset import build_data
from tests.dataset.files import SIZE, picture, save


@pytest.fixture
def directory(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            save(tmp_path / "imgs" / split / f"{number}.jpg", picture(number))
            label = np.resize([0, 1, 2, 255], (SIZE[1], SIZE[0]))
            save(tmp_path / "labels" / split / f"{number}.png", label)
    about = {"n_classes": 3, "classes": ["a", "b", "c"], "ignore": 255}
    (tmp_path / "classes.json").write_text(json.dumps(about))
    return tmp_path


@pytest.fixture
def data_of(tiny_options):
    def build(data_type, folder, **overrides):
        chosen = {
            "dataloader__batch_size": 1,
            "dataset__data_type": data_type,
            "dataset__data_path": str(folder),
        }
        return build_data(tiny_options(**chosen | overrides))

    return build
