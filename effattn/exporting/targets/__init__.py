"""What an export is for: one file each, found by itself."""
