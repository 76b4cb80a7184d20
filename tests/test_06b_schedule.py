"Tests of 06b_schedule. Generated from nbs/06b_schedule.ipynb: edit that, then run pythia_book build."
import ctypes
import functools
import json
import pytest
import re
import shutil
import subprocess
import sys
import tempfile
import torch
from hypothesis import given, settings, strategies as st
from pathlib import Path
from pythia_nb import patterns as P
from pythia_nb.schedule import compile_report, cuda_schedule, cuda_source, document_layout, schedule, schedule_hash
from pythia_nb.work import schedule_cases, torch_schedule
from torch import Tensor


def test_the_sources_are_the_ones_that_passed_on_a_gpu():
    verified = json.loads((Path(__file__).parent.parent / "nbs/results/h200/verified.json").read_text())
    assert verified["schedule"] == schedule_hash(), "the kernels were edited since they last passed on a GPU: run pytest -m cuda there"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_kernels_compile_without_spills(arch):
    done, log = compile_report(cuda_source(), arch)
    assert done, log
    assert log.count(" 0 bytes spill stores, 0 bytes spill loads") == log.count("spill stores") >= 7, log
    assert "warning" not in log, log


EMULATOR = r'''
#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define asm
#define volatile(x) abort()
using std::min; using std::max;
struct Index { unsigned x; }; static Index threadIdx, blockIdx, gridDim;
struct int2 { int x, y; }; struct int4 { int x, y, z, w; };
static int2 make_int2(int x, int y) { return {x, y}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
struct Thread { ucontext_t context; std::vector<char> stack; bool done; };
static std::vector<Thread> threads; static ucontext_t scheduler; static std::function<void()> body;
struct Barrier { unsigned arrived, round; }; static Barrier all, warps[32];
static int put_down[1024];
static void wait(Barrier& barrier, unsigned members) {
  unsigned round = barrier.round;
  if (++barrier.arrived == members) { barrier.arrived = 0; barrier.round++; }
  for (unsigned me = threadIdx.x; barrier.round == round; threadIdx.x = me) swapcontext(&threads[me].context, &scheduler);
}
static void __syncthreads() { wait(all, threads.size()); }
static void __syncwarp() { wait(warps[threadIdx.x / 32], 32); }
template <class F> static int from_warp(int x, F read) { put_down[threadIdx.x] = x; __syncwarp(); int y = read(threadIdx.x / 32 * 32, threadIdx.x % 32); __syncwarp(); return y; }
static int __shfl_up_sync(unsigned, int x, int d) { return from_warp(x, [=](int warp, int lane) { return put_down[warp + (lane < d ? lane : lane - d)]; }); }
static int __shfl_xor_sync(unsigned, int x, int d) { return from_warp(x, [=](int warp, int lane) { return put_down[warp + (lane ^ d)]; }); }
static unsigned __match_any_sync(unsigned, int x) {
  return from_warp(x, [=](int warp, int) { unsigned same = 0; for (int l = 0; l < 32; l++) same |= (unsigned)(put_down[warp + l] == x) << l; return (int)same; });
}
static int __popc(unsigned x) { return __builtin_popcount(x); }
static void atomicAdd(int* p, int x) { *p += x; }
static void start() { body(); threads[threadIdx.x].done = true; }
static void run(unsigned grid, unsigned count) {
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
    threads.resize(count); all = {};
    for (auto& w : warps) w = {};
    for (auto& t : threads) {
      t.stack.resize(1 << 15); t.done = false; getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.data(); t.context.uc_stack.ss_size = t.stack.size(); t.context.uc_link = &scheduler;
      makecontext(&t.context, start, 0);
    }
    for (bool alive = true; alive;) {
      alive = false;
      for (unsigned t = 0; t < count; t++) if (!threads[t].done) { alive = true; threadIdx.x = t; swapcontext(&scheduler, &threads[t].context); }
    }
  }
}
'''


@functools.cache
def emulator():
    "The CUDA source as a library for the CPU: thread blocks of 64 that plan, sorts by 2 bits a pass"
    if shutil.which("g++") is None: pytest.skip("no C++ compiler (g++) here")
    source, starts = cuda_source(threads=64, bits=2), []
    for name, parameters in re.findall(r"__global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\)", source):
        types = [" ".join(p.split()[:-1]) for p in parameters.split(",")]
        values = ", ".join(f"({t})a[{i}]" for i, t in enumerate(types))
        starts.append(f'extern "C" void start_{name}(unsigned grid, unsigned count, const long long* a) {{ body = [=] {{ {name}({values}); }}; run(grid, count); }}')
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernels.cpp").write_text(EMULATOR + source + "\n".join(starts))
        subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", f"{folder}/kernels.so", f"{folder}/kernels.cpp"], check=True)
        return ctypes.CDLL(f"{folder}/kernels.so")

