"""One budget of parameters for many matrices: who gets which rank, so that the least is lost.

A matrix of rank r has r (in + out) parameters and loses what its singular values beyond r hold. As
a line from one number of parameters to what they keep, it is concave: its next rank never brings
more than its last one. So the best of all is to buy, again and again, the rank that brings most for
its parameters. From r (in + out) = in out on the dense weight is no larger and loses nothing; that
jump is one more purchase, cut short of the ranks below it which bring less for each parameter.

What is bought is optimal for the parameters that it takes. What is left of a budget buys smaller
things that fit: at most one purchase is missing to more than the best.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

NOTHING = 1e-12  # shares of energy below it are rounding


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a weight (rows, columns) keeps: `energies` (min(rows, columns),), squared
    singular values, falling."""

    rows: int
    columns: int
    energies: Tensor

    @property
    def dense(self) -> int:
        """Parameters of the weight as it is."""
        return self.rows * self.columns

    @property
    def most(self) -> int:
        """The largest rank that has fewer parameters than the dense weight; at least 1."""
        return max(1, (self.dense - 1) // (self.rows + self.columns))

    def kept(self) -> list[float]:
        """The share of all energy that ranks 0, 1, …, `most` keep; all of it, where there is
        none."""
        energies = self.energies.double()
        total = float(energies.sum())
        if total <= 0:
            return [1.0] * (self.most + 1)
        return [0.0, *(energies.cumsum(0)[: self.most] / total).tolist()]


def ranks(spectra: Sequence[Spectrum], budget: int) -> list[int | None]:
    """A rank of at least 1 for each matrix, None where it stays dense, of `budget` parameters
    together, so that the sum of the shares of energy that they lose is least.

    ValueError where rank 1 of each is more than the budget."""
    left = budget - sum(one.rows + one.columns for one in spectra)
    if left < 0:
        raise ValueError(
            f"{budget:,} parameters for {len(spectra)} matrices, which have {budget - left:,} with "
            "rank 1 each"
        )
    offers = [_Offers(one) for one in spectra]
    queue = [(-offer.worth, number) for number, offer in enumerate(offers) if offer.price]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        offer = offers[number]
        if offer.price <= left:
            left -= offer.price
            offer.buy()
        elif not offer.cheaper():  # nothing more for this one
            continue
        if offer.price:
            heapq.heappush(queue, (-offer.worth, number))
    return [offer.rank for offer in offers]


class _Offers:
    """What a matrix has got, and what it could buy next: one more rank, or to stay dense."""

    def __init__(self, spectrum: Spectrum):
        self.spectrum, self.kept = spectrum, spectrum.kept()
        self.rank: int | None = 1
        self.dense_fits = True  # as far as known
        self._look()

    def _look(self) -> None:
        """Sets `price`, 0 for no offer, and `worth`, what it brings for a parameter."""
        self.price, self.worth, self.jumps = 0, 0.0, False
        if self.rank is None:
            return
        each = self.spectrum.rows + self.spectrum.columns
        if self.rank < self.spectrum.most:
            self.price = each
            self.worth = (self.kept[self.rank + 1] - self.kept[self.rank]) / each
        whole = self.spectrum.dense - self.rank * each
        if self.dense_fits and whole > 0:
            worth = (1 - self.kept[self.rank]) / whole
            if worth >= self.worth:
                self.price, self.worth, self.jumps = whole, worth, True
        if self.worth * self.price < NOTHING:
            self.price = 0

    def buy(self) -> None:
        """Takes the offer."""
        assert self.rank is not None
        self.rank = None if self.jumps else self.rank + 1
        self._look()

    def cheaper(self) -> bool:
        """Whether there is an offer below this one, which was too dear; it is made."""
        if not self.jumps:
            self.price = 0
            return False
        self.dense_fits = False
        self._look()
        return self.price > 0
