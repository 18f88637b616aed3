"""The ABI against the C headers of this machine, and against hard numbers everywhere."""

import re
import shutil
import subprocess
from ctypes import sizeof
from pathlib import Path
from typing import Any

import pytest

from kvmtick.abi import caps, ioctls, structs

HEADER = Path("/usr/include/linux/kvm.h")

SIZES = {
    "kvm_pit_channel_state": 24,
    "kvm_pit_state": 72,
    "kvm_pit_state2": 112,
    "kvm_pit_config": 64,
    "kvm_reinject_control": 32,
    "kvm_pic_state": 16,
    "kvm_ioapic_state": 216,
    "kvm_irqchip": 520,
    "kvm_irq_level": 8,
    "kvm_irq_routing": 8,
    "kvm_irq_routing_entry": 48,
    "kvm_irq_routing_irqchip": 8,
    "kvm_irq_routing_msi": 16,
    "kvm_msi": 32,
    "kvm_irqfd": 32,
    "kvm_ioeventfd": 64,
    "kvm_enable_cap": 104,
    "kvm_guest_debug": 72,
    "kvm_interrupt": 4,
    "kvm_cpuid_entry2": 40,
    "kvm_cpuid2": 8,
    "kvm_msr_entry": 16,
    "kvm_msrs": 8,
    "kvm_msr_filter": 392,
    "kvm_msr_filter_range": 24,
    "kvm_userspace_memory_region": 32,
    "kvm_regs": 144,
    "kvm_segment": 24,
    "kvm_dtable": 16,
    "kvm_sregs": 312,
    "kvm_debugregs": 128,
    "kvm_lapic_state": 1024,
    "kvm_signal_mask": 4,
    "kvm_mp_state": 4,
    "kvm_vcpu_events": 64,
    "kvm_run": 2352,
}

NUMBERS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_TSS_ADDR": 0xAE47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008AE48,
    "KVM_CREATE_IRQCHIP": 0xAE60,
    "KVM_IRQ_LINE": 0x4008AE61,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_CREATE_PIT": 0xAE64,
    "KVM_GET_PIT": 0xC048AE65,
    "KVM_SET_PIT": 0x8048AE66,
    "KVM_IRQ_LINE_STATUS": 0xC008AE67,
    "KVM_SET_GSI_ROUTING": 0x4008AE6A,
    "KVM_REINJECT_CONTROL": 0xAE71,
    "KVM_IRQFD": 0x4020AE76,
    "KVM_CREATE_PIT2": 0x4040AE77,
    "KVM_SET_BOOT_CPU_ID": 0xAE78,
    "KVM_IOEVENTFD": 0x4040AE79,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_SET_PIT2": 0x4070AEA0,
    "KVM_SIGNAL_MSI": 0x4020AEA5,
    "KVM_X86_SET_MSR_FILTER": 0x4188AEC6,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_INTERRUPT": 0x4004AE86,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_SET_SIGNAL_MASK": 0x4004AE8B,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_GET_CPUID2": 0xC008AE91,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_TPR_ACCESS_REPORTING": 0xC028AE92,
    "KVM_SET_VAPIC_ADDR": 0x4008AE93,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_NMI": 0xAE9A,
    "KVM_SET_GUEST_DEBUG": 0x4048AE9B,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_SET_TSC_KHZ": 0xAEA2,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_GET_TSC_KHZ": 0xAEA3,
}

