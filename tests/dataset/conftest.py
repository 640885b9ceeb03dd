import pytest

from dataset import build_data
from tests.dataset import miniatures


@pytest.fixture
def coco(tmp_path):
    return miniatures.make_cocostuff(tmp_path)


@pytest.fixture
def cityscapes(tmp_path):
    return miniatures.make_cityscapes(tmp_path)


@pytest.fixture
def potsdam(tmp_path):
    return miniatures.make_potsdam(tmp_path)


@pytest.fixture
def directory(tmp_path):
    return miniatures.make_directory(tmp_path)


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
