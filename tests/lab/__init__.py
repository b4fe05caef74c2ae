"""Real QEMU guests whose disks fail on demand, under a libvirtd that nobody else sees."""
