"""A device whose tensors hold no values, "meta", to find what would wait for a GPU: whatever reads a value raises."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NothingWaits(TorchDispatchMode):
    """Refuses what takes values from the host and is no asynchronous copy: a GPU's stream would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        copies = function in COPIES
        # A kernel takes one number of the host's as an argument.
        if len({x.device.type for x in tensors if copies or x.ndim > 0}) > 1:
            assert copies and kwargs.get("non_blocking"), f"{function} waits for the device"
        return result


def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the kind of a device sees a CPU; a tensor made of the host's numbers is refused."""
    autocast, tensor, new_tensor = torch.autocast, torch.tensor, torch.Tensor.new_tensor

    class Autocast(autocast):
        def __init__(self, device_type, **options):
            super().__init__("cpu", **options)

    def no_copy(data, *args, device=None, **options):
        assert torch.device(device or "cpu").type != "meta", "torch.tensor waits for the device"
        return tensor(data, *args, device=device, **options)

    def no_new(x, data, **options):
        assert x.device.type != "meta", "new_tensor waits for the device"
        return new_tensor(x, data, **options)

    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: enabled("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: dtype("cpu"))
    monkeypatch.setattr(torch, "tensor", no_copy)
    monkeypatch.setattr(torch.Tensor, "new_tensor", no_new)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda p: None)
