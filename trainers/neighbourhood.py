"""Neighbourhood optimisation of a forget loss: the algebra of StableUN, on lists of tensors.

A reconstruction of StableUN (arXiv 2509.20230): its code is not public, and of the paper we had what reviews and
digests say. What is reported: one step gives temporary parameters; the forget loss is measured again around them
(forgetting feedback), the retain loss at them (remembering feedback); where the two gradients conflict, that of
forgetting is projected onto the normal plane of that of remembering, and both are added. Everything else is our choice:
the formulas of the four perturbations, first order only, the weights, and the guard of the division.

    g0   = grad L_f(theta)                        theta' = theta - inner_step g0
    g_ff = mean over points k of grad L_f(theta' + eps_k)
    g_rf = grad L_r(theta')
    G_f  = g0 + forget_feedback g_ff              G_r = remember_feedback g_rf                 (split "disjoint")
    G_f  = g0 / 2 + forget_feedback g_ff          G_r = g0 / 2 + remember_feedback g_rf        (split "literal")
    c = <G_f, G_r>;  if c < 0: G_f <- G_f - c / (||G_r||^2 + 1e-12) G_r
    gradient of the step: G_f + G_r
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

STRATEGIES = ("sap", "gpn", "gap", "hws")
GUARD = 1e-12


def add(vector: Sequence[Tensor], other: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add `scale * other` to a vector, in place."""
    for a, b in zip(vector, other, strict=True):
        a.add_(b, alpha=scale)


def multiply(vector: Sequence[Tensor], scale: float) -> None:
    """Multiply a vector, in place."""
    for tensor in vector:
        tensor.mul_(scale)


class ParameterSpace:
    """The trained parameters as one vector, of which this process holds all or (FSDP2) its shards.

    Vectors are lists of tensors shaped like `tensors`. Lengths and products are those of the whole vector.

    Args:
        parameters: those that get a gradient.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._parameters = list(parameters)
        self.tensors = [_local(p) for p in self._parameters]
        self._groups = _shard_groups(self._parameters)

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ParameterSpace":
        """Return the trained parameters of a model, between two of its passes."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass without a backward one leaves the root's weights whole, in memory that is soon freed.
                module.reshard()
        return cls(p for p in model.parameters() if p.requires_grad)

    @property
    def sharded(self) -> bool:
        """Whether each process holds another part."""
        return bool(self._groups)

    def dot(self, one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
        """Inner product of two vectors, summed in float64, over all shards."""
        total = torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(one, two, strict=True)]).sum()
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
        return total.item()

    def norm(self, vector: Sequence[Tensor]) -> float:
        """Euclidean length."""
        return self.dot(vector, vector) ** 0.5

    def noise(self, generator: torch.Generator) -> list[Tensor]:
        """Standard normal noise; the same for the whole vector, however it is sharded."""
        return [_local(_like(p, torch.randn(p.shape, generator=generator, device=p.device))) for p in self._parameters]

    def take_gradient(self) -> list[Tensor]:
        """Return the gradient and clear it; a parameter without one has zeros."""
        found = [torch.zeros_like(t) if p.grad is None else _local(p.grad) for p, t in self._pairs()]
        for parameter in self._parameters:
            parameter.grad = None
        return found

    def set_gradient(self, vector: Sequence[Tensor]) -> None:
        """Make a vector the gradient that the optimizer sees."""
        for parameter, tensor in zip(self._parameters, vector, strict=True):
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = {"shape": parameter.shape, "stride": parameter.stride()}
                parameter.grad = DTensor.from_local(tensor, mesh, placements, run_check=False, **whole)
            else:
                parameter.grad = tensor

    def move(self, start: Sequence[Tensor], step: Sequence[Tensor] | None = None, scale: float = 1.0) -> None:
        """Set the parameters to `start + scale * step`, in place."""
        for tensor, value in zip(self.tensors, start, strict=True):
            tensor.copy_(value)
        if step is not None:
            add(self.tensors, step, scale)

    def _pairs(self):
        return zip(self._parameters, self.tensors, strict=True)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Shard a tensor that every process has in full, as a parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _shard_groups(parameters: Sequence[Tensor]) -> list:
    """Return the process groups over which the parts of a vector must be summed: none where each process has all."""
    sharded = next((p for p in parameters if isinstance(p, DTensor)), None)
    if sharded is None:
        return []
    return [sharded.device_mesh.get_group(n) for n, place in enumerate(sharded.placements) if isinstance(place, Shard)]


# ---------------------------------------------------------------------------------------------------------------------
# perturbations: vectors of length `radius`


def _to_length(space: ParameterSpace, vector: list[Tensor], length: float) -> list[Tensor]:
    multiply(vector, length / max(space.norm(vector), GUARD))
    return vector


def sap(space: ParameterSpace, gradient: Sequence[Tensor], radius: float) -> list[Tensor]:
    """Sharpness-aware: radius * g / ||g||, up the forget loss, as a relearning attack goes (SAM's; 2502.05374)."""
    return _to_length(space, [g.clone() for g in gradient], radius)


