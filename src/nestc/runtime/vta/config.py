"""A VTA machine as data: the logarithms that its own configuration files hold, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from nestc.errors import TargetError
from nestc.runtime.vta.fields import INSTRUCTION_BITS, SRAM_BITS, UOP_BITS, Layouts, layouts

# VTA's own keys (tvm-vta config/vta_config.json) and the fields that hold them.
KEYS = {
    "LOG_INP_WIDTH": "log_inp_width",
    "LOG_WGT_WIDTH": "log_wgt_width",
    "LOG_ACC_WIDTH": "log_acc_width",
    "LOG_BATCH": "log_batch",
    "LOG_BLOCK": "log_block",
    "LOG_UOP_BUFF_SIZE": "log_uop_buff_size",
    "LOG_INP_BUFF_SIZE": "log_inp_buff_size",
    "LOG_WGT_BUFF_SIZE": "log_wgt_buff_size",
    "LOG_ACC_BUFF_SIZE": "log_acc_buff_size",
}
# The only element types that code is generated for: int8 inputs and weights, int32 accumulators.
_WIDTHS = {"LOG_INP_WIDTH": 3, "LOG_WGT_WIDTH": 3, "LOG_ACC_WIDTH": 5}
# Least and most of each size. The largest published VTA has blocks of 64 (arXiv:2111.15024); blocks under 4 would leave
# no lane for the constants of a bias.
_RANGES = {
    "LOG_BATCH": (0, 5),
    "LOG_BLOCK": (2, 8),
    "LOG_UOP_BUFF_SIZE": (0, 30),
    "LOG_INP_BUFF_SIZE": (0, 30),
    "LOG_WGT_BUFF_SIZE": (0, 30),
    "LOG_ACC_BUFF_SIZE": (0, 30),
}
# Clock in Hz and data bus in bits of the boards in tvm-vta config/pkg_config.py: Zynq UltraScale+, and all others.
_ULTRASCALE, _OTHERS = (333e6, 128), (100e6, 64)
_BOARDS = {"ultra96": _ULTRASCALE, "zcu104": _ULTRASCALE}


@dataclass(frozen=True)
class VtaConfig:
    """Parameters of one VTA (tvm-vta ``config/vta_config.json``); sizes are log2, of bits (WIDTH) or bytes (BUFF_SIZE).

    An element of a memory is what one address stands for: ``inp`` (batch, block) int8, ``wgt`` (block, block) int8
    [out, in], ``acc`` (batch, block) int32, ``out`` (batch, block) int8, ``uop`` 32 bits.
    """

    name: str = "pynq_1x16x16"
    log_inp_width: int = 3
    log_wgt_width: int = 3
    log_acc_width: int = 5
    log_batch: int = 0
    log_block: int = 4
    log_uop_buff_size: int = 15
    log_inp_buff_size: int = 15
    log_wgt_buff_size: int = 18
    log_acc_buff_size: int = 17
    clock_hz: float = _OTHERS[0]
    bus_bits: int = _OTHERS[1]

    def __post_init__(self) -> None:
        """Refuses, with a `TargetError`, a machine that cannot be or that no code can be generated for."""
        sizes = {key: getattr(self, field) for key, field in KEYS.items()}
        _check_numbers(sizes, self.name)
        self._check_buffers()
        self._check_encoding()
        if not (math.isfinite(self.clock_hz) and self.clock_hz > 0):
            raise TargetError(f"VTA configuration '{self.name}': the clock is {self.clock_hz} Hz; it must be above 0")
        if self.bus_bits not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise TargetError(
                f"VTA configuration '{self.name}': the data bus has {self.bus_bits} bits; "
                "it must be a power of two from 8 to 1024"
            )

    def _check_buffers(self) -> None:
        elements = {
            "UOP": (self.log_uop_depth, 4),
            "INP": (self.log_inp_depth, self.inp_bytes),
            "WGT": (self.log_wgt_depth, self.wgt_bytes),
            "ACC": (self.log_acc_depth, self.acc_bytes),
        }
        for memory, (depth, size) in elements.items():
            key = f"LOG_{memory}_BUFF_SIZE"
            size_of = f"VTA configuration '{self.name}': {key} {getattr(self, KEYS[key])}"
            if depth < 1:
                raise TargetError(
                    f"{size_of} makes a buffer of fewer than two elements, of {size} bytes each; make it larger"
                )
            if depth > SRAM_BITS:
                raise TargetError(
                    f"{size_of} makes a buffer of 2^{depth} elements, but an SRAM address has {SRAM_BITS} bits; "
                    "make it smaller"
                )

    def _check_encoding(self) -> None:
        places = self.layouts
        kinds = (
            ("a GEMM instruction", places.gemm.bits, INSTRUCTION_BITS),
            ("an ALU instruction", places.alu.bits, INSTRUCTION_BITS),
            ("a micro-op", places.uop.bits, UOP_BITS),
        )
        for what, bits, room in kinds:
            if bits > room:
                raise TargetError(
                    f"VTA configuration '{self.name}': {what} would take {bits} bits with the addresses of these "
                    f"buffers, and has {room}; make LOG_UOP_BUFF_SIZE, LOG_INP_BUFF_SIZE, LOG_WGT_BUFF_SIZE or "
                    "LOG_ACC_BUFF_SIZE smaller"
                )

    def to_json(self) -> dict[str, int]:
        """The sizes under VTA's own keys; the clock and the bus have no key there."""
        return {key: getattr(self, field) for key, field in KEYS.items()}

    @property
    def layouts(self) -> Layouts:
        """Where the fields of instructions and micro-ops lie."""
        return layouts(self.log_uop_depth, self.log_inp_depth, self.log_wgt_depth, self.log_acc_depth)

    @property
    def batch(self) -> int:
        """Rows of an input element."""
        return 1 << self.log_batch

    @property
    def block(self) -> int:
        """Channels of an element, in and out."""
        return 1 << self.log_block

    @property
    def log_uop_depth(self) -> int:
        """log2 of the micro-ops that the buffer holds."""
        return self.log_uop_buff_size - 2

    @property
    def log_inp_depth(self) -> int:
        """log2 of the elements of the input buffer."""
        return self.log_inp_buff_size - self.log_batch - self.log_block - self.log_inp_width + 3

    @property
    def log_wgt_depth(self) -> int:
        """log2 of the elements of the weight buffer."""
        return self.log_wgt_buff_size - 2 * self.log_block - self.log_wgt_width + 3

    @property
    def log_acc_depth(self) -> int:
        """log2 of the elements of the accumulator buffer."""
        return self.log_acc_buff_size - self.log_batch - self.log_block - self.log_acc_width + 3

    @property
    def uop_depth(self) -> int:
        """Micro-ops that the buffer holds."""
        return 1 << self.log_uop_depth

    @property
    def inp_depth(self) -> int:
        """Elements of the input buffer."""
        return 1 << self.log_inp_depth

    @property
    def inp_reach(self) -> int:
        """Elements of the input buffer that a micro-op can name: its source is as wide as an accumulator's address."""
        return min(self.inp_depth, self.acc_depth)

    @property
    def wgt_depth(self) -> int:
        """Elements of the weight buffer."""
        return 1 << self.log_wgt_depth

    @property
    def acc_depth(self) -> int:
        """Elements of the accumulator buffer."""
        return 1 << self.log_acc_depth

    @property
    def inp_bytes(self) -> int:
        """Bytes of an input element, and of an output element."""
        return self.batch * self.block * (1 << self.log_inp_width) // 8

    @property
    def wgt_bytes(self) -> int:
        """Bytes of a weight element."""
        return self.block * self.block * (1 << self.log_wgt_width) // 8

    @property
    def acc_bytes(self) -> int:
        """Bytes of an accumulator element."""
        return self.batch * self.block * (1 << self.log_acc_width) // 8


