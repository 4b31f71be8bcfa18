"""What is remembered of keys and values: the members of `swap(heads=...)`, one file each."""
