"""Arithmetic as LLVM instructions: one method for each kind of Tensor IR operation on values."""

from __future__ import annotations

from abc import ABC, abstractmethod

from nestc.codegen.dots import Dots
from nestc.codegen.halves import Halves
from nestc.codegen.llvm_types import FLOAT, literal, scalar_type, suffix, unsigned, vector_type, width
from nestc.errors import Error
from nestc.kernels.api import CpuMachine
from nestc.tensor.ir import Binary, Const, Dot, Expr, Fma, Kernel, PairSum, Reduce, Repeat, Unary

_COMPARE = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_FLOAT_OPS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv", "rem": "frem"}
_INT_OPS = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor", "shl": "shl"}
_INTRINSICS = {"sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "rint": "rint", "trunc": "trunc", "abs": "fabs"}
NARROW_INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32"})
"""Integers that a float32 in their range becomes by way of int32."""
# Called for each lane: libm, which every process that runs Python has loaded.
_LIBM = frozenset("exp log sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf pow atan2".split())


class Arithmetic(ABC):
    """What the printer of kernels knows of operations; where instructions go is the printer's business."""

    kernel: Kernel
    machine: CpuMachine

    @abstractmethod
    def value(self, e: Expr) -> str:
        """SSA name or literal of an expression."""

    @abstractmethod
    def emit(self, text: str, level: int | None = None) -> str:
        """Append an instruction and give the name of its result."""

    @abstractmethod
    def declare(self, name: str, signature: str) -> str:
        """Declare an external function once."""

    @abstractmethod
    def splat(self, value: str, element: str, lanes: int) -> str:
        """A scalar in every lane."""

    def fma(self, e: Fma) -> str:
        a, b, c = self.value(e.a), self.value(e.b), self.value(e.c)
        element = scalar_type(e.dtype)
        kind = vector_type(element, e.lanes)
        if element not in ("float", "double"):
            return self.emit(f"add {kind} {self.emit(f'mul {kind} {a}, {b}')}, {c}")
        if not self.machine.fma:
            return self.emit(f"fadd {kind} {self.emit(f'fmul {kind} {a}, {b}')}, {c}")
        name = f"llvm.fma.{suffix(element, e.lanes)}"
        self.declare(name, f"{kind} @{name}({kind}, {kind}, {kind})")
        return self.emit(f"call {kind} @{name}({kind} {a}, {kind} {b}, {kind} {c})")

    def pair_sum(self, e: PairSum) -> str:
        return Dots(self.emit, self.declare, self.machine).pair_sum(self.value(e.a), self.value(e.b), e.lanes)

    def dot(self, e: Dot) -> str:
        dots = Dots(self.emit, self.declare, self.machine)
        return dots.dot(self.value(e.acc), self.value(e.a), self.value(e.b), e.a.dtype, e.b.dtype, e.lanes)

    def repeat(self, e: Repeat) -> str:
        """The short vector as one integer in every lane where there is such an integer, which is one instruction."""
        element, lanes = scalar_type(e.dtype), e.x.lanes
        value = self.value(e.x)
        if lanes == 1:
            return self.splat(value, element, e.lanes)
        bits = lanes * width(e.dtype)
        if e.dtype == "bool" or bits not in (8, 16, 32, 64):
            kind = vector_type(element, lanes)
            picks = ", ".join(f"i32 {i % lanes}" for i in range(e.lanes))
            return self.emit(f"shufflevector {kind} {value}, {kind} poison, <{e.lanes} x i32> <{picks}>")
        whole = self.emit(f"bitcast {vector_type(element, lanes)} {value} to i{bits}")
        filled = self.splat(whole, f"i{bits}", e.times)
        return self.emit(f"bitcast {vector_type(f'i{bits}', e.times)} {filled} to {vector_type(element, e.lanes)}")

    def reduce(self, e: Reduce) -> str:
        value = self.value(e.x)
        if e.x.lanes == 1:
            return value
        element = scalar_type(e.dtype)
        kind = vector_type(element, e.x.lanes)
        short = suffix(element, e.x.lanes)
        if element in ("float", "double"):
            if e.op in ("min", "max"):
                return self.halves(e.op, value, e.dtype, e.x.lanes)
            name = f"llvm.vector.reduce.f{e.op}.{short}"
            start = literal(Const(-0.0 if e.op == "add" else 1.0, e.dtype))
            self.declare(name, f"{element} @{name}({element}, {kind})")
            return self.emit(f"call reassoc {element} @{name}({element} {start}, {kind} {value})")
        elif element == "i1":
            name = f"llvm.vector.reduce.{'or' if e.op in ('max', 'add') else 'and'}.{short}"
        else:
            sign = "u" if unsigned(e.dtype) else "s"
            name = f"llvm.vector.reduce.{e.op if e.op in ('add', 'mul') else sign + e.op}.{short}"
        self.declare(name, f"{element} @{name}({kind})")
        return self.emit(f"call {element} @{name}({kind} {value})")

    def halves(self, op: str, value: str, dtype: str, lanes: int) -> str:
        """min or max over floating lanes, half against half; LLVM's own reduction keeps to an order, lane by lane."""
        element = scalar_type(dtype)
        while lanes > 1:
            kind, rest = vector_type(element, lanes), (lanes + 1) // 2
            parts: list[str] = []
            for start in (0, lanes - rest):
                picks = ", ".join(f"i32 {start + i}" for i in range(rest))
                parts.append(self.emit(f"shufflevector {kind} {value}, {kind} poison, <{rest} x i32> <{picks}>"))
            low, high = parts
            half = f"<{rest} x {element}>"
            chosen = self.emit(f"fcmp {'olt' if op == 'min' else 'ogt'} {half} {low}, {high}")
            value = self.emit(f"select <{rest} x i1> {chosen}, {half} {low}, {half} {high}")
            if rest == 1:
                return self.emit(f"extractelement {half} {value}, i64 0")
            lanes = rest
        return value

    def binary(self, e: Binary) -> str:
        a, b = self.value(e.a), self.value(e.b)
        element = scalar_type(e.a.dtype)
        kind = vector_type(element, e.lanes)
        floating = element in ("float", "double")
        if e.a.dtype in ("float16", "bfloat16"):
            raise Error(f"kernel {self.kernel.name}: {e.op} on {e.a.dtype}; compute in float32 and cast")
        if e.op in _COMPARE:
            return self.compare(e.op, a, b, kind, e.a.dtype, floating)
        if e.op in ("min", "max"):
            chosen = self.compare("lt" if e.op == "min" else "gt", a, b, kind, e.a.dtype, floating)
            return self.emit(f"select {vector_type('i1', e.lanes)} {chosen}, {kind} {a}, {kind} {b}")
        if e.op in _LIBM:
            if not floating:
                raise Error(f"kernel {self.kernel.name}: {e.op} on {e.dtype}")
            return self.libm(e.op, (a, b), element, e.lanes)
        if floating:
            if e.op in ("floordiv", "mod"):
                return self.float_floor(e.op, a, b, element, e.lanes)
            if e.op not in _FLOAT_OPS:
                raise Error(f"kernel {self.kernel.name}: {e.op} on {e.dtype}")
            if e.op == "rem":
                return self.libm("fmod", (a, b), element, e.lanes)
            return self.emit(f"{_FLOAT_OPS[e.op]} {kind} {a}, {b}")
        if e.op == "shr":
            return self.emit(f"{'lshr' if unsigned(e.dtype) else 'ashr'} {kind} {a}, {b}")
        if e.op in ("div", "rem", "floordiv", "mod"):
            return self.int_divide(e, a, b, kind)
        return self.emit(f"{_INT_OPS[e.op]} {kind} {a}, {b}")

    def compare(self, op: str, a: str, b: str, kind: str, dtype: str, floating: bool) -> str:
        if floating:
            return self.emit(f"fcmp {'une' if op == 'ne' else 'o' + op} {kind} {a}, {b}")
        sign = "" if op in ("eq", "ne") else "u" if unsigned(dtype) else "s"
        return self.emit(f"icmp {sign}{op} {kind} {a}, {b}")

    def float_floor(self, op: str, a: str, b: str, element: str, lanes: int) -> str:
        """floor(a / b), or a - floor(a / b) * b computed through fmod so that it is exact."""
        kind = vector_type(element, lanes)
        if op == "floordiv":
            return self.intrinsic("floor", self.emit(f"fdiv {kind} {a}, {b}"), element, lanes)
        remainder = self.libm("fmod", (a, b), element, lanes)
        zero = "zeroinitializer" if lanes > 1 else "0.0"
        flag = vector_type("i1", lanes)
        unequal = self.emit(f"fcmp une {kind} {remainder}, {zero}")
        negative, divisor = (self.emit(f"fcmp olt {kind} {x}, {zero}") for x in (remainder, b))
        fix = self.emit(f"and {flag} {unequal}, {self.emit(f'xor {flag} {negative}, {divisor}')}")
        fixed = self.emit(f"fadd {kind} {remainder}, {b}")
        return self.emit(f"select {flag} {fix}, {kind} {fixed}, {kind} {remainder}")

    def int_divide(self, e: Binary, a: str, b: str, kind: str) -> str:
        """Integer division that cannot trap: x / 0 is x, x % 0 is 0, and min / -1 wraps."""
        lanes = e.lanes
        flag = vector_type("i1", lanes)
        one = self.splat("1", scalar_type(e.dtype), lanes)
        zero = "zeroinitializer" if lanes > 1 else "0"
        if not isinstance(e.b, Const):
            b = self.emit(f"select {flag} {self.emit(f'icmp eq {kind} {b}, {zero}')}, {kind} {one}, {kind} {b}")
        if unsigned(e.dtype):
            return self.emit(f"{'udiv' if e.op in ('div', 'floordiv') else 'urem'} {kind} {a}, {b}")
        minus = self.splat("-1", scalar_type(e.dtype), lanes)
        is_minus = self.emit(f"icmp eq {kind} {b}, {minus}")
        safe = self.emit(f"select {flag} {is_minus}, {kind} {one}, {kind} {b}")
        quotient = self.emit(f"sdiv {kind} {a}, {safe}")
        quotient = self.emit(
            f"select {flag} {is_minus}, {kind} {self.emit(f'sub {kind} {zero}, {a}')}, {kind} {quotient}"
        )
        if e.op == "div":
            return quotient
        product = self.emit(f"mul {kind} {quotient}, {b}")
        remainder = self.emit(f"sub {kind} {a}, {product}")
        if e.op == "rem":
            return remainder
        unequal = self.emit(f"icmp ne {kind} {remainder}, {zero}")
        differs = self.emit(f"icmp slt {kind} {self.emit(f'xor {kind} {remainder}, {b}')}, {zero}")
        fix = self.emit(f"and {flag} {unequal}, {differs}")
        if e.op == "floordiv":
            return self.emit(f"add {kind} {quotient}, {self.emit(f'sext {flag} {fix} to {kind}')}")
        return self.emit(f"add {kind} {remainder}, {self.emit(f'select {flag} {fix}, {kind} {b}, {kind} {zero}')}")

    def unary(self, e: Unary) -> str:
        x = self.value(e.x)
        element = scalar_type(e.x.dtype)
        kind = vector_type(element, e.lanes)
        floating = element in ("float", "double")
        if e.x.dtype in ("float16", "bfloat16"):
            raise Error(f"kernel {self.kernel.name}: {e.op} on {e.x.dtype}; compute in float32 and cast")
        if e.op == "neg":
            zero = "zeroinitializer" if e.lanes > 1 else "0"
            return self.emit(f"fneg {kind} {x}" if floating else f"sub {kind} {zero}, {x}")
        if e.op in ("not", "bitnot"):
            ones = self.splat("true" if element == "i1" else "-1", element, e.lanes)
            return self.emit(f"xor {kind} {x}, {ones}")
        if e.op == "isnan":
            return self.emit(f"fcmp uno {kind} {x}, {x}")
        if e.op == "abs" and not floating:
            if unsigned(e.dtype):
                return x
            name = f"llvm.abs.{suffix(element, e.lanes)}"
            self.declare(name, f"{kind} @{name}({kind}, i1)")
            return self.emit(f"call {kind} @{name}({kind} {x}, i1 false)")
        if not floating:
            raise Error(f"kernel {self.kernel.name}: {e.op} on {e.dtype}")
        if e.op in _INTRINSICS:
            return self.intrinsic(_INTRINSICS[e.op], x, element, e.lanes)
        return self.libm(e.op, (x,), element, e.lanes)

    def intrinsic(self, op: str, x: str, element: str, lanes: int) -> str:
        kind = vector_type(element, lanes)
        name = f"llvm.{op}.{suffix(element, lanes)}"
        self.declare(name, f"{kind} @{name}({kind})")
        return self.emit(f"call {kind} @{name}({kind} {x})")

    def rounded(self, e: Unary) -> str:
        """``rint`` of float32 as int32, in one instruction where the machine converts in the current rounding mode."""
        lanes = e.lanes
        kind, target = vector_type("float", lanes), vector_type("i32", lanes)
        name = f"llvm.lrint.{suffix('i32', lanes)}.{suffix('float', lanes)}"
        self.declare(name, f"{target} @{name}({kind})")
        return self.emit(f"call {target} @{name}({kind} {self.value(e.x)})")

    def libm(self, op: str, operands: tuple[str, ...], element: str, lanes: int) -> str:
        """A call of the C library for each lane."""
        name = op + ("f" if element == "float" else "")
        self.declare(name, f"{element} @{name}({', '.join([element] * len(operands))})")
        if lanes == 1:
            return self.emit(f"call {element} @{name}({', '.join(f'{element} {x}' for x in operands)})")
        kind = vector_type(element, lanes)
        result = "poison"
        for lane in range(lanes):
            parts = [self.emit(f"extractelement {kind} {x}, i64 {lane}") for x in operands]
            one = self.emit(f"call {element} @{name}({', '.join(f'{element} {x}' for x in parts)})")
            result = self.emit(f"insertelement {kind} {result}, {element} {one}, i64 {lane}")
        return result

    # -- conversions

    def cast(self, x: str, source: str, target: str, lanes: int) -> str:
        """By value, see `tensor.ir.Cast`; half and bfloat16 go through float32."""
        if source == target:
            return x
        halves = Halves(self.emit, lanes, self.machine.f16c)
        if source in ("float16", "bfloat16"):
            single = halves.from_float16(x) if source == "float16" else halves.from_bfloat16(x)
            return self.cast(single, "float32", target, lanes)
        if target in ("float16", "bfloat16"):
            single = self.cast(x, source, "float32", lanes)
            return halves.to_float16(single) if target == "float16" else halves.to_bfloat16(single)
        s, t = scalar_type(source), scalar_type(target)
        from_kind, to_kind = vector_type(s, lanes), vector_type(t, lanes)
        s_float, t_float = source in FLOAT, target in FLOAT
        if target == "bool":
            zero = "zeroinitializer" if lanes > 1 else ("0.0" if s_float else "0")
            return self.emit(f"{'fcmp une' if s_float else 'icmp ne'} {from_kind} {x}, {zero}")
        if s_float and t_float:
            op = "fpext" if width(source) < width(target) else "fptrunc"
            return self.emit(f"{op} {from_kind} {x} to {to_kind}")
        if s_float:
            if target == "uint64":
                return self.emit(f"fptoui {from_kind} {x} to {to_kind}")
            wide = "i32" if width(target) < 32 or target == "int32" else "i64"
            value = self.emit(f"fptosi {from_kind} {x} to {vector_type(wide, lanes)}")
            return value if wide == t else self.emit(f"trunc {vector_type(wide, lanes)} {value} to {to_kind}")
        if t_float:
            return self.emit(f"{'uitofp' if unsigned(source) else 'sitofp'} {from_kind} {x} to {to_kind}")
        if s == t:
            return x
        from_bits = 1 if source == "bool" else width(source)
        if from_bits > width(target):
            return self.emit(f"trunc {from_kind} {x} to {to_kind}")
        return self.emit(f"{'zext' if unsigned(source) else 'sext'} {from_kind} {x} to {to_kind}")
