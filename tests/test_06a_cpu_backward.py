"Tests of 06a_cpu_backward. Generated from nbs/06a_cpu_backward.ipynb: edit that, then run pythia_book build."
import ctypes
import itertools
import math
import os
import pytest
import random
import shutil
import struct
import subprocess
import sys
import torch
from pythia_nb import patterns as P
from pythia_nb.cpu import Params, cpu_forward, kernel_source
from pythia_nb.cpu_backward import cpu_backward
from pythia_nb.layout import BlockLayout
from pythia_nb.native import FLAGS, compiler
from pythia_nb.reference import OverBudget, check_attention, sequences
from torch.utils.data import DataLoader, Dataset, get_worker_info


AXES = dict(D=[32, 64, 80, 128, 256], N=[16, 32, 64, 128], dtype=[torch.float32, torch.bfloat16], heads=[False, True], causal=[True, False],
            lengths=["equal", "fewer queries", "more queries", "start given"], masks=["none", "documents", "key counts", "both", "layout"],
            extreme=[False, True], strides=["plain", "heads last", "expanded", "odd start"], scale=[None, -0.3, 0.0], threads=[1, 2, 3])

def every_pair(axes, seed=0):
    "Cases such that each pair of values of two axes is in at least one"
    pick, names = random.Random(seed), list(axes)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in map(str, axes[a]) for y in map(str, axes[b])}
    while missing:
        def gain(case): return sum(((a, str(case[a])), (b, str(case[b]))) in missing for a, b in itertools.combinations(names, 2))
        case = max(({name: pick.choice(values) for name, values in axes.items()} for _ in range(60)), key=gain)
        missing -= {((a, str(case[a])), (b, str(case[b]))) for a, b in itertools.combinations(names, 2)}
        yield case


class OnCpu(torch.autograd.Function):
    "The two kernels as one differentiable function, for the judge"
    @staticmethod
    def forward(ctx, q, k, v, layout, scale, segments, kv_lengths):
        poison = torch.full((1 << 20,), math.nan); del poison    # freed memory that the outputs may be made from
        o, lse = cpu_forward(q, k, v, layout, scale, segments, kv_lengths)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.rest = layout, scale, segments, kv_lengths
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        poison = torch.full((1 << 20,), math.nan); del poison
        return *cpu_backward(do, dlse.masked_fill(ctx.saved_tensors[4] == -math.inf, 0), *ctx.saved_tensors, *ctx.rest), *[None] * 4

def on_cpu(q, k, v, layout, scale=None, segment_ids=None, kv_lengths=None):
    "The form that the judge takes"
    return OnCpu.apply(q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale, segment_ids, kv_lengths)


