"Tests of 06d_cuda_float32. Generated from nbs/06d_cuda_float32.ipynb: edit that, then run pythia_book build."
import json
import math
import pytest
import torch
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import HEAD_DIMS, check_compiles
from pythia_nb.cuda_float32 import TILES, float32_backward, float32_forward, float32_hash, float32_source
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import as_function, attention_oracle, blockwise_backward, check_attention, hard_problem
from pythia_nb.schedule import schedule


def own(plan, layout, at, first_row):
    "Positions of the rows that list `at` has, -1 where there is none"
    members = plan.members[at * plan.group:(at + 1) * plan.group].long()
    return torch.where(members[:, None] < 0, -1, (members[:, None] + first_row) * layout.block + torch.arange(layout.block)).flatten()

def tile_of(plan, layout, start, end, t, BN, first_row):
    "Tile t of a list: positions of its BN rows (-1: none) and bits of the members that see them"
    entry = start + (t * BN + torch.arange(BN)) // layout.block
    block, bits = plan.entries[entry.clamp(max=end - 1)].long().unbind(1)
    there = entry < end
    return torch.where(there, (block + first_row) * layout.block + (t * BN + torch.arange(BN)) % layout.block, -1), torch.where(there, bits, 0)

def rows_of(tensor, x):
    "Rows of a tensor, zeros where there is no such row"
    there = (x >= 0) & (x < len(tensor))
    return torch.where(there[:, None], tensor[x.clamp(0, len(tensor) - 1)], 0)

def sees(layout, query, key, keys):
    "Pairs that the causal order and the lengths allow"
    x = query - layout.q_start
    there = ((query >= 0) & (x >= 0) & (x < layout.L))[:, None] & ((key >= 0) & (key < keys))[None]
    return there & (key[None] <= query[:, None]) if layout.causal else there


