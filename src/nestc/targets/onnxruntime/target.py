"""ONNX Runtime as a target: it takes the regions that it has kernels for, and gets each partition as an ONNX model."""

from __future__ import annotations

from collections.abc import Callable

from nestc.host import available_cpus
from nestc.runtime.vendors.onnxruntime import CPU, KIND, OnnxRuntimeDevice, provider_called, runtime, short
from nestc.targets.api import Artifact, Device, Machine, Memory, Offer, Partition
from nestc.targets.cpu.machine import host_machine
from nestc.targets.onnxruntime.kernels import BORDER, known_ops, offered, opset_of, sound
from nestc.targets.power import cpu_watts
from nestc.targets.vendors import artifact, known_forms, no_bodies


class OnnxRuntimeTarget:
    """ONNX Runtime. Options: ``provider`` (CPU, CUDA, TensorRT, QNN, CoreML, Dml, OpenVINO ... as far as installed),
    ``threads``, and ``watts``, assumed for energies that are estimated. `nestc[onnxruntime]` brings the package."""

    name = "onnxruntime"

    def __init__(self, provider: str = "CPU", threads: int | None = None, watts: float | None = None) -> None:
        self.provider = provider_called(provider)
        self.opset = opset_of(self.provider)
        self.threads = threads or available_cpus()
        here = self.provider == CPU
        self.machine = Machine(
            name=f"onnxruntime {short(self.provider)}",
            memories=(Memory("ram", 0, 64),),
            dtypes=BORDER,
            facts={
                "version": runtime().__version__,
                "provider": short(self.provider),
                "opset": self.opset,
                "cpu": host_machine().name,
                "dynamic_shapes": here,
            },
            resource="cpu" if here else "",
            watts=cpu_watts(watts, self.threads, self.name) if here or watts is not None else 0.0,
        )
        self.offers: tuple[Offer, ...] = (
            Offer(
                "sessions",
                known_ops(self.provider),
                where=(no_bodies, known_forms(self.opset), offered(self.provider), sound),
            ),
        )

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """The partition as an ONNX model, which a session has accepted here. Raises TargetError if it does not."""
        return artifact(KIND, partition, {"provider": self.provider}, self.open(), self.threads, self.opset)

    def open(self) -> Device:
        """ONNX Runtime in this process."""
        return OnnxRuntimeDevice()