def gpn(space: ParameterSpace, radius: float, generator: torch.Generator) -> list[Tensor]:
    """Gaussian: radius * z / ||z||, which is z with sigma = radius / sqrt(n) up to the fluctuation of its length."""
    return _to_length(space, space.noise(generator), radius)


def gap(space: ParameterSpace, gradient: Sequence[Tensor], radius: float, generator: torch.Generator) -> list[Tensor]:
    """Gradient-aligned: radius * v / ||v||, v = |z| sign(g): the gradient's signs, random magnitudes."""
    noise = space.noise(generator)
    return _to_length(space, [z.abs() * g.sign() for z, g in zip(noise, gradient, strict=True)], radius)


def hws(space: ParameterSpace, average: Sequence[Tensor], radius: float, pull: float) -> list[Tensor]:
    """Towards the history of the weights: pull * (average - now), at most `radius` long."""
    step = [pull * (old - now) for old, now in zip(average, space.tensors, strict=True)]
    return _to_length(space, step, radius) if space.norm(step) > radius else step


# ---------------------------------------------------------------------------------------------------------------------
# the step


def project_conflict(
    space: ParameterSpace, forget: list[Tensor], retain: Sequence[Tensor], project: bool = True
) -> tuple[float, bool]:
    """Take from `forget`, in place, what goes against `retain`; nothing where they do not conflict.

    Args:
        space: the parameters.
        forget: gradient of forgetting.
        retain: gradient of remembering.
        project: false only measures.

    Returns:
        Their cosine before, and whether they conflicted.
    """
    product, square = space.dot(forget, retain), space.dot(retain, retain)
    cosine = product / max((space.dot(forget, forget) * square) ** 0.5, GUARD)
    if project and product < 0:
        add(forget, retain, -product / (square + GUARD))
    return cosine, product < 0


@dataclass(frozen=True)
class Neighbourhood:
    """How a neighbourhood step is made; `StableUnlearnConfig` explains each."""

    perturbation: str
    points: int
    radius: float
    base_weight: float
    forget_feedback: float
    remember_feedback: float
    split: str
    project_conflicts: bool
    pull: float


@dataclass(frozen=True)
class StepReport:
    """What happened in a step; losses are what the callables returned."""

    forget_loss: Tensor  # at theta
    nearby_loss: Tensor  # mean over the points
    retain_loss: Tensor  # at theta'
    cosine: float
    conflict: bool
    passes: int  # forward and backward, of half a batch


def neighbourhood_gradient(
    space: ParameterSpace,
    forget: Callable[[], Tensor],
    retain: Callable[[], Tensor],
    how: Neighbourhood,
    inner_step: float,
    step: int,
    generator: torch.Generator,
    average: Sequence[Tensor] | None = None,
) -> StepReport:
    """Leave the gradient of a neighbourhood step in the parameters, and the parameters bit for bit as they were.

    It holds, each of the parameters' size: a copy of them, g0, the gradient, and a perturbation.

    Args:
        space: the parameters.
        forget: runs the forget loss of the whole batch backward and returns it; the gradient accumulates.
        retain: the same for the retain loss.
        how: the kind of step.
        inner_step: length of the step to the temporary parameters, in units of g0.
        step: number of this step, which `mix` goes on from.
        generator: of the noise.
        average: the weights' history, which hws needs.
    """
    start = [tensor.clone() for tensor in space.tensors]
    points = how.points if how.forget_feedback else 0
    cycle = STRATEGIES if how.perturbation == "mix" else (how.perturbation,)
    kinds = [cycle[(step * points + k) % len(cycle)] for k in range(points)]
    passes = 2 + points
    nearby: list[Tensor] = []
    try:
        base = forget()
        g0 = ascent = space.take_gradient()
        if "sap" in kinds and inner_step:  # where there is no inner step, the ascent is g0's
            space.move(start, g0, -inner_step)
            forget()
            ascent, passes = space.take_gradient(), passes + 1
        for kind in kinds:
            space.move(start, g0, -inner_step)
            match kind:
                case "sap":
                    shift = sap(space, ascent, how.radius)
                case "gpn":
                    shift = gpn(space, how.radius, generator)
                case "gap":
                    shift = gap(space, g0, how.radius, generator)
                case _:
                    shift = hws(space, average or start, how.radius, how.pull)
            add(space.tensors, shift)
            shift = None
            nearby.append(forget())
        forgetting = space.take_gradient()
        space.move(start, g0, -inner_step)
        kept = retain()
        remembering = space.take_gradient()
    finally:
        space.move(start)
    multiply(forgetting, how.forget_feedback / max(points, 1))
    multiply(remembering, how.remember_feedback)
    share = how.base_weight / 2 if how.split == "literal" else how.base_weight
    add(forgetting, g0, share)
    if how.split == "literal":
        add(remembering, g0, share)
    del g0, ascent
    cosine, conflict = project_conflict(space, forgetting, remembering, how.project_conflicts)
    add(forgetting, remembering)
    space.set_gradient(forgetting)
    return StepReport(base, torch.stack(nearby).mean() if nearby else base, kept, cosine, conflict, passes)
