"""What changes a live model: swap, restore, save, load, describe. Above heads and projections."""
