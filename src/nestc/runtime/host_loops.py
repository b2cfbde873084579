"""Loop and Scan for the host, in place of onnx 1.23's own, which join scan outputs of some ranks along a wrong axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ValueInfoProto, helper
from onnx.reference.ops.op_loop import Loop as ReferenceLoop
from onnx.reference.ops.op_scan import Scan as ReferenceScan

Context = Mapping[str, np.ndarray] | None


class Loop(ReferenceLoop):
    """ONNX Loop: each scan output is stacked along a new first axis."""

    op_domain = ""
    # Set by the base class, one for each graph attribute of its schema.
    body: Any
    _run_body: Any

    def _run(
        self,
        M: np.ndarray | None,
        cond: np.ndarray | None = None,
        *args: np.ndarray,
        context: Context = None,
        attributes: Any = None,
        bindings: Any = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        names = list(self.body.input_names)
        states: list[Any] = list(args)
        scanned: list[list[np.ndarray]] = [[] for _ in self.body.output_names[1 + len(states) :]]
        most = None if M is None else int(np.asarray(M).reshape(-1)[0])
        go = cond is None or bool(np.asarray(cond).reshape(-1)[0])
        step = 0
        while go and (most is None or step < most):
            given = [np.array(step, np.int64), np.array(True), *states]
            feeds = {**(context or {}), **dict(zip(names, given, strict=True))}
            results = list(self._run_body(feeds, attributes=attributes, bindings=bindings))
            go = bool(np.asarray(results[0]).reshape(-1)[0])
            states = results[1 : 1 + len(states)]
            for values, value in zip(scanned, results[1 + len(states) :], strict=True):
                values.append(value)
            step += 1
        declared = self.body.proto_.output[1 + len(states) :]
        return (*states, *(_stacked(values, 0, info) for values, info in zip(scanned, declared, strict=True)))


class Scan(ReferenceScan):
    """ONNX Scan over any axes in any direction."""

    op_domain = ""

    def __init__(self, onnx_node: Any, run_params: Any) -> None:
        # The base class refuses other axes and directions before it could be asked to run.
        super(ReferenceScan, self).__init__(onnx_node, run_params)

    def _run(  # type: ignore[override]
        self, *args: np.ndarray, context: Context = None, attributes: Any = None, bindings: Any = None, **_: Any
    ) -> tuple[Any, ...]:
        inputs: int = self.num_scan_inputs  # type: ignore[attr-defined]
        first = len(args) - inputs
        states: list[Any] = list(args[:first])
        names, made = list(self.body.input_names), len(self.body.output_names) - first  # type: ignore[attr-defined]
        in_axes, in_back = self._each("scan_input_axes", inputs), self._each("scan_input_directions", inputs)
        out_axes, out_back = self._each("scan_output_axes", made), self._each("scan_output_directions", made)
        rows = [np.moveaxis(x, axis, 0) for x, axis in zip(args[first:], in_axes, strict=True)]
        rows = [x[::-1] if back else x for x, back in zip(rows, in_back, strict=True)]
        scanned: list[list[np.ndarray]] = [[] for _ in range(made)]
        for step in range(rows[0].shape[0]):
            given = [*states, *(x[step] for x in rows)]
            feeds = {**(context or {}), **dict(zip(names, given, strict=True))}
            results = list(self._run_body(feeds, attributes=attributes, bindings=bindings))  # type: ignore[attr-defined]
            states = results[:first]
            for values, value in zip(scanned, results[first:], strict=True):
                values.append(value)
        declared = self.body.proto_.output[first:]  # type: ignore[attr-defined]
        stacked = [
            _stacked(values[::-1] if back else values, axis, info)
            for values, axis, back, info in zip(scanned, out_axes, out_back, declared, strict=True)
        ]
        return (*states, *stacked)

    def _each(self, name: str, count: int) -> list[int]:
        given = getattr(self, name, None)
        return list(given) if given else [0] * count


def _stacked(values: list[np.ndarray], axis: int, declared: ValueInfoProto) -> np.ndarray:
    """The values of all steps along a new axis; without steps, no elements of the type that the body declares."""
    if values:
        return np.stack(values, axis)
    kind = declared.type.tensor_type
    sizes = [dim.dim_value for dim in kind.shape.dim]  # 0 where it is not known, as in ONNX Runtime
    sizes.insert(axis if axis >= 0 else len(sizes) + 1 + axis, 0)
    return np.zeros(sizes, helper.tensor_dtype_to_np_dtype(kind.elem_type))
