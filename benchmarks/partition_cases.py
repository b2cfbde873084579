"""What benchmarks/partition.py runs: networks, sets of devices, the number format of each, and published gains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import nestc
import zoo
from nestc.errors import Error

MODELS = "resnet18,resnet50,squeezenet11,googlenet,inception_v3,mobilenetv2,ppocr_rec,minilm"

SETS = "cpu+vta,cpu+vta+aim,cpu+vta+vta,cpu+onnxruntime+openvino"

OPTIONS: Mapping[str, str] = {"vta": "config=zcu102_1x16", "aim": "round=true"}
"""Options of targets where none are given. VTA at 16 x 16 products a cycle and 333 MHz: the board that PartitionTuner's
NPUs were on. AiM rounds the float32 that it is offered to bfloat16."""

CALIBRATION = 8
"""Seeded random inputs that networks are calibrated on: times do not depend on what these were."""

SIMULATED = frozenset({"vta", "aim"})
"""Targets that run in modelled time."""

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "type_based": {"squeezenet11": 5.03},
    "viterbi": {"resnet50": 7.18, "resnet18": 5.36, "squeezenet11": 2.73},
}
"""Percent that PartitionTuner reports (ETRI Journal 45(2), 2023): over static type-based scheduling, and over the
profiling-based schedulers that it is compared with. On other devices than ours, so only a mark to pass."""


@dataclass(frozen=True)
class Case:
    """One row: a network of the zoo, the targets it may use (as ``nestc.compile`` takes them), what is minimised."""

    model: str
    devices: tuple[str, ...]
    objective: str = "latency"
    threads: int = 1

    @property
    def label(self) -> str:
        """The devices without their options."""
        return "+".join(device.partition(":")[0] for device in self.devices)

    @property
    def slug(self) -> str:
        """A name for files."""
        devices = "+".join(self.devices).replace(":", "-").replace("/", "-")
        return f"{self.model},{devices},{self.objective},{self.threads}"

    @property
    def simulated(self) -> tuple[str, ...]:
        """The devices whose time is modelled."""
        return tuple(name for name in (device.partition(":")[0] for device in self.devices) if name in SIMULATED)

    @property
    def scheme(self) -> str | None:
        """The quantization scheme that the devices need; None: float32."""
        if "vta" not in self.simulated:
            return None
        return "devices" if "aim" in self.simulated else "int8-pow2"

    def inputs(self) -> dict[str, np.ndarray]:
        """Seeded inputs."""
        return zoo.inputs(self.model)


def cases(
    models: str, sets: str, objectives: Sequence[str], threads: int, options: Mapping[str, str] | None = None
) -> list[Case]:
    """Every model with every set of devices and objective. Raises Error for an unknown model."""
    chosen = {**OPTIONS, **(options or {})}
    found: list[Case] = []
    for each in sets.split(","):
        names = [name.strip() for name in each.split("+")]
        devices = tuple(f"{name}:{chosen[name]}" if chosen.get(name) else name for name in names)
        for model in zoo.select(models):
            found += [Case(model.name, devices, objective, threads) for objective in objectives]
    return found


def work_folder() -> Path:
    """Where models and bundles are kept if no folder is named."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nestc" / "partition-benchmark"


def model_of(case: Case, work: Path) -> nestc.Model:
    """The network in the format that its devices need, quantized on first use and kept in `work`.

    What lies there is taken as it is: use a new folder where the quantizer has changed.
    """
    shapes = {name: list(shape) for name, shape in zoo.get(case.model).shapes.items()}
    if case.scheme is None:
        return nestc.load(zoo.path(case.model), shapes=shapes)
    # What the scheme devices makes of a network depends on the devices.
    file = work / f"{case.slug if case.scheme == 'devices' else f'{case.model}-{case.scheme}'}.onnx"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        model = nestc.load(zoo.path(case.model), shapes=shapes)
        profile = nestc.calibrate(model, [zoo.inputs(case.model, seed) for seed in range(1, CALIBRATION + 1)])
        temporary = file.with_suffix(f".{os.getpid()}.onnx")
        try:
            targets = case.devices if case.scheme == "devices" else None
            nestc.quantize(model, profile, scheme=case.scheme, targets=targets).save(temporary)
            temporary.replace(file)
        except Error:
            temporary.unlink(missing_ok=True)
            raise
    return nestc.load(file)
