"""The text form of Tensor IR: what `--emit tensor` writes and what golden tests compare."""

from __future__ import annotations

from nestc.tensor.ir import (
    Binary,
    Bitcast,
    Block,
    Broadcast,
    Buffer,
    Call,
    Cast,
    Const,
    Dot,
    Expr,
    Fma,
    For,
    If,
    Kernel,
    Load,
    PairSum,
    Ramp,
    Reduce,
    Repeat,
    Select,
    Shuffle,
    Stmt,
    Store,
    Unary,
    Var,
)

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "floordiv": "//",
    "mod": "%",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "and": "&",
    "or": "|",
    "xor": "^",
    "shl": "<<",
    "shr": ">>",
}


def show(e: Expr) -> str:
    """One expression."""
    if isinstance(e, Const):
        return str(e.value) if e.dtype in ("int64", "float32", "bool") else f"{e.value}:{e.dtype}"
    if isinstance(e, Var):
        return e.name
    if isinstance(e, Load):
        lanes = f":{e.lanes}" if e.lanes > 1 else ""
        mask = f" if {show(e.mask)}" if e.mask is not None else ""
        return f"{e.buffer.name}[{', '.join(map(show, e.index))}{lanes}{mask}]"
    if isinstance(e, Binary):
        if e.op in _INFIX:
            return f"({show(e.a)} {_INFIX[e.op]} {show(e.b)})"
        return f"{e.op}({show(e.a)}, {show(e.b)})"
    if isinstance(e, Unary):
        return f"{e.op}({show(e.x)})"
    if isinstance(e, Select):
        return f"select({show(e.cond)}, {show(e.a)}, {show(e.b)})"
    if isinstance(e, Cast):
        return f"{e.dtype}({show(e.x)})"
    if isinstance(e, Bitcast):
        return f"bitcast[{e.dtype}]({show(e.x)})"
    if isinstance(e, Broadcast):
        return f"splat({show(e.x)}, {e.lanes})"
    if isinstance(e, Ramp):
        return f"ramp({show(e.base)}, {e.stride}, {e.lanes})"
    if isinstance(e, Fma):
        return f"fma({show(e.a)}, {show(e.b)}, {show(e.c)})"
    if isinstance(e, Shuffle):
        return f"shuffle({show(e.a)}, {show(e.b)}, {list(e.picks)})"
    if isinstance(e, Reduce):
        return f"reduce_{e.op}({show(e.x)})"
    if isinstance(e, Repeat):
        return f"repeat({show(e.x)}, {e.times})"
    if isinstance(e, PairSum):
        return f"pair_sum({show(e.a)}, {show(e.b)})"
    if isinstance(e, Dot):
        return f"dot({show(e.acc)}, {show(e.a)}, {show(e.b)})"
    raise TypeError(f"no text form for {type(e).__name__}")


def _declare(b: Buffer) -> str:
    memory = "" if b.memory == "param" else f" in {b.memory}"
    return f"{b.name}: {b.dtype}[{', '.join(map(str, b.shape))}]{memory}"


def _lines(block: Block, depth: int) -> list[str]:
    return [line for s in block for line in _statement(s, depth)]


def _statement(s: Stmt, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(s, For):
        kind = "" if s.kind == "serial" else f" {s.kind}"
        return [f"{pad}for {s.var.name} in {s.var.extent}{kind}:", *_lines(s.body, depth + 1)]
    if isinstance(s, Store):
        mask = f" if {show(s.mask)}" if s.mask is not None else ""
        lanes = f":{s.value.lanes}" if s.value.lanes > 1 else ""
        return [f"{pad}{s.buffer.name}[{', '.join(map(show, s.index))}{lanes}] = {show(s.value)}{mask}"]
    if isinstance(s, If):
        rest = [f"{pad}else:", *_lines(s.orelse, depth + 1)] if s.orelse else []
        return [f"{pad}if {show(s.cond)}:", *_lines(s.then, depth + 1), *rest]
    if isinstance(s, Call):
        windows = ", ".join(f"{w.buffer.name}[{', '.join(map(show, w.index))}]" for w in s.operands)
        return [f"{pad}{s.intrinsic.name}({windows})"]
    raise TypeError(f"no text form for {type(s).__name__}")


def statement_text(s: Stmt) -> str:
    """One statement, with all that stands in it, in one line."""
    return " ".join(line.strip() for line in _statement(s, 0))


def kernel_text(kernel: Kernel) -> str:
    """A kernel, with its buffers and the ONNX nodes it computes."""
    head = f"kernel {kernel.name}({', '.join(_declare(p) for p in kernel.params)}):"
    origin = [f"  # {node}" for node in kernel.origin]
    buffers = [f"  {_declare(b)}" for b in kernel.locals]
    return "\n".join([head, *origin, *buffers, *_lines(kernel.body, 1)]) + "\n"
