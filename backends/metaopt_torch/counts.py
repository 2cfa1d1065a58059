"""How many steps each leaf has made."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt_torch.leaf import Leaf
from metaopt_torch.memory import address, shared

__all__ = ["Counts"]


class Counts:
    """The counts of leaves with a state: entries of one vector a device, which advance at once.

    The "step" of a leaf's state becomes such an entry; but where other processes have it too, it
    stays where it is.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._vectors: list[tuple[Tensor, list[str]]] = []
        #: What is added to each vector, by the leaves that make a step.
        self._increments: dict[tuple[str, ...], list[Tensor]] = {}
        by_device: dict[torch.device, list[Leaf]] = defaultdict(list)
        for leaf in leaves:
            by_device[leaf.device].append(leaf)
        for device, members in by_device.items():
            if any(shared(leaf.state["step"]) for leaf in members):
                for leaf in members:
                    self._vectors.append((leaf.state["step"].reshape(1), [leaf.name]))
                continue
            # one kernel advances all: by itself, each count would be a launch a leaf and step
            counts = [torch.as_tensor(leaf.state["step"]) for leaf in members]
            vector = torch.stack([c.to(device, torch.int32).reshape(()) for c in counts])
            for leaf, entry in zip(members, vector.unbind(), strict=True):
                leaf.state["step"] = entry
            self._vectors.append((vector, [leaf.name for leaf in members]))
        self._entries = {leaf.name: leaf.state["step"] for leaf in leaves}
        self._addresses = {name: address(entry) for name, entry in self._entries.items()}
        self.settle()

    def settle(self) -> None:
        """Take what the counts are now for what they should be."""
        self._versions = [vector._version for vector, _ in self._vectors]

    def edited(self) -> bool:
        """Return whether someone else has written to a count since."""
        return self._versions != [vector._version for vector, _ in self._vectors]

    def holds(self, leaf: Leaf, step: Tensor) -> bool:
        """Return whether the count of a leaf is still the entry that it was given."""
        own = self._entries.get(leaf.name) is step
        return own and address(step) == self._addresses[leaf.name]

    def advance(self, names: Sequence[str], accepted: Tensor | None) -> None:
        """Count a step of these leaves, if it is accepted."""
        key = tuple(names)
        if key not in self._increments:
            if len(self._increments) > 100:  # leaves frozen at random make new ones without end
                self._increments.clear()
            active = set(names)
            self._increments[key] = [
                torch.tensor(
                    [name in active for name in members], dtype=torch.int32, device=vector.device
                )
                for vector, members in self._vectors
            ]
        for (vector, _), added in zip(self._vectors, self._increments[key], strict=True):
            vector.add_(
                added if accepted is None else torch.where(accepted.to(added.device), added, 0)
            )
        self.settle()
