import numpy as np
import pytest
from scipy.io import loadmat, savemat

from dataset.matfile import CLASSES, read_array

FOURS = np.array([4, 4], "<i4").tobytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", sorted(CLASSES.values()))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 4), (0, 3)])
def test_array__is_what_scipy_reads(tmp_path, kind, shape, compressed):
    drawn = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
    path = tmp_path / "x.mat"
    savemat(path, {"other": [[1.5]], "gt": drawn, "word": "text"}, do_compression=compressed)
    found, expected = read_array(path, "gt"), loadmat(path)["gt"]
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert read_array(path, "word") is None
    assert read_array(path, "nothing") is None


def test_array__stored_in_a_smaller_type_and_in_a_short_element(tmp_path):
    """MATLAB stores doubles that are small whole numbers as bytes, and what fits into a tag there."""
    body = b"".join(
        [
            np.array([6, 8, 6, 0], "<u4").tobytes(),  # flags: double
            np.array([5, 8, 1, 3], "<u4").tobytes(),  # of 1 x 3
            np.array([1 | 2 << 16], "<u4").tobytes() + b"gt\0\0",
            np.array([2 | 3 << 16], "<u4").tobytes() + bytes([7, 8, 9, 0]),
        ]
    )
    path = tmp_path / "x.mat"
    path.write_bytes(b" " * 124 + b"\0\1IM" + np.array([14, len(body)], "<u4").tobytes() + body)
    assert read_array(path, "gt").tolist() == loadmat(path)["gt"].tolist() == [[7.0, 8.0, 9.0]]
    assert read_array(path, "gt").dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "not a MAT-file"),
        (lambda content: content[:-30], "longer than the file"),
        (
            lambda content: content.replace(FOURS, FOURS[:4] + b"\5\0\0\0"),
            r"\(4, 5\), which its 16 bytes",
        ),
    ],
)
def test_array__of_a_damaged_file(tmp_path, change, message):
    path = tmp_path / "x.mat"
    savemat(path, {"gt": np.ones((4, 4), np.uint8)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_array(path, "gt")


def test_array__that_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.matfile.LARGEST", 1000)
    savemat(tmp_path / "x.mat", {"gt": np.ones((400, 400), np.uint8)}, do_compression=True)
    with pytest.raises(ValueError, match="cut short or too large"):
        read_array(tmp_path / "x.mat", "gt")
