"""The blocks of step sizes and of learned numbers: their meta-gradients and meta updates."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.blocks import Blocks
from metaopt.configuration import Configuration
from metaopt.jets import Jet
from metaopt.meta import BlockRow, begun, carried, meta_step
from metaopt.rules import Rule
from metaopt.step import sizes_of
from metaopt_torch.build import Built
from metaopt_torch.compiler import Compiled, Eager
from metaopt_torch.meta_gradient import MetaGradient
from metaopt_torch.pass_inputs import OfNumber
from metaopt_torch.passes import Arrays, Pass
from metaopt_torch.state_keys import learned_key

__all__ = ["BlockUpdate"]


class BlockUpdate:
    """The blocks of step sizes, or of a learned number: their meta-gradient and meta update.

    Parameters
    ----------
    built : Built
    config : Configuration
        The optimizer's, or that of the learned number.
    blocks : Blocks
    slots : sequence of str
        Those of the meta update's rule.
    number : str, optional
        The name of the learned number.
    """

    update: Compiled | Eager

    def __init__(
        self,
        built: Built,
        config: Configuration,
        blocks: Blocks,
        slots: Iterable[str],
        number: str | None = None,
    ) -> None:
        self._state, self._number = built.block_state, number
        self.config, self._blocks, self._slots = config, blocks, tuple(slots)
        self.meta_gradient = MetaGradient(built, number)
        #: Which blocks have a leaf with a gradient.
        self.present = torch.ones((), dtype=torch.bool)
        self.meta = _meta(config, blocks, self._slots)

    @classmethod
    def of_step_sizes(cls, built: Built) -> "BlockUpdate":
        """Return that of the step sizes."""
        return cls(built, built.config, built.plan.blocks, built.block_state.slots)

    @classmethod
    def of_number(cls, built: Built, name: str) -> "BlockUpdate":
        """Return that of a learned number."""
        number = built.plan.learned[name]
        slots = number.state["meta_slots"]
        return cls(built, built.config.learned[name], number.blocks, slots, name)

    def __getitem__(self, key: str) -> Tensor:
        return self._state[key if self._number is None else learned_key(self._number, key)]

    def same(self, other: "BlockUpdate") -> bool:
        """Return whether the meta updates of both are one function."""
        one, two = self.config, other.config
        return (
            self._blocks == other._blocks
            and self._slots == other._slots
            and one.meta is two.meta
            and (one.bounds, one.sigma, one.meta_lr) == (two.bounds, two.sigma, two.meta_lr)
        )

    def sizes(self) -> tuple[Any, Any]:
        """Return the values and their derivatives; with sigma="identity" these are beta itself."""
        return self._sizes_at(self["beta"])

    def _sizes_at(self, beta: Tensor) -> tuple[Any, Any]:
        sizes = sizes_of(self.config.sigma_map, beta)
        return sizes.value, sizes.first

    def inputs(self, sizes: tuple[Tensor, Tensor], mask: Tensor) -> OfNumber:
        """Return what passes take of a learned number; `mask` is of blocks whose traces go on."""
        return sizes, mask, self.config.discounts[-1]

    def moved(self, z: Tensor, accepted: Tensor | None) -> tuple[tuple[Any, Any], Tensor]:
        """Make the meta update; return the values to step with, and where traces go on."""
        before = self._sizes_at(self["beta"].clone())
        z = begun(z, self["meta_count"])
        mask = carried(z, self["meta_count"])
        self.move(z, accepted)
        return (self.sizes() if self.config.meta_first else before), mask

    def move(self, z: Tensor, accepted: Tensor | None) -> None:
        """Make the meta update with a meta-gradient that counts."""
        arrays = self._arrays(z, accepted)
        self.update.prepared(self.config.meta, arrays)(*arrays.values())

    def prepared(self, z: Tensor, accepted: Tensor | None) -> None:
        """Compile the meta update."""
        self.update.prepared(self.config.meta, self._arrays(z, accepted))

    def _arrays(self, z: Tensor, accepted: Tensor | None) -> dict[str, Tensor]:
        """Return what the meta update takes."""
        names = ("beta", "meta_count", "restarts", "meta_grad")
        arrays = {"z": z, "present": self.present}
        arrays |= {name: self[name] for name in names}
        arrays |= {slot: self[f"meta_{slot}"] for slot in self._slots}
        if accepted is not None:
            arrays["accepted"] = accepted
        return arrays


def _meta(config: Configuration, blocks: Blocks, slots: Sequence[str]) -> Pass:
    """Return the pass that writes the meta update of all blocks, where the step is accepted.

    It holds no array of the state: once compiled it is used again when that has been replaced.
    """

    def run(rule: Rule, arrays: Arrays) -> None:
        z, beta = arrays["z"], arrays["beta"]
        row = BlockRow(Jet(beta), {slot: Jet(arrays[slot]) for slot in slots}, arrays["meta_count"])
        row, restarts = meta_step(
            rule,
            config.sigma_map,
            row,
            Jet(z),
            meta_lr=config.meta_lr,
            bounds=config.limits(blocks, beta),
            present=arrays["present"],
        )
        written = {
            "beta": row.beta.value,
            "meta_count": row.count,
            "restarts": arrays["restarts"] + restarts,
            "meta_grad": z,
        }
        written |= {slot: jet.value for slot, jet in row.slots.items()}
        accepted = arrays.get("accepted")
        for name, new in written.items():
            old = arrays[name]
            old.copy_(new if accepted is None else torch.where(accepted, new, old))

    return run
