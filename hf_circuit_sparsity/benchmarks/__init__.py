"""One module per claim of speed or size; each measures both sides in one process.

Run one with `python -m hf_circuit_sparsity.benchmarks.<name>`, or all with
`hf-circuit-sparsity benchmark`.
"""
