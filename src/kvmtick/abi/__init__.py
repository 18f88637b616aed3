"""The uapi ABI of /dev/kvm on x86: one definition for the model and for the real kernel.

`ioctls` (request numbers), `structs` (layouts and coded values), `caps` (capability numbers) and
`errors` (what a failed call raises). Names are the kernel's; the sources are <linux/kvm.h>,
<asm/kvm.h> and Documentation/virt/kvm/api.rst. Nothing here touches a device.
"""

from kvmtick.abi.errors import HostError, KvmError

__all__ = ["HostError", "KvmError"]
