"""Kernels compiled when first used: numba on a CPU. Loaded by ``ops.dispatch`` and by nothing else."""
