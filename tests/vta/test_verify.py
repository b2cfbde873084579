"""The verifier of VTA streams: a sound program passes, every mutation of it is caught, and races are found exactly."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.vta.assembly import ENGINES, assemble, engine
from nestc.runtime.vta.config import VtaConfig, preset
from nestc.runtime.vta.isa import Alu, AluOp, Finish, Gemm, Instruction, Load, MemoryId, Store, Stream, Tokens
from nestc.targets.vta.verify import Region, StreamError, verify

STOCK = preset("pynq_1x16x16")

# Three tiles of four positions: two slots of inputs, two of accumulators, one weight.
PROGRAM = """
.uops 0x400
   acc 0 src 0 wgt 0
   acc 8 src 4 wgt 0
.code
 0 load uop sram 0 dram 0x400 size 1x2 stride 2
 1 load wgt sram 0 dram 0x20 size 1x1 stride 1
 2 load inp sram 0 dram 0x300 size 1x4 stride 4                          push(compute)
 3 load inp sram 4 dram 0x304 size 1x4 stride 4                          push(compute)
 4 reset uop 0:1 loop 1x4 acc +0 +1 inp +0 +0 wgt +0 +0
 5 gemm  uop 0:1 loop 1x4 acc +0 +1 inp +0 +1 wgt +0 +0                  pop(load) push(load)
 6 alu max imm 0 uop 0:1 loop 1x4 dst +0 +1 src +0 +0                    push(store)
 7 load inp sram 0 dram 0x308 size 1x4 stride 4                          pop(compute) push(compute)
 8 store sram 0 dram 0x800 size 1x4 stride 4                             pop(compute) push(compute)
 9 reset uop 1:2 loop 1x4 acc +0 +1 inp +0 +0 wgt +0 +0
