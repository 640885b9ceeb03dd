import csv

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

import run
from dataset import build_data
from dataset.synthetic import NAMES
from model import PPAPModule, build_module
from utils.config.loading import with_changes
from utils.errors import UserError
from utils.training.randomness import generator
from utils.training.run_dir import RunDir


@pytest.fixture
def made(tiny_options):
    def make(**overrides):
        options = tiny_options(**overrides)
        data = build_data(options)
        return options, data, build_module(options, data.labels, train_labelled=data.train_labelled)

    return make


def train(options, folder):
    options = with_changes(options, {"wandb.name": folder.name, "output_dir": str(folder.parent)})
    run.train(options, RunDir(options), {})


def first_batch(data):
    return next(iter(data.train_dataloader()))


def test_losses__probes_read_the_code_detached(made):
    _, data, module = made()
    losses, statistics = module.losses(first_batch(data), step=1)
    assert list(losses) == ["supcon_loss", "linear_loss", "cluster_loss"]
    assert {"num_positives", "num_negatives", "mean_phi"} <= set(statistics)
    (losses["linear_loss"] + losses["cluster_loss"]).backward()
    assert all(parameter.grad is None for parameter in module.segmenter.parameters())
    assert module.cluster_probe.clusters.grad is not None


def test_losses__are_a_function_of_seed_and_step(made):
    _, data, module = made()
    batch, found = first_batch(data), []
    for seed, step in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(seed)  # the global state plays no part
        found.append(module.losses(batch, step=step)[0])
    assert found[0] == found[1]
    assert found[1]["supcon_loss"] != found[2]["supcon_loss"]


def test_losses__frozen_leaves_out_ppap_and_the_head(made):
    _, data, module = made(train__frozen=True)
    losses, statistics = module.losses(first_batch(data), step=1)
    assert (list(losses), statistics) == (["linear_loss", "cluster_loss"], {})
    sum(losses.values()).backward()
    assert not any(parameter.requires_grad for parameter in module.segmenter.parameters())


def test_optimizer__three_groups_and_decay_for_adamw_alone(made):
    options, _, module = made(
        optimizer__net__weight_decay=0.1, optimizer__linear__lr=0.5, optimizer__cluster__weight_decay=0.3
    )
    optimizer = module.configure_optimizers()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (options.optimizer.net.lr, 0.1),
        (0.5, 0.0),
        (options.optimizer.cluster.lr, 0.0),
    ]
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in module.parameters() if p.requires_grad}
    # Lightning does not unscale the gradients of a fused optimizer, so that they would be clipped scaled
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_clipping__acts_on_the_net_alone(made):
    _, data, module = made(train__grad_norm=1e-3)
    losses, _ = module.losses(first_batch(data), step=1)
    (1e4 * sum(losses.values())).backward()
    probe = module.cluster_probe.clusters.grad.clone()
    module.configure_gradient_clipping(module.configure_optimizers())
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.segmenter.trainable() if p.grad is not None])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(module.cluster_probe.clusters.grad, probe)


