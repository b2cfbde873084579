"""For tests of kernels: a Region from ONNX nodes, and a Lowered run by the interpreter or as machine code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nestc.codegen.llvm import print_kernel
from nestc.codegen.objects import compile_ir, initialize
from nestc.graph.region import AttributeValue, Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered, from_layout, physical_shape, to_layout
from nestc.kernels.small import SMALL, storage
from nestc.tensor import interp, math
from nestc.tensor.ir import Kernel
from nestc.tensor.verify import verify

Array = np.ndarray[Any, np.dtype[Any]]

SHAPE_OPERANDS: Mapping[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "CenterCropPad": (1,),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "Col2Im": (1, 2),
    "BlackmanWindow": (0,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    **{f"Reduce{kind}": (1,) for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()},
}
"""Operands that decide shapes, which the compiler knows before a kernel is made."""


def host_machine() -> CpuMachine:
    """This computer, with an AVX2 machine's sizes."""
    features = llvm.get_host_cpu_features()
    wide = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
    return CpuMachine(
        name="host",
        triple=llvm.get_process_triple(),
        cpu=llvm.get_host_cpu_name(),
        features=features.flatten(),
        vector_bytes=wide,
        vector_registers=32 if wide == 64 else 16,
        fma=bool(features.get("fma")),
        l1_bytes=32 << 10,
        l2_bytes=512 << 10,
        l3_bytes=32 << 20,
        f16c=bool(features.get("f16c")),
        dot_bytes=wide,
        vnni=bool(features.get("avxvnni") or (wide == 64 and features.get("avx512vnni"))),
        bf16=bool(wide == 64 and features.get("avx512bf16")) or bool(features.get("bf16")),
        dotprod=bool(features.get("dotprod")),
    )


def dtype_name(array: Array) -> str:
    """ONNX's name of an array's element type, in lower case."""
    name = str(array.dtype)
    if not name.startswith(("float8_", "float4_")):
        return name
    return {"float8_e8m0fnu": "float8e8m0", "float4_e2m1fn": "float4e2m1"}.get(name, name.replace("_", ""))


def type_of(array: Array) -> TensorType:
    """The type of an array."""
    return TensorType(dtype_name(array), array.shape)


def op_of(node: onnx.NodeProto) -> Op:
    """A node as region data. Attributes that hold graphs are left out."""
    attributes: dict[str, AttributeValue] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            attributes[attribute.name] = numpy_helper.to_array(value)
        elif isinstance(value, bytes):
            attributes[attribute.name] = value.decode()
        elif isinstance(value, (int, float)):
            attributes[attribute.name] = value
        elif attribute.ints or attribute.floats:
            attributes[attribute.name] = tuple(value)
        elif attribute.strings:
            attributes[attribute.name] = tuple(text.decode() for text in attribute.strings)
        elif attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            attributes[attribute.name] = ()
    inputs = list(node.input)
    while inputs and not inputs[-1]:
        inputs.pop()
    return Op(node.op_type, tuple(inputs), tuple(node.output), attributes, node.domain, node.name or node.op_type)


def region_of(
    nodes: Sequence[onnx.NodeProto],
    values: Mapping[str, Array],
    outputs: Sequence[str],
    constants: Sequence[str] = (),
    anchor: str | None = None,
) -> Region:
    """A region of `nodes`. `values` holds an array for every value: inputs, intermediate ones and outputs.

    Shape operands (`SHAPE_OPERANDS`) and `constants` become constants of the region.
    """
    ops = tuple(op_of(node) for node in nodes)
    made = {name for op in ops for name in op.outputs if name}
    fixed = set(constants)
    for op in ops:
        fixed |= {op.input(i) for i in SHAPE_OPERANDS.get(op.op_type, ()) if op.input(i) and op.input(i) not in made}
    used = list(dict.fromkeys(name for op in ops for name in op.inputs if name and name not in made))
    types = {name: type_of(values[name]) for name in (*used, *made)}
    readers: dict[str, Callable[[], Array]] = {n: (lambda n=n: values[n]) for n in used if n in fixed}
    inputs = tuple(name for name in used if name not in fixed)
    return Region("region", anchor, ops, inputs, tuple(outputs), types, readers)


