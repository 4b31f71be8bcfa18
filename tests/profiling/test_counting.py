"""What the counting mode sees: elements through views, look-ups and writes; products; attention by
its definition.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from effattn.profiling.counting import Counted, attention_flops


def counted(call, **watched) -> Counted:
    with Counted(**watched) as found:
        call()
    return found


def test_views_are_read_where_they_lie():
    x = torch.randn(8, 6, dtype=torch.float64)
    # a view alone reads nothing
    assert counted(lambda: x[2:5, ::2].transpose(0, 1), x=x).read_bytes() == 0
    assert counted(lambda: x[2:5, ::2].sum(), x=x).read_bytes() == 3 * 3 * 8
    assert counted(lambda: (x[2:5].sum(), x[4:7].sum()), x=x).read_bytes() == 5 * 6 * 8  # the union
    assert counted(lambda: x[:1].expand(8, 6) * 2, x=x).read_bytes() == 6 * 8
    # windows that overlap
    assert counted(lambda: x.unfold(0, 4, 1)[2:].sum(), x=x).read_bytes() == 6 * 6 * 8
    # its shape only
    assert counted(lambda: (torch.empty_like(x), x.new_zeros(3)), x=x).read_bytes() == 0
    part = x[3:]
    assert counted(lambda: part.T.reshape(6, 5).sum(), x=part).read_bytes() == 5 * 6 * 8


def test_copies_are_no_longer_the_tensor():
    x = torch.randn(4, 4)

    def call():
        copy = x[:2].clone()
        copy.sum()
        copy.zero_()

    found = counted(call, x=x)
    assert (found.read_bytes(), found.write_bytes()) == (2 * 4 * 4, 0)


def test_look_ups_read_their_rows():
    table = torch.randn(10, 4)
    index = torch.tensor([1, 3, 3])
    for call in (
        lambda: nn.functional.embedding(index, table),
        lambda: table.index_select(0, index),
        lambda: table[index],
        lambda: table.gather(0, index[:, None].expand(3, 4)),
    ):
        assert counted(call, table=table).read_bytes() == 2 * 4 * 4
    assert counted(lambda: table[index, torch.tensor([0, 1, 2])], table=table).read_bytes() == 3 * 4


def test_writes_in_place():
    x = torch.zeros(8, 3)
    found = counted(lambda: x[2:4].fill_(1), x=x)
    assert (found.read_bytes(), found.write_bytes()) == (0, 2 * 3 * 4)
    found = counted(lambda: x.index_copy_(0, torch.tensor([0, 5]), torch.ones(2, 3)), x=x)
    assert found.write_bytes() == 2 * 3 * 4
    assert float(x.sum()) == 12  # and the operations really ran


def test_products():
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    assert counted(lambda: a @ b).flops == 2 * 3 * 4 * 5
    assert counted(lambda: torch.addmm(c, a, b)).flops == 2 * 3 * 4 * 5
    assert counted(lambda: torch.zeros(3, 5).addmm_(a, b)).flops == 2 * 3 * 4 * 5
    assert counted(lambda: torch.zeros(1, 3, 5).baddbmm_(a[None], b[None])).flops == 2 * 3 * 4 * 5
    assert counted(lambda: torch.mm(a, b, out=torch.zeros(3, 5))).flops == 2 * 3 * 4 * 5
    assert counted(lambda: b @ c).flops == counted(lambda: b.mv(c)).flops == 2 * 4 * 5
    assert counted(lambda: torch.randn(2, 6, 3) @ a).flops == 2 * 2 * 6 * 3 * 4
    assert (
        counted(
            lambda: torch.einsum("bij,bkj->bik", torch.randn(2, 3, 4), torch.randn(2, 5, 4))
        ).flops
        == 240
    )
    assert counted(lambda: a + a).flops == 0


def test_a_modules_parameters_by_name():
    layer = nn.Linear(4, 5)
    found = counted(lambda: layer(torch.randn(2, 3, 4)), layer=layer)
    assert found.flops == 2 * 6 * 4 * 5
    assert (found.read_bytes("layer.weight"), found.read_bytes("layer.bias")) == (4 * 5 * 4, 5 * 4)
    with pytest.raises(ValueError, match=r"got 'layer.weigth' \(did you mean 'layer.weight'\?\)"):
        found.read_bytes("layer.weigth")


# unequal ones have no fused kernel: products, not counted twice
@pytest.mark.parametrize("dims", [(8, 8), (8, 5)])
def test_attention_counts_pairs_whatever_the_kernel(dims):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, dims[0]), torch.randn(2, 2, 9, dims[1])
    each = 2 * 2 * 4 * (8 + dims[1])  # of one pair, in all rows and heads
    assert counted(lambda: sdpa(q, k, v, enable_gqa=True)).flops == each * 63
    assert counted(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)).flops == each * 28
    assert counted(lambda: sdpa(q, k, v, None, 0.0, True, enable_gqa=True)).flops == each * 28
    mask = torch.rand(7, 9) < 0.5
    assert counted(lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=True)).flops == each * int(
        mask.sum()
    )
    numbers = torch.zeros(7, 9).masked_fill(~mask, -torch.inf)
    assert attention_flops(q, k, v, numbers) == each * int(mask.sum())


def test_attention_reads_keys_through_views():
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    found = counted(
        lambda: sdpa(q, k[:, :, 48:], v[:, :, 48:], enable_gqa=True),
        q=q,
        k=k,
        v=v,
    )
    assert found.read_bytes("q") == q.nbytes
    assert found.read_bytes("k") == found.read_bytes("v") == k.nbytes // 4


def test_backward_of_attention_has_five_products():
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    out = sdpa(q, k, v, is_causal=True)
    assert counted(lambda: out.sum().backward()).flops == 2 * 2 * 21 * 5 * 8


def test_refuses_what_it_cannot_watch():
    with pytest.raises(ValueError, match="x: got int, valid is a tensor or a module"):
        Counted(x=3)
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="y: shares its memory with x"):
        Counted(x=x, y=x[:2])