10 gemm  uop 1:2 loop 1x4 acc +0 +1 inp +0 +1 wgt +0 +0                  pop(load)
11 alu max imm 0 uop 1:2 loop 1x4 dst +0 +1 src +0 +0                    push(store)
12 store sram 8 dram 0x804 size 1x4 stride 4                             pop(compute) push(compute)
13 reset uop 0:1 loop 1x4 acc +0 +1 inp +0 +0 wgt +0 +0                  pop(store)
14 gemm  uop 0:1 loop 1x4 acc +0 +1 inp +0 +1 wgt +0 +0                  pop(load)
15 alu max imm 0 uop 0:1 loop 1x4 dst +0 +1 src +0 +0                    pop(store) push(store)
16 store sram 0 dram 0x808 size 1x4 stride 4                             pop(compute) push(compute)
17 finish                                                                pop(store)
"""

REGIONS = (Region("x", 0x3000, 12 * 16), Region("w", 0x2000, 256), Region("y", 0x8000, 12 * 16, False, True))


def code(text: str, config: VtaConfig = STOCK) -> Stream:
    return assemble(text, config)


def refusal(stream: Stream, regions: tuple[Region, ...] | None = None, config: VtaConfig = STOCK) -> StreamError:
    with pytest.raises(StreamError) as error:
        verify(stream, config, regions)
    return error.value


def edited(old: str, new: str) -> Stream:
    assert PROGRAM.count(old) == 1
    return code(PROGRAM.replace(old, new))


def test_a_sound_program():
    verify(code(PROGRAM), STOCK)
    verify(code(PROGRAM), STOCK, REGIONS)


TOKENS = list(re.finditer(r"(?:push|pop)\(\w+\)", PROGRAM))


@pytest.mark.parametrize("which", range(len(TOKENS)))
def test_any_token_dropped(which: int):
    found = TOKENS[which]
    assert isinstance(refusal(code(PROGRAM[: found.start()] + PROGRAM[found.end() :])), TargetError)


def pairs() -> Iterator[tuple[int, str, int, str]]:
    """Instruction and field of every push with those of the pop that takes it."""
    stream = code(PROGRAM)
    for giver, taker in ((0, 1), (1, 0), (1, 2), (2, 1)):
        push, pop = ("push_next", "pop_prev") if giver < taker else ("push_prev", "pop_next")
        at = [(i, ENGINES.index(engine(item)), item.tokens) for i, item in enumerate(stream.instructions)]
        pushes = [i for i, where, tokens in at if where == giver and getattr(tokens, push)]
        pops = [i for i, where, tokens in at if where == taker and getattr(tokens, pop)]
        yield from ((a, push, b, pop) for a, b in zip(pushes, pops, strict=True))


@pytest.mark.parametrize("pair", list(pairs()))
def test_any_dependency_dropped(pair: tuple[int, str, int, str]):
    stream = code(PROGRAM)
    first, push, second, pop = pair
    items = list(stream.instructions)
    items[first] = replace(items[first], tokens=replace(items[first].tokens, **{push: False}))
    items[second] = replace(items[second], tokens=replace(items[second].tokens, **{pop: False}))
    changed = replace(stream, instructions=tuple(items))
    if (first, second) == (12, 15):
        verify(changed, STOCK)  # nothing overwrites what 12 reads, and FINISH waits for 16, which comes after 12
    else:
        assert "does not wait for" in str(refusal(changed))


@pytest.mark.parametrize(
    ("a", "b"),
    [(0, 4), (2, 5), (4, 5), (5, 7), (6, 8), (13, 14), (14, 15), (15, 16), (16, 17), (1, 17), (8, 12), (3, 7)],
)
def test_instructions_swapped(a: int, b: int):
    stream = code(PROGRAM)
    items = list(stream.instructions)
    items[a], items[b] = items[b], items[a]
    refusal(replace(stream, instructions=tuple(items)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (" 9 reset uop 1:2", " 9 reset uop 1:3", "instruction 9 (compute reset uop 1:3"),
        (" 9 reset uop 1:2", " 9 reset uop 1:3", "runs micro-op 2, which no earlier instruction loads"),
        ("10 gemm  uop 1:2 loop 1x4", "10 gemm uop 1:1 loop 1x4", "runs no micro-op, and the hardware would not stop"),
        ("10 gemm  uop 1:2 loop 1x4", "10 gemm uop 1:2 loop 0x4", "runs no micro-op"),
        ("10 gemm  uop 1:2 loop 1x4", "10 gemm uop 1:2 loop 1x5", "instruction 10 (compute gemm uop 1:2 loop 1x5"),
        ("10 gemm  uop 1:2 loop 1x4", "10 gemm uop 1:2 loop 1x5", "reads accumulator 12, which nothing has written"),
        ("10 gemm  uop 1:2 loop 1x4", "10 gemm uop 1:2 loop 1x2041", "reaches accumulator 2048 of 2048"),
        ("   acc 8 src 4 wgt 0", "   acc 8 src 2045 wgt 0", "reaches input 2048 of 2048"),
        ("   acc 8 src 4 wgt 0", "   acc 8 src 5 wgt 0", "reads input 8, which nothing has written"),
        ("   acc 8 src 4 wgt 0", "   acc 8 src 4 wgt 1", "reads weight 1, which nothing has written"),
        (
            "   acc 8 src 4 wgt 0",
            "   acc 3 src 4 wgt 0",
            "writes accumulator 3 and does not wait for instruction 8 (store store",
        ),
        (
            "   acc 8 src 4 wgt 0",
            "   acc 8 src 3 wgt 0",
            "reads input 3 and does not wait for instruction 7 (load load inp",
        ),
        (
            "load inp sram 0 dram 0x308",
            "load inp sram 1 dram 0x308",
            "reads input 4 and does not wait for instruction 7 (load load inp",
        ),
        ("dram 0x304 size 1x4 stride 4", "dram 0x304 size 1x4 stride 4 pad 0 0 0 15", ""),
        (
            "dram 0x308 size 1x4 stride 4",
            "dram 0x308 size 1x4 stride 4 pad 0 0 0 1",
            "reads input 4 and does not wait for",
        ),
        (
            "load inp sram 0 dram 0x308",
            "load inp sram 0 dram 0 size 1x0 stride 0 push(compute)\n load inp sram 0 dram 0x308",
            "never taken",
        ),
        ("load inp sram 4 dram 0x304", "load inp sram 2045 dram 0x304", "fills INP up to element 2048 of 2048"),
        (
            "load inp sram 4 dram 0x304 size 1x4",
            "load inp sram 4 dram 0x304 size 0x4",
            "moves rows of which there are none",
        ),
        ("size 1x2 stride 2", "size 1x3 stride 3", "loads micro-ops 0 to 2 of the stream's image, which holds 2"),
        ("uop sram 0 dram 0x400", "uop sram 0 dram 0x3ff", "loads micro-ops -1 to 0"),
        ("uop sram 0 dram 0x400", "uop sram 8191 dram 0x400", "fills UOP up to element 8192 of 8192"),
        ("store sram 8 dram 0x804", "store sram 10 dram 0x804", "reads accumulator 12, which nothing has written"),
        ("store sram 8 dram 0x804", "store sram 2047 dram 0x804", "stores accumulators up to 2050 of 2048"),
        ("store sram 8 dram 0x804 size 1x4", "store sram 8 dram 0x804 size 0x4", "moves rows"),
        ("store sram 8 dram 0x804", "store sram 8 dram 0x100", "stores over the micro-ops of the stream at 0x1000"),
        (
            "store sram 8 dram 0x804",
            "store sram 8 dram 0x10000000",
            "reaches DRAM at 0x100000040, but addresses have 32 bits",
        ),
        ("load wgt sram 0", "load acc_8bit sram 0", "loads to ACC_8BIT, which not every VTA does"),
        ("load wgt sram 0", "load out sram 0", "loads to OUT"),
        ("11 alu max imm 0", "11 alu mul imm 0", "multiplies"),
        ("11 alu max imm 0", "11 alu shr imm 32", "shifts by 32"),
        ("17 finish  ", "17 load uop sram 0 dram 0 size 0x0 stride 0", "the stream does not end with FINISH"),
        (" 9 reset", "   finish\n 9 reset", "instruction 9 (compute finish) stands before the end"),
        (
            " 1 load wgt",
            " 1 load wgt sram 3 dram 0x20 size 1x1 stride 1 pop(prev)\n   load wgt",
            "has a token of an engine before load",
        ),
        (
            "12 store",
            "12 store sram 0 dram 0x9 size 1x0 stride 1 push(next)\n   store",
            "has a token of an engine after store",
        ),
        (
            "12 store",
            "12 store sram 0 dram 0x9 size 1x0 stride 1 pop(compute)\n   store",
            "that no earlier instruction gives",
        ),
        (
            "17 finish",
            "   load inp sram 9 dram 0x300 size 1x1 stride 1\n   finish",
            "FINISH does not wait for instruction 17 (load load inp",
        ),
        (
            " 9 reset",
            "   load inp sram 9 dram 0x300 size 1x1 stride 1 push(compute)\n 9 reset",
            "1 of the tokens from load to compute are never taken",
        ),
    ],
)
def test_one_thing_changed(old: str, new: str, words: str):
    stream = edited(old, new)
    if not words:
        verify(stream, STOCK)
        return
    assert words in str(refusal(stream))


def test_fields_and_micro_ops_are_in_range():
    stream = code(PROGRAM)
    items = (*stream.instructions[:5], replace(stream.instructions[5], iter_in=1 << 14), *stream.instructions[6:])
    error = refusal(replace(stream, instructions=items))
    assert "instruction 5 (gemm): iter_in is 16384" in str(error) and error.index == 5
    assert "micro-op 0: dst is 2048" in str(refusal(replace(stream, uops=np.array([[2048, 0, 0], [0, 0, 0]]))))


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (
            REGIONS[1:],
            "instruction 2 (load load inp sram 0 dram 0x300 size 1x4 stride 4 push(compute)) loads from DRAM 0x3000 to 0x303f",
        ),
        ((replace(REGIONS[0], size=191), *REGIONS[1:]), "instruction 7"),
        ((REGIONS[0], replace(REGIONS[1], address=0x2010), REGIONS[2]), "instruction 1 "),
        ((*REGIONS[:2], replace(REGIONS[2], writable=False)), "which lies in no buffer to write"),
        (
            (replace(REGIONS[0], filled=False), *REGIONS[1:]),
            "instruction 2 (load load inp sram 0 dram 0x300 size 1x4 stride 4 push(compute)) loads from DRAM at 0x3000 what nothing has stored",
        ),
    ],
)
def test_dram_outside_its_buffers(regions: tuple[Region, ...], words: str):
    assert words in str(refusal(code(PROGRAM), regions))


# A second layer that reads what the first stored: 6 values of 0x8000, then overwrites some of them.
CHAIN = (
    PROGRAM.replace("17 finish                                                                pop(store)", "")
    + """