def evaluate(nodes: Sequence[onnx.NodeProto], feeds: Mapping[str, Array], opset: int = 24) -> dict[str, Array]:
    """Every value of a chain of nodes by the reference evaluator of the onnx package."""
    values = dict(feeds)
    for node in nodes:
        names = [n for n in node.input if n]
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(values[n].dtype), None) for n in names],
            [helper.make_tensor_value_info(n, 0, None) for n in node.output if n],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        results = ReferenceEvaluator(model).run(None, {n: values[n] for n in names})
        values.update(zip([n for n in node.output if n], map(np.asarray, results)))
    return values


class Compiled:
    """A kernel as machine code of this process."""

    _count = 0

    def __init__(self, kernel: Kernel, machine: CpuMachine) -> None:
        initialize()
        Compiled._count += 1
        symbol = f"k{Compiled._count}"
        code = print_kernel(math.expand(kernel, machine), symbol, machine)
        self.text = code.text
        self.object = compile_ir(code.text, machine)
        self._jit = llvm.create_lljit_compiler()
        builder = llvm.JITLibraryBuilder().add_object_img(self.object.code).add_current_process()
        self._library = builder.export_symbol(symbol).link(self._jit, symbol)
        kinds = [ctypes.c_void_p] * (len(kernel.params) + 1) + [ctypes.c_int64] * 2
        self._function = ctypes.CFUNCTYPE(None, *kinds)(self._library[symbol])
        self._scratch = np.zeros(code.scratch_bytes + 64, np.uint8)
        self.extent = kernel.parallel.extent if kernel.parallel else 1

    def __call__(self, arrays: Sequence[Array]) -> None:
        """Run on C-contiguous arrays, in the order of the kernel's parameters."""
        pointers = [array.ctypes.data for array in arrays]
        self._function(*pointers, self._scratch.ctypes.data, 0, self.extent)


def run_lowered(
    region: Region,
    lowered: Lowered,
    feeds: Mapping[str, Array],
    machine: CpuMachine,
    layouts: Mapping[str, Layout] | None = None,
    jit: bool = True,
) -> dict[str, Array]:
    """The outputs of a lowered region for plain `feeds`, through machine code or the interpreter.

    Every kernel is verified first. Outputs and temporaries start as garbage, so that what is not written shows.
    """
    layouts = layouts or {}
    memory: dict[str, Array] = {n: _stored(np.ascontiguousarray(a)) for n, a in lowered.constants.items()}
    for name in region.inputs:
        memory[name] = to_layout(_stored(np.asarray(feeds[name])), layouts.get(name, PLAIN))
    for name in region.outputs:
        memory[name] = _garbage(region.types[name].dtype, physical_shape(region.types[name], layouts.get(name, PLAIN)))
    for name, type_ in lowered.temporaries.items():
        memory[name] = _garbage(type_.dtype, type_.shape)
    for launch in lowered.launches:
        verify(launch.kernel)
        arrays = [memory[name].reshape(p.shape) for name, p in zip(launch.args, launch.kernel.params, strict=True)]
        if jit:
            Compiled(launch.kernel, machine)(arrays)
        else:
            interp.run(launch.kernel, {p.name: a for p, a in zip(launch.kernel.params, arrays)})
    return {n: from_layout(memory[n], region.types[n], layouts.get(n, PLAIN)) for n in region.outputs}


def _stored(array: Array) -> Array:
    """The array as kernels see it: small element types by their bytes."""
    return array.view(np.uint8) if dtype_name(array) in SMALL else array


def _garbage(dtype: str, shape: tuple[int, ...]) -> Array:
    kind = interp.numpy_dtype(storage(dtype))
    return np.full(shape, True if kind.kind == "b" else 85 if kind.kind in "iu" else np.nan, kind)
