"""Walking, printing and comparing structures; the errors' messages."""

import errno
import pickle
from ctypes import sizeof

import pytest

from kvmtick.abi import HostError, KvmError
from kvmtick.abi.structs import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    format_struct,
    kvm_ioapic_redirtbl_entry,
    kvm_irq_level,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_pit_state2,
    make_irq_routing,
    struct_diff,
    struct_fields,
)


def test_fields_are_named_from_the_top() -> None:
    state = kvm_pit_state2()
    state.channels[1].count = 65536
    fields = dict(struct_fields(state))
    assert fields["channels[1].count"] == 65536
    assert "flags" in fields
    assert not [name for name in fields if "reserved" in name]
    assert "reserved[8]" in dict(struct_fields(state, padding=True))


def test_irqchip_shows_the_chip_it_carries() -> None:
    assert "chip.pic.elcr_mask" in dict(struct_fields(kvm_irqchip(chip_id=1)))
    assert "chip.ioapic.redirtbl[23].bits" in dict(struct_fields(kvm_irqchip(chip_id=2)))
    assert "chip.dummy" in dict(struct_fields(kvm_irqchip(chip_id=7)))


def test_routing_entry_shows_its_target() -> None:
    entry = kvm_irq_routing_entry(gsi=3, type=KVM_IRQ_ROUTING_IRQCHIP)
    assert "u.irqchip.pin" in dict(struct_fields(entry))
    entry.type = KVM_IRQ_ROUTING_MSI
    assert "u.msi.data" in dict(struct_fields(entry))


def test_diff_names_the_fields() -> None:
    left, right = kvm_pit_state2(), kvm_pit_state2()
    assert struct_diff(left, right) == []
    left.channels[0].count = 1193
    left.channels[2].count_load_time = -5
    right.flags = 2
    assert [str(d) for d in struct_diff(left, right)] == [
        "channels[0].count: 1193 (0x4a9) != 0",
        "channels[2].count_load_time: -5 != 0",
        "flags: 0 != 2",
    ]
    ignore = ("count_load_time", "channels[0].count")
    assert [d.name for d in struct_diff(left, right, ignore)] == ["flags"]


def test_diff_of_different_chips_names_both_sides() -> None:
    pic, ioapic = kvm_irqchip(chip_id=0), kvm_irqchip(chip_id=KVM_IRQCHIP_IOAPIC)
    pic.chip.pic.imr = 0xFE
    names = {d.name: d for d in struct_diff(pic, ioapic)}
    assert names["chip.pic.imr"].left == 0xFE
    assert names["chip.pic.imr"].right is None


def test_format_is_one_line_a_field() -> None:
    lines = format_struct(kvm_pit_state2(flags=3)).splitlines()
    assert lines[0] == "kvm_pit_state2"
    assert lines[-1] == "  flags = 3"
    assert len(lines) == 2 + 3 * 13


def test_redirection_entry_bits() -> None:
    entry = kvm_ioapic_redirtbl_entry()
    entry.fields.vector = 0x45
    entry.fields.mask = 1
    entry.fields.trig_mode = 1
    entry.fields.dest_id = 0x0F
    assert entry.bits == 0x0F00_0000_0001_8045


def test_irq_level_status_is_signed() -> None:
    assert kvm_irq_level(irq=0xFFFF_FFFF).status == -1


def test_lapic_registers() -> None:
    lapic = kvm_lapic_state()
    lapic.set_reg(0x350, 0x10700)
    assert lapic.reg(0x350) == 0x10700
    assert bytes(lapic)[0x350:0x354] == b"\x00\x07\x01\x00"


def test_routing_table_bytes() -> None:
    entries = [kvm_irq_routing_entry(gsi=n, type=KVM_IRQ_ROUTING_IRQCHIP) for n in range(3)]
    data = make_irq_routing(entries)
    assert data[:8] == b"\x03\0\0\0\0\0\0\0"
    assert len(data) == 8 + 3 * sizeof(kvm_irq_routing_entry)


def test_kvm_error_is_one_line_with_a_remedy() -> None:
    error = KvmError(errno.ENOENT, "KVM_CREATE_PIT2")
    assert isinstance(error, OSError)
    assert (error.errno, error.call) == (errno.ENOENT, "KVM_CREATE_PIT2")
    assert str(error) == (
        "KVM_CREATE_PIT2: ENOENT: no in-kernel irqchip; call create_irqchip() first"
    )
    assert str(KvmError(errno.EINVAL, "KVM_RUN", "why not")) == "KVM_RUN: EINVAL: why not"
    assert str(KvmError(errno.ENOMEM, "KVM_RUN")) == "KVM_RUN: ENOMEM: Cannot allocate memory"


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(KvmError(errno.ENXIO, "KVM_GET_PIT2")))
    assert (error.errno, error.call) == (errno.ENXIO, "KVM_GET_PIT2")
    assert error.why.startswith("the VM has no PIT")
    host = pickle.loads(pickle.dumps(HostError("no /dev/kvm", "modprobe kvm")))
    assert str(host) == "no /dev/kvm; modprobe kvm"


def test_host_error_is_exit_code_3() -> None:
    with pytest.raises(HostError) as caught:
        raise HostError("tracefs is not there")
    assert caught.value.exit_code == 3
    assert str(caught.value) == "tracefs is not there"
