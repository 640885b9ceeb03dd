import functools

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import run
from model.compilation import compiled


def with_backend(monkeypatch, backend):
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=backend))


def test_training__compiled_gives_the_same(tiny_file, monkeypatch, capsys):
    """Through the whole of torch.compile but its code generator, which takes minutes here."""
    graphs = []

    def seen(graph, inputs):
        graphs.append(graph)
        return graph.forward

    path = tiny_file(eval__is_crf=False, train__epoch=2)
    (plain,) = run.main(["--opt", path])
    with_backend(monkeypatch, seen)
    (quick,) = run.main(["--opt", path, "train.compile=true"])
    assert quick["valid_loss"] == pytest.approx(plain["valid_loss"], rel=1e-4)
    assert len(graphs) >= 3  # frozen blocks, criterion features, codes
    assert "train.compile" not in capsys.readouterr().out


def test_compiled__what_fails_to_compile_runs_as_it_is_and_says_why(monkeypatch, capsys):
    calls = []

    def refuses(graph, inputs):
        calls.append(graph)
        raise RuntimeError("no such instruction\nand a long story")

    with_backend(monkeypatch, refuses)
    twice = compiled(lambda x: 2 * x, "doubles")
    for _ in range(2):
        assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))
    assert len(calls) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("train.compile: doubles run as they are (")
    assert "no such instruction" in printed
    assert printed.count("\n") == 1


def test_compiled__where_there_is_no_compiler_at_all(monkeypatch, capsys):
    def unsupported(*_arguments, **_keywords):
        raise RuntimeError("torch.compile is not supported on this system")

    monkeypatch.setattr("torch.compile", unsupported)
    assert compiled(len, "lengths") is len
    assert "not supported on this system" in capsys.readouterr().out


def test_compiled__a_mistake_of_the_function_is_its_own(monkeypatch):
    def wrong(x):
        raise ValueError(f"a mistake about {x.shape}")

    with_backend(monkeypatch, "eager")
    with pytest.raises((ValueError, TorchDynamoException), match="a mistake"):
        compiled(wrong, "mistakes")(torch.ones(2))


@pytest.mark.gpu
def test_training__compiled_on_cuda(tiny_file):
    path = tiny_file(eval__is_crf=False, train__epoch=2, train__precision="fp32")
    (plain,) = run.main(["--opt", path])
    (quick,) = run.main(["--opt", path, "train.compile=true"])
    assert quick["valid_loss"] == pytest.approx(plain["valid_loss"], rel=1e-3)
