"""The teacher of self-distillation: an exponential moving average of the student."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vtp import dist


class EMATeacher(nn.ModuleDict):
    """A frozen deep copy of everything the student is compared with, so equal to it at step 0.

    `teacher["trunk"]` is the copy of `modules["trunk"]`. It stays in evaluation mode and takes no gradient.
    """

    def __init__(self, modules: nn.ModuleDict) -> None:
        super().__init__(copy.deepcopy(dict(modules.items())))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> EMATeacher:
        """Stay in evaluation mode, whatever the mode of the module around."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.ModuleDict, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for all parameters.

        Raises:
            ValueError: teacher and student do not have the same parameters.
        """
        ours, theirs = dict(self.named_parameters()), dict(student.named_parameters())
        if ours.keys() != theirs.keys():
            raise ValueError(
                f"teacher and student differ in the parameters {sorted(ours.keys() ^ theirs.keys())[:5]}; "
                "make the teacher from the student"
            )
        torch._foreach_lerp_(dist.shards(ours.values()), dist.shards(theirs[name] for name in ours), 1 - momentum)