def cpu_problem(D, N, dtype, heads, causal, lengths, masks, extreme, strides, scale, H=3):
    "Tensors, layout and keyword arguments of one case, random within it"
    def n(low, high): return int(torch.randint(low, high, ()))
    S = n(1, 5 * N)
    L = {"equal": S, "fewer queries": n(1, S + 1), "more queries": S + n(1, 2 * N), "start given": n(1, 3 * N)}[lengths]
    B = sequences(H, L, S, D, 2)
    start = n(0, 3 * N) if lengths == "start given" else S - L if causal else 0
    nQ = -(-(start + L) // N) - start // N
    shown = torch.rand(H if heads else 1, nQ, -(-S // N)) < 0.6
    shown[:, :, 0] = True                    # a column that all queries see, so that there is enough to judge
    if nQ > 2: shown[0, nQ // 2] = False     # and a row that sees nothing
    if masks == "layout" and start >= 0:
        pattern = P.document(torch.repeat_interleave(torch.arange(6), N + 3)) & (P.per_head([P.local(2), P.strided(2), P.dense()]) if heads else P.strided(2))
        layout = pattern.layout(L, S, N, causal, q_start=start)
    else: layout = BlockLayout.from_block_mask(shown, N, causal, L, S, q_start=start)
    def make(n):
        if strides == "plain": return torch.randn(B, H, n, D, dtype=dtype)
        if strides == "heads last": return torch.randn(B, n, H, 3 * D, dtype=dtype)[..., D:2 * D].transpose(1, 2)
        if strides == "expanded": return torch.randn(B, 1, n, D, dtype=dtype).expand(B, H, n, D)
        return torch.randn(B * H * n * D + 1, dtype=dtype)[1:].view(B, H, n, D)    # in bf16 no multiple of 4 bytes
    q, k, v = make(L), make(S), make(S)
    if extreme: q = q * 20 - 60
    kw = dict(scale=scale)
    if masks in ("documents", "both"): kw["segment_ids"] = tuple(torch.randint(0, 2, (B, n)) for n in (L, S))
    if masks in ("key counts", "both"): kw["kv_lengths"] = torch.randint(0, S + 1, (B,))
    return [q, k, v], layout, kw

def check_case(threads, seed, **case):
    "Hold one case to the budget, on some number of threads"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    try:
        tensors, layout, kw = cpu_problem(**case)
        return check_attention(on_cpu, *tensors, layout, **kw)
    except OverBudget as e: raise OverBudget(f"seed {seed}, {threads} threads, {case}: {e}", e.share) from None
    finally: torch.set_num_threads(before)

@pytest.mark.parametrize("case", list(every_pair(AXES)), ids=lambda case: " ".join(map(str, case.values())))
def test_every_pair_of_choices_is_within_budget(case):
    "One problem in some thousands is a little over budget by luck; then four more must not be"
    def fresh(): return check_case(seed=random.SystemRandom().randrange(10**6), **case)
    for _ in range(2):
        try: fresh()
        except OverBudget as e:
            if e.share > 2: raise
            for _ in range(4): fresh()


def test_rows_and_columns_that_see_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        layout = BlockLayout.from_block_mask(torch.tensor([[True, False, False], [False, False, False], [True, False, True]]), 32)
        q, k, v = torch.randn(3, 1, 2, 96, 32).to(dtype)
        o, lse = cpu_forward(q, k, v, layout, 0.2, None, None)
        assert (o[:, :, 32:64] == 0).all() and (lse[:, :, 32:64] == -math.inf).all() and lse[:, :, :32].isfinite().all()
        dq, dk, dv = cpu_backward(torch.randn_like(q), torch.randn_like(lse), q, k, v, o, lse, layout, 0.2, None, None)
        assert (dq[:, :, 32:64] == 0).all() and (dk[:, :, 32:64] == 0).all() and (dv[:, :, 32:64] == 0).all() and dq.isfinite().all()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    before = torch.get_num_threads()
    try:
        for H, threads in ((4, 2), (1, 3)):
            torch.set_num_threads(threads)
            layout = P.bigbird(2, 1, 2).layout(500, block=32)
            q, k, v, do = torch.randn(4, 1, H, 500, 64).to(dtype)
            def run():
                o, lse = cpu_forward(q, k, v, layout, 0.125, None, None)
                return o, lse, *cpu_backward(do, torch.ones_like(lse), q, k, v, o, lse, layout, 0.125, None, None)
            first = run()
            for _ in range(10): assert all(torch.equal(a, b) for a, b in zip(first, run()))
    finally: torch.set_num_threads(before)


ALONE = """
import os, time, torch
from pythia_nb import patterns as P
from pythia_nb.cpu import cpu_forward
torch.set_num_threads(1)
q, k, v = torch.randn(3, 1, 4, 2048, 64)
layout = P.dense().layout(2048, block=64)
cpu_forward(q, k, v, layout, 0.125, None, None)
threads = len(os.listdir("/proc/self/task"))
wall, cpu = time.perf_counter(), time.process_time()
for _ in range(5): cpu_forward(q, k, v, layout, 0.125, None, None)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
assert cpu < 1.2 * wall, f"{cpu / wall:.2f} cores"
assert len(os.listdir("/proc/self/task")) == threads
"""

class Attends(Dataset):
    "Samples that tell how many threads attention has started in their worker"
    more = None
    def __len__(self): return 4
    def __getitem__(self, i): return torch.get_num_threads(), self.more

def attend_and_count(worker=0):
    "Called in a worker before its first sample, when nothing else starts threads there"
    before = len(os.listdir("/proc/self/task"))
    o, _ = cpu_forward(*torch.randn(3, 1, 4, 512, 64), P.local(2).layout(512), 0.125, None, None)
    assert o.isfinite().all()
    if (info := get_worker_info()): info.dataset.more = len(os.listdir("/proc/self/task")) - before

def test_one_thread_is_one_thread():
    if not os.path.isdir("/proc/self/task"): pytest.skip("counts threads in /proc")
    subprocess.run([sys.executable, "-c", ALONE], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})

@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_a_worker_of_a_loader(start):
    if not os.path.isdir("/proc/self/task"): pytest.skip("counts threads in /proc")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        attend_and_count()    # the parent's pool exists
        loader = DataLoader(Attends(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=100, worker_init_fn=attend_and_count)
        assert [tuple(sample) for sample in loader] == [(1, 0)] * 4
    finally: torch.set_num_threads(before)


@pytest.mark.slow
def test_clean_under_the_sanitizers(tmp_path):
    folder = os.path.dirname(os.path.abspath(__file__))
    script = f"import sys; sys.path.insert(0, {folder!r}); import test_06a_cpu_backward as t\nfor i, case in enumerate(t.every_pair(t.AXES)):\n    for x in range(2): t.check_case(seed=2 * i + x, **case)\nprint('clean', i + 1)"
    found = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    assert os.path.isabs(found), "the compiler has no AddressSanitizer; on Debian and Ubuntu it comes with g++"
    env = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "PYTHIA_NB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "2",
           "PYTHIA_NB_CXXFLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("clean"), done.stdout[-2000:] + done.stderr[-4000:]


ARM_MAIN = r"""
#include <cstdio>
#include <cstdlib>
int main() {                                   // memory, then where the struct's pointers point to; the memory afterwards is the answer
  Params p; i64 n, count, size[64], field[3]; char* memory[64];
  auto get = [](void* to, i64 bytes) { if ((i64)fread(to, 1, bytes, stdin) != bytes) exit(1); };
  get(&p, sizeof p); get(&count, 8); get(size, 8 * count);
  for (i64 i = 0; i < count; i++) memory[i] = (char*)aligned_alloc(64, (size[i] + 64) / 64 * 64), get(memory[i], size[i]);
  for (get(&n, 8); n > 0; n--) { get(field, 24); char* x = memory[field[1]] + field[2]; memcpy((char*)&p + field[0], &x, 8); }
  KERNEL(&p);
  for (i64 i = 0; i < count; i++) fwrite(memory[i], 1, size[i], stdout);
}
"""

def arm_program(folder, name, D):
    "The kernel with a main function, compiled for 64-bit ARM"
    path = folder / f"{name}-{D}"
    if not path.exists():
        (folder / "arm.cpp").write_text(kernel_source(name, D, False) + f"#define KERNEL {name}\n" + ARM_MAIN)
        options = [f for f in FLAGS if f != "-march=native"]
        subprocess.run(["aarch64-linux-gnu-g++", *options, "-static", str(folder / "arm.cpp"), "-o", str(path)], check=True)
    return path

@pytest.mark.slow
def test_on_emulated_arm(tmp_path, monkeypatch):
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"): pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    calls, real_fill = [], cpu_forward.__globals__["fill_params"]
    def fill(layout, columns, scale, segments, kv_lengths, tensors, **numbers):
        calls.append(tensors)
        return real_fill(layout, columns, scale, segments, kv_lengths, tensors, **numbers)
    def kernel(name, D, bf16):
        def run(reference):
            params, tensors = reference._obj, calls.pop()
            memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values() if t.numel()}
            fields = [(getattr(Params, key).offset, list(memory).index(t.untyped_storage().data_ptr()), t.data_ptr() - t.untyped_storage().data_ptr())
                      for key, t in tensors.items() if t.numel()]
            sizes = [m.nbytes() for m in memory.values()]
            words = [struct.pack(f"{len(numbers)}q", *numbers) for numbers in ([len(sizes), *sizes], [len(fields), *sum(fields, ())])]
            sent = bytes(params) + words[0] + b"".join(ctypes.string_at(m.data_ptr(), m.nbytes()) for m in memory.values()) + words[1]
            answer = subprocess.run(["qemu-aarch64", str(arm_program(tmp_path, name, D))], input=sent, capture_output=True, check=True).stdout
            assert len(answer) == sum(sizes)
            for m, end in zip(memory.values(), itertools.accumulate(sizes)): ctypes.memmove(m.data_ptr(), answer[end - m.nbytes():end], m.nbytes())
        return run
    for function in (cpu_forward, cpu_backward):
        for name, stand_in in dict(fill_params=fill, cpu_kernel=kernel, bf16_products=lambda: False).items(): monkeypatch.setitem(function.__globals__, name, stand_in)
    for seed, case in enumerate(every_pair(AXES)): check_case(seed=seed, **case)
