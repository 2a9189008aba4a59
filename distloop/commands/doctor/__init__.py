"""Check machines, devices and network before a big job."""
