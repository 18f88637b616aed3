"""KVM_SET_GSI_ROUTING and KVM_SIGNAL_MSI: what the kernel takes, and where it leads."""

import errno
from collections.abc import Sequence

import pytest
from apics import LEVEL, Apics

from kvmtick.abi.errors import KvmError
from kvmtick.abi.structs import kvm_irq_routing_entry, kvm_msi, to_chip, to_msi
from kvmtick.irqchip.delivery import LapicIrq
from kvmtick.irqchip.routing import IrqRouting, parse_msi
from kvmtick.timing.clock import VirtualClock
from kvmtick.trace.events import Event
from kvmtick.trace.recorder import Recorder

MASTER, SLAVE, IOAPIC = 0, 1, 2
ADDRESS = 0xFEE0_0000


def typed(type_: int) -> kvm_irq_routing_entry:
    return kvm_irq_routing_entry(gsi=0, type=type_)


ACCEPTED = {
    "empty": [],
    "master-0": [to_chip(0, MASTER, 0)],
    "master-7": [to_chip(0, MASTER, 7)],
    "slave-0": [to_chip(0, SLAVE, 0)],
    "slave-7": [to_chip(0, SLAVE, 7)],
    "ioapic-0": [to_chip(0, IOAPIC, 0)],
    "ioapic-23": [to_chip(0, IOAPIC, 23)],
    "msi-devid": [to_msi(0, ADDRESS, 0x40, flags=1)],
    "msi": [to_msi(0, ADDRESS, 0x40)],
    "msi-address-0": [to_msi(0, 0, 0x40)],
    "msi-address-hi-100": [to_msi(0, 0x100 << 32 | ADDRESS, 0x40)],
    "msi-address-hi-1": [to_msi(0, 1 << 32 | ADDRESS, 0x40)],
    "gsi-4095": [to_chip(4095, IOAPIC, 2)],
    "two-chips": [to_chip(0, MASTER, 0), to_chip(0, IOAPIC, 2)],
    "three-chips": [to_chip(0, MASTER, 0), to_chip(0, SLAVE, 0), to_chip(0, IOAPIC, 2)],
    "one-pin-of-two": [to_chip(0, IOAPIC, 2), to_chip(1, IOAPIC, 2)],
    "4096-entries": [to_msi(gsi, ADDRESS, 0x40) for gsi in range(4096)],
}

REFUSED = {
    "master-8": ([to_chip(0, MASTER, 8)], "PIC pin 8"),
    "master-16": ([to_chip(0, MASTER, 16)], "PIC pin 16"),
    "slave-8": ([to_chip(0, SLAVE, 8)], "PIC pin 8"),
    "ioapic-24": ([to_chip(0, IOAPIC, 24)], "IOAPIC pin 24"),
    "irqchip-3": ([to_chip(0, 3, 0)], "irqchip 3"),
    "type-0": ([typed(0)], "type 0"),
    "type-3": ([typed(3)], "type 3"),
    "type-4": ([typed(4)], "type 4"),
    "type-5": ([typed(5)], "type 5"),
    "type-99": ([typed(99)], "type 99"),
    "irqchip-flags": ([to_chip(0, IOAPIC, 0, flags=1)], "flags 0x1"),
    "msi-flags": ([to_msi(0, ADDRESS, 0x40, flags=2)], "flags 0x2"),
    "gsi-4096": ([to_chip(4096, IOAPIC, 0)], "gsi 4096"),
    "gsi-max": ([to_chip(0xFFFF_FFFF, IOAPIC, 0)], "gsi 4294967295"),
    "master-twice": ([to_chip(0, MASTER, 0), to_chip(0, MASTER, 0)], "leads to that chip"),
    "ioapic-twice": ([to_chip(0, IOAPIC, 2), to_chip(0, IOAPIC, 3)], "leads to that chip"),
    "msi-twice": ([to_msi(24, ADDRESS, 0x40), to_msi(24, ADDRESS, 0x41)], "for itself"),
    "ioapic-then-msi": ([to_chip(0, IOAPIC, 2), to_msi(0, ADDRESS, 0x40)], "for itself"),
    "msi-then-ioapic": ([to_msi(0, ADDRESS, 0x40), to_chip(0, IOAPIC, 2)], "for itself"),
    "4097-entries": ([to_msi(0, ADDRESS, 0x40)] * 4097, "4097 entries"),
    # The order of the checks: all GSIs first, then entry by entry.
    "gsi-before-type": ([typed(99), to_chip(4096, IOAPIC, 0)], "gsi 4096"),
    "first-entry-first": ([to_chip(0, IOAPIC, 24), typed(99)], "IOAPIC pin 24"),
    "flags-before-pin": ([to_chip(0, IOAPIC, 24, flags=1)], "flags 0x1"),
    "taken-before-pin": ([to_chip(0, IOAPIC, 1), to_chip(0, IOAPIC, 24)], "leads to that chip"),
}


