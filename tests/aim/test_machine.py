from dataclasses import replace

import pytest

from nestc.errors import TargetError
from nestc.runtime.aim.machine import PRESETS, TIMINGS, format_machine, load, parse, preset

TEXT = format_machine(preset("gddr6_aim"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_names_and_read_back(name):
    machine = preset(name)
    assert machine.name == name
    assert tuple(sorted(machine.timing)) == tuple(sorted(TIMINGS[machine.family]))
    assert parse(format_machine(machine), "other") == machine


def test_geometry_of_aim():
    machine = preset("gddr6_aim")
    assert (machine.channels, machine.banks, machine.outputs, machine.row_elements) == (32, 16, 512, 1024)
    # 16 banks x 32 bytes each nanosecond: 512 GB/s a channel.
    assert machine.peak_bytes_per_second == 32 * 512e9
    assert machine.seconds(9665) == pytest.approx(4.8325e-6)


def test_a_file_is_read_and_edited(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("channels: 32", "channels: 8  # smaller\n").replace("name: gddr6_aim\n", ""))
    assert load(path) == replace(preset("gddr6_aim"), name="mine", channels=8)
    assert load("newton_pimflow").family == "newton"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("channels: 32", "channels: many", "line 6: channels is 'many'; it must be a whole number"),
        ("channels: 32", "channels: 0", "channels is 0; it must be at least 1"),
        ("channels: 32", "channels: 33", "a channel mask has 32 bits"),
        ("channels: 32", "\tchannels: 32", "line 6: it is indented with a tab"),
        ("channels: 32", "channels 32", "line 6: 'channels 32' is not 'key: value'"),
        ("channels: 32", "channels:32", "line 6: 'channels:32' is not 'key: value'"),
        ("channels: 32", "channels: 32\n  channels: 32", "line 7: 'channels' is there twice"),
        ("channels: 32", "channels:", "line 6: 'channels' has no value; sections may not stand inside sections"),
        ("  channels: 32\n", "", "the section 'geometry' lacks channels"),
        ("channels: 32", "channel: 32", "line 6: 'geometry' has no key 'channel'; it has channels"),
        ("lanes: 16", "lanes: 8", "8 lanes and 16 banks"),
        ("geometry:", "shape:", "line 5: there is no section 'shape'"),
        ("\nhost:", "\ngeometry:", "the section 'geometry' is there twice"),
        ("family: aim", "family: hbm", "family is 'hbm'; it must be one of aim, newton"),
        ("family: aim\n", "", "lacks 'family'"),
        ("family: aim", "family: newton", "'newton' has no timing nRCDRD"),
        ("clock_hz: 2000000000.0", "clock_hz: fast", "line 3: clock_hz is 'fast'; it must be a number"),
        ("clock_hz: 2000000000.0", "clock_hz: 0", "clock_hz is 0.0; it must be above 0"),
        ("clock_hz: 2000000000.0\n", "", "lacks 'clock_hz'"),
        ("  nRP: 32\n", "", "lacks the timing nRP"),
        ("nRP: 32", "nRP: -1", "nRP is -1; it must not be negative"),
        ("nRP: 32", "nXP: 32", "has no timing nXP"),
        ("activate_bank: 2950.35", "activate_bank: -1", "energy activate_bank is -1.0"),
        ("  activate_bank: 2950.35\n", "", "the section 'energy' lacks activate_bank"),
        ("name: gddr6_aim", "  name: gddr6_aim", "line 1: 'name' is indented, but stands under no section"),
        ("name: gddr6_aim", "colour: red", "line 1: a machine has no key 'colour'"),
    ],
)
def test_wrong_files_are_refused_with_the_line(old, new, message):
    assert old in TEXT
    with pytest.raises(TargetError, match=message.replace("(", r"\(")):
        parse(TEXT.replace(old, new, 1), "test")


def test_a_missing_file_and_a_wrong_name_are_refused(tmp_path):
    with pytest.raises(TargetError, match="cannot be read.*gddr6_aim, newton_pimflow, or a YAML file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(TargetError, match="there is no machine 'hbm'"):
        preset("hbm")
