"""Which VMs /proc shows, and what their command lines call them."""

import os
import shutil
from pathlib import Path

import pytest
from fake_proc import KERNEL_MADE, KVM_RUN, FakeProc

from kvmtick.abi import HostError
from kvmtick.host.vms import HostVms, NoVmError, is_initial_pid_namespace, vm_name, vm_reinject

VM = ("/dev/kvm", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:1")


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def names(vms: HostVms) -> dict[int, str]:
    return {pid: vm.name for pid, vm in vms.vms.items()}


# Which processes, which threads.


def test_a_process_with_a_vm_descriptor_is_a_vm(proc: FakeProc) -> None:
    proc.process(1, "init", fds=("/dev/null", "anon_inode:[eventfd]"))
    proc.process(20, "qemu", ("qemu-system-x86_64", "-name", "guest=web"), VM)
    proc.process(2, "kthreadd")
    vms = HostVms(proc=proc.path)
    assert vms.scan(0)
    assert names(vms) == {20: "web"}
    assert not vms.scan(0.1)


def test_threads_workers_and_vcpus(proc: FakeProc) -> None:
    proc.process(20, "qemu", fds=VM)
    proc.thread(20, 21, "CPU 0/KVM")
    proc.thread(20, 22, "worker")
    proc.process(30, "kvm-pit/20")
    proc.process(31, "kvm-pit/19")
    vms = HostVms(proc=proc.path)
    vms.scan(0)
    vm = vms.vms[20]
    assert vm.threads == {20: "qemu", 21: "CPU 0/KVM", 22: "worker", 30: "kvm-pit/20"}
    assert vm.vcpus == {21: 0}
    assert vm.workers() == [30]
    assert sorted(vm.new_threads()) == [20, 22]
    assert vm.runners() == [21]
    vms.scan(1)
    assert vm.new_threads() == []


@pytest.mark.parametrize(
    ("comm", "vcpu"),
    [
        ("CPU 3/KVM", 3),
        ("CPU 0/TCG", None),
        ("fc_vcpu 0", 0),
        ("crosvm_vcpu12", 12),
        ("vcpu7", 7),
        ("kvm-vcpu-1", 1),
        ("vcpu", None),
        ("my vcpu1", None),
        ("db_vcpu_2", 2),
        ("CPU 3", None),
    ],
)
def test_a_thread_by_the_name_its_vmm_gives_it(proc: FakeProc, comm: str, vcpu: int | None) -> None:
    proc.process(20, fds=VM)
    proc.thread(20, 21, comm)
    vms = HostVms(proc=proc.path)
    vms.scan(0)
    assert vms.vms[20].vcpus.get(21) == vcpu


def test_a_thread_by_the_vcpu_it_sleeps_in(proc: FakeProc) -> None:
    proc.process(20, fds=VM)
    proc.thread(20, 21, "python", KVM_RUN % 6)
    proc.thread(20, 22, "python", KVM_RUN % 4)  # a VM's descriptor has no KVM_RUN
    proc.thread(20, 23, "kvm-nx-lpage-re", KERNEL_MADE % 5)
    proc.thread(20, 24, "python", "202 0x7f 0x80 0x0 0x0 0x0 0x0 0x7ffd0000 0x7f0000\n")
    vms = HostVms(proc=proc.path)
    vms.scan(0)
    assert vms.vms[20].vcpus == {21: 1}
    proc.thread(20, 24, "python", KVM_RUN % 5)
    assert vms.scan(1)
    assert vms.vms[20].vcpus == {21: 1, 24: 0}


def test_a_thread_that_is_named_later(proc: FakeProc) -> None:
    proc.process(20, fds=VM)
    proc.thread(20, 21, "qemu")
    vms = HostVms(proc=proc.path)
    vms.scan(0)
    proc.thread(20, 21, "CPU 5/KVM")
    vms.scan(1)
    assert vms.vms[20].threads[21] == "CPU 5/KVM"
    assert vms.vms[20].vcpus == {21: 5}


# When it is looked at.


def test_a_vm_that_starts_later_is_found(proc: FakeProc) -> None:
    proc.process(20, "qemu", fds=("/dev/null",))
    vms = HostVms(proc=proc.path)
    vms.scan(0)
    proc.descriptor(20, "anon_inode:kvm-vm")
    proc.process(21, fds=VM)
    assert vms.scan(1)
    assert sorted(vms.vms) == [20, 21]


def test_what_is_no_vm_for_long_is_looked_at_rarely(proc: FakeProc) -> None:
    proc.process(20, fds=("/dev/null",))
    vms = HostVms(proc=proc.path)
    for second in (0, 1, 2, 4, 8):
        vms.scan(second)
    proc.descriptor(20, "anon_inode:kvm-vm")
    assert not vms.scan(15.9)
    assert vms.scan(16)


def test_what_has_opened_dev_kvm_is_looked_at_each_time(proc: FakeProc) -> None:
    proc.process(20, "firecracker", fds=("/dev/kvm",))
    vms = HostVms(proc=proc.path)
    for second in (0, 1, 2, 4, 8):
        vms.scan(second)
    proc.descriptor(20, "anon_inode:kvm-vm")
    assert vms.scan(9)


def test_a_pits_worker_tells_at_once(proc: FakeProc) -> None:
    proc.process(20, fds=("/dev/null",))
    vms = HostVms(proc=proc.path)
    for second in (0, 1, 2, 4, 8):
        vms.scan(second)
    proc.descriptor(20, "anon_inode:kvm-vm")
    proc.process(30, "kvm-pit/20")
    assert vms.scan(9)
    assert vms.vms[20].workers() == [30]


def test_a_vm_that_ended_is_remembered(proc: FakeProc) -> None:
    proc.process(20, "qemu", fds=VM)
    vms = HostVms(proc=proc.path)
    vms.scan(0)
    shutil.rmtree(proc.path / "20")
    assert not vms.scan(1)
    vm = vms.vms[20]
    assert vm.threads == {20: "qemu"}
    assert (vm.runners(), vm.workers(), vm.new_threads()) == ([], [], [])


def test_only_what_was_asked_for(proc: FakeProc) -> None:
    proc.process(20, fds=VM)
    proc.process(21, fds=VM)
    proc.process(30, "kvm-pit/20")
    vms = HostVms([21], proc.path)
    vms.scan(0)
    assert list(vms.vms) == [21]


def test_check(proc: FakeProc) -> None:
    proc.process(20, fds=VM)
    proc.process(7, "bash")
    vms = HostVms(proc=proc.path)
    assert vms.check(20) == 20
    (proc.path / "25").mkdir()
    (proc.path / "25" / "status").write_text("Name:\tx\nTgid:\t20\nPid:\t25\n")
    assert vms.check(25) == 20
    with pytest.raises(NoVmError, match=r"process 7 \(bash\) has no VM"):
        vms.check(7)
    with pytest.raises(NoVmError, match="no process 99"):
        vms.check(99)


def test_check_of_a_process_of_others(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    proc.process(20, fds=VM)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(HostError, match="process 20 may not be looked at; record as root"):
        HostVms(proc=proc.path).check(20)


def test_this_process_has_a_pid_namespace() -> None:
    assert isinstance(is_initial_pid_namespace(), bool)


# Names.


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("qemu-system-x86_64 -name guest=web,debug-threads=on -m 1G", "web"),
        ("/usr/bin/qemu-kvm -name debug-threads=on,guest=web", "web"),
        ("qemu-system-x86_64 -name web,process=q", "web"),
        ("qemu-system-x86_64 --name a,,b", "a,b"),
        ("qemu-system-x86_64 -name process=q", "qemu-system-x86_64-7"),
        ("qemu-system-x86_64 -m 1G", "qemu-system-x86_64-7"),
        ("qemu-system-x86_64 -name", "qemu-system-x86_64-7"),
        ("/usr/bin/firecracker --api-sock /x --id vm-1", "vm-1"),
        ("firecracker --id=vm-1", "vm-1"),
        ("cloud-hypervisor --api-socket /run/ch/web.sock --kernel k", "web"),
        ("cloud-hypervisor --api-socket path=/run/ch/web.sock,fd=3", "web"),
        ("cloud-hypervisor --kernel k", "cloud-hypervisor-7"),
        ("crosvm run --name web --mem 512", "web"),
        ("lkvm run --name web -k bzImage", "web"),
        ("python3 -m kvmtick run tick-pic --chips kernel", "tick-pic"),
        ("python3 /opt/bin/kvmtick run /boot/kernel.elf", "kernel.elf"),
        ("kvmtick run --chips kernel", "kvmtick-7"),
        ("python3 vmm.py", "python3-7"),
        ("", "vm-7"),
    ],
)
def test_name(argv: str, name: str) -> None:
    assert vm_name(argv.split(), 7) == name


@pytest.mark.parametrize(
    ("argv", "reinject"),
    [
        ("qemu -global kvm-pit.lost_tick_policy=discard", False),
        ("qemu -global kvm-pit.lost_tick_policy=delay", True),
        ("qemu -global driver=kvm-pit,property=lost_tick_policy,value=discard", False),
        ("qemu -global kvm-pit.lost_tick_policy=slew", None),
        ("qemu -global mc146818rtc.lost_tick_policy=discard", None),
        ("kvmtick run tick-if0 --no-reinject", False),
        ("qemu", None),
    ],
)
def test_reinject(argv: str, reinject: bool | None) -> None:
    assert vm_reinject(argv.split()) is reinject
