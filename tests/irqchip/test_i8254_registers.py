"""The i8254's ports: control words, access modes, latches, read-back, port 0x61."""

import itertools

import pytest
from attributes import attributes
from hypothesis import given
from hypothesis import strategies as st
from pc import CONTROL, SPEAKER, Pc, clocks

from kvmtick.abi.structs import KVM_PIT_SPEAKER_DUMMY
from kvmtick.irqchip.i8254 import MODE_NONE

LSB, MSB, WORD = 1, 2, 3
CHANNELS = (0, 1, 2)


def fields(pc: Pc, channel: int) -> dict[str, int]:
    state = pc.pit.channels[channel]
    return {name: getattr(state, name) for name in attributes(type(state))}


@pytest.fixture
def with_speaker() -> Pc:
    return Pc(pit=KVM_PIT_SPEAKER_DUMMY)


# After creation.


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_new_counter_is_unprogrammed(channel: int) -> None:
    pc = Pc(start_ns=12345)
    assert fields(pc, channel) == {
        "count": 0x10000,
        "latched_count": 0,
        "count_latched": 0,
        "status_latched": 0,
        "status": 0,
        "read_state": 0,
        "write_state": 0,
        "write_latch": 0,
        "rw_mode": 0,
        "mode": 0xFF,
        "bcd": 0,
        "gate": 0 if channel == 2 else 1,
        "count_load_time": 12345 if channel else 0,
    }


def test_a_new_pit_has_no_flags_and_no_timer_and_does_not_tick(pc: Pc) -> None:
    assert pc.pit.flags == 0
    assert not pc.pit.timer.enqueued
    pc.run(120_000_000)
    assert pc.expiries() == []
    assert pc.count(0) == 0  # 65536, standing still


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_data_write_to_an_unprogrammed_counter_loads_the_low_byte(pc: Pc, channel: int) -> None:
    pc.run(1000)
    pc.out(0x40 + channel, 0x12)
    assert pc.pit.channels[channel].count == 0x12
    assert pc.pit.channels[channel].mode == MODE_NONE
    pc.out(0x40 + channel, 0)
    assert pc.pit.channels[channel].count == 0x10000
    assert not pc.pit.timer.enqueued
    if channel:
        assert pc.pit.channels[channel].count_load_time == 1000


def test_reads_of_an_unprogrammed_counter_give_its_low_byte(pc: Pc) -> None:
    pc.run(clocks(5))
    assert [pc.inp(0x41) for _ in range(3)] == [0xFB] * 3  # 0x10000 - 5


@pytest.mark.parametrize("command", [0x40, 0xD4])
def test_an_unprogrammed_count_is_latched_without_effect_on_reads(pc: Pc, command: int) -> None:
    pc.run(clocks(0x123))
    pc.out(CONTROL, command)
    channel = pc.pit.channels[1]
    assert (channel.latched_count, channel.count_latched) == (0x10000 - 0x123, 0)
    pc.run(clocks(4))
    assert pc.inp(0x41) == (0x10000 - 0x127) & 0xFF


def test_the_status_of_an_unprogrammed_counter_is_mode_ff_cut_to_a_byte(pc: Pc) -> None:
    assert [pc.status(channel) for channel in CHANNELS] == [0xFE] * 3


# Control words.


CONTROL_WORDS = list(itertools.product(CHANNELS, (LSB, MSB, WORD), (0, 1)))
"""Every counter, access and BCD bit."""


@pytest.mark.parametrize("mode", range(8))
def test_a_control_word_sets_access_mode_and_bcd(pc: Pc, mode: int) -> None:
    for channel, access, bcd in CONTROL_WORDS:
        before = [fields(pc, each) for each in CHANNELS]
        pc.out(CONTROL, channel << 6 | access << 4 | mode << 1 | bcd)
        before[channel] |= {
            "rw_mode": access,
            "read_state": access,
            "write_state": access,
            "mode": {6: 2, 7: 3}.get(mode, mode),
            "bcd": bcd,
        }
        assert [fields(pc, each) for each in CHANNELS] == before


@pytest.mark.parametrize("mode", range(6))
def test_the_status_byte(pc: Pc, mode: int) -> None:
    for channel, access, bcd in CONTROL_WORDS:
        pc.out(CONTROL, channel << 6 | access << 4 | mode << 1 | bcd)
        status = pc.status(channel)
        assert status & 0x3F == access << 4 | mode << 1 | bcd
        assert status & 0x40 == 0  # NULL COUNT is never reported
        assert status >> 7 == pc.pit.out_of(channel)


def test_null_count_is_not_reported_between_control_word_and_count(pc: Pc) -> None:
    pc.out(CONTROL, 0x74)
    assert pc.status(1) & 0x40 == 0
    pc.out(0x41, 0x10)
    assert pc.status(1) & 0x40 == 0


