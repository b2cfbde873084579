"""LLVM IR of the SPMD runtime that goes into every native partition: step loop, chunk claiming, barrier, workers.

Claiming: each worker owns an equal, contiguous part of a step's chunks (so that neighbouring steps meet the same data
in its cache) and takes chunks from it with an atomic counter; when it has none left it takes from the others' parts.
Barrier: central, generation-counting (J. Mellor-Crummey and M. Scott, "Algorithms for Scalable Synchronization on
Shared-Memory Multiprocessors", 1991, sec. 3.1); waiters spin with a pause, then sleep on a futex where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from llvmlite import ir

from nestc.codegen.schedule import PARALLEL, Schedule

# The shared context, in bytes. Words that different workers write lie on different cache lines (64 bytes).
_GENERATION, _IDLE = 0, 4  # number of runs started (workers wait for it to change); workers asleep
_ARRIVED = 64  # workers that have reached the current barrier
_PHASE, _ASLEEP = 128, 132  # number of barriers passed; workers asleep in one
CONTEXT_THREADS, _TABLE, _STOP, CONTEXT_TRACE, CONTEXT_SPINS, _IDLE_SPINS = 192, 200, 208, 216, 224, 232
CONTEXT_BYTES = 256

_FUTEX = {"x86_64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98}  # system call numbers on Linux
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE with FUTEX_PRIVATE_FLAG (linux/futex.h)

_I32, _I64, _PTR, _VOID = ir.IntType(32), ir.IntType(64), ir.PointerType(), ir.VoidType()
_I8 = ir.IntType(8)
# function, trampoline, extent, grain, chunks, lane, barrier, number of the first argument
_TRAMPOLINE_TYPE = ir.FunctionType(_VOID, [_PTR] * 4 + [_I64] * 2).as_pointer()
_STEP = ir.LiteralStructType([_PTR, _TRAMPOLINE_TYPE, _I64, _I64, _I64, _I64, _I64, _I64])
_FN, _TRAMPOLINE, _EXTENT, _GRAIN, _CHUNKS, _LANE, _BARRIER, _FIRST = range(8)
_ARGUMENT = ir.LiteralStructType([_I64, _I64])  # slot of the pointer table, byte offset


def emit(schedule: Schedule, triple: str, prefix: str = "nestc") -> str:
    """LLVM IR text of the program that runs `schedule` on `triple`."""
    return str(_Emitter(schedule, triple, prefix).module)


_EmitWait: TypeAlias = Callable[[ir.IRBuilder, ir.Value, ir.Value], None]
_EmitWake: TypeAlias = Callable[[ir.IRBuilder, ir.Value], None]


class _Emitter:
    """Builds one module; a method a function, callees first."""

    def __init__(self, schedule: Schedule, triple: str, prefix: str) -> None:
        self.schedule = schedule
        self.prefix = prefix
        self.arch, _, system = triple.partition("-")
        self.linux = "linux" in system
        self.windows = "windows" in system
        self.module = ir.Module(name=prefix)
        self.module.triple = triple
        self.kernels: dict[str, ir.Function] = {}
        self.trampolines: dict[int, ir.Function] = {}
        self.steps, self.arguments = self._tables()
        self.pause = self._pause()
        self.sleep = self._sleep()
        self.wait = self._wait()
        self.signal = self._signal()
        self.barrier = self._barrier()
        self.now = self._now()
        self.share = self._share()
        main = self._main()
        self._run(main)
        self._worker(main)
        self._stop()
        self._profile()

    # Tables

    def _tables(self) -> tuple[ir.GlobalVariable, ir.GlobalVariable]:
        rows: list[ir.Constant] = []
        arguments: list[ir.Constant] = []
        for item in self.schedule.steps:
            count = len(item.places)
            numbers = (item.step.extent, item.grain, item.chunks, item.lane, int(item.barrier), len(arguments))
            kernel = self._kernel(item.step.symbol, count)
            rows.append(ir.Constant(_STEP, [kernel, self._trampoline(count), *map(_i64, numbers)]))
            arguments.extend(ir.Constant(_ARGUMENT, [_i64(place.slot), _i64(place.offset)]) for place in item.places)
        return self._constant("steps", _STEP, rows), self._constant("arguments", _ARGUMENT, arguments)

    def _constant(self, name: str, element: ir.Type, rows: Sequence[ir.Constant]) -> ir.GlobalVariable:
        type_ = ir.ArrayType(element, len(rows))
        variable = ir.GlobalVariable(self.module, type_, f"{self.prefix}_{name}")
        variable.linkage = "internal"
        variable.global_constant = True
        cast(Any, variable).initializer = ir.Constant(type_, rows)  # llvmlite declares it as None
        return variable

    def _kernel(self, symbol: str, count: int) -> ir.Function:
        if symbol not in self.kernels:
            type_ = ir.FunctionType(_VOID, [_PTR] * (count + 1) + [_I64, _I64])
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
        kernel_type = ir.FunctionType(_VOID, [_PTR] * (count + 1) + [_I64, _I64]).as_pointer()
        function, b = self._function(f"call{count}", _VOID, [kernel_type, _PTR, _PTR, _PTR, _I64, _I64])
        kernel, arguments, table, scratch, begin, end = function.args
        pointers: list[ir.Value] = []
        for number in range(count):
            slot = b.load(b.gep(arguments, [_i32(number), _i32(0)], source_etype=_ARGUMENT), typ=_I64)
            offset = b.load(b.gep(arguments, [_i32(number), _i32(1)], source_etype=_ARGUMENT), typ=_I64)
            base = b.load(b.gep(table, [slot], source_etype=_PTR), typ=_PTR)
            pointers.append(b.gep(base, [offset], source_etype=_I8))
        b.call(kernel, [*pointers, scratch, begin, end])
        b.ret_void()
        self.trampolines[count] = function
        return function

    # Waiting

    def _pause(self) -> Callable[[ir.IRBuilder], None]:
        """What a spinning worker does between two looks."""
        if self.arch == "x86_64":
            return self._hint("llvm.x86.sse2.pause")
        if self.arch in ("aarch64", "arm64"):
            return self._hint("llvm.aarch64.isb", 15)  # waits some 10 ns, where `yield` does nothing on most cores
        return lambda b: None

    def _hint(self, name: str, *operands: int) -> Callable[[ir.IRBuilder], None]:
        intrinsic = ir.Function(self.module, ir.FunctionType(_VOID, [_I32] * len(operands)), name)

        def call(b: ir.IRBuilder) -> None:
            b.call(intrinsic, [_i32(operand) for operand in operands])

        return call

    def _sleep(self) -> tuple[_EmitWait, _EmitWake]:
        """How a worker sleeps while a word has a value, and how the others wake it."""
        if self.linux and self.arch in _FUTEX:
            syscall = ir.Function(self.module, ir.FunctionType(_I64, [_I64], var_arg=True), "syscall")
            number = _i64(_FUTEX[self.arch])

            def futex_wait(b: ir.IRBuilder, word: ir.Value, old: ir.Value) -> None:
                b.call(syscall, [number, word, _i64(_WAIT_PRIVATE), b.zext(old, _I64), ir.Constant(_PTR, None)])

            def futex_wake(b: ir.IRBuilder, word: ir.Value) -> None:
                b.call(syscall, [number, word, _i64(_WAKE_PRIVATE), _i64(0x7FFFFFFF)])

            return futex_wait, futex_wake
        # Elsewhere a sleeper looks again every 50 us (1 ms on Windows), and nobody needs to wake it.
        name, amount = ("Sleep", 1) if self.windows else ("usleep", 50)
        function = ir.Function(self.module, ir.FunctionType(_I32, [_I32]), name)

        def doze(b: ir.IRBuilder, word: ir.Value, old: ir.Value) -> None:
            b.call(function, [_i32(amount)])

        return doze, lambda b, word: None

    def _wait(self) -> ir.Function:
        """``(word, sleepers, old, spins)``: return once `word` is not `old`; acquires what was written before."""
        function, b = self._function("wait", _VOID, [_PTR, _PTR, _I32, _I64])
        word, sleepers, old, spins = function.args
        spin, again, sleep, check, doze, done = (
            function.append_basic_block(name) for name in ("spin", "again", "sleep", "check", "doze", "done")
        )
        entry = b.block
        b.branch(spin)
        b.position_at_end(spin)
        left = b.phi(_I64)
        left.add_incoming(spins, entry)
        same = b.icmp_signed("==", b.load_atomic(word, "acquire", 4, typ=_I32), old)
        b.cbranch(same, again, done)
        b.position_at_end(again)
        self.pause(b)
        left.add_incoming(b.sub(left, _i64(1)), again)
        b.cbranch(b.icmp_signed(">", left, _i64(0)), spin, sleep)
        # Say that we sleep, then look once more: the waker changes the word, then looks for sleepers. Both are
        # sequentially consistent, so one of the two sees the other, and the futex itself compares the word again.
        b.position_at_end(sleep)
        b.atomic_rmw("add", sleepers, _i32(1), "seq_cst")
        b.branch(check)
        b.position_at_end(check)
        still = b.icmp_signed("==", b.load_atomic(word, "seq_cst", 4, typ=_I32), old)
        awake = function.append_basic_block("awake")
        b.cbranch(still, doze, awake)
        b.position_at_end(doze)
        self.sleep[0](b, word, old)
        b.branch(check)
        b.position_at_end(awake)
        b.atomic_rmw("sub", sleepers, _i32(1), "seq_cst")
        b.branch(done)
        b.position_at_end(done)
        b.ret_void()
        return function

    def _signal(self) -> ir.Function:
        """``(word, sleepers)``: change `word` (releasing what was written before) and wake whoever sleeps on it."""
        function, b = self._function("signal", _VOID, [_PTR, _PTR])
        word, sleepers = function.args
        b.atomic_rmw("add", word, _i32(1), "seq_cst")
        asleep = b.icmp_signed("!=", b.load_atomic(sleepers, "seq_cst", 4, typ=_I32), _i32(0))
        with b.if_then(asleep, likely=False):
            self.sleep[1](b, word)
        b.ret_void()
        return function

    def _barrier(self) -> ir.Function:
        """``(ctx, nthreads)``: return when all workers are here."""
        function, b = self._function("barrier", _VOID, [_PTR, _I64])
        ctx, threads = function.args
        arrived, phase, asleep = _at(b, ctx, _ARRIVED), _at(b, ctx, _PHASE), _at(b, ctx, _ASLEEP)
        # Read the phase before arriving: afterwards the last one may already have moved on.
        now = b.load_atomic(phase, "monotonic", 4, typ=_I32)
        before = b.atomic_rmw("add", arrived, _i32(1), "acq_rel")
        last = b.icmp_signed("==", before, b.trunc(b.sub(threads, _i64(1)), _I32))
        with b.if_else(last) as (then, otherwise):
            with then:
                b.store(_i32(0), arrived)  # nobody else touches it until the signal
                b.call(self.signal, [phase, asleep])
            with otherwise:
                b.call(self.wait, [phase, asleep, now, b.load(_at(b, ctx, CONTEXT_SPINS), typ=_I64)])
        b.ret_void()
        return function

    def _now(self) -> ir.Function:
        """``() -> i64``: CLOCK_MONOTONIC in nanoseconds (0 on Windows, which has no such clock)."""
        function, b = self._function("now", _I64, [])
        if self.windows:
            b.ret(_i64(0))
            return function
        timespec = ir.LiteralStructType([_I64, _I64])
        clock = ir.Function(self.module, ir.FunctionType(_I32, [_I32, _PTR]), "clock_gettime")
        time = b.alloca(timespec)
        b.call(clock, [_i32(1 if self.linux else 6), time])
        seconds = b.load(b.gep(time, [_i32(0), _i32(0)], source_etype=timespec), typ=_I64)
        rest = b.load(b.gep(time, [_i32(0), _i32(1)], source_etype=timespec), typ=_I64)
        b.ret(b.add(b.mul(seconds, _i64(10**9)), rest))
        return function

    # Running

    def _share(self) -> ir.Function:
        """``(step, number, table, scratch, counters, tid, nthreads)``: run chunks of a step until none is left."""
        function, b = self._function("share", _VOID, [_PTR, _I64, _PTR, _PTR, _PTR, _I64, _I64])
        step, number, table, scratch, counters, tid, threads = function.args
        kernel, trampoline, extent, grain, chunks, _, _, first = self._fields(b, step)
        arguments = b.gep(self.arguments, [first], source_etype=_ARGUMENT)
        with _loop(b, threads) as turn:
            other = b.add(tid, turn)
            wrapped = b.icmp_unsigned(">=", other, threads)
            owner = b.select(wrapped, b.sub(other, threads), other)
            low = b.udiv(b.mul(chunks, owner), threads)
            high = b.udiv(b.mul(chunks, b.add(owner, _i64(1))), threads)
            size = b.sub(high, low)
            bank = b.gep(counters, [b.mul(owner, _i64(self.schedule.thread_bytes))], source_etype=_I8)
            counter = b.gep(bank, [number], source_etype=_I64)
            look, claim, work, done = (function.append_basic_block(name) for name in ("look", "claim", "work", "done"))
            b.branch(look)
            # Look before claiming, so that an exhausted part costs others no cache miss.
            b.position_at_end(look)
            taken = b.load_atomic(counter, "monotonic", 8, typ=_I64)
            b.cbranch(b.icmp_unsigned("<", taken, size), claim, done)
            b.position_at_end(claim)
            mine = b.atomic_rmw("add", counter, _i64(1), "monotonic")
            b.cbranch(b.icmp_unsigned("<", mine, size), work, done)
            b.position_at_end(work)
            begin = cast(ir.Value, b.mul(b.add(low, mine), grain))
            limit = b.add(begin, grain)
            end = b.select(b.icmp_unsigned("<", limit, extent), limit, extent)
            self._call(b, trampoline, kernel, arguments, table, scratch, begin, end)
            b.branch(look)
            b.position_at_end(done)
        b.ret_void()
        return function

    def _main(self) -> ir.Function:
        function, b = self._function("main", _VOID, [_PTR, _PTR, _I64, _I64], external=True)
        table, ctx, tid, threads = function.args
        scratch = self._scratch(b, table, tid)
        with b.if_then(b.icmp_signed("==", threads, _i64(1))):
            with _loop(b, _i64(len(self.schedule.steps))) as number:
                self._whole(b, self._step(b, number), table, scratch)
            b.ret_void()
        self._together(b, table, ctx, tid, threads, scratch)
        return function

    def _together(
        self, b: ir.IRBuilder, table: ir.Value, ctx: ir.Value, tid: ir.Value, threads: ir.Value, scratch: ir.Value
    ) -> None:
        """All steps as one of several workers, and the meeting at the end."""
        steps = len(self.schedule.steps)
        run = b.zext(b.load_atomic(_at(b, ctx, _GENERATION), "monotonic", 4, typ=_I32), _I64)
        # Two banks of counters a worker, used in turn: each worker clears its own of the next run, unread until then.
        half = self.schedule.thread_bytes // 2
        odd = b.and_(run, _i64(1))
        counters = b.gep(_at(b, ctx, CONTEXT_BYTES), [b.mul(odd, _i64(half))], source_etype=_I8)
        mine = b.gep(_at(b, ctx, CONTEXT_BYTES), [b.mul(tid, _i64(2 * half))], source_etype=_I8)
        next_bank = b.gep(mine, [b.mul(b.xor(odd, _i64(1)), _i64(half))], source_etype=_I8)
        with _loop(b, _i64(steps)) as number:
            b.store(_i64(0), b.gep(next_bank, [number], source_etype=_I64))
        trace = b.load(_at(b, ctx, CONTEXT_TRACE), typ=_PTR)
        traced = b.icmp_unsigned("!=", trace, ir.Constant(_PTR, None))
        first = b.mul(tid, _i64(steps))
        with _loop(b, _i64(steps)) as number:
            step = self._step(b, number)
            fields = self._fields(b, step)
            with b.if_then(b.icmp_signed("!=", fields[_BARRIER], _i64(0))):
                b.call(self.barrier, [ctx, threads])
            row = b.gep(trace, [b.mul(b.add(first, number), _i64(2))], source_etype=_I64)
            with b.if_then(traced, likely=False):
                b.store(b.call(self.now, []), row)
            with b.if_else(b.icmp_signed("==", fields[_LANE], _i64(PARALLEL))) as (shared, serial):
                with shared:
                    b.call(self.share, [step, number, table, scratch, counters, tid, threads])
                with serial:
                    owner = b.urem(fields[_LANE], threads)
                    with b.if_then(b.icmp_signed("==", owner, tid)):
                        self._whole(b, step, table, scratch)
            with b.if_then(traced, likely=False):
                b.store(b.call(self.now, []), b.gep(row, [_i64(1)], source_etype=_I64))
        b.call(self.barrier, [ctx, threads])
        b.ret_void()

    def _run(self, main: ir.Function) -> None:
        function, b = self._function("run", _VOID, [_PTR, _PTR], external=True)
        ctx, table = function.args
        b.store(table, _at(b, ctx, _TABLE))
        threads = b.load(_at(b, ctx, CONTEXT_THREADS), typ=_I64)
        b.call(self.signal, [_at(b, ctx, _GENERATION), _at(b, ctx, _IDLE)])
        b.call(main, [table, ctx, _i64(0), threads])
        b.ret_void()

    def _worker(self, main: ir.Function) -> None:
        function, b = self._function("worker", _VOID, [_PTR, _I64], external=True)
        ctx, tid = function.args
        generation = _at(b, ctx, _GENERATION)
        entry, loop, work, leave = b.block, *(function.append_basic_block(name) for name in ("loop", "work", "leave"))
        b.branch(loop)
        b.position_at_end(loop)
        seen = b.phi(_I32)
        seen.add_incoming(_i32(0), entry)  # a run may have started before this thread did
        spins = b.load(_at(b, ctx, _IDLE_SPINS), typ=_I64)
        b.call(self.wait, [generation, _at(b, ctx, _IDLE), seen, spins])
        now = b.load_atomic(generation, "acquire", 4, typ=_I32)
        seen.add_incoming(now, work)
        stop = b.load(_at(b, ctx, _STOP), typ=_I32)
        b.cbranch(b.icmp_signed("==", stop, _i32(0)), work, leave)
        b.position_at_end(work)
        threads = b.load(_at(b, ctx, CONTEXT_THREADS), typ=_I64)
        b.call(main, [b.load(_at(b, ctx, _TABLE), typ=_PTR), ctx, tid, threads])
        b.branch(loop)
        b.position_at_end(leave)
        b.ret_void()

    def _stop(self) -> None:
        function, b = self._function("stop", _VOID, [_PTR], external=True)
        (ctx,) = function.args
        b.store(_i32(1), _at(b, ctx, _STOP))
        b.call(self.signal, [_at(b, ctx, _GENERATION), _at(b, ctx, _IDLE)])
        b.ret_void()

    def _profile(self) -> None:
        function, b = self._function("profile", _VOID, [_PTR, _PTR], external=True)
        table, out = function.args
        scratch = self._scratch(b, table, _i64(0))
        with _loop(b, _i64(len(self.schedule.steps))) as number:
            begin = b.call(self.now, [])
            self._whole(b, self._step(b, number), table, scratch)
            b.store(b.sub(b.call(self.now, []), begin), b.gep(out, [number], source_etype=_I64))
        b.ret_void()

    # Pieces

    def _function(
        self, name: str, result: ir.Type, arguments: Sequence[ir.Type], *, external: bool = False
    ) -> tuple[ir.Function, ir.IRBuilder]:
        function = ir.Function(self.module, ir.FunctionType(result, arguments), f"{self.prefix}_{name}")
        function.attributes.add("nounwind")
        if not external:
            function.linkage = "internal"
            function.attributes.add("noinline")
        return function, ir.IRBuilder(function.append_basic_block("entry"))

    def _step(self, b: ir.IRBuilder, number: ir.Value) -> ir.Value:
        return b.gep(self.steps, [number], source_etype=_STEP)

    def _fields(self, b: ir.IRBuilder, step: ir.Value) -> list[ir.Value]:
        return [
            b.load(b.gep(step, [_i32(0), _i32(field)], source_etype=_STEP), typ=type_)
            for field, type_ in enumerate(_STEP.elements)
        ]

    def _scratch(self, b: ir.IRBuilder, table: ir.Value, tid: ir.Value) -> ir.Value:
        base = b.load(b.gep(table, [_i64(self.schedule.scratch_slot)], source_etype=_PTR), typ=_PTR)
        return b.gep(base, [b.mul(tid, _i64(self.schedule.scratch_bytes))], source_etype=_I8)

    def _whole(self, b: ir.IRBuilder, step: ir.Value, table: ir.Value, scratch: ir.Value) -> None:
        fields = self._fields(b, step)
        arguments = b.gep(self.arguments, [fields[_FIRST]], source_etype=_ARGUMENT)
        self._call(b, fields[_TRAMPOLINE], fields[_FN], arguments, table, scratch, _i64(0), fields[_EXTENT])

    def _call(self, b: ir.IRBuilder, trampoline: ir.Value, *arguments: ir.Value) -> None:
        b.call(trampoline, arguments)


@contextmanager
def _loop(b: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """Emit ``for (i = 0; i < count; ++i)`` around the code emitted in the body; `count` may be 0."""
    function: Any = b.function
    entry = b.block
    head, body, done = (function.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    number = b.phi(_I64)
    number.add_incoming(_i64(0), entry)
    b.cbranch(b.icmp_unsigned("<", number, count), body, done)
    b.position_at_end(body)
    yield number
    number.add_incoming(b.add(number, _i64(1)), b.block)
    b.branch(head)
    b.position_at_end(done)


def _at(b: ir.IRBuilder, ctx: ir.Value, offset: int) -> ir.Value:
    return b.gep(ctx, [_i64(offset)], source_etype=_I8)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _i32(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)