OFFSETS: dict[str, tuple[Any, int]] = {
    "kvm_run.immediate_exit": (structs.kvm_run.immediate_exit, 1),
    "kvm_run.exit_reason": (structs.kvm_run.exit_reason, 8),
    "kvm_run.kvm_valid_regs": (structs.kvm_run.kvm_valid_regs, 288),
    "kvm_pit_channel_state.gate": (structs.kvm_pit_channel_state.gate, 15),
    "kvm_pit_channel_state.count_load_time": (structs.kvm_pit_channel_state.count_load_time, 16),
    "kvm_pit_state2.flags": (structs.kvm_pit_state2.flags, 72),
    "kvm_ioapic_state.redirtbl": (structs.kvm_ioapic_state.redirtbl, 24),
    "kvm_irqchip.chip": (structs.kvm_irqchip.chip, 8),
    "kvm_sregs.apic_base": (structs.kvm_sregs.apic_base, 272),
    "kvm_vcpu_events.exception_payload": (structs.kvm_vcpu_events.exception_payload, 56),
    "kvm_irq_routing_entry.u": (structs.kvm_irq_routing_entry.u, 16),
    "kvm_msi.devid": (structs.kvm_msi.devid, 16),
    "kvm_irqfd.resamplefd": (structs.kvm_irqfd.resamplefd, 12),
    "kvm_ioeventfd.fd": (structs.kvm_ioeventfd.fd, 20),
    "kvm_enable_cap.args": (structs.kvm_enable_cap.args, 8),
    "kvm_cpuid_entry2.eax": (structs.kvm_cpuid_entry2.eax, 12),
    "kvm_msr_entry.data": (structs.kvm_msr_entry.data, 8),
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes, offsets and constants as this machine's C compiler sees them."""
    compiler = shutil.which("cc")
    if compiler is None or not HEADER.exists():
        pytest.skip(f"no C compiler or no {HEADER}: the hard numbers are tested alone")
    constants = [n for n in structs.__all__ if re.fullmatch(r"KVM_[A-Z0-9_]+", n)]
    wanted = {**dict.fromkeys([*constants, *ioctls.IOCTLS, *caps.CAPS], "({})")}
    lines = [f'#ifdef {n}\nprintf("{n} %lld\\n", (long long){n});\n#endif' for n in sorted(wanted)]
    lines += [f'printf("{n} %zu\\n", sizeof(struct {n}));' for n in SIZES]
    lines += [
        'printf("{0}.{1} %zu\\n", offsetof(struct {0}, {1}));'.format(*n.split("."))
        for n in OFFSETS
    ]
    where = tmp_path_factory.mktemp("headers")
    source = where / "abi.c"
    body = "\n".join(lines)
    source.write_text(
        "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )
    subprocess.run([compiler, "-o", where / "abi", source], check=True, timeout=60)
    told = subprocess.run([where / "abi"], check=True, capture_output=True, text=True, timeout=10)
    return {name: int(value) for name, value in map(str.split, told.stdout.splitlines())}


@pytest.mark.parametrize("name", SIZES)
def test_size(name: str) -> None:
    assert sizeof(getattr(structs, name)) == SIZES[name]


def test_ioctl_numbers() -> None:
    assert ioctls.IOCTLS == NUMBERS
    assert ioctls.ioctl_name(0xAE80) == "KVM_RUN"
    assert ioctls.ioctl_name(0xAEFF) == "ioctl 0xaeff"


@pytest.mark.parametrize("name", OFFSETS)
def test_offset(name: str) -> None:
    field, offset = OFFSETS[name]
    assert field.offset == offset


def test_all_caps_are_exported() -> None:
    assert set(caps.CAPS) == {n for n in caps.__all__ if n != "CAPS"}
    assert len(set(caps.CAPS.values())) == len(caps.CAPS)
    assert list(caps.CAPS.values()) == sorted(caps.CAPS.values())


def test_against_c_sizes_and_offsets(header: dict[str, int]) -> None:
    ours = {**SIZES, **{name: field.offset for name, (field, _) in OFFSETS.items()}}
    assert {n: header[n] for n in ours} == ours


def test_against_c_constants(header: dict[str, int]) -> None:
    """Only what this header knows: an older header lacks the newest capabilities."""
    ours = {**ioctls.IOCTLS, **caps.CAPS}
    ours |= {n: getattr(structs, n) for n in structs.__all__ if re.fullmatch(r"KVM_[A-Z0-9_]+", n)}
    known = {n: v for n, v in ours.items() if n in header}
    assert {n: header[n] for n in known} == known
    assert set(NUMBERS) <= set(known)
