"Tests of 06c_cuda_basics. Generated from nbs/06c_cuda_basics.ipynb: edit that, then run pythia_book build."
import functools
import gc
import math
import pytest
import re
import torch
import weakref
from concurrent.futures import ThreadPoolExecutor
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import (
    Kernel, MANY, MASKS, PACK, PARAMS, Recipe, aligned, check_compiles, cuda_obstacle, mask_tensors, masks_for,
    pack_params, params_at, recipe_for,
)
from pythia_nb.reference import attention_oracle
from pythia_nb.schedule import schedule


def test_an_obstacle_is_one_sentence():
    assert cuda_obstacle(torch.device("cpu"), torch.float32, 64) == "the tensors are on cpu; the CUDA kernels need an NVIDIA GPU"


def packed_example():
    "A packed struct and what went in"
    layout = P.local(2).layout(100, 130, 32)
    q, k, v = torch.randn(2, 100, 3, 64).transpose(1, 2), torch.randn(2, 3, 130, 64), torch.randn(2, 3, 130, 64)
    plan = schedule(layout, False, 1, 1 << 20)
    return q, k, v, layout, plan, pack_params(plan, layout, 0.5, mask_tensors(layout, None, None, 2), False, q, k, v)

def test_the_struct_holds_what_was_given():
    q, k, v, layout, plan, packed = packed_example()
    x = params_at(packed)
    assert x[:4] == (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0) and x[16] == plan.items.data_ptr() and x[26:29] == (*q.stride()[:2], k.stride(0))
    assert x[42:45] == (q.stride(2), k.stride(2), v.stride(2)) and x[24:26] == (0.5, 2) and x[50:53] == (3, 100, 130) and x[55:58] == (30, 0, 1)


def letters(struct_text):
    "The declarations of a C struct as letters of Python's `struct`, in their order"
    out = ""
    for kind, names in re.findall(r"(?:const )?(\w+) ([^;{}]*);", struct_text[struct_text.index("{"):]):
        for name in names.split(","): out += "Q" if "*" in name else {"i64": "q", "int": "i", "float": "f"}[kind]
    return out

def test_python_and_cpp_agree_on_the_struct():
    expected = "".join(letter * int(n or 1) for n, letter in re.findall(r"(\d*)([a-zA-Z])", PACK.format.removesuffix("0q")))
    assert letters(PARAMS) == expected
    check_compiles(f"#define T float\n{PARAMS}static_assert(sizeof(Params) == {PACK.size}, \"Python's and C++'s struct differ\");"
                   'extern "C" __global__ void nothing(const __grid_constant__ Params p) {}')


def test_only_tensors_that_need_it_are_copied():
    base = torch.randn(2, 10, 3, 64)
    for t in (base, base.transpose(1, 2), base[:, 1:], base[..., 4:36], base[:1].expand(5, -1, -1, -1)): assert aligned(t) is t
    for t in (base[..., 1:33], base.mT, torch.randn(2, 3, 5, 33)[..., :32], base.flatten()[1:1 + 2 * 32].view(1, 1, 2, 32)):
        assert aligned(t) is not t and torch.equal(aligned(t), t) and aligned(t).data_ptr() % 16 == 0


def a_recipe(kernel):
    "A way to make recipes whose kernel is a Python function, and how often it was used"
    made = []
    def make(layout, untrusted, q, k, v):
        made.append(untrusted)
        plan = schedule(layout, False, 1, 1 << 20)
        return Recipe("q k v out", pack_params(plan, layout, 0, MASKS, untrusted, q, k, v, out=q), plan, [(kernel, 3)], True)
    return make, made

def no_gpu(monkeypatch):
    "What a recipe asks a GPU, answered without one"
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

def test_a_recipe_writes_what_changes_and_keeps_the_rest(monkeypatch):
    no_gpu(monkeypatch)
    q, k, v, layout, plan, _ = packed_example()
    seen = []
    make, made = a_recipe(lambda blocks, arguments: seen.append((blocks, params_at(arguments))))
    for scale in (0.5, 0.25):
        o = torch.empty_like(q)
        recipe = recipe_for(make, layout, False, q, k, v)
        kept, masks = masks_for(recipe, layout, None, None, 2)
        recipe.launch(scale, masks, q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr())
        expected = pack_params(plan, layout, scale, MASKS, False, q, k, v, out=o)
        assert seen.pop() == (3, params_at(expected))
    assert made == [False] and recipe_for(make, layout, True, q, k, v) is not recipe and recipe_for(make, layout, False, q.contiguous(), k, v) is not recipe
    assert recipe_for(make, layout, False, q, k, v) is recipe and made == [False, True, False]

