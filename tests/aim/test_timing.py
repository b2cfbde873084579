from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tick_by_tick import run

from nestc.errors import TargetError
from nestc.runtime.aim import commands as c
from nestc.runtime.aim.constraints import table
from nestc.runtime.aim.energy import joules
from nestc.runtime.aim.machine import TIMINGS, preset
from nestc.runtime.aim.timing import simulate_timing

MACHINE = preset("gddr6_aim")
ALL = (1 << 32) - 1


def ticks(commands):
    return simulate_timing([*commands, c.Eoc()], MACHINE).ticks


# Ticks of the public simulator (arkhadem/aim_simulator at 0f28a07), without refresh.
@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 6359), (2, 6487), (4, 6743), (8, 7255), (16, 8279), (32, 10327), (64, 14423)],
)
def test_macs_on_new_rows_take_the_public_ticks(size, expected):
    assert ticks([c.MacAbk(size, ALL, row) for row in range(64)]) == expected


def test_macs_on_one_row_take_the_public_ticks():
    assert ticks([c.MacAbk(64, ALL, 0)] * 64) == 8249


@pytest.mark.parametrize(("size", "expected"), [(1, 163), (8, 1059), (64, 8227)])
def test_global_buffer_writes_take_the_public_ticks(size, expected):
    assert ticks([c.WrGb(size, 0, ALL)] * 64) == expected


