"""Who drives a line, as the trace tells: irq_source_id of kvm_set_irq."""

import os

from kvmtick.abi.structs import KVM_IRQFD_FLAG_RESAMPLE
from kvmtick.conform.bench import COUNT, Bench
from kvmtick.guests.script import out8, pit, spin_ms
from kvmtick.kvm.model import ModelVm
from kvmtick.trace.events import Event, field


def test_irq_source_ids_in_traces() -> None:
    """IRQ_LINE and a plain irqfd are source 0, a resampling irqfd 1, the PIT 2."""
    seen: list[tuple[int, ...]] = []
    fds = plain, resampling, resampled = tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    try:
        with Bench("model", ModelVm, exact=True).pc(pit=True) as pc:
            assert isinstance(pc.vm, ModelVm)
            pc.vm.machine.recorder.add_consumer(
                lambda batch: seen.extend(
                    (field(record, "gsi"), field(record, "irq_source_id"))
                    for record in batch
                    if record[1] == Event.KVM_SET_IRQ
                )
            )
            pc.vm.irq_line(1, 1)
            pc.vm.irqfd(plain, 3)
            os.eventfd_write(plain, 1)
            pc.vm.get_irqchip(0)
            pc.vm.irqfd(resampling, 4, KVM_IRQFD_FLAG_RESAMPLE, resampled)
            os.eventfd_write(resampling, 1)
            pc.run(out8(0x21, 0xFF), pit(COUNT), spin_ms(2))
    finally:
        for fd in fds:
            os.close(fd)
    assert set(seen) == {(1, 0), (3, 0), (4, 1), (0, 2)}
