# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels that are put in place while the one before them ends (`launch` with CHAINED).

    kernel A   | weights | waits | reads, computes, stores |
    kernel B             | weights ----------------> waits | reads, computes, stores |

In a decode step the time between two kernels is as long as a small one of them. A kernel that is
started so must wait before it touches anything that kernels before it write, or before it writes
what they read: several may be on their way at once, each behind the other. Weights it may read at
once, no kernel of a step writes them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(CHAINED: tl.constexpr):
    """Behind this all kernels before have ended; the next one may be put in place."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
