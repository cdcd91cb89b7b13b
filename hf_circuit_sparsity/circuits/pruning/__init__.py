"""The search for the smallest circuit: masks, then shrinking."""
