import re

import pytest

import run
from model.monitoring import SetWatch, sets_warning


def scalars(positives=20.0, negatives=400.0, alone=0.1):
    return {"num_positives": positives, "num_negatives": negatives, "without_positives": alone}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (scalars(), ""),
        (scalars(positives=510.0), "51.0% of the patches are positives"),
        (scalars(negatives=9.0), "0.90% of the patches are negatives"),
        (scalars(alone=0.6), "60% of the anchors have no positive"),
        ({"total_loss": 1.0}, ""),  # another loss
    ],
)
def test_degenerate_sets__are_reported_once_after_a_quarter(found, words, capsys):
    watch, printed = SetWatch(), []
    for _ in range(8):
        watch.add(found, patches=1000, logged_steps=8)
        printed.append(capsys.readouterr().out)
    printed = [" ".join(text.split()) for text in printed]
    assert [words in text for text in printed] == [not words or k == 1 for k in range(8)]
    assert words in sets_warning([found, {"images_per_s": 1.0}], patches=1000)
    assert all("training_coeff.initialcrit_amb" in text and "--suggest" in text for text in printed if text)


def test_degenerate_sets__a_run_reports_them_again_at_its_end(tiny_file, tmp_path, capsys):
    words = ["training_coeff.initialcrit_pos=-1", "training_coeff.initialcrit_amb=-1", "train.print_freq=1"]
    run.main(["--opt", tiny_file(), *words, "eval.is_crf=false"])
    start, end = capsys.readouterr().out.split("trained in")
    assert "warning: training learns little" in start
    assert "warning: training learns little" in end
    assert "--measure-sets" in end  # in one piece
    shares = [re.search(r"([\d.]+)% of the patches are positives", text)[1] for text in (start, end)]
    assert shares[0] == shares[1]
    assert "training learns little" in (tmp_path / "output/tiny/report.html").read_text()