def plain_gemv(rows, k):
    """Tiles of 1,024 of K outside, passes of 512 rows inside, partial sums as the bias of the next tile."""
    passes = -(-rows // 512)
    stream = [c.WriteCfr(c.CFR_BROADCAST, 0)]
    for tile in range(-(-k // 1024)):
        size = min(64, -(-(k - 1024 * tile) // 16))
        stream.append(c.WrGb(size, 0, ALL))
        for number in range(passes):
            stream += [c.WrBias(0, ALL), c.MacAbk(size, ALL, tile * passes + number), c.RdMac(0, ALL)]
    return stream


@pytest.mark.parametrize(
    ("rows", "k", "expected"),
    [
        (512, 1024, 415),
        (4096, 1024, 2417),
        (1024, 4096, 2801),
        (4096, 4096, 9665),
        (1000, 2048, 1401),
        (4096, 25088, 59825),
    ],
)
def test_matrix_vector_products_take_the_public_ticks(rows, k, expected):
    assert ticks(plain_gemv(rows, k)) == expected


def test_fraction_of_the_internal_bandwidth():
    report = simulate_timing([*plain_gemv(4096, 4096), c.Eoc()], MACHINE)
    assert report.issued["MAC16"] == 32 * 2048
    assert report.bandwidth_fraction == pytest.approx(2048 * 2 / 9665)
    assert report.seconds == 9665 * 0.5e-9


def test_energy_by_part():
    # One row of 64 columns: an activation of 16 banks a channel, and what the figures of the machine say of each.
    report = simulate_timing([c.WrGb(64, 0, ALL), c.MacAbk(64, ALL, 0), c.RdMac(0, ALL), c.Eoc()], MACHINE)
    e = MACHINE.energies
    found = joules(report)
    assert found["activate"] == pytest.approx(32 * 16 * e.activate_bank * 1e-12)
    assert found["mac"] == pytest.approx(32 * 64 * e.mac_all_banks * 1e-12)
    assert found["column"] == pytest.approx(32 * e.read_column * 1e-12)
    assert found["transfer"] == pytest.approx(32 * 65 * e.transfer * 1e-12)
    assert found["control"] == pytest.approx(32 * ((64 + 64 + 1 + 1 + 3) * e.command + 129 * e.request) * 1e-12)
    assert found["buffer"] == pytest.approx(32 * 64 * (e.global_buffer_read + e.global_buffer_write) * 1e-12)
    closed = 32 * report.ticks - report.active
    milliwatts = e.active_mw * report.active + e.precharged_mw * closed + e.global_buffer_mw * 32 * report.ticks
    assert found["background"] == pytest.approx(milliwatts * 1e-3 * 0.5e-9)
    assert found["total"] == pytest.approx(sum(value for name, value in found.items() if name != "total"))


def test_start_and_end_of_requests():
    report = simulate_timing([c.WrGb(64, 0, ALL), c.MacAbk(2, ALL, 0), c.RdMac(0, ALL), c.Eoc()], MACHINE)
    # The queue holds 33: the last of 64 writes enters a tick after the 31st is issued, at 33 + 30 * 2, and the second
    # MAC a tick after the 33rd.
    assert report.start.tolist() == [1, 95, 99, report.ticks - 1]
    assert report.end[0] == 33 + 63 * 2 + 3
    assert report.end[2] == report.start[3] - 1
    assert report.between(0, 1) == 94
    assert report.between(0, 4) == report.ticks


def test_refresh_costs_at_least_its_own_time():
    stream = [*plain_gemv(4096, 4096), c.Eoc()]
    refreshed = simulate_timing(stream, MACHINE, refresh=True)
    per_channel = refreshed.issued["REFab"] // 32
    assert per_channel == refreshed.ticks // 3333
    assert refreshed.ticks >= 9665 + per_channel * 210


def test_other_families_are_refused():
    with pytest.raises(TargetError, match="does not take AiM requests"):
        simulate_timing([c.Eoc()], preset("newton_pimflow"))


def test_gap_of_a_burst_is_the_longest_rule_to_itself():
    rules = table(MACHINE)
    gaps = {name: rules.gap(place) for place, name in enumerate(rules.commands)}
    assert gaps["MAC16"] == gaps["WRGB"] == gaps["EWMUL16"] == 2
    assert gaps["AF16"] == 1
    assert gaps["PREA"] == 32


CHANNELS = 3
masks = st.integers(1, (1 << CHANNELS) - 1)
sizes = st.one_of(st.integers(1, 4), st.integers(1, 48))
banks = st.sampled_from([0, 1, 4, 15])
rows = st.integers(0, 2)
PIM = st.one_of(
    st.builds(c.WrGb, sizes, st.just(0), masks),
    st.builds(c.WrBias, st.just(0), masks),
    st.builds(c.RdMac, st.just(0), masks),
    st.builds(c.RdAf, st.just(0), masks),
    st.builds(c.CopyBkGb, sizes, masks, banks, rows),
    st.builds(c.CopyGbBk, sizes, masks, banks, rows),
    st.builds(c.MacSbk, sizes, masks, banks, rows),
    st.builds(c.MacAbk, sizes, masks, rows),
    st.builds(c.MacAbk, sizes, st.just((1 << CHANNELS) - 1), rows),
    st.builds(c.Af, masks),
    st.builds(c.EwMul, sizes, masks, rows),
    st.builds(c.EwAdd, st.just(1), st.just(0), st.just(0)),
    st.builds(c.WrAbk, st.just(0), st.sampled_from([1, 2, 4]), rows),
    st.just(c.Sync()),
    st.builds(c.WriteCfr, st.just(c.CFR_AF), st.integers(0, 1)),
    st.builds(c.WriteGpr, st.just(0)),
)
ORDINARY = st.one_of(
    st.builds(c.WriteMem, st.integers(0, CHANNELS - 1), banks, rows),
    st.builds(c.ReadMem, st.integers(0, CHANNELS - 1), banks, rows),
    st.builds(c.WrSbk, st.just(0), masks, banks, rows),
    st.builds(c.RdSbk, st.just(0), masks, banks, rows),
)
RUN = st.one_of(
    PIM.map(lambda request: [request]),
    st.tuples(PIM, st.integers(1, 6)).map(lambda pair: [pair[0]] * pair[1]),
)
ACCESSES = st.one_of(
    ORDINARY.map(lambda request: [request]),
    st.lists(ORDINARY, min_size=1, max_size=12),
    st.tuples(ORDINARY, st.integers(2, 45)).map(lambda pair: [pair[0]] * pair[1]),
)


def short(changes=()):
    """The machine with few channels, a short refresh interval, and other timings."""
    timing = dict(MACHINE.timing) | {"nREFI": 700, "nRFC": 90} | dict(changes)
    return replace(MACHINE, channels=CHANNELS, timings=tuple(timing.items()))


def agree(stream, machine, refresh=False):
    stream = [*stream, c.Eoc()]
    report = simulate_timing(stream, machine, refresh)
    expected, counts, active = run(stream, machine, refresh)
    issued = {name: count for name, count in report.issued.items() if count}
    assert (report.ticks, issued, report.active) == (expected, counts, active)


@given(st.lists(RUN, max_size=6).map(lambda runs: list(chain(*runs))))
@settings(deadline=None, max_examples=40)
def test_requests_agree_with_a_model_of_every_tick(stream):
    agree(stream, short())


@given(st.lists(st.one_of(RUN, ACCESSES), max_size=6).map(lambda runs: list(chain(*runs))))
@settings(deadline=None, max_examples=40)
def test_ordinary_accesses_between_agree_with_a_model_of_every_tick(stream):
    agree(stream, short())


@given(st.lists(RUN, max_size=6).map(lambda runs: list(chain(*runs))), st.data())
@settings(deadline=None, max_examples=30)
def test_other_timings_agree_with_a_model_of_every_tick(stream, data):
    names = data.draw(st.lists(st.sampled_from(TIMINGS["aim"]), max_size=6, unique=True))
    names = [name for name in names if name not in ("nREFI", "nCWL", "nBL")]
    agree(stream, short([(name, data.draw(st.integers(1, 70))) for name in names]))


@given(st.lists(st.one_of(RUN, ACCESSES), max_size=6).map(lambda runs: list(chain(*runs))))
@settings(deadline=None, max_examples=30)
def test_refresh_agrees_with_a_model_of_every_tick(stream):
    agree(stream, short(), refresh=True)


def test_products_are_written_before_their_row_is_closed():
    """By hand: activate, nRCDEWMUL 25, the write of EWMUL nCWL 6 + nWR 33, precharge nRP 32."""
    found = [
        simulate_timing([*(c.EwMul(1, 1, row) for row in range(rows)), c.Eoc()], preset("gddr6_aim")).ticks
        for rows in (2, 3)
    ]
    assert found[1] - found[0] == 25 + 6 + 33 + 32
