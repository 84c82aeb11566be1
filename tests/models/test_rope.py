import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vtp.models.rope import DTYPES, RopeEmbed, rope_periods, rope_tables, rotate

CPU = torch.device("cpu")


def test_tables_are_the_published_bits(shared):
    golden = load_file(shared / "fixtures/misc/rope.safetensors")
    tables = [name.split("/")[1:] for name in golden if name.startswith("cos/")]
    assert len(tables) == 22
    for width, dtype, size in tables:
        head_dim, grid = int(width.removeprefix("hd")), tuple(map(int, size.split("x")))
        assert torch.equal(rope_periods(head_dim, DTYPES[dtype]), golden[f"periods/{width}/{dtype}"])
        cos, sin = rope_tables(head_dim, grid, DTYPES[dtype], CPU)
        assert torch.equal(cos, golden[f"cos/{width}/{dtype}/{size}"]), (width, dtype, size)
        assert torch.equal(sin, golden[f"sin/{width}/{dtype}/{size}"]), (width, dtype, size)


def test_rotation_is_the_published_bits(shared):
    golden = load_file(shared / "fixtures/misc/rope.safetensors")
    cos, sin = RopeEmbed(16)((3, 5), 1, CPU)
    assert torch.equal(cos[1:], golden["apply/cos"])
    for name in "qk":
        assert torch.equal(rotate(golden[f"apply/{name}"], cos, sin), golden[f"apply/{name}_out"])


def test_rotation_is_relative_and_keeps_lengths():
    cos, sin = RopeEmbed(32, "fp32")((6, 6), 0, CPU)
    q, k = torch.randn(2, 32).expand(36, 2, 32).unbind(1)
    rotated_q, rotated_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(rotated_q.norm(dim=1), q.norm(dim=1))
    scores = (rotated_q @ rotated_k.T).view(6, 6, 6, 6)
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[3, 4, 5, 5])  # two rows down, one column right


def test_prefix_is_not_rotated():
    cos, sin = RopeEmbed(16)((2, 2), 3, CPU)
    x = torch.randn(2, 7, 16)
    assert torch.equal(rotate(x, cos, sin)[:, :3], x[:, :3].bfloat16().float())


def test_no_cast_changes_the_tables():
    rope = RopeEmbed(16)
    before = [table.clone() for table in rope((3, 4), 1, CPU)]
    for cast in (rope.double, rope.half, rope.float, lambda: rope.to(torch.float32), lambda: copy.deepcopy(rope)):
        module = cast()
        assert module.periods.dtype == torch.bfloat16
        assert torch.equal(module.periods, rope_periods(16, torch.bfloat16))
        assert all(map(torch.equal, module((3, 4), 1, CPU), before))
    assert list(rope.state_dict()) == ["periods"]


@pytest.mark.parametrize("scope", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_tables_first_made_in_any_scope_serve_training(scope):
    head_dim = 24 if scope is torch.inference_mode else 28  # not yet in the cache
    rope = RopeEmbed(head_dim)
    with scope():
        tables = rope((5, 7), 1, CPU)
    cos, sin = rope_tables(head_dim, (5, 7), torch.bfloat16, CPU)
    assert torch.equal(tables[0][1:], cos) and tables[0].dtype == torch.bfloat16
    x = torch.randn(1, 36, head_dim, requires_grad=True)
    rotate(x, *rope((5, 7), 1, CPU)).sum().backward()
    assert rope((5, 7), 1, CPU)[0] is tables[0]


def test_beyond_256_patches_bf16_centres_collide_as_published():
    published = rope_tables(16, (300, 1), torch.bfloat16, CPU)[0]
    exact = rope_tables(16, (300, 1), torch.float32, CPU)[0]
    assert len(published.unique(dim=0)) < 200 and len(exact.unique(dim=0)) > len(published.unique(dim=0))


def test_compiled_tables_are_the_same_and_their_own():
    op = torch.ops.vtp.rope_tables.default
    torch.library.opcheck(op, (16, 3, 5, 1, torch.bfloat16, CPU))
    eager = RopeEmbed(16)((3, 5), 1, CPU)
    compiled = op(16, 3, 5, 1, torch.bfloat16, CPU)
    assert all(map(torch.equal, compiled, eager))
    compiled[0].zero_()  # a compiler may write over its results
    assert all(map(torch.equal, op(16, 3, 5, 1, torch.bfloat16, CPU), RopeEmbed(16)((3, 5), 1, CPU)))


COMPILED = """
import torch
from vtp.models.rope import RopeEmbed, rotate

def look(graph, _examples):
    print(*(node.target for node in graph.graph.nodes if node.op.startswith("call")), sep="\\n")
    return graph

def rotated(x):
    return rotate(x, *RopeEmbed.forward(rope, (3, 5), 1, torch.device("cpu")))

rope, x = RopeEmbed(16), torch.randn(2, 16, 16)
assert torch.equal(torch.compile(rotated, backend=look, fullgraph=True)(x), rotated(x))
"""


def test_a_compiler_does_not_see_how_tables_are_made():
    """It would compute the angles again for every head of every layer: a quarter of a compiled decoder's time.

    In a process of its own, for Dynamo cannot look through the checks of annotations.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    assert "vtp.rope_tables.default" in done.stdout and "arange" not in done.stdout and "cos" not in done.stdout
    assert "flip" in done.stdout and "roll" not in done.stdout
