"""What an Attention node computes: heads, lengths, masks, and where its operands keep an element."""

from __future__ import annotations

from dataclasses import dataclass

from nestc.graph.region import Op, Region
from nestc.kernels.rows import FLOATS, work_dtype
from nestc.tensor import index as ix
from nestc.tensor.ir import Expr

Index = tuple[Expr, ...]


@dataclass(frozen=True)
class AttentionShape:
    """``out[b, h] = softmax(cap(scale * q[b, h] k[b, g]^T) + mask) v[b, g]`` with g = h // (heads / kv_heads).

    `length` and `keys` count queries and keys, `size` and `v_size` the elements of one head. ``packed_heads`` operands
    have three axes (batch, length, heads * size), others four (batch, heads, length, size).
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    keys: int
    size: int
    v_size: int
    packed_heads: bool
    scale: float
    softcap: float
    causal: bool
    mask: str
    dtype: str

    def place(self, b: Expr, head: Expr, position: Expr, element: Expr, size: int) -> Index:
        """Index of an element of one head of q, k, v or the output, whose heads have `size` elements."""
        if self.packed_heads:
            return (b, position, ix.add(ix.mul(head, size), element))
        return (b, head, position, element)

    def kv_head(self, head: Expr) -> Expr:
        """The head of k and v that a head of q attends to."""
        return ix.floordiv(head, self.heads // self.kv_heads)


def attention_shape(op: Op, region: Region) -> AttentionShape | str:
    """The shape of an Attention node, or why generated code does not take it."""
    node = f"Attention (node {op.name!r})"
    q, k, v = (region.types[name] for name in op.inputs[:3])
    if q.dtype not in FLOATS or len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"{node} is on {q.dtype}, {k.dtype} and {v.dtype}"
    for position, what in ((4, "past keys"), (5, "past values"), (6, "lengths without padding")):
        if op.input(position):
            return f"{node} reads {what}"
    for position, what in ((1, "the present keys"), (2, "the present values"), (3, "the scores")):
        if op.output(position):
            return f"{node} also gives {what}"
    if any(_number(op, name, -1) >= 0 for name in ("left_window_size", "right_window_size")):
        return f"{node} looks at a sliding window"
    if not len(q.shape) == len(k.shape) == len(v.shape) or len(q.shape) not in (3, 4):
        return f"{node} has operands of {len(q.shape)}, {len(k.shape)} and {len(v.shape)} axes"
    if any(0 in t.shape for t in (q, k, v)):
        return f"{node} has an axis of size 0"
    packed = len(q.shape) == 3
    if packed:
        heads, kv_heads = int(_number(op, "q_num_heads", 0)), int(_number(op, "kv_num_heads", 0))
        if heads < 1 or kv_heads < 1:
            return f"{node} does not say how many heads it has"
        batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
        size, v_size = q.shape[2] // heads, v.shape[2] // kv_heads
    else:
        (batch, heads, length, size), (_, kv_heads, keys, _), v_size = q.shape, k.shape, v.shape[3]
    if heads % kv_heads:
        return f"{node} has {heads} heads of queries for {kv_heads} of keys"
    mask = op.input(3)
    if mask:
        shape = region.types[mask].shape
        full = (batch, heads, length, keys)
        if len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape[::-1], full[::-1])):
            return f"the mask of {node} has shape {shape}, which does not broadcast to {full}"
        if shape and shape[-1] != keys:  # ONNX masks the keys that the mask does not reach, also when it has one column
            return f"the mask of {node} covers {shape[-1]} of {keys} keys"
        if region.types[mask].dtype not in FLOATS | {"bool"}:
            return f"the mask of {node} is {region.types[mask].dtype}"
    return AttentionShape(
        batch,
        heads,
        kv_heads,
        length,
        keys,
        size,
        v_size,
        packed,
        _number(op, "scale", size**-0.5),
        _number(op, "softcap", 0.0),
        bool(_number(op, "is_causal", 0)),
        mask,
        work_dtype(q.dtype),
    )


def _number(op: Op, name: str, default: float) -> float:
    value = op.attributes.get(name)
    return float(value) if isinstance(value, (int, float)) else default