# Loading.


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(
    ("access", "values", "count"),
    [
        (LSB, [0x34], 0x34),
        (MSB, [0x12], 0x1200),
        (WORD, [0x34, 0x12], 0x1234),
        (LSB, [0], 0x10000),
        (MSB, [0], 0x10000),
        (WORD, [0, 0], 0x10000),
        (WORD, [0xFF, 0xFF], 0xFFFF),
    ],
)
def test_a_count_is_loaded_by_byte_or_word_and_0_is_65536(
    pc: Pc, channel: int, access: int, values: list[int], count: int
) -> None:
    pc.out(CONTROL, channel << 6 | access << 4 | 2 << 1)
    pc.run(100)
    pc.out(0x40 + channel, *values)
    assert pc.pit.channels[channel].count == count
    assert pc.pit.channels[channel].count_load_time == (100 if channel else 0)


@pytest.mark.parametrize("channel", CHANNELS)
def test_half_a_word_loads_nothing(pc: Pc, channel: int) -> None:
    pc.load(channel, 2, 0x4000)
    loaded = fields(pc, channel)
    pc.run(1000)
    pc.out(0x40 + channel, 0x55)
    assert fields(pc, channel) == loaded | {"write_latch": 0x55, "write_state": 4}
    pc.out(0x40 + channel, 0x66)
    assert pc.pit.channels[channel].count == 0x6655
    assert pc.pit.channels[channel].write_state == WORD


def test_a_control_word_restarts_the_byte_order(pc: Pc) -> None:
    pc.out(CONTROL, 0x74)
    pc.out(0x41, 0x55)
    pc.out(CONTROL, 0x74)
    pc.out(0x41, 0x11, 0x22)
    assert pc.pit.channels[1].count == 0x2211


def test_bcd_is_stored_but_loading_and_counting_stay_binary(pc: Pc) -> None:
    pc.out(CONTROL, 0x71)
    pc.out(0x41, 0x00, 0x01)
    assert pc.pit.channels[1].count == 0x100
    pc.run(clocks(1))
    assert pc.count(1) == 0xFF  # 99 in BCD
    pc.run_to(clocks(0x101))
    assert pc.count(1) == 0xFFFF  # 9999 in BCD


# Reading.


def test_reads_follow_the_access_mode(pc: Pc) -> None:
    for access, expected in ((LSB, [0x34] * 4), (MSB, [0x12] * 4), (WORD, [0x34, 0x12] * 2)):
        pc.load(1, 2, 0x1234)
        pc.out(CONTROL, 0x40 | access << 4 | 2 << 1)
        assert [pc.inp(0x41) for _ in range(4)] == expected


def test_reads_and_writes_of_a_word_keep_separate_states(pc: Pc) -> None:
    pc.load(1, 2, 0x1234)
    pc.out(0x41, 0x78)  # LSB written
    assert pc.inp(0x41) == 0x34  # LSB read
    assert pc.inp(0x41) == 0x12
    assert pc.inp(0x41) == 0x34
    pc.out(0x41, 0x56)
    assert pc.pit.channels[1].count == 0x5678
    assert pc.inp(0x41) == 0x56  # still the MSB's turn


def test_a_latched_word_holds_while_the_counter_goes_on(pc: Pc) -> None:
    pc.load(1, 2, 0x8000)
    pc.run(clocks(0x10))
    pc.out(CONTROL, 0x40)
    pc.run(clocks(0x1000))
    assert pc.inp(0x41) == 0xF0
    pc.run(clocks(0x1000))
    assert pc.inp(0x41) == 0x7F
    assert pc.inp(0x41) == pc.pit.count_of(1) & 0xFF  # live again


def test_a_second_latch_before_the_read_is_ignored(pc: Pc) -> None:
    pc.load(1, 2, 0x8000)
    pc.out(CONTROL, 0x40)
    pc.run(clocks(0x100))
    pc.out(CONTROL, 0x40)
    pc.out(CONTROL, 0xD4)  # read-back of the count
    assert pc.word(0x41) == 0x8000
    pc.out(CONTROL, 0x40)
    assert pc.word(0x41) == 0x7F00


def test_a_second_latch_between_the_bytes_of_the_first_is_ignored(pc: Pc) -> None:
    pc.load(1, 2, 0x8000)
    pc.out(CONTROL, 0x40)
    assert pc.inp(0x41) == 0x00
    pc.run(clocks(0x1234))
    pc.out(CONTROL, 0x40)
    assert pc.inp(0x41) == 0x80


