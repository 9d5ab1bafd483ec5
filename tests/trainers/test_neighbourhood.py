import dataclasses

import pytest
import torch

from afterglow.trainers.neighbourhood import (
    STRATEGIES,
    Neighbourhood,
    ParameterSpace,
    gap,
    gpn,
    hws,
    neighbourhood_gradient,
    project_conflict,
    sap,
)

PLAIN = Neighbourhood(
    perturbation="sap",
    points=1,
    radius=0.1,
    base_weight=1.0,
    forget_feedback=1.0,
    remember_feedback=1.0,
    split="disjoint",
    project_conflicts=True,
    pull=0.5,
)


def space_of(*shapes, seed=0) -> ParameterSpace:
    torch.manual_seed(seed)
    return ParameterSpace([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])


def vector(space, seed) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn_like(t) for t in space.tensors]


def noise(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# perturbations and projection


def test_every_perturbation_has_the_radius_as_its_length():
    space = space_of((40, 30), (7,))
    g = vector(space, 1)
    average = [t + 5 for t in space.tensors]
    for found in (
        sap(space, g, 0.3),
        gpn(space, 0.3, noise()),
        gap(space, g, 0.3, noise()),
        hws(space, average, 0.3, 0.5),
    ):
        assert space.norm(found) == pytest.approx(0.3, rel=1e-6)


def test_directions():
    space = space_of((40, 30), (7,))
    g = vector(space, 1)
    up = sap(space, g, 0.3)
    assert space.dot(up, g) == pytest.approx(0.3 * space.norm(g), rel=1e-6)
    aligned = gap(space, g, 0.3, noise())
    assert all(torch.equal(a.sign(), b.sign()) for a, b in zip(aligned, g, strict=True))
    fresh = noise()
    assert not torch.equal(gpn(space, 0.3, fresh)[0], gpn(space, 0.3, fresh)[0])
    near = [t + 1e-4 for t in space.tensors]
    for step in hws(space, near, 0.3, 0.5):
        torch.testing.assert_close(step, torch.full_like(step, 5e-5), rtol=1e-2, atol=1e-7)


def test_a_gradient_of_zero_perturbs_nothing():
    space = space_of((3,))
    assert sap(space, [torch.zeros(3)], 1.0)[0].tolist() == [0.0, 0.0, 0.0]


def test_projection_is_orthogonal_after_a_conflict_and_nothing_otherwise():
    space = space_of((50, 20), (9,))
    retain = vector(space, 1)
    forget = [f - 0.5 * r for f, r in zip(vector(space, 2), retain, strict=True)]
    cosine, conflict = project_conflict(space, forget, retain)
    assert conflict and cosine < 0
    assert abs(space.dot(forget, retain)) < 1e-6 * space.norm(forget) * space.norm(retain)
    assert space.dot(forget, retain) >= -1e-3
    friendly = [f + r for f, r in zip(forget, retain, strict=True)]
    before = [f.clone() for f in friendly]
    cosine, conflict = project_conflict(space, friendly, retain)
    assert not conflict and cosine > 0
    assert all(torch.equal(a, b) for a, b in zip(friendly, before, strict=True))


def test_a_conflict_with_nothing_is_harmless():
    space = space_of((3,))
    forget = [torch.tensor([1.0, 2.0, 3.0])]
    assert project_conflict(space, forget, [torch.zeros(3)]) == (0.0, False)
    assert forget[0].tolist() == [1.0, 2.0, 3.0]


# ---------------------------------------------------------------------------------------------------------------------
# a step


def quadratic(space, target, seen=None):
    """A loss with a gradient that depends on the place: 1/4 sum (x - target)^4."""

    def run() -> torch.Tensor:
        loss = sum(((p - t) ** 4).sum() / 4 for p, t in zip(space._parameters, target, strict=True))
        loss.backward()
        if seen is not None:
            seen.append([t.clone() for t in space.tensors])
        return loss.detach()

    return run


def cube(x: list, target: list) -> list:
    return [(a - b) ** 3 for a, b in zip(x, target, strict=True)]


def step(how, inner_step=0.01, seed=0, number=0, average=None):
    """One step on two quartics; returns space, gradient, targets, the places of the forget passes, and the report."""
    space = space_of((6, 5), (4,))
    far, near, seen = vector(space, 11), vector(space, 12), []
    report = neighbourhood_gradient(
        space, quadratic(space, far, seen), quadratic(space, near), how, inner_step, number, noise(seed), average
    )
    return space, space.take_gradient(), far, near, seen, report


@pytest.mark.parametrize("perturbation", [*STRATEGIES, "mix"])
def test_parameters_come_back_bit_for_bit(perturbation):
    how = dataclasses.replace(PLAIN, perturbation=perturbation, points=4)
    before = space_of((6, 5), (4,))
    average = [t + 1 for t in before.tensors]
    space, *_, seen, report = step(how, average=average)
    assert all(torch.equal(a, b) for a, b in zip(space.tensors, before.tensors, strict=True))
    away = [space.norm([x - y for x, y in zip(place, before.tensors, strict=True)]) for place in seen[1:]]
    assert min(away) > 0
    assert report.passes == 6 + (perturbation in ("sap", "mix"))
    assert len(seen) == report.passes - 1


def test_parameters_come_back_when_a_pass_fails():
    space = space_of((6, 5))
    before = space.tensors[0].clone()
    forget, calls = quadratic(space, vector(space, 1)), []

    def failing() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return forget()

    with pytest.raises(MemoryError):
        neighbourhood_gradient(space, failing, forget, PLAIN, 0.1, 0, noise())
    assert torch.equal(space.tensors[0], before)


def test_sap_by_hand():
    how = dataclasses.replace(PLAIN, project_conflicts=False, forget_feedback=0.7, remember_feedback=0.3)
    space, gradient, far, near, seen, _ = step(how, inner_step=0.02)
    x = space.tensors
    g0 = cube(x, far)
    tau = [a - 0.02 * b for a, b in zip(x, g0, strict=True)]
    up = cube(tau, far)
    point = [a + 0.1 * b / space.norm(up) for a, b in zip(tau, up, strict=True)]
    for found, expected in zip(seen[2], point, strict=True):
        torch.testing.assert_close(found, expected)
    expected = [a + 0.7 * b + 0.3 * c for a, b, c in zip(g0, cube(point, far), cube(tau, near), strict=True)]
    for found, by_hand in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)


