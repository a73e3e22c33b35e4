"""Small texts of four kinds, written for this project, for where nobody names a text."""

from __future__ import annotations

PROSE = """\
The ferry left the island a little after six, when the light was still grey and the gulls had
not made up their minds about the day. Marta stood at the rail with her collar turned up. Behind
her the harbour grew small: first the nets lost their colour, then the houses their windows, and
at last the church was only a mark on the hill, as if someone had begun to write a word there
and thought better of it. She had lived on the island for thirty years and had never once
watched it go.

An old man with a basket of eggs came and stood beside her. He asked whether she was crossing
for the market, and she said that she was, because it was easier than the truth. He nodded. His
own mother, he told her, used to say that the sea keeps the accounts of everyone who crosses it,
and that nobody has ever been allowed to look into the book. Marta laughed, and was surprised at
the sound.

By the time the mainland came out of the mist the wind had turned. The old man shared his bread
with her, and she gave him half of an orange. They did not speak again, but when the ropes were
thrown he lifted his hat to her, very slowly, like a man who closes a door in a house where
others are asleep. She waited until all the passengers had gone ashore. Then she took up the
small blue case, felt in her pocket for the letter, and walked down the bridge into the noise of
the town.
"""

CODE = '''\
"""A small ledger: accounts, transfers between them, and what each held on a day."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path


class LedgerError(ValueError):
    """A transfer that cannot be made."""


@dataclass(frozen=True)
class Transfer:
    day: date
    source: str
    target: str
    amount: int

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise LedgerError(f"the amount must be positive, not {self.amount}")
        if self.source == self.target:
            raise LedgerError(f"{self.source} cannot pay itself")


@dataclass
class Ledger:
    transfers: list[Transfer] = field(default_factory=list)

    def balance(self, account: str, until: date | None = None) -> int:
        total = 0
        for transfer in self.transfers:
            if until is not None and transfer.day > until:
                continue
            if transfer.target == account:
                total += transfer.amount
            elif transfer.source == account:
                total -= transfer.amount
        return total

    def by_month(self, account: str) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = defaultdict(int)
        for transfer in self.transfers:
            if account in (transfer.source, transfer.target):
                sign = 1 if transfer.target == account else -1
                found[transfer.day.year, transfer.day.month] += sign * transfer.amount
        return dict(sorted(found.items()))


def read(path: Path) -> Ledger:
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return Ledger([
            Transfer(date.fromisoformat(row["day"]), row["from"], row["to"], int(row["amount"]))
            for row in rows
        ])
'''

MATHEMATICS = """\
Problem. A tank is filled by two pipes. The first fills it alone in 6 hours, the second alone in
9 hours, and an open drain empties a full tank in 18 hours. How long does it take to fill the
empty tank when both pipes run and the drain is open?

Solution. In one hour the first pipe fills 1/6 of the tank, the second 1/9, and the drain takes
away 1/18. Together they fill 1/6 + 1/9 - 1/18 = 3/18 + 2/18 - 1/18 = 4/18 = 2/9 of the tank in
an hour. So the tank is full after 9/2 = 4.5 hours.

Theorem. For every positive integer n, the sum 1 + 3 + 5 + ... + (2n - 1) is equal to n^2.

Proof. By induction on n. For n = 1 the sum is 1 = 1^2. Suppose that the claim holds for n. Then
1 + 3 + ... + (2n - 1) + (2n + 1) = n^2 + 2n + 1 = (n + 1)^2, which is the claim for n + 1.

Problem. Let f(x) = x^3 - 3x + 2. Find all local extrema of f.

Solution. The derivative is f'(x) = 3x^2 - 3 = 3(x - 1)(x + 1), which is zero at x = -1 and at x
= 1. The second derivative is f''(x) = 6x. Since f''(-1) = -6 < 0, there is a local maximum at x
= -1 with f(-1) = -1 + 3 + 2 = 4. Since f''(1) = 6 > 0, there is a local minimum at x = 1 with
f(1) = 0. In fact f(x) = (x - 1)^2 (x + 2), so x = 1 is a double root, and the remaining root is
x = -2.
"""

DIALOGUE = """\
User: Hi! My basil keeps dying on the kitchen window. What am I doing wrong?
Assistant: Sorry to hear that. How often do you water it, and does the pot have a hole in the
bottom?
User: Every day, I think. There is a hole, but the pot stands in a bowl, and the bowl is always
full.
Assistant: That is probably it. Roots need air as well as water, and in a full bowl they drown.
Empty the bowl, and water only when the top of the soil feels dry.
User: Okay. The leaves at the bottom are yellow already. Should I cut them off?
Assistant: Yes, they will not turn green again. Cut just above a pair of healthy leaves: the
plant will make two new shoots there.
User: And the window? It looks to the north.
Assistant: Basil likes six hours of sun a day. A south or west window would be better, if you
have one. If not, turn the pot a little every few days so that it does not lean.
User: There is one in the bedroom. My cat sleeps there, though.
Assistant: Then the question is who wins. Basil does not harm cats, but cats do harm basil!
User: Ha, the cat wins. I'll try the living room instead. Thanks a lot!
Assistant: You're welcome. Give it two weeks, and tell me how it goes.
"""

SAMPLES = {
    "prose": PROSE,
    "code": CODE,
    "mathematics": MATHEMATICS,
    "dialogue": DIALOGUE,
}
