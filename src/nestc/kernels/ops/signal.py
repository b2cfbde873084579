"""Fourier transforms by their definition (a table of cosines and sines), and operators over sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi

import numpy as np

from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.ops.attributes import integer, number, refused, text
from nestc.kernels.ops.reduction import work_dtype
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, load
from nestc.tensor.ir import Binary, Expr, Load, Select, Unary, Var
from nestc.tensor.math import swish
from nestc.tensor.rewrite import cast, select

Axes = tuple[Var, ...]
_LONGEST = 1 << 13  # beyond, the definition's quadratic time is no answer


def _turn(body: Body, length: int, work: str) -> Callable[[Expr, Expr], tuple[Expr, Expr]]:
    """cos and sin of 2 pi k n / length for indices k and n."""
    angles = 2 * pi * np.arange(length) / length
    cosines, sines = body.literal(np.cos(angles).astype(work)), body.literal(np.sin(angles).astype(work))

    def at(k: Expr, n: Expr) -> tuple[Expr, Expr]:
        phase = (ix.mod(binary("mul", k, n), length),)
        return body.read(cosines, phase), body.read(sines, phase)

    return at


def _dft(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, target = body.shape(source), body.shape(out)
    rank = len(shape)
    axis = int(body.constant(op, 2).reshape(-1)[0]) if op.input(2) else integer(op, "axis", -2)
    axis %= rank
    inverse, onesided = integer(op, "inverse", 0), integer(op, "onesided", 0)
    real_result = inverse and onesided
    length = int(body.constant(op, 1).reshape(-1)[0]) if op.input(1) else 0
    length = length or (2 * (shape[axis] - 1) if real_result else shape[axis])
    if length > _LONGEST:
        raise refused(op, f"a transform of {length} points")
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    turn = _turn(body, length, work)
    used = min(shape[axis], length // 2 + 1 if real_result else length)
    sign = 1 if inverse else -1

    def value(axes: Axes, reduced: Axes) -> Expr:
        n = reduced[0]
        place = [n if d == axis else i for d, i in enumerate(axes[:-1])]
        cosine, sine = turn(axes[axis], n)
        real = cast(body.read(source, (*place, ix.const(0))), work)
        imaginary = cast(body.read(source, (*place, ix.const(1))), work) if shape[-1] == 2 else None
        even = Binary("mul", real, cosine)
        odd = Binary("mul", real, sine)
        if imaginary is not None:
            cross, straight = Binary("mul", imaginary, sine), Binary("mul", imaginary, cosine)
            even = Binary("sub" if sign > 0 else "add", even, cross)
            odd = Binary("add", odd if sign > 0 else Unary("neg", odd), straight)
        elif sign < 0:
            odd = Unary("neg", odd)
        if real_result:
            # The other half of the spectrum is the conjugate of this one.
            single = binary("or", binary("eq", n, ix.const(0)), binary("eq", ix.mul(n, 2), ix.const(length)))
            return select(single, even, Binary("mul", constant(2, work), even))
        if target[-1] == 1:
            return even
        return Select(Binary("eq", axes[-1], ix.const(0)), even, odd)

    def final(total: Expr) -> Expr:
        return cast(Binary("div", total, constant(length, work)) if inverse else total, dtype)

    body.combine(out, (used,), "add", value, final)


def _stft(body: Body, op: Op) -> None:
    source, window, out = op.inputs[0], op.input(2), op.outputs[0]
    shape = body.shape(source)
    step = int(body.constant(op, 1).reshape(-1)[0])
    if op.input(3):
        length = int(body.constant(op, 3).reshape(-1)[0])
    else:
        length = body.shape(window)[0] if window else shape[1]
    if length > _LONGEST:
        raise refused(op, f"frames of {length} samples")
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    turn = _turn(body, length, work)

    def value(axes: Axes, reduced: Axes) -> Expr:
        b, frame, k, part = axes
        n = reduced[0]
        at = ix.add(ix.mul(frame, step), n)
        cosine, sine = turn(k, n)
        first = (b, at, ix.const(0)) if len(shape) == 3 else (b, at)
        real = cast(body.read(source, first), work)
        even, odd = Binary("mul", real, cosine), Unary("neg", Binary("mul", real, sine))
        if len(shape) == 3 and shape[2] == 2:
            imaginary = cast(body.read(source, (b, at, ix.const(1))), work)
            even = Binary("add", even, Binary("mul", imaginary, sine))
            odd = Binary("add", odd, Binary("mul", imaginary, cosine))
        result: Expr = Select(Binary("eq", part, ix.const(0)), even, odd)
        return Binary("mul", result, cast(body.read(window, (n,)), work)) if window else result

    body.combine(out, (length,), "add", value, lambda total: cast(total, dtype))


def _swiglu(body: Body, op: Op) -> None:
    gate, other, out = op.inputs[0], op.inputs[1], op.outputs[0]
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    alpha = number(op, "alpha", 1.0)

    def value(axes: Axes) -> Expr:
        a, b = cast(body.read(gate, axes), work), cast(body.read(other, axes), work)
        inner = a if alpha == 1.0 else Binary("mul", a, constant(alpha, work))
        return cast(Binary("mul", swish(a, inner), b), dtype)

    body.map(out, value)


def _causal_conv(body: Body, op: Op) -> None:
    """A depthwise convolution over the past state followed by the input; the new state is the end of both."""
    source, weight, bias, past = op.inputs[0], op.inputs[1], op.input(2), op.input(3)
    out, state = op.outputs[0], op.output(1)
    length = body.shape(source)[2]
    taps = body.shape(weight)[2]
    activation = text(op, "activation", "none")
    if activation not in ("none", "silu", "swish"):
        raise refused(op, f"activation {activation!r} is unknown")
    dtype = body.dtype(out)
    work = work_dtype(dtype)

    def joined(n: Expr, c: Expr, at: Expr) -> Expr:
        """An element of the past state and the input in a row."""
        inside = binary("ge", at, ix.const(taps - 1))
        new = body.read(source, (n, c, ix.add(at, -(taps - 1))), inside)
        if not past or taps == 1:
            return new
        return select(inside, new, body.read(past, (n, c, at), binary("lt", at, ix.const(taps - 1))))

    def value(axes: Axes, reduced: Axes) -> Expr:
        n, c, t = axes
        x = cast(joined(n, c, ix.add(t, reduced[0])), work)
        return Binary("mul", x, cast(body.read(weight, (c, ix.const(0), reduced[0])), work))

    total = body.temporary(work, body.shape(out))
    body.combine(total, (taps,), "add", value)

    def final(axes: Axes) -> Expr:
        x = body.read(total, axes)
        if bias:
            x = Binary("add", x, cast(body.read(bias, (axes[1],)), work))
        return cast(x if activation == "none" else swish(x), dtype)

    body.map(out, final)
    if state:
        body.map(state, lambda axes: joined(axes[0], axes[1], ix.add(axes[2], length)))


def _linear_attention(body: Body, op: Op) -> None:
    """The recurrence of the operator's definition, one (batch, key head) for each worker, one token after the other."""
    query, key, value = op.inputs[:3]
    past, decay, beta = op.input(3), op.input(4), op.input(5)
    out = op.outputs[0]
    batch, tokens, width = body.shape(query)
    q_heads, kv_heads = integer(op, "q_num_heads", 0), integer(op, "kv_num_heads", 0)
    rule = text(op, "update_rule", "gated_delta")
    dk, dv = width // q_heads, body.shape(value)[2] // kv_heads
    each = q_heads // kv_heads
    scale = number(op, "scale", 0.0) or dk**-0.5
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    state_type = body.dtype(past) if past else dtype
    state = op.output(1) or body.temporary(state_type, (batch, kv_heads, dk, dv))
    state_type = body.dtype(state)

    b = Builder(f"{body.region.name}_linear_attention")
    names: dict[str, str] = {}

    def param(label: str, name: str):  # type: ignore[no-untyped-def]
        buffer = b.param(label, body.dtype(name), body.shape(name))
        names[buffer.name] = name
        return buffer

    q, k, v = param("q", query), param("k", key), param("v", value)
    s0 = param("s0", past) if past else None
    g = param("g", decay) if decay and rule.startswith("gated") else None
    rate = param("rate", beta) if beta and rule.endswith("delta") else None
    y, new_state = param("y", out), param("state", state)
    s = b.scratch("s", (dk, dv), work)
    zero = ix.const(0)
    acc = b.regs("acc", (1,), 1, work)
    here = (zero, zero)

    def wide(e: Expr) -> Expr:
        return cast(e, work)

    def per_head(buffer, n: Expr, t: Expr, h: Expr, i: Expr) -> Expr:  # type: ignore[no-untyped-def]
        """A value of each head, of each of its keys, or of all heads."""
        last = buffer.shape[2]
        if last == kv_heads:
            return wide(load(buffer, n, t, h))
        if last == 1:
            return wide(load(buffer, n, t, 0))
        return wide(load(buffer, n, t, ix.add(ix.mul(h, dk), i)))

    with b.parallel("p", batch, kv_heads) as (n, h):
        with b.loop("i", dk) as i, b.loop("j", dv) as j:
            b.store(s, (i, j), wide(load(s0, n, h, i, j)) if s0 is not None else constant(0, work))
        with b.loop("t", tokens) as t:
            if g is not None:
                with b.loop("i", dk) as i, b.loop("j", dv) as j:
                    b.store(s, (i, j), Binary("mul", load(s, i, j), Unary("exp", per_head(g, n, t, h, i))))
            with b.loop("j", dv) as j:
                new: Expr = wide(load(v, n, t, ix.add(ix.mul(h, dv), j)))
                if rule.endswith("delta"):
                    b.store(acc, here, constant(0, work))
                    with b.loop("i", dk) as i:
                        x = wide(load(k, n, t, ix.add(ix.mul(h, dk), i)))
                        b.store(acc, here, Binary("add", Load(acc, here), Binary("mul", load(s, i, j), x)))
                    new = Binary("sub", new, Load(acc, here))
                    if rate is not None:
                        new = Binary("mul", new, per_head(rate, n, t, h, zero))
                b.store(acc, here, new)
                with b.loop("i", dk) as i:
                    x = wide(load(k, n, t, ix.add(ix.mul(h, dk), i)))
                    b.store(s, (i, j), Binary("add", load(s, i, j), Binary("mul", x, Load(acc, here))))
                with b.loop("e", each) as e:
                    head = ix.add(ix.mul(h, each), e)
                    b.store(acc, here, constant(0, work))
                    with b.loop("i", dk) as i:
                        x = wide(load(q, n, t, ix.add(ix.mul(head, dk), i)))
                        b.store(acc, here, Binary("add", Load(acc, here), Binary("mul", load(s, i, j), x)))
                    result = Binary("mul", Load(acc, here), constant(scale, work))
                    b.store(y, (n, t, ix.add(ix.mul(head, dv), j)), cast(result, dtype))
        with b.loop("i", dk) as i, b.loop("j", dv) as j:
            b.store(new_state, (n, h, i, j), cast(load(s, i, j), state_type))
    made = {y.name: out, new_state.name: state}
    body.kernel(b, {p: name for p, name in names.items() if p not in made}, made)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "CausalConvWithState": _causal_conv,
    "DFT": _dft,
    "LinearAttention": _linear_attention,
    "STFT": _stft,
    "SwiGLU": _swiglu,
}
