"""The target ``onnxruntime``: regions run in ONNX Runtime, on the CPU or whatever else its providers drive."""

from nestc.targets.onnxruntime.target import OnnxRuntimeTarget

__all__ = ["OnnxRuntimeTarget"]
