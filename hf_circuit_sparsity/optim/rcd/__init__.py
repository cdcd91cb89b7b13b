"""Random coordinate descent on sparse weights, at the cost of what it touches."""
