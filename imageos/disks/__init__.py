"""The instance's disk: partitions, filesystems, what is on it."""
