"""Take away the rows and columns of a convolution's kernel that only ever meet its padding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from nestc.graph.kinds import is_constant
from nestc.graph.model import static_shape
from nestc.graph.passes.rewrite import Rewrite, array, ints, operand


class TrimTaps(Rewrite):
    """Where the input is small beside the kernel (a 3-tap convolution of one element, padded by one on each side), the
    first and last taps multiply zeros for every output: their weights are neither read nor kept."""

    what = "convolutions without taps that meet only padding"

    def rewrite(self, node: ir.Node) -> bool:
        data, weight = operand(node, 0), operand(node, 1)
        if node.op_type != "Conv" or data is None or weight is None or not is_constant(weight):
            return False
        given, made, dims = static_shape(data), static_shape(node.outputs[0]), static_shape(weight)
        if given is None or made is None or dims is None or 0 in (*given, *made):
            return False
        if node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
            return False
        spatial = len(dims) - 2
        pads = ints(node, "pads", (0,) * (2 * spatial))
        strides, dilations = ints(node, "strides", (1,) * spatial), ints(node, "dilations", (1,) * spatial)
        axes = [
            _kept(*sizes)
            for sizes in zip(
                given[2:], made[2:], dims[2:], strides, dilations, pads[:spatial], pads[spatial:], strict=True
            )
        ]
        cuts = [cut for cut, _, _ in axes]
        if all(cut == slice(0, size) for cut, size in zip(cuts, dims[2:], strict=True)):
            return False
        kernel = [cut.stop - cut.start for cut in cuts]

        def trimmed() -> np.ndarray:
            whole = array(weight)
            assert whole is not None
            return np.ascontiguousarray(whole[(slice(None), slice(None), *cuts)])

        assert weight.dtype is not None
        less = self.later(trimmed, weight.dtype, [*dims[:2], *kernel], f"{weight.name}.trimmed")
        node.replace_input_with(1, less)
        node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)
        node.attributes["pads"] = ir.AttrInt64s("pads", [b for _, b, _ in axes] + [a for _, _, a in axes])
        node.attributes.pop("auto_pad", None)
        return True


def _kept(
    size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int, after: int
) -> tuple[slice, int, int]:
    """Of one axis the taps that some output multiplies with an element, and the padding that is then left."""
    whole = slice(0, kernel), before, after
    firsts = np.arange(outputs) * stride - before
    taps = [tap for tap in range(kernel) if np.any((firsts + tap * dilation >= 0) & (firsts + tap * dilation < size))]
    if not taps:
        return whole
    first, last = taps[0], taps[-1]
    left = before - first * dilation
    right = max(0, (outputs - 1) * stride + (last - first) * dilation + 1 - size - left)
    # A negative padding is none that ONNX has; and the outputs must be as many as they were.
    if left < 0 or (size + left + right - (last - first) * dilation - 1) // stride + 1 != outputs:
        return whole
    return slice(first, last + 1), left, right