def emulate(name, grid, threads, device, *arguments):
    "`launch_cuda`, on the CPU"
    if name == "plan": arguments = (*arguments[:8], 6, *arguments[9:])    # six passes of 2 bits for lengths below 4096
    values = [x.data_ptr() if isinstance(x, Tensor) else int(x) for x in arguments]
    getattr(emulator(), f"start_{name}")(grid, min(threads, 64) if name in ("plan", "group_members", "document_lists") else threads,
                                         (ctypes.c_longlong * len(values))(*values))


def assert_same_schedule(plan, expected):
    "Assert that two schedules are equal, as far as they mean anything"
    for name in ("lists", "heads", "group", "max_items", "max_splits", "max_slots"): assert getattr(plan, name) == getattr(expected, name), name
    for name in ("members", "items", "splits", "counts"): assert torch.equal(getattr(plan, name).cpu(), getattr(expected, name)), name
    assert torch.equal(plan.entries[:plan.counts[1]].cpu(), expected.entries[:expected.counts[1]])


arguments = schedule_cases(st)

@settings(max_examples=80, deadline=None)
@given(**arguments)
def test_the_cuda_source_on_the_cpu_equals_the_definition(layout, columns, group, chunk):
    assert_same_schedule(cuda_schedule(layout, columns, group, chunk, emulate), torch_schedule(layout, columns, group, chunk))

@pytest.mark.parametrize("group", [1, 2, 4])
def test_more_lists_than_threads(group):
    layout = P.per_head([P.bigbird(3, 2, 3), P.strided(7) | P.local(2)]).layout(300 * 16, block=16)    # lists longer than a tile of 128, too
    for columns in (False, True):
        for chunk in (16, 10**10): assert_same_schedule(cuda_schedule(layout, columns, group, chunk, emulate), torch_schedule(layout, columns, group, chunk))


def test_schedules_are_kept_and_forgotten_with_their_layout():
    import gc, weakref
    layout = P.local(2).layout(256, block=64)
    made = schedule(layout, False, 1, 8)
    assert schedule(layout, False, 1, 8) is made and schedule(layout, True, 1, 8) is not made
    gone = weakref.ref(made)
    del layout, made
    gc.collect()
    assert gone() is None

def test_a_layout_that_outlives_the_modules_names_goes_in_silence(monkeypatch):
    "As when Python ends and a layout is still kept somewhere"
    import gc
    complaints, layout = [], P.local(2).layout(256, block=64)
    schedule(layout, False, 1, 8)
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    monkeypatch.setitem(schedule.__globals__, "_schedules", None)
    del layout
    gc.collect()
    assert not complaints


@pytest.mark.cuda
@settings(max_examples=150, deadline=None)
@given(**arguments)
def test_gpu_schedules_equal_the_definition(layout, columns, group, chunk):
    assert_same_schedule(schedule(layout.to("cuda"), columns, group, chunk), torch_schedule(layout, columns, group, chunk))


@pytest.mark.cuda
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [False, True])
def test_gpu_schedules_of_large_layouts(columns, group):
    for pattern in (P.bigbird(), P.per_head([P.strided(64) | P.local(2), P.local(8), P.dense() - P.local(500)])):
        layout = pattern.layout(65_536, block=64)
        for chunk in (32, 100_000): assert_same_schedule(schedule(layout.to("cuda"), columns, group, chunk), torch_schedule(layout, columns, group, chunk))


@pytest.mark.cuda
def test_schedules_of_a_capture_are_not_used_outside():
    schedule(P.local(1).layout(64).to("cuda"), False, 1, 16)    # compiles, which no capture allows
    layout = P.bigbird().layout(8192).to("cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()): inside = schedule(layout, False, 1, 16)    # never replayed
    outside = schedule(layout, False, 1, 16)
    assert outside is not inside and outside is schedule(layout, False, 1, 16)
    side = torch.cuda.Stream()
    fresh = P.bigbird().layout(8192).to("cuda")
    torch.cuda.synchronize()
    first = schedule(fresh, True, 1, 16)
    with torch.cuda.stream(side): assert schedule(fresh, True, 1, 16) is first and first.counts[0] > 0
    assert_same_schedule(first, torch_schedule(fresh.to("cpu"), True, 1, 16))


@pytest.mark.parametrize("group, chunk, message", [(3, 16, "group is 3; a program takes 1, 2, 4 or 8"), (1, 0, "chunk is 0; give"), (1, 2.5, "whole number")])
def test_mistakes_get_one_sentence(group, chunk, message):
    with pytest.raises(ValueError, match=message): schedule(P.local(1).layout(64), False, group, chunk)
    with pytest.raises(ValueError, match="a whole number for each of the 90 tokens"): document_layout(torch.zeros(64, dtype=torch.int64), S=90)
    with pytest.raises(ValueError, match="queries start at 0"): document_layout(torch.zeros(64, dtype=torch.int64), q_start=-3, causal=False)


def assert_same_layout(layout, expected):
    "Assert that two layouts are equal, where the first may have room at the end of its lists"
    assert (layout.L, layout.S, layout.block, layout.causal, layout.q_start, layout.heads) == (expected.L, expected.S, expected.block, expected.causal, expected.q_start, 1)
    for name in ("row_ptr", "col_ptr", "segment_ids"): assert torch.equal(getattr(layout, name).cpu(), getattr(expected, name)), name
    for name in ("row_cols", "row_full", "col_rows", "col_full"): assert torch.equal(getattr(layout, name)[:expected.visible].cpu(), getattr(expected, name)), name


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30), less=st.integers(0, 60), queries=st.integers(1, 400), start=st.one_of(st.none(), st.integers(0, 400)),
       block=st.sampled_from([16, 32, 64]), causal=st.booleans(), room=st.sampled_from([None, 0, 7]), repeat=st.integers(1, 12))
