"""The plan: which device takes which region and why, what crosses between devices, as plain data that prints and saves.

Nothing here imports a compiler stage, so an opened bundle can show its plan.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from nestc.errors import PlanError

FORMAT = 2


@dataclass(frozen=True)
class Alternative:
    """What a region costs on a device: milliseconds (of it alone, borders apart), and how that is known."""

    ms: float
    kind: str = "measured"


@dataclass(frozen=True)
class PlannedRegion:
    """A region, the device that takes it and why; the refusals, in words, of the devices that do not take it.

    ``costs``: by device, for all that take it. ``predicted_ms`` is the cost where it is placed.
    """

    name: str
    device: str
    ops: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    predicted_ms: float | None = None
    kind: str = "estimated"
    costs: Mapping[str, Alternative] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class PlannedPartition:
    """Regions, by name and in execution order, that one device runs without interruption, and when by prediction."""

    name: str
    device: str
    regions: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    begin_ms: float | None = None
    end_ms: float | None = None


@dataclass(frozen=True)
class Transfer:
    """A tensor that crosses from one device to another; `bytes` is its plain size.

    ``us``: predicted microseconds on the links. ``conversion_us``: what both devices work on it beside that, turning it
    from and into layouts of their own, which is in the times of their partitions. "host memory" stands for the graph's
    inputs and outputs.
    """

    tensor: str
    source: str
    destination: str
    bytes: int
    us: float = 0.0
    kind: str = "estimated"
    conversion_us: float = 0.0


@dataclass(frozen=True)
class PlannedSplit:
    """An operator that is computed in parts, by its node: the output channels of each part."""

    node: str
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Where everything of a model runs. Regions are in execution order.

    ``predicted_ms`` is of the objective "latency" or "energy" one inference, of "throughput" the time a request when
    pipelined; ``lower_bound_ms``: no placement of these regions does better by the same costs (millijoules for the
    objective "energy", as ``predicted_mj``), in which its own partitions take what was measured of them as a whole and
    others what their regions say; ``promised_ms``: by these costs, the value of the last solution that the solver found
    (in the unit of the bound), whose partitions need not all have been measured; ``single_device_ms``: by device, all
    it takes there and the rest on the CPU. ``method`` tells how it was found. ``cuts``: nodes after which regions are
    cut for a device that takes a piece; ``splits``: operators that are computed in parts, which may run on several
    devices.
    """

    model: str
    objective: str
    devices: tuple[str, ...]
    regions: tuple[PlannedRegion, ...]
    partitions: tuple[PlannedPartition, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    predicted_ms: float | None = None
    predicted_mj: float | None = None
    lower_bound_ms: float | None = None
    promised_ms: float | None = None
    optimal: bool = False
    single_device_ms: Mapping[str, float] = field(default_factory=dict)
    method: str = "in the order of the targets"
    cuts: tuple[str, ...] = ()
    splits: tuple[PlannedSplit, ...] = ()

    @property
    def fallback_ops(self) -> dict[str, int]:
        """Operators that run in an interpreter instead of generated code, and how many of each."""
        counts = Counter(op for region in self.regions if region.device == "host" for op in region.ops)
        return dict(sorted(counts.items()))

    def ops(self, partition: PlannedPartition) -> dict[str, int]:
        """Operators of a partition and how many of each, most frequent first."""
        inside = set(partition.regions)
        counts = Counter(op for region in self.regions if region.name in inside for op in region.ops)
        return dict(counts.most_common())

    def explain(self) -> str:
        """The plan in words: each device's share, what crosses, what it takes, and for each region why it is there."""
        lines = [f"{self.model}: {len(self.regions)} regions in {len(self.partitions)} partitions ({self.objective})"]
        lines += [f"  {words}" for words in self.predictions()]
        for device in self.devices:
            taken = [region for region in self.regions if region.device == device]
            if taken:
                counts = Counter(op for region in taken for op in region.ops)
                share = ", ".join(f"{op} {count}" for op, count in counts.most_common())
                lines.append(f"  {device} takes {len(taken)} regions: {share}")
            elif device != "host":
                lines.append(f"  {device} takes nothing")
        if self.fallback_ops:
            listed = ", ".join(f"{op} {count}" for op, count in self.fallback_ops.items())
            lines.append(f"  interpreted, not compiled: {listed}")
        for each in self.splits:
            lines.append(f"  {each.node} is computed in parts of {', '.join(map(str, each.channels))} channels")
        for transfer in self.transfers:
            took = f", {transfer.us:.3g} us {transfer.kind}" if transfer.us else ""
            took += f", {transfer.conversion_us:.3g} us of conversions" if transfer.conversion_us else ""
            lines.append(
                f"  {transfer.tensor}: {transfer.source} -> {transfer.destination}, {transfer.bytes} bytes{took}"
            )
        lines.append("")
        for region in self.regions:
            lines.append(f"{region.name} -> {region.device}: {', '.join(region.ops)}")
            if region.costs:
                lines.append(f"  {region.reason}")
            lines.extend(f"  not {target}: {reason}" for target, reason in region.refusals.items())
        return "\n".join(lines)

    def predictions(self) -> list[str]:
        """In words what the plan is predicted to take, how good that is, and what single devices would take."""
        if self.lower_bound_ms is None or self.predicted_ms is None:
            return []
        lines = [f"predicted {self.predicted_ms:.4g} ms"]
        if self.objective == "throughput":
            lines[0] += " a request, pipelined"
        if self.predicted_mj:
            lines[0] += f", {self.predicted_mj:.4g} mJ"
        value, unit = (self.predicted_mj or 0.0, "mJ") if self.objective == "energy" else (self.predicted_ms, "ms")
        known = "optimal" if self.optimal else "not known how far above the best"
        if self.lower_bound_ms and not self.optimal:
            known = f"at most {100 * max(value / self.lower_bound_ms - 1, 0.0):.2g} % above the best"
        lines[0] += f"; lower bound {self.lower_bound_ms:.4g} {unit}: {known} by these costs ({self.method})"
        if self.promised_ms is not None and self.lower_bound_ms and not self.optimal:
            above = 100 * max(self.promised_ms / self.lower_bound_ms - 1, 0.0)
            words = "the best" if above < 1e-4 else f"at most {above:.2g} % above the best"
            lines.append(
                f"the solver's last solution: {self.promised_ms:.4g} {unit}, {words} if partitions take what their"
                " regions say"
            )
        for device, single in self.single_device_ms.items():
            lines.append(f"all that {device} takes on {device}: {single:.4g} ms")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; `from_json` reads them back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "the plan") -> Plan:
        """Rebuild a plan from `to_json`'s values. What has a default may be left out.

        Raises PlanError, with `where` and the place in it, for a field that is missing, unknown or of the wrong kind,
        and if the format is another one.
        """
        if data.get("format") != FORMAT:
            found = data.get("format")
            raise PlanError(f"{where} is of format {found!r}; this version reads format {FORMAT}: make it again")
        return cast(Plan, _build(Plan, {key: value for key, value in data.items() if key != "format"}, where))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML. Raises PlanError if it cannot be written."""
        import yaml  # only who writes or reads a file needs it

        destination = Path(path)
        temporary = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
        text = yaml.safe_dump(
            _plain(self.to_json()), sort_keys=False, default_flow_style=None, width=140, allow_unicode=True
        )
        try:
            temporary.write_text(HEAD + text, encoding="utf-8")
            temporary.replace(destination)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PlanError(f"cannot write the plan to {destination}: {error.strerror or error}") from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan (YAML). Raises PlanError if the file is missing or is not one."""
        import yaml

        where = os.fspath(path)
        try:
            data: object = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {where}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            words = " ".join(str(error).split())
            raise PlanError(f"{where} is not a plan: it does not read as YAML ({words})") from error
        if not isinstance(data, dict):
            raise PlanError(f"{where} is not a plan: it is not a mapping")
        return Plan.from_json(cast("dict[str, Any]", data), where)


