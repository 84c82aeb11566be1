import copy

import torch
import torch.nn.functional as F

from vtp.models.dino_head import DINOHead, Prototypes, _UnitRows


def test_logits_are_cosines_to_prototypes():
    head = DINOHead(12, 20, nlayers=2, hidden_dim=16, bottleneck_dim=8)
    x = torch.randn(5, 12)
    cosines = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), cosines)
    head.last_layer.weight_g.data.fill_(3.0)
    torch.testing.assert_close(head(x), 3 * cosines)
    torch.testing.assert_close(head.embed(x).norm(dim=-1), torch.ones(5))


def test_names_copies_and_gradients():
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8)
    names = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert set(head.state_dict()) == names | {"last_layer.weight_g", "last_layer.weight_v"}
    twin = copy.deepcopy(head)
    x = torch.randn(3, 12)
    assert torch.equal(twin(x), head(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.embed(x).dtype == torch.float32
        head(x).float().square().sum().backward()
    assert all(p.grad.any() for p in head.parameters())


def test_gradient_of_the_prototypes():
    prototypes = Prototypes(8, 20).double()
    torch.nn.init.uniform_(prototypes.weight_g, 0.5, 2.0)
    v, gain = (p.detach().requires_grad_() for p in (prototypes.weight_v, prototypes.weight_g))
    assert torch.autograd.gradcheck(_UnitRows.apply, (v, gain))
    torch.testing.assert_close(_UnitRows.apply(v, gain), F.normalize(v, dim=1) * gain)
    assert _UnitRows.apply(torch.zeros(1, 8), torch.ones(1, 1)).eq(0).all()
    assert prototypes.weight().dtype == torch.float32


def test_one_layer():
    assert DINOHead(12, 20, nlayers=1, bottleneck_dim=8)(torch.randn(2, 12)).shape == (2, 20)
