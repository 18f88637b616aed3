"""The devices of the PC around the chips: one a module, put together by `kvmtick.machine.pc.pc`.

They are user space's, as with a real VMM: what the guest does to them leaves KVM by an exit, and
their interrupts come back by KVM_IRQ_LINE. So they serve the model's chips and the kernel's alike.
"""
