"""Kernels for CPUs, compiled by numba when they are first needed.

In reading order: simd.py (vectors), compiled.py (what is compiled, and where it is kept), team.py
(threads), then the ops: tiles.py (packed products), attention.py with dense.py, scan.py (and the
convolution), rows.py (norms, gate, rotation). door.py says which calls come here. Import the others
only where the kernels are wanted: they need numba.
"""
