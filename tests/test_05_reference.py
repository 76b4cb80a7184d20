"Tests of 05_reference. Generated from nbs/05_reference.ipynb: edit that, then run pythia_book build."
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb import patterns as P
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import (
    all_segments, as_function, attention_oracle, blockwise_backward, blockwise_forward, check_attention, check_forward,
    error_floor, hard_problem, sized_problem, split_segments,
)


def broken(kind):
    "An attention function with a typical mistake"
    def attention(q, k, v, layout, **kw):
        if kind == "heads swapped": k = k.flip(1)
        if kind == "one key too many":
            layout = P.dense().layout(layout.L, block=16, causal=False)
        if kind == "scale forgotten": kw = dict(kw, scale=1.0)
        o, lse = attention_oracle(q, k, v, layout, **kw)
        if kind == "last block lost": o = torch.cat([o[:, :, :-16], o[:, :, -32:-16]], 2)
        if kind == "lse in base 2": lse = lse / math.log(2)
        return o.to(q.dtype), lse.float()
    return attention

@pytest.mark.parametrize("kind", ["heads swapped", "one key too many", "scale forgotten", "last block lost", "lse in base 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_notices_mistakes(kind, dtype):
    q, k, v = torch.randn(3, 1, 2, 64, 16).to(dtype)
    layout = P.dense().layout(64, block=16)
    check_attention(broken("none"), q, k, v, layout)
    with pytest.raises(AssertionError): check_attention(broken(kind), q, k, v, layout)


class Blockwise(torch.autograd.Function):
    "The blockwise algorithm with its own backward, so that it can be checked like any backend"
    @staticmethod
    def forward(ctx, q, k, v, layout, kw):
        o, lse = blockwise_forward(q, k, v, layout, **kw)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.layout, ctx.kw = layout, kw
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        return *blockwise_backward(do, dlse, *ctx.saved_tensors, ctx.layout, **ctx.kw), None, None


@settings(max_examples=80, deadline=None)
@given(L=st.integers(1, 70), S=st.integers(1, 70), causal=st.booleans(), block=st.sampled_from([16, 32]), seed=st.integers(0, 10**6),
       documents=st.booleans(), lengths=st.booleans(), extreme=st.booleans())
def test_blockwise_equals_the_oracle(L, S, causal, block, seed, documents, lengths, extreme):
    torch.manual_seed(seed)
    mask = torch.rand(3, -(-L // block) + 1, -(-S // block)) < 0.6
    start = S - L if causal else 0
    nQ = -(-(start + L) // block) - start // block
    layout = BlockLayout.from_block_mask(mask[:, :nQ], block, causal, L, S)
    q, k, v = torch.randn(2, 3, L, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 8)
    if extreme: q = q * 100 - 300    # scores in the hundreds, mostly very negative
    kw = {}
    if documents: kw["segment_ids"] = tuple(torch.randint(0, 2, (2, n)) for n in (L, S))
    if lengths: kw["kv_lengths"] = torch.randint(0, S + 1, (2,))
    result = check_attention(lambda q, k, v, layout, **kw: Blockwise.apply(q, k, v, layout, kw), q.double(), k.double(), v.double(), layout, **kw)
    assert set(result) == {"o", "lse", "dq", "dk", "dv"}


def test_documents_of_the_layout_and_of_the_call_both_hold():
    ids = torch.repeat_interleave(torch.tensor([30, 50]))
    layout = P.document(ids).layout(80, block=16)
    per_batch = torch.randint(0, 2, (2, 80))
    pairs = all_segments(layout, per_batch)
    both = (pairs[0][:, :, None] == pairs[1][:, None])
    assert torch.equal(both, (ids[:, None] == ids) & (per_batch[:, :, None] == per_batch[:, None]))

def test_rows_that_see_nothing():
    layout = BlockLayout.from_block_mask(torch.tensor([[True, False], [False, False]]), 16)
    q, k, v = torch.randn(3, 1, 1, 32, 8, dtype=torch.float64)
    for o, lse in (attention_oracle(q, k, v, layout), blockwise_forward(q, k, v, layout)):
        assert (o[:, :, 16:] == 0).all() and (lse[:, :, 16:] == -math.inf).all() and lse[:, :, :16].isfinite().all()

def test_a_negative_scale_has_the_same_floor():
    q, k = torch.randn(2, 1, 1, 8, 4)
    assert error_floor(q, q.double(), q, k, -2.0) == error_floor(q, q.double(), q, k, 2.0) > 0

def test_segments_that_do_not_cover_the_queries_get_one_sentence():
    layout = P.dense().layout(40, 20, block=16, causal=False)
    with pytest.raises(ValueError, match="give a pair"): split_segments(layout, torch.zeros(1, 20))
    with pytest.raises(ValueError, match="one id for each key"): split_segments(layout, torch.zeros(1, 30))
    with pytest.raises(TypeError, match="segment_ids is a list"): split_segments(layout, [0] * 20)


def rounded(q, k, v, layout, scale, segments, kv_lengths):
    "The oracle, rounded as a kernel's results are"
    o, lse = attention_oracle(q.double(), k.double(), v.double(), layout, scale=scale, segment_ids=segments, kv_lengths=kv_lengths)
    return o.to(q.dtype), lse.float()

@pytest.mark.parametrize("kind", range(4))
def test_hard_problems_have_their_traps_and_the_judge_of_a_forward_pass_notices_mistakes(kind):
    (q, k, v), layout, masks = hard_problem(32, 16, torch.bfloat16, kind, device="cpu")
    assert (layout.heads == 3, q.is_contiguous() and q.shape[2] > 1, bool(masks)) == (kind == 1, kind != 1 and q.shape[2] > 1, kind == 2)
    visible, planted = layout.row_ptr.diff().view(layout.heads, layout.nQ)[0], layout.nQ // 2
    assert visible[planted] == 0 if kind % 2 else kind == 2 or (visible > 0).all()    # of kind 2, queries before the first key see nothing either
    assert visible[-1] == layout.nK or (kind % 2 and planted == layout.nQ - 1)
    o, lse = rounded(q, k, v, layout, 32**-0.5, split_segments(layout, masks.get("segment_ids")), masks.get("kv_lengths"))
    check_forward(o, lse, q, k, v, layout, **masks)
    for wrong in ((o, lse + .01), (o.masked_fill(torch.ones_like(o).bool(), math.nan), lse), (o + o.abs().max() / 4 + .1, lse)):
        if lse.isfinite().any():
            with pytest.raises(AssertionError): check_forward(*wrong, q, k, v, layout, **masks)

def test_two_kernels_are_judged_as_one_function():
    (q, k, v), layout = sized_problem(16, 32, 50, 70, 2, True, True, .5, torch.float32, seed=0, device="cpu")
    assert len(q) == 20 and layout.heads == 2
    def backward(do, dlse, q, k, v, o, lse, *rest):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad(): return torch.autograd.grad(rounded(*leaves, *rest), leaves, (do, dlse))
    check_attention(as_function(rounded, backward), q, k, v, layout)
    with pytest.raises(AssertionError, match="dq"): check_attention(as_function(rounded, lambda *a: [g * (1 + n == 0) for n, g in enumerate(backward(*a))]), q, k, v, layout)
