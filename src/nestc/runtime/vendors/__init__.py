"""Vendors' runtimes as devices: a partition is an ONNX model there, which the runtime compiles when it is loaded."""
