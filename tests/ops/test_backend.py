"""Which implementation serves an op, and how a kernel's function becomes one node to a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hymba import ops
from hymba.errors import UserError
from hymba.ops import Segments
from hymba.ops import backend as backend_module
from hymba.ops import conv as conv_module
from hymba.ops import packed as packed_module
from hymba.ops.backend import backend, forget, operator, twin
from hymba.ops.packed import quantize
from hymba.schemes import SCHEMES

calls: list[str] = []


@operator("test_double")
def double(x: Tensor, lengths: list[int]) -> Tensor:
    calls.append(type(x).__name__)
    return 2 * x


@double.register_fake
def _(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.empty_like(x)


double.register_autograd(lambda ctx, grad: (2 * grad, None))


@pytest.fixture
def undecided() -> Iterator[None]:
    """No backend chosen yet, and none chosen here left to others."""
    forget()
    yield
    forget()


def test_an_operator_is_a_plain_function_where_nothing_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(double, "op", None)  # to be asked would be an error
    with torch.no_grad():
        got = double(torch.ones(2, requires_grad=True), [2])
    assert torch.equal(got, torch.full((2,), 2.0))
    assert torch.equal(double(torch.ones(2), [2]), torch.full((2,), 2.0))


def test_gradients_go_through_an_operator() -> None:
    x = torch.ones(3, requires_grad=True)
    double(x, [3]).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_fake_tensors_are_not_computed() -> None:
    calls.clear()
    with FakeTensorMode():
        assert double(torch.ones(3), [3]).shape == (3,)
    assert not calls


def test_a_compiler_sees_one_node() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: double(x + 1, [4]) * 3, backend=keep, fullgraph=True)
    assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 12.0))
    nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("test_double" in node for node in nodes) == 1


@pytest.mark.usefixtures("undecided")
def test_float64_never_meets_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels add up in float32."""
    pytest.importorskip("triton")
    monkeypatch.setenv("HYMBA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = [twin("rms_norm", torch.ones(1, dtype=t)) for t in (torch.float32, torch.float64)]
    assert [op.__module__ for op in chosen] == ["hymba.ops.norm_triton", "hymba.ops.norm"]


@pytest.mark.usefixtures("undecided")
def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMBA_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="HYMBA_BACKEND=triton: no kernels for cpu"):
        backend("cpu")


@pytest.mark.usefixtures("undecided")
def test_numba_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMBA_BACKEND", "numba")
    with pytest.raises(UserError, match=r"for CPUs and needs: pip install 'hymba\[cpu\]'"):
        backend("mps")


@pytest.mark.usefixtures("undecided")
def test_without_numba_a_cpu_has_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is said but where it matters: for weights in few bits, once."""
    for module in (backend_module, packed_module):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    packed_module._name_faster.cache_clear()
    assert backend("cpu") == "torch"
    assert not caplog.records
    packed = quantize(torch.randn(3, 32), SCHEMES["int4"])
    for _ in range(2):
        ops.packed_linear(torch.ones(1, 32), packed)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install 'hymba[cpu]'" in caplog.text
    packed_module._name_faster.cache_clear()


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_the_door(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """hymba.ops.causal_conv is the fast one, and the other when HYMBA_BACKEND asks for it."""
    monkeypatch.setenv("HYMBA_BACKEND", name)
    for op in ("causal_conv", "causal_conv_reference"):
        monkeypatch.setattr(conv_module, op, lambda *_, op=op: op)
    taken = ops.causal_conv(torch.ones(4, 3), torch.ones(3, 4), None, Segments((4,)))
    assert taken == {"torch": "causal_conv", "reference": "causal_conv_reference"}[name]


@pytest.mark.usefixtures("undecided")
def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMBA_BACKEND", "nonsense")
    with pytest.raises(UserError, match="HYMBA_BACKEND='nonsense' is not one of triton, numba"):
        ops.causal_conv(torch.ones(4, 3), torch.ones(3, 4), None, Segments((4,)))


@pytest.mark.usefixtures("undecided")
def test_a_device_without_kernels_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert backend("mps") == "torch"
        assert backend("cpu") in ("numba", "torch")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no kernels for mps" in caplog.text
