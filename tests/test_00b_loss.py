"Tests of 00b_loss. Generated from nbs/00b_loss.ipynb: edit that, then run pythia_book build."
import pytest
import torch
import torch.nn.functional as F
from pythia_nb.loss import chunk_gradient, chunked_cross_entropy


def test_one_chunk_at_a_time():
    "No more than `chunk` rows of logits at once, each row once, and the backward pass makes none."
    h, W, t = torch.randn(100, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.arange(100) % 20
    rows = []
    def spy(h, *args):
        rows.append(len(h))
        return chunk_gradient(h, *args)
    loss = chunked_cross_entropy(h, W, t, chunk=32, gradient=spy)
    loss.backward()
    assert rows == [32, 32, 32, 4] and h.grad.shape == h.shape and W.grad.shape == W.shape


def test_loss_edges():
    "Frozen weights get no gradient, all targets ignored is not a number, a chunk of nothing is refused."
    h, W, t = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8), torch.randint(0, 20, (9,))
    (got,) = torch.autograd.grad(chunked_cross_entropy(h, W, t, chunk=4), h)
    assert torch.allclose(got, torch.autograd.grad(F.cross_entropy(h @ W.T, t), h)[0], atol=1e-6)
    assert chunked_cross_entropy(h, W, torch.full((9,), -100)).isnan()
    with pytest.raises(ValueError, match="chunk is 0"): chunked_cross_entropy(h, W, t, chunk=0)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_loss_in_low_precision(dtype, limit):
    "Half precision gives the fp32 loss and gradients up to its rounding, under autocast too."
    torch.manual_seed(0)
    h, W = torch.randn(300, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    t = torch.randint(0, 500, (300,))
    expected = F.cross_entropy(h @ W.T, t)
    grads = torch.autograd.grad(expected, [h, W])
    low = [h.detach().to(dtype).requires_grad_(), W.detach().to(dtype).requires_grad_()]
    got = chunked_cross_entropy(*low, t, chunk=64)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected.item(), rel=limit)
    for a, b in zip(torch.autograd.grad(got, low), grads):
        assert a.dtype == dtype and (a.float() - b).norm() < limit * b.norm()
    with torch.autocast("cpu", dtype=dtype): got = chunked_cross_entropy(h, W, t, chunk=64)
    for a, b in zip(torch.autograd.grad(got, [h, W]), grads):
        assert a.dtype == torch.float32 and (a - b).norm() < limit * b.norm()
