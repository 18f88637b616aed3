"""QEMU and Bochs: they run our guests to their end, or it is said why not."""

import shutil
from pathlib import Path

import pytest
from peer_programs import SAYS, only

from kvmtick import guests
from kvmtick.bench.guest_code import loop
from kvmtick.bench.peers import BOCHS, PEERS, QEMU, Peer
from kvmtick.bench.process import MeasureError
from kvmtick.bench.session import NOT_INSTALLED, Session

GUESTS = ("tick-pic", "tick-ioapic", "tick-lapic")


def installed(name: str) -> Peer:
    peer = PEERS[name]
    if shutil.which(peer.program) is None:
        pytest.skip(f"{peer.program} is not installed")
    return peer


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_every_tick(name: str) -> None:
    peer = installed(name)
    for guest in GUESTS:
        assert peer.run(guests.load(guest, ticks=50), 50).wall_s > 0


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_goes_round_every_loop(name: str) -> None:
    peer = installed(name)
    for each in ("load-store", "registers"):
        assert peer.run(loop(each, 70_000), 70_000).wall_s > 0


@pytest.mark.parametrize("name", PEERS)
def test_a_count_that_is_not_ours_is_found(name: str) -> None:
    with pytest.raises(MeasureError, match="tick-pic left with code 0 after 5 of 6 rounds"):
        installed(name).run(guests.load("tick-pic", ticks=5), 6)


@pytest.mark.parametrize("name", PEERS)
def test_a_version_is_one_line(name: str) -> None:
    told = installed(name).version()
    assert told is not None
    assert name in told.lower()
    assert "\n" not in told


def test_a_peer_that_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path)
    session = Session(2, True, tmp_path)
    taken = session.in_turns(lambda: 3.0, {"qemu": lambda: 1.0})
    assert taken.values == [3.0, 3.0]
    assert taken.absent == {"qemu": NOT_INSTALLED}
    assert PEERS["qemu"].version() is None


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo no such machine >&2; exit 2", "ended with exit code 2: no such machine"),
        ("exit 1", "tick-pic did not say how it ended"),
        (SAYS.format("ff 00000000\\n"), "tick-pic left with code 255 after 0 of 5 rounds"),
        (SAYS.format("00 00000004\\n"), "tick-pic left with code 0 after 4 of 5 rounds"),
        (SAYS.format("00 0000000"), "tick-pic did not say how it ended"),
    ],
)
def test_a_qemu_that_fails(
    script: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only(monkeypatch, tmp_path, qemu=script)
    with pytest.raises(MeasureError, match=told) as error:
        QEMU.run(guests.load("tick-pic", ticks=5), 5)
    assert "\n" not in str(error.value)


def test_a_version_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path, qemu="kill -9 $$", bochs="exit 3")
    assert QEMU.version() == "qemu-system-x86_64 was ended by signal 9"
    assert BOCHS.version() == "bochs"
    Path(tmp_path, QEMU.program).write_text("")
    assert QEMU.version() == "qemu-system-x86_64 cannot be started: Exec format error"


def test_a_bochs_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path, bochs="echo no display >&2; exit 4")
    with pytest.raises(MeasureError, match="bochs ended with exit code 4: no display"):
        BOCHS.run(guests.load("tick-pic", ticks=5), 5)


def test_a_peer_that_fails_is_left_out_and_we_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only(monkeypatch, tmp_path, qemu="exit 0")
    turns = iter([1.0])

    def fails_later() -> float:
        try:
            return next(turns)
        except StopIteration:
            raise MeasureError("qemu is gone") from None

    taken = Session(3, True, tmp_path).in_turns(lambda: 3.0, {"qemu": fails_later})
    assert taken.values == [3.0, 3.0, 3.0]
    assert taken.peers == {}
    assert taken.absent == {"qemu": "qemu is gone"}
