"""Recording the VMs of this host."""
