"""Which number means what in a mask."""

import json

import pytest

from utils.errors import UserError
from utils.plots.mask_ids import class_ids, cluster_ids, read_names
from utils.vision.labels import LabelSpace

LABELS = LabelSpace(("road", "sky", "tree"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))


def test_clusters__matched_take_their_class_and_others_follow():
    ids = cluster_ids(LABELS, 5, assignment=[2, -1, 0, 1, -1])
    assert ids.of_prediction == (2, 3, 0, 1, 4)
    assert ids.names == ("road", "sky", "tree", "cluster 1", "cluster 4")
    assert ids.palette[:3] == LABELS.palette
    assert len(set(ids.palette)) == 5


def test_clusters__without_labels_keep_their_numbers():
    ids = cluster_ids(LABELS, 4, assignment=None)
    assert ids.of_prediction == (0, 1, 2, 3)
    assert ids.names == ("cluster 0", "cluster 1", "cluster 2", "cluster 3")
    assert ids.palette[:3] == LABELS.palette


def test_clusters__more_than_eight_bits_hold():
    with pytest.raises(UserError, match="300 clusters; a mask of 8 bits holds 256"):
        cluster_ids(LABELS, 300, assignment=None)


def test_classes__are_the_data_sets():
    ids = class_ids(LABELS)
    assert (ids.names, ids.palette, ids.of_prediction) == (LABELS.names, LABELS.palette, (0, 1, 2))


def test_names__from_words_and_from_a_file(tmp_path):
    assert read_names("0=road, 2=a = b") == {0: "road", 2: "a = b"}
    (tmp_path / "names.json").write_text(json.dumps({"1": "sky, blue"}))
    assert read_names(str(tmp_path / "names.json")) == {1: "sky, blue"}
    assert read_names(None) == {}
    ids = class_ids(LABELS).renamed({0: "tree"})
    assert ids.names == ("tree", "sky", "tree")


def test_names__mistakes_come_together():
    with pytest.raises(UserError) as error:
        read_names("0,x=y,1=,2=a,2=b,-1=c")
    assert len(error.value.mistakes) == 5
    with pytest.raises(UserError, match="--names: 3=car: ids are 0 to 2"):
        class_ids(LABELS).renamed({0: "a", 3: "car"})
