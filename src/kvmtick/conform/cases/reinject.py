"""Ticks the guest could not take: KVM_REINJECT_CONTROL, acknowledgement, what drops them."""