def test_a_launch_within_a_launch_has_memory_of_its_own(monkeypatch):
    no_gpu(monkeypatch)
    q, k, v, layout, plan, _ = packed_example()
    seen = []
    def kernel(blocks, arguments):    # as if another thread came between
        if len(seen) < 3: seen.append(None); recipe.launch(0.5, (0, 0, 0), 7, 7, 7, 7)
        seen.append(params_at(arguments)[0])
    recipe = recipe_for(a_recipe(kernel)[0], layout, False, q, k, v)
    recipe.launch(0.5, (0, 0, 0), 1, 2, 3, 4)
    assert seen == [None] * 3 + [7, 7, 7, 1] and len(recipe.free) == 4


def test_recipes_are_forgotten_with_their_layout_and_are_not_too_many(monkeypatch):
    no_gpu(monkeypatch)
    q, k, v, layout, plan, _ = packed_example()
    make, made = a_recipe(None)
    gone = weakref.ref(recipe_for(make, layout, False, q, k, v))
    for i in range(MANY): recipe_for(make, layout, False, q, k, v[:, :, :, :i % 64 + 1].as_strided(v.shape, (1, 2, 3, i)))
    assert len(made) == MANY + 1 and gone() is None
    gone = weakref.ref(recipe_for(make, layout, False, q, k, v))
    del layout; gc.collect()
    assert gone() is None

def test_a_recipe_made_in_a_capture_is_not_kept(monkeypatch):
    no_gpu(monkeypatch)
    q, k, v, layout, *_ = packed_example()
    make, made = a_recipe(None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    inside = recipe_for(make, layout, False, q, k, v)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    outside = recipe_for(make, layout, False, q, k, v)
    assert inside is not outside and recipe_for(make, layout, False, q, k, v) is outside and len(made) == 2

def test_masks_of_the_layout_are_made_once(monkeypatch):
    no_gpu(monkeypatch)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 30, 50]))
    layout = P.document(ids).layout(100, block=32)
    q = torch.randn(2, 3, 100, 64)
    recipe = recipe_for(a_recipe(None)[0], layout, False, q, q, q)
    (q_ids, k_ids, _), where = first = masks_for(recipe, layout, None, None, 2)
    assert masks_for(recipe, layout, None, None, 2) is first and where == (q_ids.data_ptr(), k_ids.data_ptr(), 0)
    assert q_ids.dtype == torch.int32 and torch.equal(q_ids, ids.int().expand(2, -1))
    layout.segment_ids[0] = 5    # somebody writes
    assert masks_for(recipe, layout, None, None, 2)[0][0][0, 0] == 5
    lengths = torch.tensor([3, 4])
    assert masks_for(recipe, layout, None, lengths, 2)[0][2].tolist() == [3, 4] and masks_for(recipe, layout, (ids[None], ids[None]), None, 2) is not first
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert masks_for(recipe, layout, None, None, 2)[0][0] is not masks_for(recipe, layout, None, None, 2)[0][0]


def simulate_thread(q, k, v, layout, entries, x, scale):
    "What one thread of the naive kernel does for query `x`: o [D], lse"
    m, l, acc = -math.inf, 0.0, torch.zeros(q.shape[1])
    for block, _ in entries:
        for key in range(block * layout.block, min((block + 1) * layout.block, layout.S)):
            if layout.causal and key > x + layout.q_start: continue
            s = scale * float(q[x] @ k[key])
            top = max(m, s)
            alpha, e = math.exp(m - top), math.exp(s - top)
            m, l, acc = top, l * alpha + e, acc * alpha + e * v[key]
    return (acc / l, m + math.log(l)) if l > 0 else (acc, -math.inf)

