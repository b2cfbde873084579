"""LLVM IR of the SPMD runtime that goes into every native partition: step loop, chunk claiming, phases, workers.

The caller's thread is worker 0 and can do a whole run alone: nobody waits for a worker, only for work. Each worker owns
an equal, contiguous part of a step's chunks (so that neighbouring steps meet the same data in its cache), claims chunks
of it with a compare-and-swap, and when none is left takes from the others' parts. A phase begins once all chunks of
those before it are done, whoever did them. So a worker that the system has put aside holds a run up only by the chunk
that it is in, and one that comes late, even in a later run, finds nothing to claim: every word holds the number of its
run beside its count. Waiters spin with a pause, then sleep on a futex where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from llvmlite import ir

from nestc.codegen.schedule import PARALLEL, Schedule
from nestc.codegen.spmd_wait import (
    CONTEXT_BYTES,
    CONTEXT_THREADS,
    CONTEXT_TRACE,
    DONE,
    GENERATION,
    I8,
    I32,
    I64,
    IDLE,
    IDLE_SPINS,
    LOW,
    PTR,
    STOP,
    TABLE,
    VOID,
    Waiting,
    at,
    counted,
    i32,
    i64,
)

# function, trampoline, extent, grain, chunks, lane, next step of the lane in this phase (0: none), number of the first
# argument; a serial step that follows another one of its lane and phase has no chunks, since it goes with that one.
_TRAMPOLINE_TYPE = ir.FunctionType(VOID, [PTR] * 4 + [I64] * 2).as_pointer()
_STEP = ir.LiteralStructType([PTR, _TRAMPOLINE_TYPE, I64, I64, I64, I64, I64, I64])
_FN, _TRAMPOLINE, _EXTENT, _GRAIN, _CHUNKS, _LANE, _NEXT, _FIRST = range(8)
# first step, end, chunks of the run up to its end
_PHASE = ir.LiteralStructType([I64, I64, I64])
_ARGUMENT = ir.LiteralStructType([I64, I64])  # slot of the pointer table, byte offset


def emit(schedule: Schedule, triple: str, prefix: str = "nestc") -> str:
    """LLVM IR text of the program that runs `schedule` on `triple`."""
    return str(_Emitter(schedule, triple, prefix).module)


class _Emitter(Waiting):
    """Builds one module; a method a function, callees first."""

    def __init__(self, schedule: Schedule, triple: str, prefix: str) -> None:
        super().__init__(triple, prefix)
        self.schedule = schedule
        self.kernels: dict[str, ir.Function] = {}
        self.trampolines: dict[int, ir.Function] = {}
        self.steps, self.arguments = self._tables()
        self.phases, self.phase_count, self.chunks = self._phase_table()
        self.now = self._now()
        self.claim = self._claim()
        self.share = self._share()
        self.serial = self._serial()
        self._main()
        together = self._together()
        self._run(together)
        self._worker(together)
        self._stop()
        self._profile()

    # Tables

    def _tables(self) -> tuple[ir.GlobalVariable, ir.GlobalVariable]:
        rows: list[ir.Constant] = []
        arguments: list[str] = []
        argument = str(_ARGUMENT)
        followers, heads = _lanes(self.schedule)
        for number, item in enumerate(self.schedule.steps):
            count = len(item.places)
            chunks = item.chunks if item.lane == PARALLEL else int(number in heads)
            follower = followers.get(number, 0)
            numbers = (item.step.extent, item.grain, chunks, item.lane, follower, len(arguments))
            kernel = self._kernel(item.step.symbol, count)
            rows.append(ir.Constant(_STEP, [kernel, self._trampoline(count), *map(i64, numbers)]))
            # As text: there may be thousands of them, which llvmlite takes long to print.
            arguments += [f"{argument} {{i64 {place.slot}, i64 {place.offset}}}" for place in item.places]
        type_ = ir.ArrayType(_ARGUMENT, len(arguments))
        places = ir.FormattedConstant(type_, f"[{', '.join(arguments)}]")
        return self._constant("steps", _STEP, rows), self._table("arguments", type_, places)

    def _phase_table(self) -> tuple[ir.GlobalVariable, int, int]:
        """The phases, their number, and the chunks of a run."""
        _, heads = _lanes(self.schedule)
        items = self.schedule.steps
        begins = [number for number, item in enumerate(items) if number == 0 or item.barrier]
        rows: list[ir.Constant] = []
        total = 0
        for begin, end in zip(begins, [*begins[1:], len(items)]):
            total += sum(items[i].chunks if items[i].lane == PARALLEL else int(i in heads) for i in range(begin, end))
            rows.append(ir.Constant(_PHASE, [i64(begin), i64(end), i64(total)]))
        return self._constant("phases", _PHASE, rows), len(rows), total

    def _constant(self, name: str, element: ir.Type, rows: Sequence[ir.Constant]) -> ir.GlobalVariable:
        type_ = ir.ArrayType(element, len(rows))
        return self._table(name, type_, ir.Constant(type_, rows))

    def _table(self, name: str, type_: ir.Type, content: ir.Constant) -> ir.GlobalVariable:
        variable = ir.GlobalVariable(self.module, type_, f"{self.prefix}_{name}")
        variable.linkage = "internal"
        variable.global_constant = True
        cast(Any, variable).initializer = content  # llvmlite declares it as None
        return variable

    def _kernel(self, symbol: str, count: int) -> ir.Function:
        if symbol not in self.kernels:
            type_ = ir.FunctionType(VOID, [PTR] * (count + 1) + [I64, I64])
            self.kernels[symbol] = ir.Function(self.module, type_, symbol)
        known = len(self.kernels[symbol].args) - 3
        if known != count:
            raise ValueError(f"kernel {symbol} is called with {count} and with {known} arguments")
        return self.kernels[symbol]

    def _trampoline(self, count: int) -> ir.Function:
        """``(fn, arguments, table, scratch, begin, end)``: fetch `count` pointers and call the kernel."""
        if count in self.trampolines:
            return self.trampolines[count]
        # llvmlite takes the type of an indirect call from the pointer's type, although LLVM prints it as `ptr`.
        kernel_type = ir.FunctionType(VOID, [PTR] * (count + 1) + [I64, I64]).as_pointer()
        function, b = self.function(f"call{count}", VOID, [kernel_type, PTR, PTR, PTR, I64, I64])
        kernel, arguments, table, scratch, begin, end = function.args
        pointers: list[ir.Value] = []
        for number in range(count):
            slot = b.load(b.gep(arguments, [i32(number), i32(0)], source_etype=_ARGUMENT), typ=I64)
            offset = b.load(b.gep(arguments, [i32(number), i32(1)], source_etype=_ARGUMENT), typ=I64)
            base = b.load(b.gep(table, [slot], source_etype=PTR), typ=PTR)
            pointers.append(b.gep(base, [offset], source_etype=I8))
        b.call(kernel, [*pointers, scratch, begin, end])
        b.ret_void()
        self.trampolines[count] = function
        return function

    def _now(self) -> ir.Function:
        """``() -> i64``: CLOCK_MONOTONIC in nanoseconds (0 on Windows, which has no such clock)."""
        function, b = self.function("now", I64, [])
        if self.windows:
            b.ret(i64(0))
            return function
        timespec = ir.LiteralStructType([I64, I64])
        clock = ir.Function(self.module, ir.FunctionType(I32, [I32, PTR]), "clock_gettime")
        time = b.alloca(timespec)
        b.call(clock, [i32(1 if self.linux else 6), time])
        seconds = b.load(b.gep(time, [i32(0), i32(0)], source_etype=timespec), typ=I64)
        rest = b.load(b.gep(time, [i32(0), i32(1)], source_etype=timespec), typ=I64)
        b.ret(b.add(b.mul(seconds, i64(10**9)), rest))
        return function

    # Running

    def _claim(self) -> ir.Function:
        """``(word, run, size) -> i64``: the next of `size` chunks of a part; -1 if there is none for this run."""
        function, b = self.function("claim", I64, [PTR, I64, I64])
        word, run, size = function.args
        look, take, done, none = (function.append_basic_block(name) for name in ("look", "take", "done", "none"))
        b.branch(look)
        # Look before claiming, so that an exhausted part costs others no cache miss.
        b.position_at_end(look)
        taken = b.load_atomic(word, "monotonic", 8, typ=I64)
        count = b.and_(taken, i64(LOW))
        same = b.icmp_unsigned("==", b.lshr(taken, i64(32)), run)
        b.cbranch(b.and_(same, b.icmp_unsigned("<", count, size)), take, none)
        b.position_at_end(take)
        result = b.cmpxchg(word, taken, b.add(taken, i64(1)), "monotonic", "monotonic")
        b.cbranch(b.extract_value(result, 1), done, look)
        b.position_at_end(done)
        b.ret(count)
        b.position_at_end(none)
        b.ret(i64(-1))
        return function

    def _share(self) -> ir.Function:
        """``(step, number, table, scratch, ctx, tid, nthreads, run, times) -> i64``: run chunks of a step until none is
        left, and say how many; `times` takes begin and end if there were some and it is not null."""
        function, b = self.function("share", I64, [PTR, I64, PTR, PTR, PTR, I64, I64, I64, PTR])
        step, number, table, scratch, ctx, tid, threads, run, times = function.args
        kernel, trampoline, extent, grain, chunks, _, _, first = self._fields(b, step)
        arguments = b.gep(self.arguments, [first], source_etype=_ARGUMENT)
        done = b.alloca(I64)
        b.store(i64(0), done)
        with counted(b, threads) as turn:
            other = b.add(tid, turn)
            wrapped = b.icmp_unsigned(">=", other, threads)
            owner = b.select(wrapped, b.sub(other, threads), other)
            low = b.udiv(b.mul(chunks, owner), threads)
            high = b.udiv(b.mul(chunks, b.add(owner, i64(1))), threads)
            size = b.sub(high, low)
            word = self._word(b, ctx, owner, number)
            look, work, rest = (function.append_basic_block(name) for name in ("look", "work", "rest"))
            b.branch(look)
            b.position_at_end(look)
            mine = b.call(self.claim, [word, run, size])
            b.cbranch(b.icmp_signed(">=", mine, i64(0)), work, rest)
            b.position_at_end(work)
            before = b.load(done, typ=I64)
            with b.if_then(b.icmp_unsigned("==", before, i64(0))):
                self._stamp(b, times, 0)
            begin = cast(ir.Value, b.mul(b.add(low, mine), grain))
            limit = b.add(begin, grain)
            end = cast(ir.Value, b.select(b.icmp_unsigned("<", limit, extent), limit, extent))
            self._call(b, trampoline, kernel, arguments, table, scratch, begin, end)
            b.store(b.add(before, i64(1)), done)
            b.branch(look)
            b.position_at_end(rest)
        count = b.load(done, typ=I64)
        with b.if_then(b.icmp_unsigned(">", count, i64(0))):
            self._stamp(b, times, 1)
        b.ret(count)
        return function

    def _serial(self) -> ir.Function:
        """``(number, owner, table, scratch, ctx, run, times) -> i64``: run a serial step and those that follow it on
        its lane, unless somebody has; says how many chunks that is (0 or 1). `times` is of step 0."""
        function, b = self.function("serial", I64, [I64, I64, PTR, PTR, PTR, I64, PTR])
        number, owner, table, scratch, ctx, run, times = function.args
        loop, leave = (function.append_basic_block(name) for name in ("loop", "leave"))
        mine = b.call(self.claim, [self._word(b, ctx, owner, number), run, i64(1)])
        begin = function.append_basic_block("begin")
        b.cbranch(b.icmp_signed(">=", mine, i64(0)), begin, leave)
        b.position_at_end(leave)
        b.ret(i64(0))
        b.position_at_end(begin)
        b.branch(loop)
        b.position_at_end(loop)
        current = b.phi(I64)
        current.add_incoming(number, begin)
        step = self._step(b, current)
        here = self._times(b, times, current)
        self._stamp(b, here, 0)
        self._whole(b, step, table, scratch)
        self._stamp(b, here, 1)
        follower = self._fields(b, step)[_NEXT]
        done = function.append_basic_block("done")
        current.add_incoming(follower, b.block)
        b.cbranch(b.icmp_unsigned("!=", follower, i64(0)), loop, done)
        b.position_at_end(done)
        b.ret(i64(1))
        return function

    def _word(self, b: ir.IRBuilder, ctx: ir.Value, owner: ir.Value, number: ir.Value) -> ir.Value:
        """Where a worker's part of a step is claimed."""
        bank = b.gep(at(b, ctx, CONTEXT_BYTES), [b.mul(owner, i64(self.schedule.thread_bytes))], source_etype=I8)
        return b.gep(bank, [number], source_etype=I64)

    def _times(self, b: ir.IRBuilder, times: ir.Value, number: ir.Value) -> ir.Value:
        """Where a worker writes begin and end of a step; null stays null."""
        null = ir.Constant(PTR, None)
        return b.select(
            b.icmp_unsigned("==", times, null), null, b.gep(times, [b.mul(number, i64(2))], source_etype=I64)
        )

    def _stamp(self, b: ir.IRBuilder, times: ir.Value, which: int) -> None:
        """Write the time to begin (0) or end (1), if anybody wants it."""
        with b.if_then(b.icmp_unsigned("!=", times, ir.Constant(PTR, None)), likely=False):
            b.store(b.call(self.now, []), b.gep(times, [i64(which)], source_etype=I64))

    def _main(self) -> None:
        function, b = self.function("main", VOID, [PTR, PTR, I64, I64], external=True)
        table = function.args[0]
        scratch = self._scratch(b, table, i64(0))
        with counted(b, i64(len(self.schedule.steps))) as number:
            self._whole(b, self._step(b, number), table, scratch)
        b.ret_void()

    def _together(self) -> ir.Function:
        """``(table, ctx, tid, nthreads, run)``: take part in a run; worker 0 returns when all of it is done."""
        function, b = self.function("together", VOID, [PTR, PTR, I64, I64, I64])
        table, ctx, tid, threads, run = function.args
        scratch = self._scratch(b, table, tid)
        trace = b.load(at(b, ctx, CONTEXT_TRACE), typ=PTR)
        # What is done counts only while its run goes on, so a worker that comes too late writes no times either.
        times = self._times(b, trace, cast(ir.Value, b.mul(tid, i64(len(self.schedule.steps)))))
        first = b.icmp_unsigned("==", tid, i64(0))
        need = b.alloca(I64)
        b.store(i64(0), need)
        with counted(b, i64(self.phase_count)) as phase:
            row = b.gep(self.phases, [phase], source_etype=_PHASE)
            begin, end, after = (
                b.load(b.gep(row, [i32(0), i32(field)], source_etype=_PHASE), typ=I64) for field in range(3)
            )
            with b.if_then(b.not_(b.call(self.ready, [ctx, run, b.load(need, typ=I64)])), likely=False):
                b.ret_void()
            with counted(b, cast(ir.Value, b.sub(end, begin))) as index:
                number = cast(ir.Value, b.add(begin, index))
                step = self._step(b, number)
                fields = self._fields(b, step)
                with b.if_else(b.icmp_signed("==", fields[_LANE], i64(PARALLEL))) as (shared, serial):
                    with shared:
                        here = self._times(b, times, number)
                        count = b.call(self.share, [step, number, table, scratch, ctx, tid, threads, run, here])
                        self._count(b, ctx, count, after)
                    with serial:
                        owner = b.urem(fields[_LANE], threads)
                        own = b.and_(b.icmp_unsigned("==", owner, tid), b.icmp_unsigned("!=", fields[_CHUNKS], i64(0)))
                        with b.if_then(own):
                            count = b.call(self.serial, [number, owner, table, scratch, ctx, run, times])
                            self._count(b, ctx, count, after)
            # Lanes of workers that have not come: the caller's thread does what it would otherwise wait for.
            with b.if_then(first), counted(b, cast(ir.Value, b.sub(end, begin))) as index:
                number = cast(ir.Value, b.add(begin, index))
                fields = self._fields(b, self._step(b, number))
                head = b.icmp_unsigned("!=", fields[_CHUNKS], i64(0))
                with b.if_then(b.and_(head, b.icmp_signed("!=", fields[_LANE], i64(PARALLEL)))):
                    owner = b.urem(fields[_LANE], threads)
                    count = b.call(self.serial, [number, owner, table, scratch, ctx, run, times])
                    self._count(b, ctx, count, after)
            b.store(after, need)
        with b.if_then(first):
            b.call(self.ready, [ctx, run, i64(self.chunks)])
        b.ret_void()
        return function

    def _count(self, b: ir.IRBuilder, ctx: ir.Value, count: ir.Value, after: ir.Value) -> None:
        with b.if_then(b.icmp_unsigned(">", count, i64(0))):
            b.call(self.finish, [ctx, count, after])

    def _run(self, together: ir.Function) -> None:
        function, b = self.function("run", VOID, [PTR, PTR], external=True)
        ctx, table = function.args
        threads = b.load(at(b, ctx, CONTEXT_THREADS), typ=I64)
        before = b.load_atomic(at(b, ctx, GENERATION), "monotonic", 4, typ=I32)
        run = b.zext(b.add(before, i32(1)), I64)
        none = b.shl(run, i64(32))
        # Aligned words are written at once; whoever still looks for the run before finds its number gone.
        with counted(b, threads) as owner, counted(b, i64(len(self.schedule.steps))) as number:
            b.store(none, self._word(b, ctx, owner, number))
        b.store(none, at(b, ctx, DONE))
        b.store(table, at(b, ctx, TABLE))
        b.call(self.signal, [at(b, ctx, GENERATION), at(b, ctx, IDLE)])
        b.call(together, [table, ctx, i64(0), threads, run])
        b.ret_void()

    def _worker(self, together: ir.Function) -> None:
        function, b = self.function("worker", VOID, [PTR, I64], external=True)
        ctx, tid = function.args
        generation = at(b, ctx, GENERATION)
        entry, loop, work, leave = b.block, *(function.append_basic_block(name) for name in ("loop", "work", "leave"))
        b.branch(loop)
        b.position_at_end(loop)
        seen = b.phi(I32)
        seen.add_incoming(i32(0), entry)  # a run may have started before this thread did
        spins = b.load(at(b, ctx, IDLE_SPINS), typ=I64)
        b.call(self.wait, [generation, at(b, ctx, IDLE), seen, spins])
        now = b.load_atomic(generation, "acquire", 4, typ=I32)
        seen.add_incoming(now, work)
        stop = b.load(at(b, ctx, STOP), typ=I32)
        b.cbranch(b.icmp_signed("==", stop, i32(0)), work, leave)
        b.position_at_end(work)
        threads = b.load(at(b, ctx, CONTEXT_THREADS), typ=I64)
        b.call(together, [b.load(at(b, ctx, TABLE), typ=PTR), ctx, tid, threads, b.zext(now, I64)])
        b.branch(loop)
        b.position_at_end(leave)
        b.ret_void()

    def _stop(self) -> None:
        function, b = self.function("stop", VOID, [PTR], external=True)
        (ctx,) = function.args
        b.store(i32(1), at(b, ctx, STOP))
        b.call(self.signal, [at(b, ctx, GENERATION), at(b, ctx, IDLE)])
        b.ret_void()

    def _profile(self) -> None:
        function, b = self.function("profile", VOID, [PTR, PTR], external=True)
        table, out = function.args
        scratch = self._scratch(b, table, i64(0))
        with counted(b, i64(len(self.schedule.steps))) as number:
            begin = b.call(self.now, [])
            self._whole(b, self._step(b, number), table, scratch)
            b.store(b.sub(b.call(self.now, []), begin), b.gep(out, [number], source_etype=I64))
        b.ret_void()

    # Pieces

    def _step(self, b: ir.IRBuilder, number: ir.Value) -> ir.Value:
        return b.gep(self.steps, [number], source_etype=_STEP)

    def _fields(self, b: ir.IRBuilder, step: ir.Value) -> list[ir.Value]:
        return [
            b.load(b.gep(step, [i32(0), i32(field)], source_etype=_STEP), typ=type_)
            for field, type_ in enumerate(_STEP.elements)
        ]

    def _scratch(self, b: ir.IRBuilder, table: ir.Value, tid: ir.Value) -> ir.Value:
        base = b.load(b.gep(table, [i64(self.schedule.scratch_slot)], source_etype=PTR), typ=PTR)
        return b.gep(base, [b.mul(tid, i64(self.schedule.scratch_bytes))], source_etype=I8)

    def _whole(self, b: ir.IRBuilder, step: ir.Value, table: ir.Value, scratch: ir.Value) -> None:
        fields = self._fields(b, step)
        arguments = b.gep(self.arguments, [fields[_FIRST]], source_etype=_ARGUMENT)
        self._call(b, fields[_TRAMPOLINE], fields[_FN], arguments, table, scratch, i64(0), fields[_EXTENT])

    def _call(self, b: ir.IRBuilder, trampoline: ir.Value, *arguments: ir.Value) -> None:
        b.call(trampoline, arguments)


def _lanes(schedule: Schedule) -> tuple[dict[int, int], set[int]]:
    """Of each serial step the next one of its lane in the phase, if there is one; and the first steps of the lanes."""
    followers: dict[int, int] = {}
    heads: set[int] = set()
    last: dict[int, int] = {}
    for number, item in enumerate(schedule.steps):
        if item.barrier:
            last.clear()
        if item.lane == PARALLEL:
            continue
        if item.lane in last:
            followers[last[item.lane]] = number
        else:
            heads.add(number)
        last[item.lane] = number
    return followers, heads
