"""Compiled loops, used wherever they can be compiled, and by nothing else needed.

What is in `source/` is for the CPU, compiled on first use and kept in the user's cache folder;
`gpu.py` and the files in Triton beside it are for CUDA. Without a compiler or without Triton, or
with `HF_CIRCUIT_SPARSITY_KERNELS=0` in the environment, everything runs on torch and numpy.
"""
