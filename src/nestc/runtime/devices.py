"""Which device runs an artifact: a table of the kinds that nestc makes, then the entry points of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from nestc.bundle.artifact import Device
from nestc.errors import TargetError

ENTRY_POINTS = "nestc.devices"
"""Group of entry points: the name is an artifact kind, the value a function without arguments that returns a Device."""

_OWN = {
    "aim": ("nestc.runtime.aim.device", "AimDevice"),
    "cpu-native": ("nestc.runtime.native", "CpuDevice"),
    "host-onnx": ("nestc.runtime.host", "HostDevice"),
    "onnxruntime": ("nestc.runtime.vendors.onnxruntime", "OnnxRuntimeDevice"),
    "openvino": ("nestc.runtime.vendors.openvino", "OpenVinoDevice"),
    "vta": ("nestc.runtime.vta.device", "VtaDevice"),
}


def device_for(kind: str) -> Device:
    """The device for artifacts of `kind`. Raises TargetError if no installed package has one."""
    if kind in _OWN:
        module, name = _OWN[kind]
        return cast(Callable[[], Device], getattr(importlib.import_module(module), name))()
    from importlib.metadata import entry_points  # slow to import, and not needed for our own

    for point in entry_points(group=ENTRY_POINTS, name=kind):
        return cast(Callable[[], Device], point.load())()
    raise TargetError(f"no installed device runs artifacts of kind {kind!r}; install the package of that target")
