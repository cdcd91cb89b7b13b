"""Whether a circuit is the one: faithfulness and its controls."""
