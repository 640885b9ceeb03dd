import numpy as np

from dataset.synthetic import NAMES, Synthetic


def test_scenes__are_deterministic_and_differ(tiny_options):
    options = tiny_options().dataset
    first, again, other = Synthetic(options, "train"), Synthetic(options, "train"), Synthetic(options, "val")
    assert np.array_equal(first.read(3).image, again.read(3).image)
    assert np.array_equal(first.read(3).label, again.read(3).label)
    assert not np.array_equal(first.read(3).image, first.read(4).image)
    assert not np.array_equal(first.read(3).image, other.read(3).image)


def test_scenes__every_class_occurs_and_labels_are_known(tiny_options):
    source = Synthetic(tiny_options(dataset__train_images=60).dataset, "train")
    counts = sum(
        np.bincount(np.asarray(source.read(i).label).ravel(), minlength=len(NAMES)) for i in range(60)
    )
    assert len(counts) == len(NAMES)
    assert (counts / counts.sum()).min() > 0.05