17 load inp sram 20 dram 0 size 0x0 stride 0
   load uop sram 0 dram 0x400 size 1x0 stride 2                        pop(store) push(load)
   load inp sram 16 dram 0x802 size 2x3 stride 6                       pop(compute) push(compute)
   reset uop 0:1 loop 1x4 acc +0 +1 inp +0 +0 wgt +0 +0                pop(load)  push(store)
   store sram 0 dram 0x809 size 1x1 stride 1                           pop(compute) push(compute)
   finish                                                              pop(store)
"""
)


def test_a_layer_reads_what_another_stored():
    verify(code(CHAIN), STOCK, REGIONS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # No way from the last store to the load: the token goes on from compute alone, one store too early.
        ("pop(store) push(load)", "push(load)", "DRAM at 0x8080 and does not wait for instruction 16 (store store"),
        (
            "pop(load)  push(store)",
            "push(store)",
            "writes DRAM at 0x8090 and does not wait for instruction 19 (load load inp",
        ),
        (
            "dram 0x802 size 2x3 stride 6",
            "dram 0x802 size 2x3 stride 8",
            "loads from DRAM at 0x8020 what nothing has stored",
        ),
        ("dram 0x802 size 2x3 stride 6", "dram 0x802 size 2x3 stride 9", "which lies in no buffer"),
    ],
)
def test_dram_hazards(old: str, new: str, words: str):
    text = CHAIN.replace(old, new)
    assert text != CHAIN
    regions = REGIONS
    if "stride 8" in new:
        regions = (*REGIONS[:2], replace(REGIONS[2], size=16 * 16))
    if "push" in new:
        # The token that is not taken there is taken by a last instruction, so that only the order is wrong.
        side = "store" if "(store) push(load)" in old else "load"
        text = text.replace("   finish ", f"   load uop sram 0 dram 0x400 size 1x0 stride 2 pop({side})\n   finish ")
    assert words in str(refusal(code(text), regions))


def test_what_was_loaded_is_not_stored_as_it_is():
    text = """
    .code
    load acc sram 0 dram 0x10 size 1x2 stride 2 push(store)
    store sram 0 dram 0x100 size 1x2 stride 2 pop(compute) push(compute)
    finish pop(store)
    """
    assert "instruction 1 (store store sram 0" in str(refusal(code(text)))
    assert "stores accumulator 0 as it was loaded" in str(refusal(code(text)))


def test_more_tokens_than_the_hardware_counts():
    push = "load inp sram 0 dram 0 size 0x0 stride 0 push(compute)\n"
    pop = "load uop sram 0 dram 0 size 0x0 stride 0 pop(load)\n"
    verify(code(".code\n" + push * 255 + pop * 255 + "finish"), STOCK)
    error = refusal(code(".code\n" + push * 256 + pop * 256 + "finish"))
    assert error.index == 255 and "may find more than 255 tokens waiting from load to compute" in str(error)
    # Pops in between do not help, as nothing makes the load engine wait for them.
    assert refusal(code(".code\n" + (push + pop) * 256 + "finish")).index == 510
    both = push.replace("push(", "pop(compute) push(")
    verify(
        code(
            ".code\n"
            + (push + pop.replace("\n", " push(load)\n"))
            + (both + pop.replace("\n", " push(load)\n")) * 300
            + "load inp sram 0 dram 0 size 0x0 stride 0 pop(compute) push(compute)\nfinish pop(load)"
        ),
        STOCK,
    )


def steps(item: Alu, uops: np.ndarray) -> list[tuple[int, int]]:
    """Destination and source of every micro-op in time, as the loops say."""
    return [
        (int(dst) + i * item.dst_out + j * item.dst_in, int(src) + i * item.src_out + j * item.src_in)
        for i in range(item.iter_out)
        for j in range(item.iter_in)
        for dst, src, _ in uops[item.uop_begin : item.uop_end]
    ]


small = st.integers(0, 3)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(small, small), min_size=1, max_size=3),
    st.builds(
        Alu,
        st.just(AluOp.ADD),
        st.just(0),
        st.just(0),
        st.integers(1, 3),
        st.integers(1, 3),
        small,
        small,
        small,
        small,
        st.booleans(),
    ),
)
def test_alu_pipeline(pairs: list[tuple[int, int]], item: Alu):
    uops = np.array([(dst, src, 0) for dst, src in pairs])
    item = replace(item, uop_end=len(uops))
    reset = Gemm(True, len(uops), len(uops) + 1, 1, 32, dst_in=1)
    image = np.concatenate([uops, np.zeros((1, 3), np.int64)])
    stream = Stream((Load(MemoryId.UOP, 0, 0, 1, len(image), len(image)), reset, item, Finish()), image, 0)
    times = steps(item, uops)
    column = 0 if item.use_imm else 1
    if any(a[0] == b[column] for a, b in pairwise(times)):
        assert "too soon for the pipeline" in str(refusal(stream))
    else:
        verify(stream, STOCK)


# --- against every order in which the engines may run


def touches(item: Instruction) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """What an instruction of the small programs below reads and writes."""
    if isinstance(item, Load):
        if item.memory is MemoryId.UOP or not item.x_size:
            return set(), set()
        space = {MemoryId.INP: "inp", MemoryId.WGT: "wgt"}[item.memory]
        return {("dram", item.dram + k) for k in range(item.x_size)}, {
            (space, item.sram + k) for k in range(item.x_size)
        }
    if isinstance(item, Store):
        return {("acc", item.sram + k) for k in range(item.x_size)}, {
            ("dram", item.dram + k) for k in range(item.x_size)
        }
    if isinstance(item, Gemm):
        dst = {("acc", item.uop_begin // 2 + k) for k in range(item.iter_in)}
        if item.reset:
            return set(), dst
        return dst | {("wgt", 0)} | {("inp", item.uop_begin % 2 + k) for k in range(item.iter_in)}, dst
    return set(), set()


ENGINE_OF = {Load: 0, Gemm: 1, Finish: 1, Store: 2}


def place(item: Instruction) -> int:
    return 1 if isinstance(item, Load) and item.memory is MemoryId.UOP else ENGINE_OF[type(item)]


def sound(items: list[Instruction]) -> bool:
    """Whether, in every order that tokens allow, whatever conflicts runs in program order, and none waits for ever."""
    engines = [[i for i, item in enumerate(items) if place(item) == e] for e in range(3)]
    effects = [touches(item) for item in items]

    def conflict(a: int, b: int) -> bool:
        (ra, wa), (rb, wb) = effects[a], effects[b]
        return bool(wa & wb or wa & rb or ra & wb)

    def tokens(i: int, verb: str) -> list[tuple[int, int]]:
        here, t = place(items[i]), items[i].tokens
        sides = ((-1, t.pop_prev if verb == "pop" else t.push_prev), (1, t.pop_next if verb == "pop" else t.push_next))
        return [(here + side, here) if verb == "pop" else (here, here + side) for side, set_ in sides if set_]

    # A state is how far each engine is: 2 k: k instructions ended; 2 k + 1: one more has started.
    seen, todo = {(0, 0, 0)}, [(0, 0, 0)]
    while todo:
        state = todo.pop()
        ended = {i for e in range(3) for i in engines[e][: state[e] // 2]}
        started = {i for e in range(3) for i in engines[e][: (state[e] + 1) // 2]}
        count: dict[tuple[int, int], int] = {}
        for i in ended:
            for edge in tokens(i, "push"):
                count[edge] = count.get(edge, 0) + 1
        for i in started:
            for edge in tokens(i, "pop"):
                count[edge] = count.get(edge, 0) - 1
        moves = 0
        for e in range(3):
            if state[e] == 2 * len(engines[e]):
                continue
            if state[e] % 2 == 0:
                i = engines[e][state[e] // 2]
                if any(count.get(edge, 0) < 1 for edge in tokens(i, "pop")):
                    continue
                if any(conflict(a, i) for a in range(i) if a not in ended):
                    return False
                if any(conflict(i, b) for b in started if b > i):
                    return False
            moves += 1
            after = tuple(s + (k == e) for k, s in enumerate(state))
            if after not in seen:
                seen.add(after)
                todo.append(after)
        if not moves and any(state[e] < 2 * len(engines[e]) for e in range(3)):
            return False
    return True


# Micro-op 2 a + i: accumulator a, input i.
UOPS = np.array([(a, i, 0) for a in range(2) for i in range(2)])
OPENING: list[Instruction] = [
    Load(MemoryId.UOP, 0, 0x400, 1, 4, 4),
    Load(MemoryId.WGT, 0, 0x20, 1, 1, 1),
    Load(MemoryId.INP, 0, 0x300, 1, 3, 3, tokens=Tokens(push_next=True)),
    Gemm(True, 0, 1, 1, 3, 0, 1, tokens=Tokens(pop_prev=True)),
]
ENDING: list[Instruction] = [
    Load(MemoryId.INP, 0, 0, 0, 0, 0, tokens=Tokens(push_next=True)),
    Store(0, 0, 0, 0, 0, Tokens(push_prev=True)),
    Finish(Tokens(True, True)),
]
STEPS = st.one_of(
    st.builds(
        lambda at, x, d: Load(MemoryId.INP, at, d, 1, x, x),
        st.integers(0, 1),
        st.integers(1, 2),
        st.sampled_from([0x300, 0x800]),
    ),
    st.builds(lambda u, n: Gemm(False, u, u + 1, 1, n, 0, 1, 0, 1), st.integers(0, 3), st.integers(1, 2)),
    st.builds(lambda u, n: Gemm(True, u, u + 1, 1, n, 0, 1), st.integers(0, 3), st.integers(1, 2)),
    st.builds(
        lambda at, x, d: Store(at, d, 1, x, x), st.integers(0, 1), st.integers(1, 2), st.sampled_from([0x800, 0x900])
    ),
)


@settings(deadline=None, max_examples=250)
@given(
    st.lists(STEPS, min_size=2, max_size=7),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9),
    st.booleans(),
)
def test_races_are_found_exactly(steps: list[Instruction], links: list[tuple[int, int]], chain: bool):
    items = list(steps)
    wanted = [pair for pair in links if pair[0] < pair[1] < len(items)]
    if chain:
        # Every neighbour in program order that tokens can order, so that many programs are sound.
        wanted += [(i, j) for j in range(len(items)) for i in range(j) if conflicts(items[i], items[j])]
    for i, j in wanted:
        a, b = place(items[i]), place(items[j])
        if abs(a - b) == 1:
            push, pop = ("push_next", "pop_prev") if a < b else ("push_prev", "pop_next")
            if not getattr(items[i].tokens, push) and not getattr(items[j].tokens, pop):
                items[i] = replace(items[i], tokens=replace(items[i].tokens, **{push: True}))
                items[j] = replace(items[j], tokens=replace(items[j].tokens, **{pop: True}))
    items = [*OPENING, *items, *ENDING]
    stream = Stream(tuple(items), UOPS, 0x400)
    if sound(items):
        verify(stream, STOCK)
    else:
        assert "does not wait for" in str(refusal(stream))


def conflicts(a: Instruction, b: Instruction) -> bool:
    (ra, wa), (rb, wb) = touches(a), touches(b)
    return bool(wa & wb or wa & rb or ra & wb)
