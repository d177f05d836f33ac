"""`IntrinsicMuon`: the rule of `intrinsic` as an optimizer over parameters that live on a manifold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.manifolds.grassmann import Grassmann
from dreamrie.manifolds.intrinsic import Manifold, direction
from dreamrie.manifolds.spd import SPD
from dreamrie.manifolds.stiefel import Stiefel

MANIFOLDS: dict[str, Manifold] = {"grassmann": Grassmann(), "spd": SPD(), "stiefel": Stiefel()}
"""Manifolds by name; add an object with the methods of `Manifold` to use your own."""


class IntrinsicMuon(Optimizer):
    """Steepest descent in the intrinsic spectral norm, with heavy-ball momentum.

    Per step: M <- momentum * M + grad f, x <- R_x(-lr * direction(M)), M <- its transport to the new x. M is the raw
    sum of gradients; msign is taken of M, not stored in it. The size of a step is lr alone, whatever the size of the
    gradient, so let lr fall to zero to converge.

    Parameters without a gradient are left alone, state included.

    Source: arXiv:2605.09238. The momentum is carried by projection on Stiefel and Grassmann, and by parallel transport
    on SPD, where projection would change its length with the metric.

    Args:
        params: parameters, each a point of the manifold in fp32 or fp64, or dicts {"params": [...], "manifold": ...}
            for parameter groups.
        manifold: a name in `MANIFOLDS`.
        lr: intrinsic spectral norm of a step; see the module of each manifold for its unit.
        momentum: heavy-ball factor in [0, 1).

    Raises:
        ConfigError: an option is bad, or a parameter is not a point of its manifold.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        manifold: str,
        lr: float = 1e-2,
        momentum: float = 0.9,
    ) -> None:
        given: list[Any] = list(params)
        if not given:
            raise ConfigError("IntrinsicMuon: no parameters were given.")
        super().__init__(given, {"manifold": manifold, "lr": lr, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": [...], option: value, ...}; options not given take the defaults.

        Args:
            param_group: "params" and any option of the constructor.

        Raises:
            ConfigError: an option is bad, or a parameter is not a point of its manifold.
        """
        group = self.defaults | param_group
        if group["manifold"] not in MANIFOLDS:
            raise ConfigError(
                f"IntrinsicMuon: manifold {group['manifold']!r} is unknown; use one of {', '.join(sorted(MANIFOLDS))}."
            )
        if not float(group["lr"]) >= 0:
            raise ConfigError(f"IntrinsicMuon: lr must be at least 0, got {group['lr']}.")
        if not 0 <= group["momentum"] < 1:
            raise ConfigError(
                f"IntrinsicMuon: momentum must be in [0, 1), got {group['momentum']}."
            )
        params = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        for index, parameter in enumerate(params):
            try:
                MANIFOLDS[group["manifold"]].check_point(parameter.detach())
            except NumericalError as error:
                raise ConfigError(
                    f"IntrinsicMuon: parameter {index} of the group is not a point. {error}"
                ) from error
        super().add_param_group(param_group | {"params": params})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            NumericalError: a gradient is not finite, or a step leaves the manifold. Nothing is written.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves = []
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if not bool(torch.isfinite(gradient).all()):
                    raise NumericalError(
                        f"IntrinsicMuon: the gradient of parameter {index}, group {number}, shape "
                        f"{tuple(parameter.shape)}, is not finite. Lower the learning rate, or look for an overflow in "
                        "the loss."
                    )
                moves.append((parameter, *self._moved(parameter, gradient, group)))
        for parameter, point, momentum in moves:
            parameter.copy_(point)
            self.state[parameter]["momentum"] = momentum
        return loss

    def _moved(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the new point and the momentum there."""
        manifold = MANIFOLDS[group["manifold"]]
        point = parameter.detach()
        momentum = manifold.gradient(point, gradient)
        if "momentum" in self.state.get(parameter, {}):
            momentum = momentum + group["momentum"] * self.state[parameter]["momentum"]
        new = manifold.retract(point, direction(manifold, point, momentum), -float(group["lr"]))
        return new, manifold.transport(point, momentum, new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of an equally built optimizer returned.

        Args:
            state_dict: see `torch.optim.Optimizer.state_dict`.

        Raises:
            ConfigError: a group belongs to another manifold. Nothing is changed.
        """
        own = [group["manifold"] for group in self.param_groups]
        saved = [group.get("manifold") for group in state_dict["param_groups"]]
        if own != saved:
            raise ConfigError(
                f"IntrinsicMuon: the state is of the manifolds {saved}, this optimizer has {own}. Build it as the one "
                "that was saved."
            )
        super().load_state_dict(state_dict)
