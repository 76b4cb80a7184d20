"Tests of 06e_tensor_cores. Generated from nbs/06e_tensor_cores.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from pythia_nb.cuda_basics import HEAD_DIMS, PARAMS, check_compiles
from pythia_nb.tensor_cores import COPY, INSTRUCTIONS, PRODUCTS, SHAPES, Tile, macros


lane = torch.arange(32)
def places_a():    # lane, register, half -> row, column
    l, r, e = torch.meshgrid(lane, torch.arange(4), torch.arange(2), indexing="ij")
    return l // 4 + r % 2 * 8, l % 4 * 2 + e + r // 2 * 8

def places_b():    # lane, register, half -> row (the summed index), column
    l, r, e = torch.meshgrid(lane, torch.arange(2), torch.arange(2), indexing="ij")
    return l % 4 * 2 + e + r * 8, l // 4

def places_c():    # lane, element -> row, column
    l, e = torch.meshgrid(lane, torch.arange(4), indexing="ij")
    return l // 4 + e // 2 * 8, l % 4 * 2 + e % 2


def mma(c, a, b):    # c [32, 4], a [32, 4, 2], b [32, 2, 2] -> c + a·b, as fragments
    A, B = torch.zeros(16, 16), torch.zeros(16, 8)
    A[places_a()], B[places_b()] = a.float(), b.float()
    return c + (A @ B)[places_c()]

def test_a_simulated_warp_multiplies_tiles():
    for places, numbers in ((places_a(), 256), (places_b(), 128), (places_c(), 128)): assert len(set(zip(*(p.flatten().tolist() for p in places)))) == numbers    # each has one owner
    A, B, C = torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)
    torch.testing.assert_close(mma(C[places_c()], A[places_a()], B[places_b()]), (C + A @ B)[places_c()])


def ldmatrix(shared, address, trans=False):    # flat shared memory, the 32 lanes' addresses -> fragments [32, 4, 2]
    matrices = shared[address[:, None] + torch.arange(8)].view(4, 8, 8)
    if trans: matrices = matrices.mT
    return matrices[:, lane // 4].view(4, 32, 4, 2)[:, lane, lane % 4].transpose(0, 1)


def a_address(row, col, LD): return (row + lane % 16) * LD + col + lane // 16 * 8
def b_address(n, k, LD): return (n + lane % 8 + lane // 16 * 8) * LD + k + lane // 8 % 2 * 8
def bt_address(k, n, LD): return (k + lane % 16) * LD + n + lane // 16 * 8

def test_ldmatrix_brings_the_fragments_that_mma_wants():
    LD = 72
    tile = torch.randn(64, LD)
    shared = tile.flatten()
    assert torch.equal(ldmatrix(shared, a_address(16, 32, LD)), tile[16:32, 32:48][places_a()])
    for i in range(2):    # two tiles of B with one instruction
        assert torch.equal(ldmatrix(shared, b_address(8, 16, LD))[:, 2 * i:2 * i + 2], tile[8 + 8 * i:16 + 8 * i, 16:32].mT[places_b()])
        assert torch.equal(ldmatrix(shared, bt_address(16, 8, LD), trans=True)[:, 2 * i:2 * i + 2], tile[16:32, 8 + 8 * i:16 + 8 * i][places_b()])


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_rows_with_16_bytes_more_do_not_meet_in_a_bank(D):
    for address in (a_address(16, 16, D + 8), b_address(16, 16, D + 8), bt_address(16, 16, D + 8)):
        for matrix in (address * 2 // 4 % 32).view(4, 8): assert len({(int(start) + word) % 32 for start in matrix for word in range(4)}) == 32


def to_a(c0, c1, dtype):    # two accumulators [32, 4], columns 0 … 7 and 8 … 15 -> A's fragments [32, 4, 2]
    return torch.stack([c0[:, :2], c0[:, 2:], c1[:, :2], c1[:, 2:]], 1).to(dtype)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_products_of_a_warp(dtype, D=32, keys=32, LD=40):
    "A warp's 16 queries against 32 keys: scores, weights and their product with the values, through fragments only"
    q, k, v = (torch.randn(n, D).to(dtype) for n in (16, keys, keys))
    q_shared, k_shared, v_shared = (torch.nn.functional.pad(t, (0, LD - D)).flatten() for t in (q, k, v))
    s = torch.zeros(keys // 8, 32, 4)
    for ks in range(D // 16):
        a = ldmatrix(q_shared, a_address(0, ks * 16, LD))
        for n in range(0, keys // 8, 2):
            b = ldmatrix(k_shared, b_address(n * 8, ks * 16, LD))
            s[n], s[n + 1] = mma(s[n], a, b[:, :2]), mma(s[n + 1], a, b[:, 2:])
    p, o = torch.exp(s * 0.1), torch.zeros(D // 8, 32, 4)
    for ks in range(keys // 16):
        a = to_a(p[2 * ks], p[2 * ks + 1], dtype)
        for n in range(0, D // 8, 2):
            b = ldmatrix(v_shared, bt_address(ks * 16, n * 8, LD), trans=True)
            o[n], o[n + 1] = mma(o[n], a, b[:, :2]), mma(o[n + 1], a, b[:, 2:])
    exact = torch.exp(q.float() @ k.float().T * 0.1).to(dtype).float() @ v.float()
    for n in range(D // 8): torch.testing.assert_close(o[n], exact[:, 8 * n:8 * n + 8][places_c()], rtol=2e-2, atol=2e-2)


TWO_PRODUCTS = r'''
extern "C" __global__ void __launch_bounds__(THREADS, CTAS) two_products(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u16 shared[];
  const u32 q_tile = smem_address(shared), k_tile = q_tile + BM * LD * 2, v_tile = k_tile + BN * LD * 2;
  const int row0 = threadIdx.x / 32 * 16 * MT;
  load_block<BM>(q_tile, p.q, p.q_l, p.L, blockIdx.x * BM);
  load_block<BN>(k_tile, p.k, p.k_l, p.S, 0);
  load_block<BN>(v_tile, p.v, p.v_l, p.S, 0);
  commit(); wait<0>(); __syncthreads();

  float s[MT][NT][4], acc[MT][DT][4];
  fill(s, 0.f); fill(acc, 0.f);
  u32 none[1][MT][4];
  product_abt<false, 0, NT>(s, none, q_tile, row0, k_tile);
  #pragma unroll
  for (int ks = 0; ks < BS / 16; ks++) {
    u32 a[MT][4]; to_a(a, s, ks);
    product_ab(acc, a, v_tile, ks * 16);
  }
  __syncthreads();    // other warps may still read what the stores overwrite
  store_rows(acc, shared, row0, p.out, p.o_l, blockIdx.x * BM, p.L, [](int, int) { return 1.f; });
}
'''

@pytest.mark.parametrize("MT, bf16", [(1, True), (2, True), (2, False)])
def test_two_products_compile_without_spills(MT, bf16):
    check_compiles(macros(64, 64, Tile(64, 64, 64, MT, 1), bf16) + PARAMS + SHAPES + INSTRUCTIONS + COPY + PRODUCTS + TWO_PRODUCTS)
