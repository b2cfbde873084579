"""OpenVINO as a target: it takes regions that it is known to compute as ONNX says, each partition as an ONNX model."""

from __future__ import annotations

from collections.abc import Callable

from nestc.host import available_cpus
from nestc.runtime.vendors.common import package
from nestc.runtime.vendors.openvino import KIND, OpenVinoDevice, core, device_called, require_precision
from nestc.targets.api import Artifact, Device, Machine, Memory, Offer, Partition
from nestc.targets.openvino.rules import BORDER, OPS, kept_types, sound
from nestc.targets.power import cpu_watts
from nestc.targets.vendors import OPSET, artifact, known_forms


class OpenVinoTarget:
    """OpenVINO. Options: ``device`` (CPU, GPU, GPU.1, NPU ... as far as here), ``precision`` (f32, f16, bf16) that
    float32 is computed in, ``threads``, and ``watts``, assumed for energies that are estimated.

    `nestc[openvino]` brings the package.
    """

    name = "openvino"

    def __init__(
        self, device: str = "CPU", precision: str = "f32", threads: int | None = None, watts: float | None = None
    ) -> None:
        self.device = device_called(device)
        require_precision(self.device, precision)
        self.precision = precision
        self.threads = threads or available_cpus()
        here = self.device == "CPU"
        self.machine = Machine(
            name=f"openvino {self.device}",
            memories=(Memory("ram", 0, 64),),
            dtypes=BORDER,
            facts={
                "version": package("openvino").__version__,
                "device": self.device,
                "device_name": str(core().get_property(self.device, "FULL_DEVICE_NAME")),
                "precision": precision,
            },
            resource="cpu" if here else "",
            watts=cpu_watts(watts, self.threads, self.name) if here or watts is not None else 0.0,
        )
        self.offers: tuple[Offer, ...] = (Offer("models", OPS, where=(known_forms(OPSET), kept_types, sound)),)

    def compile(self, partition: Partition, emit: Callable[[str, str, str], None] | None = None) -> Artifact:
        """The partition as an ONNX model, which OpenVINO has compiled here. Raises TargetError if it does not."""
        options = {"device": self.device, "precision": self.precision}
        return artifact(KIND, partition, options, self.open(), self.threads)

    def open(self) -> Device:
        """OpenVINO in this process."""
        return OpenVinoDevice()
