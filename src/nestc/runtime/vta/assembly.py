"""VTA streams as text that a person reads, and that gives the same bits back.

    .uops 0x400                                     address of the first micro-op in DRAM, in micro-ops
         0  acc 0 src 0 wgt 0                       a micro-op a line: destination, source, weight
    .code
         0 compute  load uop sram 0 dram 0x400 size 1x9 stride 9
         1 load     load inp sram 0 dram 0x100 size 14x14 stride 56   push(compute)
         2 compute  gemm uop 0:9 loop 14x56 acc +56 +1 inp +56 +1 wgt +0 +0   pop(load) push(store)
         3 store    store sram 0 dram 0x200 size 14x14 stride 56   pop(compute)
         4 compute  finish

Sizes are rows x columns, loops outer x inner; the two steps after a memory are those of the outer and the inner loop.
A comment starts with ``;`` or ``#``. The number and the engine before an instruction may be left out when writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nestc.errors import TargetError
from nestc.runtime.vta.config import VtaConfig
from nestc.runtime.vta.encode import EncodingError, encode, encode_uops
from nestc.runtime.vta.fields import DRAM_BITS, UOP_BITS
from nestc.runtime.vta.isa import (
    ENGINES,
    Alu,
    AluOp,
    Finish,
    Gemm,
    Instruction,
    Load,
    MemoryId,
    Store,
    Stream,
    Tokens,
    engine_of,
)

# Engines in the order of their tokens: prev is the one before, next the one after.
_MNEMONICS = ("load", "store", "gemm", "reset", "alu", "finish")
_PADS = ("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1")


def engine(instruction: Instruction) -> str:
    """The name of the engine that executes an instruction."""
    return ENGINES[engine_of(instruction)]


def disassemble(stream: Stream, config: VtaConfig, notes: Mapping[int, str] | None = None) -> str:
    """The text of a stream. `notes`: comments to stand above the instructions of these indices."""
    lines = [
        f"; VTA {config.name}: {len(stream.instructions)} instructions, {len(stream.uops)} micro-ops",
        f".uops {stream.uop_base:#x}",
        *(f"{index:6d}  acc {dst} src {src} wgt {wgt}" for index, (dst, src, wgt) in enumerate(stream.uops.tolist())),
        ".code",
    ]
    for index, instruction in enumerate(stream.instructions):
        lines.extend(f"; {line}" for line in (notes or {}).get(index, "").splitlines())
        lines.append(f"{index:6d} {line(instruction)}")
    return "\n".join(lines) + "\n"


def line(instruction: Instruction) -> str:
    """One instruction as text, its engine first."""
    where = engine(instruction)
    return f"{where:8s} {_body(instruction)}   {_tokens(instruction.tokens, where)}".rstrip()


def assemble(text: str, config: VtaConfig) -> Stream:
    """The stream that a text describes.

    Raises:
        TargetError: a line cannot be read, or says what the configuration cannot encode; names the line.
    """
    section, base = "", 0
    uops: list[tuple[int, int, int]] = []
    instructions: list[Instruction] = []
    uop_lines: list[int] = []
    code_lines: list[int] = []
    for number, raw in enumerate(text.splitlines(), 1):
        words = _Words(raw.split(";")[0].split("#")[0].split(), number)
        if words.done:
            continue
        if words.peek.startswith("."):
            section = words.one_of((".uops", ".code"), "a section")
            if section == ".uops" and not words.done:
                base = words.number()
                if not 0 <= base < 1 << DRAM_BITS:
                    raise words.error(f"the address {base:#x} is not one of {DRAM_BITS} bits")
        elif section == ".uops":
            uops.append(_read_uop(words))
            uop_lines.append(number)
        elif section == ".code":
            instructions.append(_read(words))
            code_lines.append(number)
        else:
            raise words.error("stands before .uops or .code")
        if not words.done:
            raise words.error(f"'{words.peek}' is one word too many")
    stream = Stream(tuple(instructions), _uop_array(uops, uop_lines), base)
    lines = uop_lines
    try:
        encode_uops(stream.uops, config)
        lines = code_lines
        encode(stream.instructions, config)
    except EncodingError as error:
        raise TargetError(f"line {lines[error.index]} of VTA assembly: {error}") from error
    return stream


def _uop_array(uops: list[tuple[int, int, int]], lines: list[int]) -> np.ndarray:
    for uop, number in zip(uops, lines, strict=True):
        if min(uop) < 0 or max(uop) >= 1 << UOP_BITS:
            raise TargetError(f"line {number} of VTA assembly: an index of a micro-op is not one of {UOP_BITS} bits")
    return np.array(uops, np.int64).reshape(-1, 3)


def _body(item: Instruction) -> str:
    if isinstance(item, Load):
        pads = [getattr(item, name) for name in _PADS]
        pad = f" pad {pads[0]} {pads[1]} {pads[2]} {pads[3]}" if any(pads) else ""
        return f"load {item.memory.name.lower()} {_transfer(item)}{pad}"
    if isinstance(item, Store):
        return f"store {_transfer(item)}"
    if isinstance(item, Gemm):
        steps = f"acc {_steps(item, 'dst')} inp {_steps(item, 'src')} wgt {_steps(item, 'wgt')}"
        return f"{'reset' if item.reset else 'gemm'} {_loops(item)} {steps}"
    if isinstance(item, Alu):
        # An immediate that is not used is kept, so that the bits come back.
        imm = f" imm {item.imm}" if item.use_imm else f" unused {item.imm}" if item.imm else ""
        return f"alu {item.op.name.lower()}{imm} {_loops(item)} dst {_steps(item, 'dst')} src {_steps(item, 'src')}"
    return "finish"


def _transfer(item: Load | Store) -> str:
    return f"sram {item.sram} dram {item.dram:#x} size {item.y_size}x{item.x_size} stride {item.x_stride}"


def _loops(item: Gemm | Alu) -> str:
    return f"uop {item.uop_begin}:{item.uop_end} loop {item.iter_out}x{item.iter_in}"


def _steps(item: Gemm | Alu, operand: str) -> str:
    return f"+{getattr(item, operand + '_out')} +{getattr(item, operand + '_in')}"


def _neighbours(where: str) -> tuple[str, str]:
    """Names of the engines before and after one; ``prev`` and ``next`` where there is none."""
    place = ENGINES.index(where)
    return (ENGINES[place - 1] if place else "prev"), (ENGINES[place + 1] if place < 2 else "next")


def _tokens(tokens: Tokens, where: str) -> str:
    before, after = _neighbours(where)
    pops = [name for name, set_ in ((before, tokens.pop_prev), (after, tokens.pop_next)) if set_]
    pushes = [name for name, set_ in ((before, tokens.push_prev), (after, tokens.push_next)) if set_]
    return " ".join(f"{verb}({','.join(names)})" for verb, names in (("pop", pops), ("push", pushes)) if names)


class _Words:
    """The words of a line, taken one after another; every failure names the line."""

    def __init__(self, words: list[str], line: int) -> None:
        self._words, self._line, self._at = words, line, 0

    @property
    def done(self) -> bool:
        return self._at == len(self._words)

    @property
    def peek(self) -> str:
        """The next word, empty at the end."""
        return "" if self.done else self._words[self._at]

    @property
    def after(self) -> str:
        """The word after the next."""
        return self._words[self._at + 1] if self._at + 1 < len(self._words) else ""

    def error(self, what: str) -> TargetError:
        return TargetError(f"line {self._line} of VTA assembly: {what}")

    def next(self, what: str) -> str:
        if self.done:
            raise self.error(f"the line ends where {what} is expected")
        self._at += 1
        return self._words[self._at - 1]

    def skip(self, word: str) -> bool:
        """Takes the next word if it is this one."""
        found = self.peek == word
        self._at += found
        return found

    def keyword(self, word: str) -> None:
        got = self.next(f"'{word}'")
        if got != word:
            raise self.error(f"'{word}' is expected, not '{got}'")

    def one_of(self, words: tuple[str, ...], what: str) -> str:
        got = self.next(what)
        if got not in words:
            raise self.error(f"'{got}' is not {what}; there are {', '.join(words)}")
        return got

    def number(self) -> int:
        return self._integer(self.next("a number"))

    def pair(self, separator: str) -> tuple[int, int]:
        """Two numbers in one word, such as 14x56 or 0:9."""
        word = self.next(f"two numbers with '{separator}' between")
        parts = word.split(separator)
        if len(parts) != 2:
            raise self.error(f"'{word}' is not two numbers with '{separator}' between")
        return self._integer(parts[0]), self._integer(parts[1])

    def named(self, word: str) -> int:
        """A number after its name."""
        self.keyword(word)
        return self.number()

    def steps(self, word: str) -> tuple[int, int]:
        """Two steps after the name of what they move."""
        self.keyword(word)
        return self.number(), self.number()

    def _integer(self, word: str) -> int:
        try:
            return int(word, 0)
        except ValueError:
            raise self.error(f"'{word}' is not a number") from None


def _read_uop(words: _Words) -> tuple[int, int, int]:
    if words.peek != "acc":
        words.number()
    return words.named("acc"), words.named("src"), words.named("wgt")


def _read(words: _Words) -> Instruction:
    if words.peek[:1].isdigit():
        words.number()
    # "load" and "store" are engines and instructions: an engine is followed by an instruction.
    said = words.next("an engine") if words.peek in ENGINES and words.after in _MNEMONICS else ""
    instruction = _read_body(words)
    where = engine(instruction)
    if said and said != where:
        raise words.error(f"this instruction runs on the {where} engine, not on '{said}'")
    tokens = _read_tokens(words, where)
    return replace(instruction, tokens=tokens)


def _read_body(words: _Words) -> Instruction:
    name = words.one_of(_MNEMONICS, "an instruction")
    if name == "finish":
        return Finish()
    if name == "load":
        names = tuple(memory.name.lower() for memory in MemoryId)
        memory = MemoryId[words.one_of(names, "a memory").upper()]
        transfer = _read_transfer(words)
        if not words.skip("pad"):
            return Load(memory, *transfer)
        return Load(memory, *transfer, words.number(), words.number(), words.number(), words.number())
    if name == "store":
        return Store(*_read_transfer(words))
    if name == "alu":
        op = AluOp[words.one_of(tuple(op.name.lower() for op in AluOp), "an ALU operation").upper()]
        use_imm = words.skip("imm")
        imm = words.number() if use_imm or words.skip("unused") else 0
        loops = _read_loops(words)
        return Alu(op, *loops, *words.steps("dst"), *words.steps("src"), use_imm, imm)
    loops = _read_loops(words)
    return Gemm(name == "reset", *loops, *words.steps("acc"), *words.steps("inp"), *words.steps("wgt"))


def _read_transfer(words: _Words) -> tuple[int, int, int, int, int]:
    sram, dram = words.named("sram"), words.named("dram")
    words.keyword("size")
    rows, columns = words.pair("x")
    return sram, dram, rows, columns, words.named("stride")


def _read_loops(words: _Words) -> tuple[int, int, int, int]:
    words.keyword("uop")
    begin, end = words.pair(":")
    words.keyword("loop")
    outer, inner = words.pair("x")
    return begin, end, outer, inner


def _read_tokens(words: _Words, where: str) -> Tokens:
    before, after = _neighbours(where)
    found: dict[str, bool] = {}
    while not words.done:
        word = words.next("tokens")
        verb, opened, rest = word.partition("(")
        if verb not in ("pop", "push") or not opened or not rest.endswith(")"):
            raise words.error(f"'{word}' is not pop(ENGINE) or push(ENGINE)")
        for name in rest[:-1].split(","):
            if name not in (before, after):
                raise words.error(f"the {where} engine has no tokens of '{name}', only of {before} and {after}")
            side = f"{verb}_{'prev' if name == before else 'next'}"
            if side in found:
                raise words.error(f"{verb}({name}) is said twice")
            found[side] = True
    return Tokens(**found)