@pytest.mark.parametrize("table", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(table: Sequence[kvm_irq_routing_entry]) -> None:
    Apics().routing.set_table(table)


@pytest.mark.parametrize(("table", "why"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(table: Sequence[kvm_irq_routing_entry], why: str) -> None:
    apics = Apics()
    with pytest.raises(KvmError, match=f"^KVM_SET_GSI_ROUTING: EINVAL: .*{why}") as raised:
        apics.routing.set_table(table)
    assert raised.value.errno == errno.EINVAL
    assert apics.line(4, 1) == 1
    assert apics.pic.master.irr == 1 << 4


def test_table_flags_and_a_vm_without_irqchip_are_refused() -> None:
    with pytest.raises(KvmError, match="EINVAL: table flags 0x1"):
        Apics().routing.set_table([], flags=1)
    for table in ([], [to_msi(0, ADDRESS, 0x40)]):
        with pytest.raises(KvmError, match="EINVAL: no in-kernel irqchip"):
            IrqRouting(Recorder(VirtualClock())).set_table(table)


def test_a_split_irqchip_has_no_pins() -> None:
    apics = Apics(split=24)
    apics.routing.set_table([to_msi(0, ADDRESS, 0x40)])
    for irqchip in range(3):
        with pytest.raises(KvmError, match="EINVAL: entry 1: a pin"):
            apics.routing.set_table([to_msi(0, ADDRESS, 0x41), to_chip(1, irqchip, 0)])
    assert apics.line(0, 1) == 1
    assert apics.irrs() == [0x40]


def test_32_bit_ids_reserve_the_low_byte_of_the_high_address() -> None:
    apics = Apics()
    bad, good = to_msi(0, 1 << 32 | ADDRESS, 0x40), to_msi(1, 0x100 << 32 | ADDRESS, 0x41)
    apics.routing.set_table([bad])
    apics.delivery.x2apic_format = True
    with pytest.raises(KvmError, match="EINVAL: entry 0: address_hi 0x1"):
        apics.routing.set_table([bad])
    assert apics.line(0, 1) == -1
    assert apics.irrs() == []
    apics.routing.set_table([good])
    assert apics.line(1, 1) == 0  # there is no APIC 0x100


# Where it leads.


def test_entries_are_called_in_the_order_of_the_table() -> None:
    orders = [[MASTER, IOAPIC], [IOAPIC, MASTER]]
    for order in orders:
        apics = Apics(detail=True)
        apics.routing.set_table([to_chip(9, irqchip, 3) for irqchip in order])
        apics.line(9, 1)
        names = {MASTER: "kvm_pic_set_irq", IOAPIC: "kvm_ioapic_set_irq"}
        assert apics.names() == ["kvm_set_irq", *(names[irqchip] for irqchip in order)]


def test_the_slaves_pins_are_8_to_15_and_the_last_gsi_of_a_pin_is_told() -> None:
    apics = Apics()
    apics.routing.set_table([to_chip(40, SLAVE, 3), to_chip(50, IOAPIC, 2), to_chip(41, IOAPIC, 2)])
    assert apics.routing.gsi_of_pin(SLAVE, 11) == 40
    assert apics.routing.gsi_of_pin(SLAVE, 3) == -1
    assert apics.routing.gsi_of_pin(IOAPIC, 2) == 41
    assert apics.routing.gsi_of_pin(IOAPIC, 4) == -1
    apics.line(40, 1)
    assert (apics.pic.slave.irr, apics.pic.master.irr) == (1 << 3, 1 << 2)


def test_a_gsi_that_the_new_table_leaves_out_leads_nowhere() -> None:
    apics = Apics()
    apics.routing.set_table([])
    assert apics.line(4, 1) == -1
    apics.routing.pulse(2, 0)
    assert apics.names() == ["kvm_set_irq"] * 2


# Messages.


def test_a_message_goes_out_when_its_gsi_rises() -> None:
    apics = Apics()
    apics.routing.set_table([to_msi(24, ADDRESS, 0x51)])
    assert apics.lines(24, 1, 0, 1, 0) == [1, -1, 1, -1]
    assert apics.irrs() == [0x51]
    sent = ["kvm_set_irq", "kvm_msi_set_irq", "kvm_apic_accept_irq", "kvm_set_irq"]
    assert apics.names() == sent * 2


def test_a_message_to_nobody() -> None:
    apics = Apics()
    apics.routing.set_table([to_msi(24, ADDRESS | 5 << 12, 0x51)])
    assert apics.lines(24, 1, 0, 1) == [0, -1, 0]


def test_a_pulse_of_a_message_is_its_rise() -> None:
    apics = Apics()
    apics.routing.set_table([to_msi(0, ADDRESS, 0x51)])
    apics.routing.pulse(2, 0)
    assert apics.irrs() == [0x51]
    assert apics.names() == ["kvm_set_irq", "kvm_msi_set_irq", "kvm_apic_accept_irq"]


@pytest.mark.parametrize("x2apic_format", [False, True])
def test_the_fields_of_a_message(x2apic_format: bool) -> None:
    irq = parse_msi(0xFEE5_A00C, 0x1234_5600, 0xFFFF_F961, x2apic_format)
    assert irq == LapicIrq(
        vector=0x61,
        delivery_mode=1,
        dest_mode_logical=True,
        trig_mode_level=True,
        level=True,
        shorthand=0,
        dest_id=0x1234_565A if x2apic_format else 0x5A,
        msi_redir_hint=True,
    )
    assert parse_msi(0, 0, 0, x2apic_format) == LapicIrq(0, 0, False, False, True, 0, 0, False)


def message(address: int, data: int, flags: int = 0) -> kvm_msi:
    return kvm_msi(
        address_lo=address & 0xFFFF_FFFF, address_hi=address >> 32, data=data, flags=flags
    )


@pytest.mark.parametrize(
    ("address", "data", "taken"),
    [
        (ADDRESS, 0x40, 1),
        (ADDRESS | 5 << 12, 0x40, 0),
        (ADDRESS | 0xFF << 12, 0x40, 1),
        (ADDRESS, 0x0F, 1),
        (0, 0x40, 1),
        (0x100 << 32 | ADDRESS, 0x40, 1),
        (1 << 32 | ADDRESS, 0x40, 1),
        (ADDRESS, 0x440, 1),
        (ADDRESS, 0x240, 0),
        (ADDRESS, 0x540, 1),
        (ADDRESS, 0x740, 0),
    ],
)
def test_signal_msi(address: int, data: int, taken: int) -> None:
    apics = Apics()
    for flags in (0, 1):
        assert apics.routing.signal_msi(message(address, data, flags)) == taken


def test_signal_msi_refuses() -> None:
    def refused(routing: IrqRouting, msi_: kvm_msi) -> int | None:
        with pytest.raises(KvmError, match=r"^KVM_SIGNAL_MSI: ") as raised:
            routing.signal_msi(msi_)
        return raised.value.errno

    assert refused(IrqRouting(Recorder(VirtualClock())), message(ADDRESS, 0x40)) == errno.EINVAL
    assert refused(Apics().routing, message(ADDRESS, 0x40, flags=2)) == errno.EINVAL
    assert refused(Apics(vcpus=0).routing, message(ADDRESS, 0x40)) == errno.EPERM
    apics = Apics()
    apics.delivery.x2apic_format = True
    assert refused(apics.routing, message(1 << 32 | ADDRESS, 0x40)) == errno.EINVAL
    assert apics.routing.signal_msi(message(0x100 << 32 | ADDRESS, 0x40)) == 0


def test_the_high_address_is_recorded_only_where_it_counts() -> None:
    apics = Apics()
    for x2apic_format, address in ((False, ADDRESS), (True, 0x100 << 32 | ADDRESS)):
        apics.delivery.x2apic_format = x2apic_format
        apics.routing.signal_msi(message(0x100 << 32 | ADDRESS, 0x40))
        records = apics.records(Event.KVM_MSI_SET_IRQ)
        assert [record[3:] for record in records] == [(address, 0x40)]


# The split irqchip.


def test_split_scan() -> None:
    apics = Apics(vcpus=2, split=4)
    apics.routing.set_table(
        [
            to_msi(0, ADDRESS, 0x40 | LEVEL),
            to_msi(1, ADDRESS, 0x41),
            to_msi(2, ADDRESS | 1 << 12, 0x42 | LEVEL),
            to_msi(4, ADDRESS, 0x44 | LEVEL),
        ]
    )
    assert [vcpu.scan_wanted for vcpu in apics.stubs] == [True, True]
    assert [apics.routing.scan_routes(lapic) for lapic in apics.lapics] == [1 << 0x40, 1 << 0x42]
    apics.lapics[0].isr = 1 << 0x42
    assert apics.routing.scan_routes(apics.lapics[0]) == 1 << 0x40 | 1 << 0x42


def test_split_eoi_leaves_to_user_space() -> None:
    apics = Apics(split=24)
    apics.routing.set_table([to_msi(0, ADDRESS, 0x40 | LEVEL), to_msi(1, ADDRESS, 0x51)])
    apics.line(0, 1)
    apics.line(1, 1)
    assert [apics.take(), apics.take()] == [0x51, -1]
    apics.eoi()
    assert apics.take() == 0x40
    apics.eoi()
    assert apics.stubs[0].eoi_exits == [0x40]
