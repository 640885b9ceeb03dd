import torch

from loss import PPAPLoss

CRITERION = PPAPLoss(
    initialcrit_pos=0.55,
    initialcrit_amb=0.2,
    prop_iter=2,
    sigma_pos=3,
    sigma_amb=3,
    trainpatchsplit=4,
    tau=0.8,
    group_size=16,
)


def test_sampling__range_no_repeats_and_per_group():
    anchors = CRITERION.sample_anchors(16 * 3 + 7, torch.Generator().manual_seed(0))
    assert anchors.shape == (4, 4)
    assert anchors.dtype == torch.int64
    for group, row in enumerate(anchors.tolist()):
        drawn = [index for index in row if index >= 0]
        assert len(drawn) == (4 if group < 3 else 1)  # 16 // 4, and 7 // 4
        assert len(set(drawn)) == len(drawn)
        assert all(16 * group <= index < min(16 * group + 16, 55) for index in drawn)


def test_sampling__covers_a_group_and_depends_on_the_generator_alone():
    seen = {
        int(i) for s in range(80) for i in CRITERION.sample_anchors(16, torch.Generator().manual_seed(s))[0]
    }
    assert seen == set(range(16))
    draw = [CRITERION.sample_anchors(160, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draw)
    shorter = CRITERION.sample_anchors(80, torch.Generator().manual_seed(5))
    assert torch.equal(shorter, draw[0][:5])  # what follows a group does not change it


def test_sampling__fewer_patches_than_the_split_gives_one_anchor():
    assert CRITERION.sample_anchors(3).shape == (1, 1)
