"""ONNX graphs written by hand: a value is its name, an op is a call that returns the names it made.

    graph = Graph(Data(folder / "weights.bin"))
    x = graph.op("Gather", graph.weight("embedding", tensor), "ids")

Weights go to one file as they come, one after the other, and a graph holds only where they lie: no
model is ever in memory, no graph meets protobuf's limit of 2 GB, and several graphs, or several
shapes of the same bytes, share what is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

PAGE = 4096  # where a large tensor begins, so that runtimes can map the file
SMALL = 1024  # bytes; below, a tensor stands in the graph itself
MICROSOFT = "com.microsoft"  # onnxruntime's own ops
KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.uint8): TensorProto.UINT8,
}


class Place(NamedTuple):
    """Where a tensor lies in the data file; bytes and shape, and itself where it is small."""

    offset: int
    kind: int
    shape: tuple[int, ...]
    raw: bytes | None
    size: int


class Data:
    """A file of tensors, one behind the other. Close it, or use it as a context."""

    def __init__(self, path: Path):
        self.name = path.name
        self.places: dict[str, Place] = {}
        self._file = path.open("wb")

    def put(self, name: str, array: np.ndarray) -> None:
        if name in self.places:
            raise ValueError(f"{name} is written already")
        array, offset, raw = np.ascontiguousarray(array), 0, None
        if array.nbytes < SMALL:
            raw = array.tobytes()
        else:
            self._file.write(b"\0" * (-self._file.tell() % PAGE))
            offset = self._file.tell()
            self._file.write(array.data)
        kind = KINDS[array.dtype]
        self.places[name] = Place(offset, kind, array.shape, raw, array.nbytes)

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Graph:
    """Nodes and initialisers on their way to a GraphProto. The body of a loop or a branch is a
    graph `inside` another, whose values it may use."""

    def __init__(self, data: Data):
        self.data = data
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self._where: list[str] = []
        self._made: dict[str, int] = {}

    def inside(self) -> Graph:
        """A graph whose weights and constants belong to this one, and whose names are its own."""
        inner = Graph(self.data)
        inner.weights, inner._where, inner._made = self.weights, self._where, self._made
        return inner

    @contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Names of what is made meanwhile begin with this part."""
        self._where.append(part)
        yield
        self._where.pop()

    def ops(
        self, kind: str, *inputs: str, outputs: int | Sequence[str], **attributes: Any
    ) -> list[str]:
        """Add a node; the names of its outputs, made up where only their number is given."""
        place = "/".join([*self._where, kind])
        number = self._made[place] = self._made.get(place, 0) + 1
        name = f"{place}.{number}"
        if isinstance(outputs, int):
            outputs = [f"{name}.{index}" for index in range(outputs)]
        node = helper.make_node(kind, list(inputs), list(outputs), name=name, **attributes)
        self.nodes.append(node)
        return list(outputs)

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, and its name."""
        named: int | list[str] = 1 if output is None else [output]
        return self.ops(kind, *inputs, outputs=named, **attributes)[0]

    def weight(
        self, name: str, array: np.ndarray | None = None, shape: Sequence[int] | None = None
    ) -> str:
        """An initialiser: `array`, or what was written under this name before. With a `shape` it
        is another view of the same bytes."""
        if array is not None and name not in self.data.places:
            self.data.put(name, array)
        place = self.data.places[name]
        dims = list(place.shape if shape is None else shape)
        known = name if shape is None else f"{name}{tuple(dims)}"
        if known not in self.weights:
            self.weights[known] = _tensor(known, place, dims, self.data.name)
        return known

    def ints(self, *values: int) -> str:
        """A constant (len(values),) int64."""
        return self._constant(np.array(values, np.int64))

    def scalar(self, value: float | int) -> str:
        """A constant () of float32, or of int64 for an int."""
        return self._constant(np.array(value, np.int64 if isinstance(value, int) else np.float32))

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant {array.dtype.name}{list(array.shape)} {array.tolist()}"
        return self.weight(name, array)

    def proto(
        self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
    ) -> GraphProto:
        """As a graph of its own, with all weights."""
        return helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), list(self.weights.values())
        )

    def body(
        self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
    ) -> GraphProto:
        """As the body of a loop or a branch: the weights are those of the graph around it."""
        return helper.make_graph(self.nodes, name, list(inputs), list(outputs))


def value(name: str, shape: Sequence[int | str] | None, kind: int = 0) -> ValueInfoProto:
    """An input or output; a name in a shape is a size that is known when it runs."""
    return helper.make_tensor_value_info(name, kind or TensorProto.FLOAT, shape)


def _tensor(name: str, place: Place, dims: Sequence[int], file: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=place.kind, dims=dims)
    if place.raw is not None:
        tensor.raw_data = place.raw
        return tensor
    tensor.data_location = TensorProto.EXTERNAL
    told = {"location": file, "offset": str(place.offset), "length": str(place.size)}
    for key, said in told.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, said
    return tensor
