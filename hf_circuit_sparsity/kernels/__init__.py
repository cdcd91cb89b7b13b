"""Compiled loops for the CPU, used wherever a C compiler is found, and by nothing else needed.

What is in `source/` is compiled on first use and kept in the user's cache folder. Without a
compiler, or with `HF_CIRCUIT_SPARSITY_KERNELS=0` in the environment, everything runs on torch and
numpy.
"""