@pytest.mark.parametrize("causal", [True, False])
def test_the_simulated_threads_equal_the_oracle(causal):
    layout = P.bigbird(1, 1, 1).layout(37, 50, 16, causal)
    plan = schedule(layout, False, 1, 1 << 20)
    q, k, v = torch.randn(37, 32), torch.randn(50, 32), torch.randn(50, 32)
    expected = attention_oracle(q[None, None], k[None, None], v[None, None], layout)
    for at, start, end, slot in plan.items.tolist():
        for row in range(16):
            x = (layout.q_start // 16 + at) * 16 + row - layout.q_start
            if not 0 <= x < 37: continue
            o, lse = simulate_thread(q, k, v, layout, plan.entries[start:end].tolist(), x, 32**-0.5)
            torch.testing.assert_close(o.double(), expected[0][0, 0, x], atol=1e-5, rtol=1e-5)
            assert abs(lse - float(expected[1][0, 0, x])) < 1e-5


NAIVE = r'''
extern "C" __global__ void __launch_bounds__(N, 1) attention_naive(const __grid_constant__ Params p) {
  const int wide = p.layout_heads > 1 ? p.B : p.B * p.H, bh = blockIdx.x % wide;
  const int4 item = p.items[blockIdx.x / wide];    // list, first entry, end
  const int b = p.layout_heads > 1 ? bh : bh / p.H, h = p.layout_heads > 1 ? item.x / p.lists : bh % p.H;
  const int query = (p.first_row + item.x % p.lists) * N + threadIdx.x, x = query - p.q_start;
  if (x < 0 || x >= p.L) return;
  const float* from = p.q + b * p.q_b + h * p.q_h + (i64)x * p.q_l;
  float q[D], acc[D], m = __int_as_float(0xff800000), l = 0.f;
  for (int d = 0; d < D; d++) { q[d] = from[d]; acc[d] = 0.f; }
  const int keys = p.kv_lengths ? min(p.kv_lengths[b], p.S) : p.S;
  for (int e = item.y; e < item.z; e++)
    for (int key = p.entries[e].x * N; key < min((p.entries[e].x + 1) * N, keys); key++) {
      if (p.causal && key > query) continue;
      const float *k = p.k + b * p.k_b + h * p.k_h + (i64)key * p.k_l, *v = p.v + b * p.v_b + h * p.v_h + (i64)key * p.v_l;
      float s = 0.f;
      for (int d = 0; d < D; d++) s = fmaf(q[d], k[d], s);
      s *= p.scale;
      const float top = fmaxf(m, s), alpha = expf(m - top), weight = expf(s - top);
      m = top; l = fmaf(l, alpha, weight);
      for (int d = 0; d < D; d++) acc[d] = fmaf(acc[d], alpha, weight * v[d]);
    }
  float* to = p.out + b * p.o_b + h * p.o_h + (i64)x * p.o_l;
  for (int d = 0; d < D; d++) to[d] = l > 0.f ? acc[d] / l : 0.f;
  p.lse[((i64)b * p.H + h) * p.L + x] = l > 0.f ? m + logf(l) : m;
}
'''
def naive_source(D, N): return f"#define T float\n#define D {D}\n#define N {N}\n" + PARAMS + NAIVE

@pytest.mark.parametrize("D", [32, 64])
def test_the_naive_kernel_compiles(D): check_compiles(naive_source(D, 64))


@functools.cache
def naive_kernel(D, N, device): return Kernel(naive_source(D, N), "attention_naive", N, 0, device)

def naive_forward(q, k, v, layout, scale, kv_lengths=None):
    "Block-sparse attention with a thread a query: o, lse"
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    plan = schedule(layout, False, 1, 1 << 30)    # no list is split
    masks = mask_tensors(layout, None, kv_lengths, len(q))    # has a name, so that it lives until the launch
    arguments = pack_params(plan, layout, scale, masks, kv_lengths is not None, q, k, v, out=o, lse=lse)
    naive_kernel(q.shape[3], layout.block, q.device)(plan.max_items * q.shape[0] * (1 if layout.heads > 1 else q.shape[1]), arguments)
    return o, lse


@pytest.mark.cuda
@pytest.mark.parametrize("D, N, causal", [(32, 16, True), (64, 64, False), (64, 128, True), (32, 32, False)])
def test_the_naive_kernel_equals_the_oracle(D, N, causal):
    for layout in (P.bigbird(1, 1, 1).layout(5 * N - 3, 7 * N - 9, N, causal, device="cuda"),
                   P.per_head([P.local(1), P.strided(2), P.dense()]).layout(3 * N, 3 * N, N, causal, device="cuda")):
        q, k, v = (torch.randn(2, n, 3, D, device="cuda").transpose(1, 2) for n in (layout.L, layout.S, layout.S))
        for lengths in (None, torch.tensor([0, layout.S - 5], device="cuda")):
            o, lse = naive_forward(q, k, v, layout, D**-0.5, lengths)
            expected = attention_oracle(q, k, v, layout, kv_lengths=lengths)
            torch.testing.assert_close(o.double(), expected[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
def test_a_thread_that_has_not_used_cuda_can_launch():
    layout = P.dense().layout(64, 64, 64, device="cuda")
    q, k, v = (torch.randn(1, 1, 64, 64, device="cuda") for _ in range(3))
    expected, _ = naive_forward(q, k, v, layout, 0.125)
    with ThreadPoolExecutor(1) as pool: got, _ = pool.submit(naive_forward, q, k, v, layout, 0.125).result()
    assert torch.equal(got, expected)

@pytest.mark.cuda
def test_launches_follow_the_current_stream_and_device():
    layout = P.dense().layout(64, 64, 64, device="cuda")
    q, k, v = (torch.randn(1, 1, 64, 64, device="cuda") for _ in range(3))
    expected, _ = naive_forward(q, k, v, layout, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): captured, _ = naive_forward(q, k, v, layout, 0.125)
    q.copy_(q.flip(2)); graph.replay()
    assert not torch.equal(captured, expected) and torch.equal(captured, naive_forward(q, k, v, layout, 0.125)[0])
    if torch.cuda.device_count() > 1:
        there = [t.to("cuda:1") for t in (q, k, v)]
        assert torch.equal(naive_forward(*there, layout.to("cuda:1"), 0.125)[0].cpu(), captured.cpu())
