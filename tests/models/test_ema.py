import pytest
import torch
from torch import nn

from vtp.models.config import ViTConfig
from vtp.models.dino_head import DINOHead
from vtp.models.ema import EMATeacher
from vtp.models.vit import ViT

SMALL = ViTConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2, feature_bottleneck=8)


def make_student():
    return nn.ModuleDict({"trunk": ViT(SMALL), "head": DINOHead(32, 16, hidden_dim=24, bottleneck_dim=8)})


def test_equals_the_student_at_first():
    student = make_student().eval()
    teacher = EMATeacher(student)
    images = torch.randn(2, 3, 8, 12)
    with torch.no_grad():  # where no gradient is asked for, both use the same kernels
        ours, theirs = teacher["trunk"](images), student["trunk"](images)
        assert torch.equal(ours.cls, theirs.cls)
        assert torch.equal(teacher["head"](ours.cls), student["head"](theirs.cls))
    assert teacher.state_dict().keys() == student.state_dict().keys()
    owned = {p.data_ptr() for p in teacher.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in student.parameters())


def test_stays_frozen_and_in_evaluation():
    module = nn.ModuleDict({"teacher": EMATeacher(make_student())}).train()
    assert not any(m.training for m in module["teacher"].modules())
    assert not any(p.requires_grad for p in module.parameters())


def test_follows():
    student = make_student()
    teacher = EMATeacher(student)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.follow(student, momentum=0.9)
    for name, p in student.named_parameters():
        expected = 0.9 * before[name] + 0.1 * p
        torch.testing.assert_close(dict(teacher.named_parameters())[name], expected)
    teacher.follow(student, momentum=0.0)
    assert all(map(torch.equal, teacher.parameters(), student.parameters()))


def test_other_student():
    with pytest.raises(ValueError, match="head"):
        EMATeacher(make_student()).follow(nn.ModuleDict({"trunk": ViT(SMALL)}), 0.9)
