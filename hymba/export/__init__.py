"""A model for devices without Python: ONNX graphs that onnxruntime runs. Needs `hymba[onnx]`.

The graphs are written node by node from the model's own modules (`decoder`), not traced: we own the
model, tracing would fix its Python branches and copy every weight, and what comes out is small
enough to read. In reading order: layout - graph - linear - meta - decoder - run.
"""

from hymba.export.linear import ExportError
from hymba.export.run import Choices, export

__all__ = ["Choices", "ExportError", "export"]