def simulate_forward(q, k, v, layout, plan, item, BN, scale, keys):
    "What a thread block of the forward kernel does for an item: o and lse of its rows; q [L, D], k and v [S, D]"
    at, start, end, slot = item
    N, first_row = layout.block, layout.q_start // layout.block
    query = own(plan, layout, at, first_row)
    q_tile, group = rows_of(q, query - layout.q_start), torch.arange(len(query)) // N
    m, l, acc = torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1), torch.zeros(len(query), q.shape[1])
    for t in range(-(-(end - start) * N // BN)):
        key, bits = tile_of(plan, layout, start, end, t, BN, 0)
        s = q_tile @ rows_of(k[:keys], key).T
        s = s.masked_fill(~sees(layout, query, key, keys) | (bits[None] >> group[:, None] & 1 == 0), -math.inf)
        top = torch.maximum(m, s.amax(1, keepdim=True))
        safe = top.masked_fill(top == -math.inf, 0)
        alpha, p = torch.exp((m - safe) * scale), torch.exp((s - safe) * scale)
        m, l, acc = top, l * alpha + p.sum(1, keepdim=True), acc * alpha + p @ rows_of(v[:keys], key)
    return torch.where(l > 0, acc / l, 0), (m * scale + torch.log(l)).squeeze(1)

def simulate_combine(parts):
    "o and lse of a list from those of its parts, in order"
    top = torch.stack([lse for _, lse in parts]).amax(0)
    safe = top.masked_fill(top == -math.inf, 0)
    f = [torch.exp(lse - safe) for _, lse in parts]
    total = sum(f)
    return torch.where(total[:, None] > 0, sum(x[:, None] * o for x, (o, _) in zip(f, parts)) / total[:, None], 0), torch.log(total) + safe


def put_rows(tensor, x, values):
    "Write the rows that exist"
    there = (x >= 0) & (x < len(tensor))
    tensor[x[there]] = values[there]

def walk(plan, layout, head, work, combine):
    "Run `work` for each item of a head and `combine` for the parts of split lists: pairs of (list, result)"
    parts = {}
    for item in plan.items.tolist():
        if plan.heads == 1 or item[0] // plan.lists == head: parts.setdefault(item[0], []).append((item[3], work(item)))
    return [(at, results[0][1] if len(results) == 1 else combine([r for _, r in sorted(results, key=lambda x: x[0])])) for at, results in parts.items()]

@pytest.mark.parametrize("N, BN, group", [(16, 32, 4), (32, 64, 2), (32, 32, 1), (128, 32, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_simulated_forward_equals_the_oracle(N, BN, group, causal):
    for L, S, keys in [(150, 150, 150), (70, 150, 120), (150, 90, 90)]:
        layout = P.per_head([P.bigbird(1, 1, 1), P.strided(2)]).layout(L, S, N, causal)
        plan = schedule(layout, False, group, max(1, 64 // N))
        q, k, v = torch.randn(1, 2, L, 32), torch.randn(1, 2, S, 32), torch.randn(1, 2, S, 32)
        expected = attention_oracle(q, k, v, layout, kv_lengths=torch.tensor([keys]))
        for h in range(2):
            o, lse = torch.full((L, 32), math.nan), torch.full((L,), math.nan)
            for at, (po, plse) in walk(plan, layout, h, lambda item: simulate_forward(q[0, h], k[0, h], v[0, h], layout, plan, item, BN, 32**-0.5, keys), simulate_combine):
                x = own(plan, layout, at, layout.q_start // N) - layout.q_start
                put_rows(o, x, po); put_rows(lse, x, plse)
            torch.testing.assert_close(o.double(), expected[0][0, h], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(lse.double(), expected[1][0, h], atol=2e-5, rtol=1e-4)


def simulate_columns(q, k, v, do, lse, delta, layout, plan, item, BN, scale):
    "What a thread block of the dK/dV kernel does for an item: dk and dv of its rows; q, do [L, D], k, v [S, D]"
    at, start, end, slot = item
    N, first_row = layout.block, layout.q_start // layout.block
    key = own(plan, layout, at, 0)
    k_tile, v_tile, group = rows_of(k, key), rows_of(v, key), torch.arange(len(key)) // N
    dk, dv = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
    for t in range(-(-(end - start) * N // BN)):
        query, bits = tile_of(plan, layout, start, end, t, BN, first_row)
        x = query - layout.q_start
        q_tile, do_tile = rows_of(q, x), rows_of(do, x)
        there = (query >= 0) & (x >= 0) & (x < layout.L)
        safe_lse = torch.where(there & (lse[x.clamp(0, layout.L - 1)] > -math.inf), lse[x.clamp(0, layout.L - 1)], math.inf)
        p = torch.exp(k_tile @ q_tile.T * scale - safe_lse)
        p = p.masked_fill(~sees(layout, query, key, layout.S).T | (bits[None] >> group[:, None] & 1 == 0), 0)
        dv += p @ do_tile
        dk += p * (v_tile @ do_tile.T - torch.where(there, delta[x.clamp(0, layout.L - 1)], 0)) @ q_tile
    return dk * scale, dv

@pytest.mark.parametrize("N, BN, group", [(16, 32, 4), (32, 32, 1), (64, 32, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_simulated_columns_equal_the_reference(N, BN, group, causal):
    for L, S in [(150, 150), (70, 150), (150, 90)]:
        layout = P.bigbird(1, 1, 1).layout(L, S, N, causal)
        plan = schedule(layout, True, group, 1)
        q, do, k, v = torch.randn(1, 1, L, 32), torch.randn(1, 1, L, 32), torch.randn(1, 1, S, 32), torch.randn(1, 1, S, 32)
        o, lse = (t.float() for t in attention_oracle(q, k, v, layout))
        _, dk, dv = blockwise_backward(do, None, q, k, v, o, lse, layout)
        delta, got = (do * o).sum(-1)[0, 0], [torch.full((S, 32), math.nan) for _ in range(2)]
        def work(item): return simulate_columns(q[0, 0], k[0, 0], v[0, 0], do[0, 0], lse[0, 0], delta, layout, plan, item, BN, 32**-0.5)
        for at, result in walk(plan, layout, 0, work, lambda parts: tuple(map(sum, zip(*parts)))):
            for tensor, values in zip(got, result): put_rows(tensor, own(plan, layout, at, 0), values)
        torch.testing.assert_close(got[0], dk[0, 0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(got[1], dv[0, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("N", [16, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("kind", list(TILES))
def test_every_variant_compiles_without_spills(kind, D, N):
    for t in TILES[kind][D]: check_compiles(float32_source(kind, D, N, *t))


def long_problem(D, N, device="cuda"):
    "A problem with lists that are split: a column that all see, a row that sees all"
    L = 4096 + 3 * N + 5
    mask = torch.rand(1, -(-L // N), -(-L // N)) < 0.02
    mask[:, :, 0] = True; mask[:, -1] = True
    return torch.randn(3, 1, 2, L, D, device=device).unbind(), BlockLayout.from_block_mask(mask, N, True, L, L).to(device)


def judge(q, k, v, layout, **kw):
    "Hold the kernels to the budget, with keys that don't exist poisoned"
    def attention(q, k, v, layout, **kw):
        lengths = kw.get("kv_lengths")
        if lengths is not None:
            gone = (torch.arange(layout.S, device=k.device) >= lengths[:, None])[:, None, :, None]
            k, v = (t.masked_fill(gone, math.nan) for t in (k, v))    # its gradient there is zero whatever the kernel gives
        return as_function(float32_forward, float32_backward)(q, k, v, layout, **kw)
    return check_attention(attention, q, k, v, layout, **kw)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_float32_on_the_gpu_within_budget(D, N, kind):
    (q, k, v), layout, kw = hard_problem(D, N, torch.float32, kind)
    judge(q, k, v, layout, **kw)

@pytest.mark.cuda
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_lists_in_parts_within_budget(D, N):
    (q, k, v), layout = long_problem(D, N)
    judge(q, k, v, layout)


@pytest.mark.cuda
@pytest.mark.parametrize("N", [16, 128])
def test_float32_traps(N):
    layout = P.local(2).layout(3 * N - 7, 3 * N - 7, N, device="cuda")
    q, k, v = (torch.randn(1, 2, layout.L, 64, device="cuda") for _ in range(3))
    judge(q * 30, k * 30 - 100, v, layout)                                        # very negative scores
    judge(q, k, v, layout, scale=3.0)
    empty = BlockLayout.from_block_mask(torch.zeros(3, 3, dtype=torch.bool), N, True, layout.L, layout.S, 0).to("cuda")
    o, lse = float32_forward(q, k, v, empty, 0.125, None, None)                   # rows that see nothing, and their gradients
    dlse = torch.full_like(lse, math.nan)
    assert not o.any() and (lse == -math.inf).all()
    assert not any(d.any() for d in float32_backward(torch.randn_like(o), dlse, q, k, v, o, lse, empty, 0.125, None, None))
    o, lse = float32_forward(q, k, v, layout, 0.125, None, None)                  # no gradient of lse
    given = float32_backward(q, torch.zeros_like(lse), q, k, v, o, lse, layout, 0.125, None, None)
    assert all(map(torch.equal, given, float32_backward(q, None, q, k, v, o, lse, layout, 0.125, None, None)))
    ids = torch.arange(layout.S) // (N + 5)                                       # documents that the layout knows
    judge(q, k, v, P.document(ids).layout(layout.L, block=N, device="cuda"))


@pytest.mark.cuda
def test_float32_has_the_same_bits_in_every_run():
    (q, k, v), layout = long_problem(64, 64)
    o, lse = float32_forward(q, k, v, layout, 0.125, None, None)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    first = o, lse, *float32_backward(do, dlse, q, k, v, o, lse, layout, 0.125, None, None)
    for _ in range(20):
        o, lse = float32_forward(q, k, v, layout, 0.125, None, None)
        assert all(map(torch.equal, first, (o, lse, *float32_backward(do, dlse, q, k, v, o, lse, layout, 0.125, None, None))))


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_float32"] == float32_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
