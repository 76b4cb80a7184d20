"Tests of 10a_operators. Generated from nbs/10a_operators.ipynb: edit that, then run pythia_book build."
import importlib.util
import pytest
import torch
from pythia_nb import patterns as P
from pythia_nb.cuda_basics import cuda_obstacle
from pythia_nb.layout import BlockLayout
from pythia_nb.operators import (
    BACKENDS, TransformedForward, attention_backward, attention_forward, backend_for, call_backend, call_operator,
    choose_backend, flatten, warn_once,
)
from types import SimpleNamespace


@pytest.mark.parametrize("change, dtype, D, reason", [
    (dict(capability=(7, 5)), torch.bfloat16, 64, "older than Ampere"), (dict(), torch.float64, 64, "not float64"),
    (dict(), torch.bfloat16, 63, "not 63"), (dict(cupy=None), torch.bfloat16, 64, "CuPy is not installed")])
def test_a_fallback_says_why_and_only_once(change, dtype, D, reason, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: change.get("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "the GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: change.get("cupy", True) if name == "cupy" else find(name, *rest))
    monkeypatch.setitem(backend_for.__wrapped__.__globals__, "why_no_cuda", cuda_obstacle.__wrapped__)    # without what it remembers
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 1, 32, D))
    backend_for.cache_clear(); warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"which is slower.*{reason}") as told:
        assert [choose_backend("auto", q) for _ in range(3)] == ["torch"] * 3
    assert len(told) == 1
    with pytest.raises(ValueError, match=f"'cuda' can't be used.*{reason}"): choose_backend("cuda", q)
    backend_for.cache_clear(); warn_once.cache_clear()


def test_the_cpu_backend_is_chosen_and_says_why_it_cannot_be_used():
    q = torch.randn(1, 1, 32, 16)
    assert choose_backend("auto", q) == choose_backend("cpu", q.bfloat16()) == "cpu"
    assert choose_backend("auto", q.double()) == choose_backend("auto", q.half()) == choose_backend("auto", q[..., :12]) == "torch"
    with pytest.raises(ValueError, match="not float64 with 16; use backend='torch'"): choose_backend("cpu", q.double())


def test_autocast_is_off_inside_a_backend(monkeypatch):
    seen = []
    def spy(q): seen.append(torch.is_autocast_enabled("cpu"))
    monkeypatch.setitem(BACKENDS, "torch", (spy, spy))
    with torch.autocast("cpu", torch.bfloat16):
        for direction in (0, 1): call_backend(direction, "torch", torch.ones(1))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]


def operator_problem(dtype, backend):
    "q, k, v and the rest, as the operator takes them: lists for each head, documents, key counts, permuted strides, lengths that are no multiple of the block"
    layout = BlockLayout.from_block_mask(torch.rand(3, 5, 6) < 0.6, 16, True, 70, 90)
    tensors = [torch.randn(2, n, 3, 16).transpose(1, 2).to(dtype) for n in (70, 90, 90)]
    documents, counts = tuple(torch.randint(0, 2, (2, n)) for n in (70, 90)), torch.randint(0, 91, (2,))
    return tensors, flatten(layout, 0.25, documents, counts, backend)

def test_autograd_and_torch_func_get_the_same_gradients():
    tensors, rest = operator_problem(torch.float32, "torch")
    def loss(q, k, v): return call_operator(attention_forward, TransformedForward, q, k, v, *rest)[0].square().sum()
    leaves = [t.clone().requires_grad_() for t in tensors]
    for got, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), torch.autograd.grad(loss(*leaves), leaves)): assert torch.equal(got, want)


def test_an_operator_is_one_node_of_a_compiled_graph():
    tensors, rest = operator_problem(torch.float32, "torch")
    graphs = []
    def keep(graph, inputs):
        graphs.append(graph)
        return graph
    def f(q, k, v): return attention_forward(q.sin(), k, v, *rest)[0].cos()
    assert torch.equal(torch.compile(f, fullgraph=True, backend=keep)(*tensors), f(*tensors))
    nodes = [str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")]
    assert len(graphs) == 1 and sum("attention_forward" in name for name in nodes) == 1 and len(nodes) == 4    # sin, attention, its first output, cos


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, backend):
    tensors, rest = operator_problem(dtype, backend)
    torch.library.opcheck(attention_forward, (*[t.requires_grad_() for t in tensors], *rest))
    q, k, v = (t.detach() for t in tensors)
    o, lse = attention_forward(q, k, v, *rest)
    for dlse in (torch.randn_like(lse), None):
        torch.library.opcheck(attention_backward, (torch.randn_like(o), dlse, q, k, v, o, lse, *rest))


@pytest.mark.cuda
def test_the_cuda_backend_is_chosen_and_its_operator_checked():
    layout = P.per_head([P.bigbird(1, 1, 1), P.strided(2)]).layout(100, block=32).to("cuda")
    q, k, v = (torch.randn(2, 2, 100, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert choose_backend("auto", q) == "cuda" and choose_backend("auto", q[..., :63]) == "torch"
    rest = flatten(layout, 0.125, None, None, "cuda")
    torch.library.opcheck(attention_forward, (*(t.clone().requires_grad_() for t in (q, k, v)), *rest))
