from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.errors import TargetError
from nestc.runtime.aim.constraints import NEWTON_RULES, evaluate
from nestc.runtime.aim.energy import joules_newton
from nestc.runtime.aim.machine import TIMINGS, preset
from nestc.runtime.aim.newton import (
    KINDS,
    NewtonRequest,
    format_newton,
    matrix_vector,
    parse_newton,
    simulate_newton,
)

MACHINE = preset("newton_pimflow")


# Cycles of PIMFlow's Ramulator. The larger ones have 7, 10 and 167 refreshes of 361 cycles; the last one also waits six
# cycles before seven of its GWRITEs, where the one of 1024x1024 hides behind a refresh.
@pytest.mark.parametrize(
    ("rows", "k", "expected", "refreshes"),
    [
        (16, 512, 140, 0),
        (32, 512, 266, 0),
        (160, 512, 1274, 0),
        (1600, 512, 15141, 7),
        (1024, 1024, 19752, 10),
        (4096, 4096, 318391, 167),
    ],
)
def test_matrix_vector_products_take_the_published_cycles(rows, k, expected, refreshes):
    report = simulate_newton(matrix_vector(rows, k, MACHINE), MACHINE)
    assert (report.ticks, report.issued["REF"]) == (expected, refreshes)
    assert report.issued["COMP"] == rows * k // 256


def test_a_step_of_16_rows_takes_126_cycles():
    t = MACHINE.timing
    steps = [simulate_newton(matrix_vector(16 * n, 512, MACHINE), MACHINE).ticks for n in (1, 2, 3)]
    assert steps[2] - steps[1] == steps[1] - steps[0] == 3 * t["nFAW"] + t["nRCDR"] + 32 * t["nCCDS"] == 126


def test_energy_by_part():
    found = joules_newton(simulate_newton(matrix_vector(32, 512, MACHINE), MACHINE))
    e = MACHINE.energies
    assert found["activate"] == pytest.approx(2 * 16 * e.activate_bank * 1e-12)
    assert found["mac"] == pytest.approx(64 * e.mac_all_banks * 1e-12)
    assert found["total"] == pytest.approx(sum(value for name, value in found.items() if name != "total"))


def test_without_refresh_only_steps_and_writes_count():
    report = simulate_newton(matrix_vector(4096, 4096, MACHINE), MACHINE, refresh=False)
    assert report.ticks == 140 + 2047 * 126 + 7 * 6
    assert report.seconds == pytest.approx(report.ticks * 8 / 7 * 1e-9)


def test_ragged_rows_and_columns_take_fewer_requests():
    requests = matrix_vector(20, 600, MACHINE)
    kinds = [request.kind for request in requests]
    assert kinds.count("G_ACT3") == 2 and kinds.count("G_ACT0") == 4
    assert kinds.count("COMP") == 2 * 32 + 2 * 6


def test_trace_text_is_that_of_pimflow():
    text = format_newton([NewtonRequest("GWRITE", 1), NewtonRequest("G_ACT2", 3), NewtonRequest("COMP", 3, 5)])
    assert text == "0x00000800 GWRITE \n0x10001800 G_ACT2\n0x00001940 COMP\n"


@given(st.lists(st.sampled_from([*matrix_vector(40, 700, MACHINE)])))
def test_trace_text_reads_back(requests):
    assert parse_newton(format_newton(requests)) == requests


@pytest.mark.parametrize(
    ("text", "message"),
    [("0x00 GWRITE\nwhat", "line 2"), ("0xzz COMP", "line 1.*not an address"), ("12 COMP", "line 1")],
)
def test_wrong_traces_are_refused(text, message):
    with pytest.raises(TargetError, match=message):
        parse_newton(text)


def test_wrong_streams_are_refused():
    with pytest.raises(TargetError, match="must end with READRES"):
        simulate_newton([NewtonRequest("COMP")], MACHINE)
    with pytest.raises(TargetError, match="has no 'MAC'"):
        simulate_newton([NewtonRequest("MAC"), NewtonRequest("READRES")], MACHINE)
    with pytest.raises(TargetError, match="does not take Newton"):
        simulate_newton([NewtonRequest("READRES")], preset("gddr6_aim"))


def every_cycle(requests, machine):
    """PIMFlow's controller, looked at in every cycle: a queue of 32 that gets one request a cycle."""
    timing = machine.timing
    waits = [
        (before, after, evaluate(rule.ticks, timing))
        for rule in NEWTON_RULES
        for before in rule.before.split()
        for after in rule.after.split()
    ]
    last, queue, others, pending = {}, [], 0, []
    now, sent, refreshing, is_open = 0, 0, False, False
    while sent < len(requests) or queue or others or pending:
        if sent < len(requests) and len(queue) < machine.queue:
            queue.append(requests[sent].kind)
            sent += 1
        now += 1
        if pending and pending[0] <= now:
            pending.pop(0)
        others += now % timing["nREFI"] == 0
        if refreshing and not others:
            refreshing = False
        if not queue and others:
            refreshing = True
        if refreshing:
            command = "PREA" if is_open else "REF"
        elif queue:
            command = queue[0]
        else:
            continue
        if any(after == command and before in last and now < last[before] + ticks for before, after, ticks in waits):
            continue
        last[command] = now
        if command == "PREA":
            is_open = False
        elif command == "REF":
            others -= 1
        else:
            queue.pop(0)
            is_open = is_open or command.startswith("G_ACT")
            if command == "READRES":
                refreshing = True
                pending.append(now + timing["nCL"] + timing["nBL"])
    return now


STEPS = st.lists(st.sampled_from(KINDS), max_size=60)


@given(STEPS, st.data())
@settings(deadline=None, max_examples=60)
def test_streams_agree_with_a_model_of_every_cycle(kinds, data):
    names = data.draw(st.lists(st.sampled_from(TIMINGS["newton"]), max_size=5, unique=True))
    timing = dict(MACHINE.timing) | {"nREFI": 150, "nRFC": 40}
    timing |= {name: data.draw(st.integers(1, 40)) for name in names if name not in ("nREFI", "nRFC")}
    machine = replace(MACHINE, timings=tuple(timing.items()))
    requests = [NewtonRequest(kind) for kind in kinds] + [NewtonRequest("READRES")]
    assert simulate_newton(requests, machine).ticks == every_cycle(requests, machine)
