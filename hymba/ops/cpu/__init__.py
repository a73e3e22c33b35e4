"""Kernels for CPUs, compiled by numba when they are first needed.

In reading order: simd.py (vectors), compiled.py (what is compiled, and where it is kept), team.py
(threads), then the ops. Import these modules only where the kernels are wanted: they need numba.
"""
