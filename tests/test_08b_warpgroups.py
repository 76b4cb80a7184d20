"Tests of 08b_warpgroups. Generated from nbs/08b_warpgroups.ipynb: edit that, then run pythia_book build."
import math
import pytest
import random
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb.cuda_basics import PARAMS, check_compiles
from pythia_nb.layout import BlockLayout
from pythia_nb.reference import attention_oracle
from pythia_nb.schedule import compile_report, schedule
from pythia_nb.tensor_cores import INSTRUCTIONS, SHAPES, Tile, macros
from pythia_nb.warpgroups import BARRIERS, Phased, Ring, WGMMA, tensor_map, wgmma_function


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

class Open(Phased):
    "Nobody waits at it"
    def is_over(self, parity): return True

@pytest.mark.parametrize("which", ["q_full", "q_empty", "full", "empty"])
def test_the_simulation_finds_each_missing_barrier(which, monkeypatch):
    start = SimulatedTeam.__init__
    def without(self, *about):
        start(self, *about); setattr(self, which, [Open(b.arrivals) for b in getattr(self, which)])
    monkeypatch.setattr(SimulatedTeam, "__init__", without)
    check = test_every_job_is_done_by_every_warp_of_one_team_in_any_order_of_events.hypothesis.inner_test
    with pytest.raises((AssertionError, TypeError)):
        for seed in range(20): check(2, 2, 2, 1, [3, 4, 5, 2], seed); check(1, 7, 1, 1, [1] * 12, seed)


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


def test_a_map_has_one_row_where_a_dimension_is_expanded(monkeypatch):
    seen = []
    monkeypatch.setitem(tensor_map.__globals__, "encode_map", lambda address, *about: seen.append(about) or bytes(128))
    t = torch.empty(2, 100, 3, 128, dtype=torch.bfloat16).transpose(1, 2)
    for x, rows in ((t, 64), (t[:, :1].expand(-1, 3, -1, -1), 64), (t[:1], 16)): tensor_map(x, rows)
    assert seen == [((64, 100, 2, 3, 2), (768, 128, 256, 76800), (64, 64, 2)), ((64, 100, 2, 1, 2), (768, 128, 768, 76800), (64, 64, 2)), ((64, 100, 2, 3, 1), (768, 128, 256, 768), (64, 16, 1))]


ONE_PRODUCT = r'''
extern "C" __global__ void __launch_bounds__(128, 1) one_product(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u16 shared[];
  __shared__ u64 full;
  const u32 a = smem_address(shared), b = a + 64 * 128, here = smem_address(&full);
  if (threadIdx.x == 0) barrier_init(here, 128);
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    const int row = i / 8, chunk = i % 8, to = row * 128 + ((chunk ^ (row & 7)) << 4);
    copy_async(a + to, p.q + row * p.q_l + chunk * 8); copy_async(b + to, p.k + row * p.k_l + chunk * 8);
  }
  count_copies(here); arrive(here); await(here, 0); fence_copies();
  float s[1][8][4];
  wgmma_fence();
  for (int ks = 0; ks < 4; ks++) wgmma_scores(s, descriptor(a, 0) + (ks * 32 >> 4), descriptor(b, 0) + (ks * 32 >> 4), ks > 0);
  wgmma_commit(); wgmma_wait<0>(); pin(s);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int j = 0; j < 8; j++)
    for (int e = 0; e < 4; e++) p.partial[(row + e / 2 * 8) * 64 + j * 8 + column + e % 2] = s[0][j][e];
}
'''
@pytest.mark.parametrize("bf16", [True, False])
def test_one_product_compiles_without_spills_and_is_not_serialised(bf16):
    source = macros(64, 64, Tile(64, 64, 64, 1, 1), bf16) + PARAMS + SHAPES + INSTRUCTIONS + BARRIERS + WGMMA + wgmma_function("wgmma_scores", 64, False) + ONE_PRODUCT
    check_compiles(source, ("sm_90a",))
    assert "C75" not in compile_report(source, "sm_90a")[1]

def test_values_come_from_registers_and_transposed():
    source = wgmma_function("wgmma_values", 128, True)
    assert source.count("m64n128k16") == 2 and '"r"(a[3])' in source and "add, 1, 1, 1;" in source and source.count('"+f"') == 64
