"""The node: its kernel, its mounts, and what is kept apart from them."""