@pytest.mark.parametrize(("access", "byte"), [(LSB, 0x34), (MSB, 0x12)])
def test_a_one_byte_latch_is_gone_after_one_read(pc: Pc, access: int, byte: int) -> None:
    pc.load(1, 2, 0x1234)
    pc.out(CONTROL, 0x40 | access << 4 | 2 << 1, 0x40)
    assert pc.pit.channels[1].count_latched == access
    pc.run(clocks(0x3F0))
    assert pc.inp(0x41) == byte
    assert pc.pit.channels[1].count_latched == 0
    live = pc.pit.count_of(1)
    assert pc.inp(0x41) == (live & 0xFF if access == LSB else live >> 8) != byte


def test_a_latch_does_not_disturb_the_state_of_unlatched_reads(pc: Pc) -> None:
    pc.load(1, 2, 0x1234)
    assert pc.inp(0x41) == 0x34
    pc.out(CONTROL, 0x40)
    assert pc.word(0x41) == 0x1234
    assert pc.inp(0x41) == 0x12


def test_latch_commands_change_nothing_else(pc: Pc) -> None:
    pc.load(1, 3, 0x1234)
    before = fields(pc, 1)
    pc.out(CONTROL, 0x4F)  # access 00: the low bits mean nothing
    assert fields(pc, 1) == before | {"latched_count": 0x1234, "count_latched": WORD}


@pytest.mark.parametrize("selected", range(8))
@pytest.mark.parametrize("status", [False, True])
@pytest.mark.parametrize("count", [False, True])
def test_read_back_latches_any_subset(pc: Pc, selected: int, count: bool, status: bool) -> None:
    for channel in CHANNELS:
        pc.load(channel, 2, 0x1111 * (channel + 1))
    before = [fields(pc, channel) for channel in CHANNELS]
    pc.out(CONTROL, 0xC0 | selected << 1 | (not count) << 5 | (not status) << 4)
    for channel in CHANNELS:
        expected = dict(before[channel])
        if selected >> channel & 1 and count:
            expected |= {"latched_count": 0x1111 * (channel + 1), "count_latched": WORD}
        if selected >> channel & 1 and status:
            expected |= {"status": 0x34, "status_latched": 1}
        assert fields(pc, channel) == expected


def test_a_latched_status_is_read_before_a_latched_count(pc: Pc) -> None:
    pc.load(1, 2, 0x1234)
    pc.out(CONTROL, 0xC4)
    pc.run(clocks(0x20))
    assert [pc.inp(0x41) for _ in range(3)] == [0x34, 0x34, 0x12]
    assert pc.inp(0x41) == 0x14  # live


def test_a_second_status_latch_before_the_read_is_ignored(pc: Pc) -> None:
    pc.load(1, 0, 100)
    pc.out(CONTROL, 0xE4)
    pc.run(clocks(100))  # OUT goes high
    pc.out(CONTROL, 0xE4)
    assert pc.inp(0x41) == 0x30
    pc.out(CONTROL, 0xE4)
    assert pc.inp(0x41) == 0xB0


# Width and the control register.


def test_a_read_of_the_control_register_leaves_the_buffer_as_it_was(pc: Pc) -> None:
    assert pc.inp(CONTROL) == 0
    assert pc.inp(CONTROL, stale=0xA5) == 0xA5


def test_a_wide_access_is_one_of_the_low_byte(pc: Pc) -> None:
    pc.load(1, 2, 0x1234)
    assert pc.inp(0x41, size=2, stale=0xFFFF) == 0x34
    assert pc.inp(0x41, size=2, stale=0xFFFF) == 0x12
    pc.out(0x41, 0xAA77, size=2)
    pc.out(0x41, 0xBB66, size=2)
    assert pc.pit.channels[1].count == 0x6677
    pc.load(0, 2, 0x4321)
    assert pc.inp(0x40, size=4) == 0x21


@pytest.mark.parametrize(
    ("port", "size", "taken"),
    [
        (0x3F, 1, False),
        (0x3F, 2, False),
        (0x40, 4, True),
        (0x41, 2, True),
        (0x42, 2, True),
        (0x43, 1, True),
        (0x43, 2, False),
        (0x41, 4, False),
        (0x42, 4, False),
        (0x44, 1, False),
    ],
)
def test_an_access_must_lie_within_the_four_ports(
    pc: Pc, port: int, size: int, taken: bool
) -> None:
    assert pc.board.bus.find(port, size) is (pc.pit if taken else None)


# Port 0x61.


@pytest.mark.parametrize("size", [1, 2, 4])
def test_without_speaker_dummy_port_61_is_left_to_user_space(pc: Pc, size: int) -> None:
    assert pc.board.bus.find(SPEAKER, size) is None


@pytest.mark.parametrize("flags", [1, 0xFFFFFFFF])
def test_with_speaker_dummy_accesses_that_start_at_port_61_are_taken(flags: int) -> None:
    pc = Pc(pit=flags)
    bus = pc.board.bus
    assert [bus.find(SPEAKER, size) for size in (1, 2, 4)] == [pc.pit.speaker] * 3
    assert [bus.find(port, 1) for port in (0x60, 0x62, 0x63, 0x64, 0x65)] == [None] * 5
    assert bus.find(0x62, 2) is None


