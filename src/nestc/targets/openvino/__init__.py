"""The target ``openvino``: regions run in OpenVINO, on the CPU or Intel's GPUs and NPUs."""

from nestc.targets.openvino.target import OpenVinoTarget

__all__ = ["OpenVinoTarget"]