def test_document_layouts_equal_the_pattern(lengths, less, queries, start, block, causal, room, repeat):
    lengths = lengths * repeat    # more blocks than threads, too
    ids = torch.repeat_interleave(torch.randperm(len(lengths)), torch.tensor(lengths))
    S = max(len(ids) - less, 1)
    expected = P.document(ids).layout(queries, S, block, causal, q_start=start)
    capacity = None if room is None else expected.visible + room
    assert_same_layout(document_layout(ids, queries, S, block, causal, start, capacity, emulate), expected)


def some_documents(tokens: int, count: int, seed: int) -> Tensor:
    "Ids of `count` documents of random lengths, int64 [tokens]"
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[:count - 1] + 1
    return torch.zeros(tokens, dtype=torch.int64).index_fill(0, cuts, 1).cumsum(0)


@pytest.mark.cuda
@pytest.mark.parametrize("tokens, count", [(1, 1), (1000, 7), (32_768, 64), (200_000, 3), (1_048_576, 900)])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_document_layouts_equal_the_pattern(tokens, count, block, causal):
    if tokens == 200_000 and block == 16: tokens = 50_000    # three documents of many blocks each: keep the list below a gigabyte
    ids = some_documents(tokens, count, 0)
    expected = P.document(ids).layout(tokens, block=block, causal=causal)
    for capacity in (None, expected.visible + 100): assert_same_layout(document_layout(ids.cuda(), block=block, causal=causal, capacity=capacity), expected)


@pytest.mark.cuda
def test_a_graph_rebuilds_layout_and_schedules():
    ids = some_documents(32_768, 64, 0).cuda()
    def build():
        layout = document_layout(ids, capacity=140_000)
        return layout, schedule(layout, False, 1, 64), schedule(layout, True, 2, 64)
    build()    # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): layout, rows, columns = build()
    for seed in range(1, 4):
        new = some_documents(32_768, 64, seed)
        ids.copy_(new); graph.replay(); torch.cuda.synchronize()
        expected = P.document(new).layout(32_768)
        assert_same_layout(layout, expected)
        for plan, columns_too, group in ((rows, False, 1), (columns, True, 2)):
            definition = torch_schedule(expected, columns_too, group, 64)
            n = definition.counts[0]    # the bounds differ with the room
            assert torch.equal(plan.counts.cpu(), definition.counts) and torch.equal(plan.items[:n].cpu(), definition.items[:n])
            assert torch.equal(plan.entries[:definition.counts[1]].cpu(), definition.entries[:definition.counts[1]])


@pytest.mark.cuda
def test_documents_that_need_more_room_stop_the_program():
    program = """if True:
        import torch
        from pythia_nb.schedule import document_layout
        ids = torch.arange(4, device="cuda").repeat_interleave(256)    # 4 documents of 4 blocks: 40 visible
        document_layout(ids, capacity=40); torch.cuda.synchronize(); print("enough room")
        document_layout(ids, capacity=39); torch.cuda.synchronize(); print("not reached")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)    # the error ends the process's use of the GPU
    assert done.returncode != 0 and "CUDA error" in done.stderr and "enough room" in done.stdout and "not reached" not in done.stdout, done


def gpu_microseconds(work, repeats=50):
    "Median time on the GPU of a replay of `work`, in microseconds"
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): kept = work()    # kept: so that each has memory of its own
    times = []
    for _ in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(); graph.replay(); end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times[5:])[repeats // 2]


@pytest.mark.cuda
def test_rebuilding_takes_a_hundred_microseconds():
    ids = some_documents(32_768, 64, 0).cuda()
    def layout(): return document_layout(ids, capacity=131_328)
    made, bigbird = layout(), P.bigbird().layout(32_768).to("cuda")
    times = {"document layout": gpu_microseconds(layout)}
    for name, of in (("documents", made), ("bigbird", bigbird)):
        for columns in (False, True): times[f"{name}, {'columns' if columns else 'rows'}"] = gpu_microseconds(lambda: cuda_schedule(of, columns, 1, 32))
    def both(): made = layout(); return made, cuda_schedule(made, False, 1, 32), cuda_schedule(made, True, 1, 32)
    times["documents: layout and both schedules"] = gpu_microseconds(both)
    print(torch.cuda.get_device_name(), {name: f"{time:.1f} us" for name, time in times.items()})
    assert times["document layout"] <= 100 and times["documents: layout and both schedules"] <= 100