def scalars(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


def test_training__validates_at_the_published_steps(tiny_options, tmp_path):
    """7 batches an epoch, valid_freq 3, two epochs: steps 3, 6, 7, 10, 13, 14."""
    options = tiny_options(dataset__train_images=30, train__epoch=2, train__valid_freq=3)
    train(options, tmp_path / "run")
    rows = scalars(tmp_path / "run")
    validated = [int(float(row["iters"])) for row in rows if "valid_loss" in row]
    assert validated == [3, 6, 7, 10, 13, 14]
    four = ("Cluster_mIoU", "Cluster_Accuracy", "Linear_mIoU", "Linear_Accuracy")
    totals = [sum(float(row[name]) for name in four) for row in rows if "valid_loss" in row]
    about = torch.load(tmp_path / "run/best.ckpt", weights_only=True)["ppap"]
    assert about["step"] == validated[totals.index(max(totals))]  # the best, not the last
    assert sum(about["metrics"].values()) == pytest.approx(max(totals))


def test_training__logs_the_published_scalars(tiny_options, tmp_path):
    train(tiny_options(), tmp_path / "run")  # 4 steps, print_freq 2
    rows = [row for row in scalars(tmp_path / "run") if "train_loss" in row]
    assert [int(float(row["iters"])) for row in rows] == [1, 3]
    published = {"epoch", "iters", "train_loss", "supcon_loss", "net_lr", "param_norm", "grad_norm"}
    ours = {"total_loss", "linear_loss", "cluster_loss", "mean_phi", "mean_psi", "mean_propagation"}
    assert published | ours | {"num_positives", "num_negatives", "without_positives"} <= set(rows[0])
    assert "images_per_s" not in rows[0]  # the first step warms up
    assert float(rows[1]["images_per_s"]) > 0
    for row in rows:
        parts = float(row["train_loss"]) + float(row["supcon_loss"])
        assert float(row["total_loss"]) == pytest.approx(parts, rel=1e-5)
        probes = float(row["linear_loss"]) + float(row["cluster_loss"])
        assert float(row["train_loss"]) == pytest.approx(probes, rel=1e-5)
        sunk = (0.55 - float(row["mean_phi"])) * 3  # by m_t / sigma_pos a step
        assert float(row["mean_propagation"]) == pytest.approx(sunk, abs=1e-5)
        assert 0 <= float(row["without_positives"]) <= 1
    content = torch.load(tmp_path / "run/best.ckpt", weights_only=True)  # tensors and plain containers
    about = content["ppap"]
    assert about["class_names"] == list(NAMES)
    assert len(about["palette"]) == len(about["assignment"]) == len(NAMES)
    assert about["options"]["training_coeff"]["prop_iter"] == 2
    assert about["git_sha"]
    assert "torch" in about["versions"]


def test_training__workers_change_nothing(tiny_options, tmp_path):
    for workers in (0, 2):
        crops = {"dataset__loader_crop_type": "random", "dataset__crop_type": "five"}
        train(tiny_options(dataloader__num_workers=workers, **crops), tmp_path / f"{workers}")
    assert loss_rows(tmp_path / "0") == loss_rows(tmp_path / "2")


def test_training__order_is_that_of_seed_and_epoch(tiny_options, tmp_path, monkeypatch):
    seen = []
    step = PPAPModule.training_step
    monkeypatch.setattr(
        PPAPModule, "training_step", lambda self, b, i: (seen.append(b.index.tolist()), step(self, b, i))[1]
    )
    train(tiny_options(train__epoch=2), tmp_path / "run")
    epochs = [[index for batch in part for index in batch] for part in (seen[:4], seen[4:])]
    for epoch, order in enumerate(epochs):
        assert order == torch.randperm(16, generator=generator(0, "order", epoch)).tolist()


def test_training__reduced_precision_steps_and_clips_after_unscaling(tiny_options, tmp_path, monkeypatch):
    """float16 as on CUDA, loss scaling included, but with the CPU's scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2048.0, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    train(tiny_options(), tmp_path / "full")
    train(tiny_options(train__precision="bf16"), tmp_path / "bf16")
    monkeypatch.setattr("utils.training.device.precision_settings", lambda *_: {"plugins": [plugin]})
    train(tiny_options(train__precision="bf16"), tmp_path / "fp16")
    full, *low = (scalars(tmp_path / name)[0] for name in ("full", "bf16", "fp16"))
    for name in ("total_loss", "train_loss", "grad_norm", "num_positives"):  # not 2048 times as large
        assert [float(row[name]) for row in low] == pytest.approx([float(full[name])] * 2, rel=0.1)
    assert low[0] != low[1]
    assert scaler.get_scale() == 2048


def test_training__deterministic_operations_are_asked_for_and_change_nothing(tiny_options, tmp_path):
    for chosen in (True, False):  # the second leaves the process as it was
        train(tiny_options(train__deterministic=chosen), tmp_path / f"{chosen}")
        assert torch.are_deterministic_algorithms_enabled() is chosen
    assert loss_rows(tmp_path / "True") == loss_rows(tmp_path / "False")


def loss_rows(folder):
    measured = ("images_per_s", "gpu_memory_gib")
    return [{key: row[key] for key in row if key not in measured} for row in scalars(folder)]


@pytest.mark.gpu
def test_training__deterministic_gives_the_same_bits_on_cuda(tiny_options, tmp_path):
    for name in ("one", "two"):
        train(tiny_options(train__deterministic=True, train__epoch=4), tmp_path / name)
    assert loss_rows(tmp_path / "one") == loss_rows(tmp_path / "two")
    torch.use_deterministic_algorithms(False)


def test_channels__that_do_not_fit(made):
    with pytest.raises(UserError, match=r"model\.continuous is false: D = n_classes is"):
        made(model__continuous=False)
    with pytest.raises(UserError, match=r"eval\.is_direct"):
        made(eval__is_direct=True)
