"""The node: its kernel, its mounts, and the isolation from them."""
