"""The machines that a world can be: what computing and copying KV costs there.

Owns the built-in cost models and the making of one from a mapping; who fits or reads one is outside. The built-in
figures are round ones for their class, not measurements of one machine: compare policies with them, not machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..accounting import FLOPS_PER_BYTE, Gamma, GammaSource, gamma_from_times
from ..model import CostModel

TURN_S = 0.002
"""What the start of each turn takes besides its tokens: tokenising, one more slot in the batch."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine's speeds. Invariant: bytes_per_token and the prefill, decode and host speeds are above 0."""

    name: str
    bytes_per_token: int
    cost: CostModel
    """`disk_bytes_per_second` 0: there is no disk tier."""
    gamma: Gamma | None = None

    def decode_step_s(self, sequences: int) -> float:
        """Seconds of a decode step that computes one token of each; at least one sequence."""
        return self.cost.decode_step_seconds + (sequences - 1) * self.cost.decode_seconds_per_sequence

    def prefill_s(self, tokens: int, held_tokens: int = 0) -> float:
        return self.cost.prefill_seconds(tokens, held_tokens)


def _gamma_8b_on_h100() -> Gamma:
    # Llama 3 8B: 32 layers x 8 heads x (128 + 128) x 2 bytes, 8.03e9 parameters; the formula of accounting.py.
    return Gamma(131_072 * FLOPS_PER_BYTE["H100"] / (2 * 8.03e9), GammaSource.TABLE)


MACHINES: dict[str, Machine] = {
    "h100-8b": Machine("h100-8b", 131_072, CostModel(5e-5, 6e-10, 0.0126, 0.0006, 25e9, 3e9), _gamma_8b_on_h100()),
    "unified": Machine("unified", 57_344, CostModel(1e-3, 4e-9, 0.052, 0.002, 50e9, 3e9)),
    "cpu": Machine("cpu", 23_053, CostModel(6e-3, 0.0, 0.018, 0.003, 4e9, 3e9)),
}
"""An H100 with an 8B model; a small machine whose GPU shares the host's RAM; the embedded engine on two CPU cores."""

EMBEDDED_BYTES_PER_TOKEN = 23_040
"""Of the embedded engine's default model: what a fitted cost model, which holds speeds alone, is completed with."""


def machine_of(name: str, figures: object) -> Machine:
    """A machine from a mapping: `bytes_per_token` and the fields of CostModel, the disk's speed optional.

    What an engine keeps of its fit is such a mapping but for `bytes_per_token`; more keys are no error.

    Raises:
        ValueError: it is no mapping, or a figure is missing, not a number, or not above 0.
    """
    if not isinstance(figures, Mapping):
        raise ValueError(f"{name}: no mapping of figures")  # noqa: TRY004 - one error for whatever a file holds
    wanted = {field.name: field.default for field in fields(CostModel)}
    values = {key: _figure(name, figures, key) for key in wanted}
    for key in ("prefill_seconds_per_token", "decode_step_seconds", "host_bytes_per_second"):
        if not values[key] > 0:
            raise ValueError(f"{name}: {key} must be above 0")
    per_token = int(_figure(name, figures, "bytes_per_token", EMBEDDED_BYTES_PER_TOKEN))
    if per_token <= 0:
        raise ValueError(f"{name}: bytes_per_token must be above 0")
    context_s = _figure(name, figures, "decode_seconds_per_context_token")
    gamma = gamma_from_times(context_s, values["prefill_seconds_per_token"])
    return Machine(name, per_token, CostModel(**values), gamma)


def _figure(name: str, figures: Mapping[str, object], key: str, default: float = 0.0) -> float:
    value = figures.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: {key}: {value!r} is no number of 0 or more")
    return float(value)
