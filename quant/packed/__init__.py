"""A cache of packed numbers: its state, its ring, its static form, and attention over them."""