def from_json(content: str | Mapping[str, object], name: str) -> VtaConfig:
    """The machine that a configuration in VTA's own keys describes, JSON text or what it holds.

    TARGET, if it names a board, gives clock and bus as in tvm-vta's ``pkg_config.py`` (the PYNQ's for any other); keys
    that do not change the machine are ignored.

    Raises:
        TargetError: not a JSON object, a key is missing or not an integer, or the machine cannot be.
    """
    data = _parse(content, name) if isinstance(content, str) else content
    missing = [key for key in KEYS if key not in data]
    if missing:
        raise TargetError(f"VTA configuration '{name}' lacks {', '.join(missing)}; all of {', '.join(KEYS)} are needed")
    sizes = {key: data[key] for key in KEYS}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TargetError(f"VTA configuration '{name}': {key} is {value!r}; it must be an integer")
    numbers = cast(dict[str, int], sizes)
    _check_derived(data, numbers, name)
    clock_hz, bus_bits = _BOARDS.get(str(data.get("TARGET")), _OTHERS)
    return VtaConfig(name, **{KEYS[key]: value for key, value in numbers.items()}, clock_hz=clock_hz, bus_bits=bus_bits)


def load(path: str | Path) -> VtaConfig:
    """The machine in a JSON file with VTA's own keys, named after the file.

    Raises:
        TargetError: the file cannot be read, or is not such a configuration.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"VTA configuration '{path}' cannot be read: {error}") from error
    return from_json(text, Path(path).stem)


def preset(name: str) -> VtaConfig:
    """The machine of a name in `PRESETS`.

    Raises:
        TargetError: there is no such name.
    """
    if name not in PRESETS:
        raise TargetError(
            f"there is no VTA configuration '{name}'; there are {', '.join(PRESETS)}, or a file: vta:config=FILE"
        )
    return PRESETS[name]


def _parse(text: str, name: str) -> Mapping[str, object]:
    try:
        data: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise TargetError(f"VTA configuration '{name}' is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise TargetError(f"VTA configuration '{name}' is not a JSON object of keys such as LOG_BLOCK")
    return cast(Mapping[str, object], data)


def _check_numbers(sizes: Mapping[str, int], name: str) -> None:
    for key, value in sizes.items():
        if key in _WIDTHS and value != _WIDTHS[key]:
            raise TargetError(
                f"VTA configuration '{name}': {key} is {value}; code is generated only for 8-bit inputs and weights "
                "and 32-bit accumulators (LOG_INP_WIDTH 3, LOG_WGT_WIDTH 3, LOG_ACC_WIDTH 5)"
            )
        low, high = _RANGES.get(key, (value, value))
        if not low <= value <= high:
            raise TargetError(f"VTA configuration '{name}': {key} is {value}; it must be from {low} to {high}")


def _check_derived(data: Mapping[str, object], sizes: Mapping[str, int], name: str) -> None:
    """Keys that tvm-vta derives from the others may be there, but may not describe another machine."""
    derived = {
        "LOG_BLOCK_IN": sizes["LOG_BLOCK"],
        "LOG_BLOCK_OUT": sizes["LOG_BLOCK"],
        "LOG_OUT_WIDTH": sizes["LOG_INP_WIDTH"],
        "LOG_OUT_BUFF_SIZE": sizes["LOG_ACC_BUFF_SIZE"] + sizes["LOG_INP_WIDTH"] - sizes["LOG_ACC_WIDTH"],
    }
    for key, value in derived.items():
        if data.get(key, value) != value:
            raise TargetError(
                f"VTA configuration '{name}': {key} is {data[key]!r}, but the other keys make it {value}; remove it"
            )


# The ZCU102 is a Zynq UltraScale+ board. 1x32x32 has four times the MACs; its buffers are the largest that still fit in
# 128-bit instructions and 32-bit micro-ops: 2^13 micro-ops, 2^11 inputs, 2^10 weights, 2^11 accumulators.
PRESETS: Mapping[str, VtaConfig] = {
    config.name: config
    for config in (
        VtaConfig("pynq_1x16x16"),
        VtaConfig("zcu102_1x16", clock_hz=_ULTRASCALE[0], bus_bits=_ULTRASCALE[1]),
        VtaConfig(
            "1x32x32",
            log_block=5,
            log_inp_buff_size=16,
            log_wgt_buff_size=20,
            log_acc_buff_size=18,
            clock_hz=_ULTRASCALE[0],
            bus_bits=_ULTRASCALE[1],
        ),
    )
}
