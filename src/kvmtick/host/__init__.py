"""All that touches the real kernel: /dev/kvm (`kvmdev`), tracefs (`tracefs`) and what the host
offers (`probe`)."""
