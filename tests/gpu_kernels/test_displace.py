"""θ + s z in one pass: Triton's kernel, in its interpreter where there is no GPU, against the plain twin."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from zoo_hf.noise import Direction, entries

from .conftest import DEVICE, DTYPES, LARGE, every_dtype, needs_triton


pytestmark = needs_triton


def displaced(weights, direction, start, scale, distribution, dtype):
    out = torch.full(weights.shape, torch.nan, dtype=dtype, device=DEVICE)
    torch.ops.zoo_hf.displace_(out, weights, list(direction), "lm_head.weight", start, scale, distribution)
    return out


@pytest.mark.parametrize("direction", [Direction(LARGE, 5, 2**31 + 7), Direction(0, LARGE, 0)])
@pytest.mark.parametrize(("numel", "start"), [(0, 0), (1, 0), (4097, 0), (333, 1), (128, 127), (5000, 2**33 + 3)])
def test_signs_in_registers_are_those_of_the_cpu_for_any_slice(both, direction, numel, start):
    zeros = torch.zeros(numel, device=DEVICE)
    found, _ = both(displaced, zeros, direction, start, 1.0, "rademacher", torch.float32)
    assert torch.equal(found.cpu(), entries(direction, "lm_head.weight", start, start + numel))


@pytest.mark.parametrize(("weights", "out"), [*itertools.product(DTYPES, repeat=2)])
def test_weights_are_displaced_to_the_same_bits(both, rng, weights, out):
    theta = torch.randn(777, generator=rng).to(DEVICE, weights)
    arguments = theta, Direction(3, 4, 5), 129, 1e-2, "rademacher", out
    found, expected = both(displaced, *arguments)
    assert torch.equal(found, expected)
    assert not torch.equal(found, theta.to(out))


def test_a_displacement_in_place_is_the_same(both, rng):
    theta = torch.randn(5000, generator=rng).to(DEVICE)

    def run():
        weights = theta.clone()
        torch.ops.zoo_hf.displace_(weights, weights, [1, 2, 3], "w", 0, 0.1, "rademacher")
        return weights

    found, _ = both(run)
    assert torch.equal((found - theta).sign().cpu(), entries(Direction(1, 2, 3), "w", 0, 5000))


@pytest.mark.parametrize("numel", [1, 2049, 4099])
def test_normals_in_registers_are_those_of_the_cpu_to_rounding(both, numel):
    zeros = torch.zeros(numel, device=DEVICE)
    found, expected = both(displaced, zeros, Direction(LARGE, 7, 8), 3, 1.0, "gaussian", torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert abs(found.square().mean().item() - 1) < 4 * (2 / numel) ** 0.5


@every_dtype
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("numel", [0, 1, 4097])
def test_a_population_is_displaced_as_its_members_one_by_one(both, rng, dtype, distribution, numel):
    theta = torch.randn(numel, generator=rng).to(DEVICE, dtype)
    index, scale = torch.tensor([0, 0, LARGE], device=DEVICE), torch.tensor([0.1, -0.1, 0.02], device=DEVICE)
    arguments = theta, index, scale, 1, LARGE, "lm_head.weight", distribution
    found, plain = both(torch.ops.zoo_hf.displaced_members, *arguments)
    assert found.shape == (3, numel)
    for row, number, size in zip(found, index.tolist(), scale.tolist(), strict=True):
        alone = displaced(theta, Direction(1, LARGE, number), 0, size, distribution, dtype)
        torch.testing.assert_close(row, alone, rtol=0 if distribution == "rademacher" else 1e-2, atol=1e-6)
    torch.testing.assert_close(found, plain, rtol=0 if distribution == "rademacher" else 1e-2, atol=1e-6)


def test_under_vmap_members_get_their_own_displacement(both, rng):
    theta, index = torch.randn(300, generator=rng).to(DEVICE), torch.tensor([4, 9], device=DEVICE)
    scale = torch.tensor(0.5, device=DEVICE)

    def member(number):
        return torch.ops.zoo_hf.displaced(theta, number, scale, 1, 2, "w")

    together, _ = both(torch.func.vmap(member), index)
    assert torch.equal(together, torch.stack([member(number) for number in index]))
    assert not torch.equal(together[0], together[1])


def test_the_compiler_sees_through_the_operations(rng):
    theta = torch.randn(300, generator=rng)
    index, scale = torch.tensor([4, 9]), torch.tensor([0.5, 0.5])
    for operation, arguments in (
        (torch.ops.zoo_hf.displaced_members.default, (theta, index, scale, 1, 2, "w", "rademacher")),
        (torch.ops.zoo_hf.displaced.default, (theta, index[0], scale[0], 1, 2, "w")),
        (torch.ops.zoo_hf.displace_.default, (theta.clone(), theta, [1, 2, 3], "w", 0, 0.1, "rademacher")),
    ):
        torch.library.opcheck(operation, arguments)


def test_doubles_are_displaced_plainly(run_by, rng):
    theta = torch.randn(300, generator=rng, dtype=torch.float64).to(DEVICE)
    found = run_by("triton", displaced, theta, Direction(1, 2, 3), 0, 1e-9, "rademacher", torch.float64)
    signs = entries(Direction(1, 2, 3), "lm_head.weight", 0, 300, dtype=torch.float64)
    torch.testing.assert_close((found - theta).cpu(), 1e-9 * signs, rtol=1e-6, atol=0)


def test_a_kernel_is_launched_on_the_device_of_its_tensors():
    from zoo_hf.kernels.gpu.devices import on_device_of

    second = on_device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")))
    assert isinstance(second, torch.cuda.device)
    assert second.idx == 1
    with on_device_of(torch.ones(1)) as nowhere:
        assert nowhere is None
