"""What a policy sees of the fleet, and what it says: the cost of each place. A policy is one class, a `Scorer`.

The fleet decides what fits, keeps the costs of equal demands, asks again only about nodes that changed, and takes the
least: equal costs in the order of rows (node name), then of columns (device UUID). So a cost may depend on the demand,
on one node's row, and on what the policy has learned; not on other rows. When what was learned moves costs that were
given before, `Scorer.epoch` changes, and all are asked for again (about a millisecond for 5000 nodes: not for each
pod, please).

`stranding.Stranding()` is the default's; `peers.peer(policy, seed)` makes all others. `Fleet(scorer=...)` takes any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_Number = TypeVar("_Number", bound=np.generic)


def at_rows(array: NDArray[_Number], rows: Ints) -> NDArray[_Number]:
    """``array[rows]`` of (N, D), kept so that a look along a node's GPUs is quick (ten times at 5000 nodes)."""
    return array.T.take(rows, axis=1).T


class Item(NamedTuple):
    """So many slots of one GPU: what one container asks for, or an init container with those that get its slots."""

    resource: str
    slots: int
    asks: tuple[int, ...]
    """Positions in `Demand.asks`, in order."""


@dataclass(frozen=True, slots=True)
class Want:
    """What is the same of all demands that may go to the same places at the same cost."""

    cpu_milli: int
    memory_mib: int
    items: tuple[Item, ...]
    products: frozenset[str] | None
    """GPUs that will do; None: any but `unfit`."""
    unfit: tuple[tuple[str, str], ...] = ()
    """(product, why not in words), sorted."""
    namespace: str = ""
    """"" while no GPU is isolated."""


class Table:
    """All nodes as arrays: a row for each node, in order of its name; a column for each of its GPUs, by UUID.

    N nodes, D: the most GPUs of any node, at least 1. To policies it is read-only. (N, D) are in Fortran's order:
    see `at_rows`.
    """

    __slots__ = (
        "cpu_free",
        "cpu_total",
        "gpus_free",
        "memory_free",
        "memory_total",
        "names",
        "product",
        "products",
        "room",
        "slots",
    )

    def __init__(self, nodes: int, devices: int) -> None:
        self.names: Sequence[str] = ()
        self.products: list[str] = [""]
        """The product of each code; 0 also stands where there is no GPU."""
        self.cpu_free: Ints = np.zeros(nodes, np.int64)
        """(N,) millicores; negative where more is taken than there is."""
        self.cpu_total: Ints = np.zeros(nodes, np.int64)
        self.memory_free: Ints = np.zeros(nodes, np.int64)
        """(N,) MiB."""
        self.memory_total: Ints = np.zeros(nodes, np.int64)
        self.slots: Ints = np.zeros((nodes, devices), np.int64, "F")
        """(N, D) slots of the GPU in all; 0: no GPU."""
        self.room: Ints = np.zeros((nodes, devices), np.int64, "F")
        """(N, D) slots of it that a pod could have now; 0 where it is closed."""
        self.gpus_free: Floats = np.zeros(nodes)
        """(N,) sum of room / slots."""
        self.product: Ints = np.zeros((nodes, devices), np.int64, "F")
        """(N, D) code: index of `products`."""


class Scorer(Protocol):
    """A policy. Deterministic: what it says follows from what it has learned, its seed, and its arguments."""

    @property
    def epoch(self) -> int:
        """Another number when costs given before hold no longer."""

    @property
    def spread(self) -> bool:
        """Containers of one pod on one node: emptiest GPU first; False: fullest first."""

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        """A pod arrived. `gpus`: how much of a GPU each of its items is, by the mean slots of the resource's GPUs."""

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        """The least is chosen. `rows` (R,), ascending: nodes where the demand fits; one item: on some GPU of it.

        A demand of one item: (R, D), the cost of each GPU as place for it; what stands at those where it does not fit
        means nothing. Otherwise: (R, 1), the cost of the node."""