@pytest.mark.parametrize("flags", [0, 2, 0xFFFFFFFE])
def test_only_bit_0_of_the_creation_flags_matters(flags: int) -> None:
    assert Pc(pit=flags).board.bus.find(SPEAKER, 1) is None


def test_speaker_data_is_mirrored_in_the_flags(with_speaker: Pc) -> None:
    pc = with_speaker
    pc.pit.flags = 0x8000_0000
    pc.out(SPEAKER, 0x02)
    assert pc.pit.flags == 0x8000_0002
    assert pc.inp(SPEAKER) & 3 == 2
    pc.out(SPEAKER, 0x01)
    assert pc.pit.flags == 0x8000_0000
    assert pc.inp(SPEAKER) & 3 == 1


def test_the_refresh_bit_toggles_every_16384_ns(with_speaker: Pc) -> None:
    seen = []
    for now_ns in (0, 16383, 16384, 32767, 32768, 49151, 49152):
        with_speaker.run_to(now_ns)
        seen.append(with_speaker.inp(SPEAKER) >> 4 & 1)
    assert seen == [0, 0, 1, 1, 0, 0, 1]


def test_bit_5_is_the_output_of_counter_2(with_speaker: Pc) -> None:
    pc = with_speaker
    pc.load(2, 0, 1000)
    pc.run(clocks(1000) - 1)
    assert pc.inp(SPEAKER) & 0x20 == 0
    pc.run(1)
    assert pc.inp(SPEAKER) & 0x20 == 0x20


def test_the_other_bits_of_port_61_read_0_and_a_wide_read_is_one_byte(with_speaker: Pc) -> None:
    with_speaker.out(SPEAKER, 0xFF)
    assert with_speaker.inp(SPEAKER) & 0xCC == 0
    assert with_speaker.inp(SPEAKER, size=4, stale=0xFFFFFFFF) <= 0xFF
    with_speaker.out(SPEAKER, 0xFFFF_FF02, size=4)
    assert with_speaker.inp(SPEAKER) & 3 == 2


@pytest.mark.parametrize("mode", range(6))
def test_a_low_gate_does_not_stop_counter_2(with_speaker: Pc, mode: int) -> None:
    pc = with_speaker
    pc.out(SPEAKER, 1)
    pc.load(2, mode, 0x4000)
    pc.run(clocks(0x100))
    pc.out(SPEAKER, 0)
    before = pc.count(2)
    pc.run(clocks(0x100))
    assert pc.count(2) < before


@pytest.mark.parametrize(
    ("mode", "restarts"), [(0, False), (1, True), (2, True), (3, True), (4, False), (5, True)]
)
def test_a_rising_gate_restarts_modes_1_2_3_and_5(
    with_speaker: Pc, mode: int, restarts: bool
) -> None:
    pc = with_speaker
    pc.load(2, mode, 0x4000)
    pc.run(5000)
    pc.out(SPEAKER, 1)  # rising
    assert pc.pit.channels[2].count_load_time == (5000 if restarts else 0)
    pc.run(5000)
    pc.out(SPEAKER, 1)  # high already
    pc.out(SPEAKER, 0)  # falling
    assert pc.pit.channels[2].count_load_time == (5000 if restarts else 0)
    assert pc.pit.channels[2].gate == 0


def test_a_gate_set_by_user_space_above_1_never_rises(with_speaker: Pc) -> None:
    pc = with_speaker
    pc.load(2, 2, 0x4000)
    pc.pit.channels[2].gate = 0xFF
    pc.run(5000)
    pc.out(SPEAKER, 1)
    assert pc.pit.channels[2].count_load_time == 0


# Whatever the guest writes.


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]),
            st.one_of(st.none(), st.integers(0, 0xFF)),  # None: a read
            st.integers(0, 5000),
        ),
        max_size=40,
    )
)
def test_no_sequence_of_port_accesses_leaves_the_byte_range(
    accesses: list[tuple[int, int | None, int]],
) -> None:
    pc = Pc(pit=KVM_PIT_SPEAKER_DUMMY)
    for port, value, elapsed_ns in accesses:
        if value is None:
            assert 0 <= pc.inp(port) <= 0xFF
        else:
            pc.out(port, value)
        pc.run(elapsed_ns)
    for channel in pc.pit.channels:
        assert 1 <= channel.count <= 0x10000
        assert channel.mode in (0, 1, 2, 3, 4, 5, MODE_NONE)
        saved = channel.save()
        assert all(
            getattr(saved, name) == getattr(channel, name) for name in attributes(type(channel))
        )
