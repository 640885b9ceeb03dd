import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.clustering import adjusted_rand_score

from model.kmeans import assign, clear_size, kmeans, stability

SIZES = (2, 3, 4, 5, 6, 7, 8, 12)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def groups():
    """Rows about six directions, (12 images, 50, 16), and their direction."""
    centres, labels = (
        4 * torch.randn(6, 16, generator=drawn(1)),
        torch.randint(6, (12, 50), generator=drawn(2)),
    )
    return F.normalize(centres[labels] + torch.randn(12, 50, 16, generator=drawn(3)), dim=2), labels


def test_kmeans__finds_separate_groups(groups):
    images, labels = groups
    rows = images.flatten(0, 1)
    centroids = kmeans(rows, 6, drawn())
    assert centroids.norm(dim=1) == pytest.approx(torch.ones(6), abs=1e-5)
    assert adjusted_rand_score(assign(rows, centroids), labels.flatten()) > 0.99


def test_kmeans__more_clusters_than_different_rows():
    centroids = kmeans(F.normalize(torch.ones(5, 3), dim=1), 8, drawn())
    assert centroids.shape == (8, 3)
    assert torch.isfinite(centroids).all()


def test_stability__is_clear_at_the_number_of_groups(groups):
    images, _ = groups
    assert clear_size(SIZES, stability(images, SIZES, drawn())) == 6
    noise = F.normalize(torch.randn(12, 50, 16, generator=drawn()), dim=2)
    assert clear_size(SIZES, stability(noise, SIZES, drawn())) is None


@pytest.mark.parametrize(
    ("agreement", "size"),
    [
        ((0.5, 0.7, 0.9, 0.7, 0.6, 0.5, 0.5, 0.5), 4),  # a peak
        ((0.9, 0.9, 0.9, 0.9, 0.7, 0.5, 0.5, 0.5), 5),  # a knee
        ((0.9, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5), None),  # the first
        ((0.5, 0.6, 0.7, 0.7, 0.8, 0.8, 0.9, 0.9), None),  # the last
        ((0.5, 0.7, 0.9, 0.8, 0.84, 0.5, 0.5, 0.5), None),  # a second one is nearly as good
        ((0.3, 0.5, 0.7, 0.3, 0.3, 0.3, 0.3, 0.3), None),  # low
    ],
)
def test_clear_size(agreement, size):
    assert clear_size(SIZES, agreement) == size