def test_literal_split_gives_half_of_the_forget_gradient_to_each_side_so_that_only_projection_differs():
    same = {"project_conflicts": False, "perturbation": "gpn"}
    one = step(dataclasses.replace(PLAIN, **same))[1]
    two = step(dataclasses.replace(PLAIN, split="literal", **same))[1]
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    one = step(dataclasses.replace(PLAIN, perturbation="gpn"))
    two = step(dataclasses.replace(PLAIN, perturbation="gpn", split="literal"))
    assert one[5].cosine != pytest.approx(two[5].cosine, abs=1e-3)


def test_without_radius_and_inner_step_the_feedback_is_the_gradient_itself():
    how = dataclasses.replace(PLAIN, radius=1e-12, project_conflicts=False, base_weight=0.0, points=3)
    space, gradient, far, near, _, report = step(how, inner_step=0.0)
    expected = [a + b for a, b in zip(cube(space.tensors, far), cube(space.tensors, near), strict=True)]
    for found, by_hand in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)
    assert report.nearby_loss.item() == pytest.approx(report.forget_loss.item(), rel=1e-6)


def test_without_feedback_and_inner_step_it_is_gradient_difference_with_projected_conflicts():
    space, gradient, far, near, _, report = step(dataclasses.replace(PLAIN, forget_feedback=0.0), inner_step=0.0)
    forget, retain = cube(space.tensors, far), cube(space.tensors, near)
    project_conflict(space, forget, retain)
    for found, f, r in zip(gradient, forget, retain, strict=True):
        torch.testing.assert_close(found, f + r)
    assert report.passes == 2


def test_sam_is_a_special_case_of_three_passes():
    how = dataclasses.replace(PLAIN, base_weight=0.0, project_conflicts=False, remember_feedback=2.25)
    space, gradient, far, near, _, report = step(how, inner_step=0.0)
    g = cube(space.tensors, far)
    point = [x + 0.1 * d / space.norm(g) for x, d in zip(space.tensors, g, strict=True)]
    for found, f, r in zip(gradient, cube(point, far), cube(space.tensors, near), strict=True):
        torch.testing.assert_close(found, f + 2.25 * r, rtol=1e-5, atol=1e-6)
    assert report.passes == 3


def test_mix_takes_turns_over_points_and_steps():
    four = dataclasses.replace(PLAIN, perturbation="mix", points=4)
    assert step(four)[5].passes == 7
    one = dataclasses.replace(PLAIN, perturbation="mix", points=1)
    assert [step(one, number=n)[5].passes for n in range(4)] == [4, 3, 3, 3]  # sap costs one more


# ---------------------------------------------------------------------------------------------------------------------
# what it is for


def landscape(x: torch.Tensor) -> torch.Tensor:
    """A wide valley around (3, 0), and in its slope, at about (0, 0), a pit that is deeper but only 0.2 wide."""
    wide = 0.05 * ((x[0] - 3) ** 2 + 4 * x[1] ** 2)
    return wide - 0.5 * torch.exp(-(x[0] ** 2 + x[1] ** 2) / (2 * 0.1**2))


def end_of(perturbation: str | None) -> torch.Tensor:
    x = torch.nn.Parameter(torch.tensor([0.0, 0.02]))
    space = ParameterSpace([x])

    def forget() -> torch.Tensor:
        loss = landscape(x)
        loss.backward()
        return loss.detach()

    def retain() -> torch.Tensor:
        return torch.zeros(())

    how = dataclasses.replace(
        PLAIN, perturbation=perturbation or "sap", points=4, radius=0.5, forget_feedback=12.0 if perturbation else 0.0
    )
    for number in range(300):
        neighbourhood_gradient(space, forget, retain, how, 0.01, number, noise(number))
        x.data -= 0.02 * x.grad
        x.grad = None
    return x.detach()


@pytest.mark.parametrize("perturbation", ["sap", "gpn", "gap"])
def test_the_flat_minimum_is_found_where_plain_descent_ends_in_the_sharp_one(perturbation):
    sharp, flat = end_of(None), end_of(perturbation)
    assert sharp.norm() < 0.05 and (flat - torch.tensor([3.0, 0.0])).norm() < 0.3
    assert landscape(sharp) < landscape(flat), "the sharp one is the deeper one"
    around = 0.5 * torch.nn.functional.normalize(torch.randn(100, 2, generator=noise()))
    worst = {name: max(landscape(place + shift).item() for shift in around) for name, place in
             {"sharp": sharp, "flat": flat}.items()}  # fmt: skip
    assert worst["flat"] < 0.1 < 0.4 < worst["sharp"]
