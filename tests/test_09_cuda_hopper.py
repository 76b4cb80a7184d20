"Tests of 09_cuda_hopper. Generated from nbs/09_cuda_hopper.ipynb: edit that, then run pythia_book build."
import functools
import json
import math
import pytest
import random
import torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import check_compiles
from pythia_nb.cuda_forward import cuda_forward
from pythia_nb.cuda_hopper import (
    HOPPER_TILES, Phased, Ring, forward_on_gpu, hopper_hash, hopper_shared, hopper_source, takes_hopper,
)
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import attention_oracle, check_forward, hard_problem, sized_problem
from pythia_nb.schedule import compile_report, schedule


class SimulatedTeam:
    "Barriers and places of a team with `warps` warps"
    def __init__(self, stages, warps):
        self.q_full, self.q_empty = [Phased(1) for _ in range(2)], [Phased(warps) for _ in range(2)]
        self.full, self.empty = [Phased(1) for _ in range(stages)], [Phased(warps) for _ in range(stages)]
        self.jobs, self.tiles = [None, None], [None] * stages

def number_of(n, block, blocks): return n * blocks + (blocks - 1 - block if n % 2 else block)    # there and back

def load_team(team, stages, take, items):
    "The loader of a team: jobs, and the tiles of their entries; `take` gives the next job's number, `items` maps it to (queries, tiles) or None"
    ring, j = Ring(stages), 0
    while True:
        job, side = items(take()), j % 2
        while not team.q_empty[side].is_over(j // 2 % 2 ^ 1): yield
        team.jobs[side] = None; yield    # a copy is on its way
        team.jobs[side] = (job,)
        team.q_full[side].arrive()
        if job is None: return
        for tile in job[1]:
            for part in ("keys", "values"):
                while not team.empty[ring.stage].is_over(ring.phase ^ 1): yield
                team.tiles[ring.stage] = None; yield
                team.tiles[ring.stage] = (part, tile)
                team.full[ring.stage].arrive()
                ring.turn()
        j += 1

def compute(team, stages, work):
    "A warp of a team; `work(queries, tiles)` is called with what it saw"
    ring, j = Ring(stages), 0
    while True:
        side = j % 2
        while not team.q_full[side].is_over(j // 2 % 2): yield
        (job,) = team.jobs[side]
        if job is None: return
        seen = []
        for _ in job[1]:
            for part in ("keys", "values"):
                while not team.full[ring.stage].is_over(ring.phase): yield
                before = team.tiles[ring.stage]; yield    # reading takes its time
                assert team.tiles[ring.stage] is before and before[0] == part, "overwritten while it was read"
                team.empty[ring.stage].arrive()
                ring.turn()
            seen.append(before[1])
        work(job[0], seen)
        team.q_empty[side].arrive()
        j += 1


def run_in_any_order(processes, seed, steps=200_000):
    "Let a random process go on until all have ended; too many steps mean that they wait for one another"
    choose, processes = random.Random(seed), list(processes)
    for _ in range(steps):
        if not processes: return
        at = choose.randrange(len(processes))
        try: next(processes[at])
        except StopIteration: processes.pop(at)
    raise AssertionError(f"{len(processes)} processes wait for one another")

@settings(max_examples=60, deadline=None)
@given(teams=st.integers(1, 4), stages=st.integers(1, 7), warps=st.integers(1, 4), blocks=st.integers(1, 3), lengths=st.lists(st.integers(0, 6), max_size=30), seed=st.integers(0, 1 << 30))
def test_every_job_is_done_by_every_warp_of_one_team_in_any_order_of_events(teams, stages, warps, blocks, lengths, seed):
    done, processes = [], []
    for block in range(blocks):
        taken = iter(range(10**6))
        def take(block=block, taken=taken): return number_of(next(taken), block, blocks)
        for _ in range(teams):
            team = SimulatedTeam(stages, warps)
            items = lambda number: (number, [(number, t) for t in range(lengths[number])]) if number < len(lengths) else None
            processes.append(load_team(team, stages, take, items))
            processes += [compute(team, stages, lambda job, seen: done.append((job, tuple(seen)))) for _ in range(warps)]
    run_in_any_order(processes, seed)
    assert sorted(done) == sorted((j, tuple((j, t) for t in range(n))) for j, n in enumerate(lengths) for _ in range(warps))

def test_the_simulation_finds_a_missing_barrier(monkeypatch):
    monkeypatch.setattr(Phased, "is_over", lambda self, parity: True)    # nobody waits
    with pytest.raises((AssertionError, TypeError)):
        for seed in range(20): test_every_job_is_done_by_every_warp_of_one_team_in_any_order_of_events.hypothesis.inner_test(2, 2, 2, 1, [3, 4, 5, 2], seed)


@pytest.mark.parametrize("causal", [True, False])
def test_the_simulated_kernel_equals_the_oracle(causal, N=16, D=8, L=90, scale=0.4):
    "The ring, the online softmax with an old maximum, and rows of an item as BM queries"
    S = L + (23 if not causal else 0)
    nQ, nK = -(-L // N), -(-S // N)
    mask = torch.rand(nQ, nK) < 0.5
    mask[2] = False; mask[4] = True
    layout = BlockLayout.from_block_mask(mask, N, causal, L, S)
    q, k, v = torch.randn(L, D), torch.randn(S, D), torch.randn(S, D)
    plan, c = schedule(layout, False, 1, 1 << 20), scale * math.log2(math.e)
    o, lse = torch.full_like(q, math.nan), torch.full((L,), math.nan)
    def items(number):
        if number >= plan.counts[0]: return None
        at, start, end, _ = plan.items[number].tolist()
        return at, plan.entries[start:end, 0].tolist()
    def work(at, blocks):
        x = torch.arange(at * N, min(at * N + N, L))
        m, l, acc = torch.full((len(x), 1), -math.inf), torch.zeros(len(x), 1), torch.zeros(len(x), D)
        for block in blocks:
            key = torch.arange(block * N, min(block * N + N, S))
            s = (q[x] @ k[key].T).masked_fill(causal & (key > x[:, None]), -math.inf)
            top = s.amax(1, keepdim=True)
            new = torch.where((top > m + 8 / c).any(), torch.maximum(m, top), m)    # a whole warp rescales, or nobody
            alpha = torch.where(new == -math.inf, 1, torch.exp2((m - new) * c))
            m, l, acc = new, l * alpha, acc * alpha
            p = torch.exp2(s * c - m.masked_fill(m == -math.inf, 0) * c)
            l, acc = l + p.sum(1, keepdim=True), acc + p @ v[key]
        o[x], lse[x] = torch.where(l > 0, acc / l, 0), (m * scale + torch.log(l))[:, 0]
    taken = iter(range(10**6))
    teams = [SimulatedTeam(3, 1) for _ in range(2)]
    run_in_any_order([load_team(t, 3, lambda: next(taken), items) for t in teams] + [compute(t, 3, work) for t in teams], seed=random.randrange(10**6))
    exact_o, exact_lse = attention_oracle(*(t[None, None].double() for t in (q, k, v)), layout, scale=scale)
    torch.testing.assert_close(o.double(), exact_o[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse[0, 0], atol=1e-5, rtol=1e-5)


def place(row, chunk): return chunk ^ row % 8    # where a chunk of 16 bytes lies in its row


@pytest.mark.parametrize("chunk", range(8))
def test_a_column_of_chunks_meets_every_bank_once(chunk):
    for first in (0, 8, 40): assert sorted(place(first + r, chunk) for r in range(8)) == list(range(8))
    assert all(place(r, place(r, chunk)) == chunk for r in range(16))    # its own inverse


def test_lanes_exchange_until_each_has_one_tile():
    "transpose_quad, lane by lane: v[k] of lane i becomes v[i] of lane k"
    v = [[(lane, k) for k in range(4)] for lane in range(4)]
    for bit, pairs in ((2, ((0, 2), (1, 3))), (1, ((0, 1), (2, 3)))):
        sent = {(lane, a): v[lane][a if lane & bit else b] for lane in range(4) for a, b in pairs}
        for lane in range(4):
            for a, b in pairs: v[lane][a if lane & bit else b] = sent[lane ^ bit, a]
    assert v == [[(k, lane) for k in range(4)] for lane in range(4)]


@pytest.mark.parametrize("D, N", HOPPER_TILES)
@pytest.mark.parametrize("bf16", [True, False])
def test_every_variant_compiles_without_spills_and_runs_its_products_by_themselves(D, N, bf16):
    source = hopper_source(D, N, bf16)
    check_compiles(source, ("sm_90a",))
    _, log = compile_report(source, "sm_90a")
    assert "C75" not in log, f"the compiler serialises products or ignores setmaxnreg: {log}"

@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_launch_parameters(D, N):
    t = HOPPER_TILES[D, N]
    assert hopper_shared(t, D) <= 227 * 1024 and t.threads <= 1024 and t.BM in (64, 128) and N % t.BM == 0 and N % t.BN == 0 and t.TEAMS in (1, 2, 4)
    at_start = 65536 // t.threads // 8 * 8    # registers of a thread when the kernel starts
    groups = t.threads // 128
    assert (groups - 1) * t.REGS + t.LOADER_REGS <= groups * at_start, "asks for more registers than there are, and would wait for ever"


def test_other_gpus_and_shapes_stay_with_the_kernels_before(monkeypatch):
    seen = []
    for name, capability in (("old", (8, 0)), ("hopper", (9, 0)), ("new", (10, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setitem(takes_hopper.__wrapped__.__globals__, "max_shared_memory", lambda device: 227 * 1024)
        seen.append([(D, N) for D in (32, 64, 80, 128, 256) for N in (16, 32, 64, 128) if takes_hopper.__wrapped__(name, D, N)])
    assert seen == [[], [(64, 64), (64, 128), (128, 64), (128, 128)], []]


@functools.cache
def needs_hopper():
    if torch.cuda.get_device_capability() != (9, 0): pytest.skip("needs a GPU with compute capability 9.0")

def hopper_forward(q, k, v, layout, scale, segments=None, kv_lengths=None):
    needs_hopper()
    assert takes_hopper(q.device, q.shape[3], layout.block)
    return forward_on_gpu(q, k, v, layout, scale, segments, kv_lengths)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_hopper_within_budget(D, N, dtype, kind):
    (q, k, v), layout, kw = hard_problem(D, N, dtype, kind)
    poison = torch.full((64 << 20,), float("nan"), device="cuda"); del poison    # freed memory that the outputs will be made from
    o, lse = hopper_forward(q, k, v, layout, D**-0.5, kw.get("segment_ids"), kw.get("kv_lengths"))
    check_forward(o, lse, q, k, v, layout, **kw)

@pytest.mark.cuda
@settings(max_examples=100, deadline=None)
@given(D=st.sampled_from([64, 128]), N=st.sampled_from([64, 128]), L=st.integers(1, 900), S=st.integers(1, 900), H=st.integers(1, 3), causal=st.booleans(), per_head=st.booleans(),
       density=st.floats(0, 1), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 1 << 30))
def test_random_layouts_on_hopper(**about):
    (q, k, v), layout = sized_problem(**about)
    check_forward(*hopper_forward(q, k, v, layout, about["D"]**-0.5), q, k, v, layout)


@pytest.mark.cuda
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_a_thread_block_has_many_jobs(D, N):
    "Hundreds of jobs a team, rows that are split among them, as the kernel with mma.sync computes them"
    for layout, B in ((P.bigbird(1, 1, 1).layout(300, block=N, device="cuda"), 400), (P.dense().layout(8192, block=N, device="cuda"), 1), (P.strided(3).layout(5000, block=N, device="cuda"), 4)):
        q, k, v = (torch.randn(B, 8, layout.L, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        ours, expected = hopper_forward(q, k, v, layout, D**-0.5), cuda_forward(q, k, v, layout, D**-0.5, None, None)
        torch.testing.assert_close(ours[0].float(), expected[0].float(), atol=3e-2, rtol=2e-2)
        torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-4)

@pytest.mark.cuda
@pytest.mark.parametrize("D, N", HOPPER_TILES)
def test_hopper_gives_the_same_bits_on_every_stream_and_in_graphs(D, N):
    (q, k, v), layout, _ = hard_problem(D, N, torch.bfloat16, 0)
    first = hopper_forward(q, k, v, layout, 0.125)
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, hopper_forward(q, k, v, layout, 0.125)))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other): side = hopper_forward(q, k, v, layout, 0.125)
    other.synchronize()
    assert torch.equal(side[0], first[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured = hopper_forward(q, k, v, layout, 0.125)
    new = torch.randn_like(q); expected = hopper_forward(new, k, v, layout, 0.125)[0]
    q.copy_(new); graph.replay(); torch.cuda.synchronize()
    assert torch.equal(captured[0], expected)

@pytest.mark.cuda
def test_a_million_tokens_on_hopper(L=1 << 20):
    "Offsets beyond 2^31 bytes"
    layout = (P.local(1) | P.sinks(1)).layout(L, block=64, device="cuda")
    q, k, v = (torch.randn(1, L, 20, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    o, lse = hopper_forward(q, k, v, layout, 0.125)
    at, keys = slice(L - 64, L), torch.cat([torch.arange(64), torch.arange(L - 64, L)]).cuda()
    s = (q[:, :, at].double() @ k[:, :, keys].double().mT * 0.125).masked_fill(keys > torch.arange(L - 64, L, device="cuda")[:, None], -math.inf)
    torch.testing.assert_close(lse[:, :, at].double(), s.logsumexp(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(o[:, :, at].double(), s.softmax(-1) @ v[:, :, keys].double(), atol=2e-2, rtol=2e-2)


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["cuda_hopper"] == hopper_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"
