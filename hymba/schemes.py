"""Ways to keep weights in few bits: so many bits a code, a scale for each group of a row's columns.

A weight is code * scale: codes are whole numbers around zero, or floats of 8 bits (e4m3: a sign, 4
bits of exponent, 3 of mantissa); scales are float16. Groups must be multiples of 16 columns, which
the kernels' vectors want; 32 and 64 divide the released widths (1600, 3200, 5504), which 128 does
not. Last groups that are not full are padded with zeros. No torch here: commands name schemes in
their help.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from hymba.errors import UserError


class SchemeError(UserError):
    """No such scheme, or weights that it cannot hold."""


@dataclass(frozen=True)
class Scheme:
    name: str
    bits: int
    group: int  # columns that share a scale
    kind: str = "int"  # of codes: int or e4m3

    @property
    def most(self) -> int:
        """The largest code."""
        return 448 if self.kind == "e4m3" else 2 ** (self.bits - 1) - 1

    @property
    def least(self) -> int:
        """The smallest code: there is a whole number more below zero than above it."""
        return -448 if self.kind == "e4m3" else -self.most - 1

    @property
    def zero(self) -> int:
        """What stands for a code of 0 where codes are kept, unsigned."""
        return 0 if self.kind == "e4m3" else -self.least

    def groups(self, columns: int) -> int:
        return -(-columns // self.group)

    @property
    def group_bytes(self) -> int:
        """Of a tile's 32 rows: their codes of one group, and 32 scales."""
        return 32 * (self.group * self.bits // 8 + 2)


SCHEMES = {
    scheme.name: scheme
    for scheme in (Scheme("int8", 8, 64), Scheme("int4", 4, 32), Scheme("fp8", 8, 64, "e4m3"))
}


def scheme_named(name: str) -> Scheme:
    """SchemeError that lists the known ones."""
    if name in SCHEMES:
        return SCHEMES[name]
    near = difflib.get_close_matches(name, SCHEMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise SchemeError(f"there is no quantisation called {name!r}: {', '.join(SCHEMES)}{hint}")