HEAD = """\
# Which device runs which region, and what that is predicted to take; made by nestc.
# To place a region elsewhere change its device, and give the file back: nestc compile MODEL --plan FILE
"""


def _plain(value: Any) -> Any:
    """JSON values with lists for tuples and numbers of six digits, as a person reads them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _build(kind: Any, data: object, where: str) -> object:
    """A value of the annotated kind from JSON values. Raises PlanError with the place that does not fit."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _build(next(each for each in arguments if each is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise PlanError(f"{where} must be a list, not {data!r}")
        items = cast("Sequence[object]", data)
        return tuple(_build(arguments[0], item, f"{where}, item {index}") for index, item in enumerate(items))
    if origin is not None:
        if not isinstance(data, Mapping):
            raise PlanError(f"{where} must be a mapping, not {data!r}")
        pairs = cast("Mapping[object, object]", data)
        return {str(key): _build(arguments[1], item, f"{where}, {key}") for key, item in pairs.items()}
    if dataclasses.is_dataclass(kind):
        return _record(cast("type[Any]", kind), data, where)
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        if not math.isfinite(data):
            raise PlanError(f"{where} must be a finite number, not {data!r}")
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise PlanError(f"{where} must be a {kind.__name__}, not {data!r}")
    return data


def _record(kind: type[Any], data: object, where: str) -> object:
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} must be a mapping, not {data!r}")
    given = cast("Mapping[str, object]", data)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    unknown = next((name for name in given if name not in fields), None)
    if unknown is not None:
        raise PlanError(f"{where} has a field {unknown!r} that no plan has; there are {', '.join(fields)}")
    required = (
        item.name
        for item in fields.values()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    )
    missing = next((name for name in required if name not in given), None)
    if missing is not None:
        raise PlanError(f"{where} lacks the field {missing!r}")
    hints = get_type_hints(kind)
    label = given.get("name")
    place = f"{where} {label}" if isinstance(label, str) else where
    return kind(**{name: _build(hints[name], value, f"{place}, {name}") for name, value in given.items()})
