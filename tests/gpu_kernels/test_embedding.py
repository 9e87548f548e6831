"""Embeddings of members W + s Z: the kernel, interpreted where there is no GPU, and its plain twin against rows."""

import pytest
import torch
from torch.func import vmap

from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.kernels.embedding import perturbed_embedding, perturbed_embedding_population
from zoo_hf.noise import Direction, entries

from .conftest import DEVICE, every_backend, every_dtype


NAME = {"seed": 2**32 - 1, "step": 2**32 - 7, "name": "embeddings.weight"}


def made(rng, members, tokens, rows, width, dtype=torch.float32):
    """ids, W, and the members' indices, of which two are equal, and scales."""
    ids = torch.randint(rows, (members, tokens), generator=rng)
    weight = torch.randn(rows, width, generator=rng).to(dtype)
    index = (torch.arange(members) + 1) // 2 + 2**32 - 2
    return [each.to(DEVICE) for each in (ids, weight, index, 0.01 * (-1.0) ** torch.arange(members))]


def expected(ids, weight, index, scale):
    """The rows of the members' matrices, which are summed in float32 and rounded once."""
    names = [Direction(NAME["seed"], NAME["step"], int(i)) for i in index]
    z = [entries(name, NAME["name"], 0, weight.numel(), device=DEVICE).view(weight.shape) for name in names]
    own = [(weight.float() + s * z).to(weight.dtype)[i] for s, z, i in zip(scale, z, ids, strict=True)]
    return torch.stack(own) if own else torch.empty(*ids.shape, weight.shape[1], dtype=weight.dtype)


@every_backend
@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 20, 256), (2, 40, 77, 192), (1, 7, 1000, 101), (2, 9, 300, 3), (0, 5, 9, 8), (2, 0, 9, 8)],
    ids=str,
)
def test_rows_are_those_of_the_members_matrices(run_by, rng, kernels, dtype, shape):
    arguments = made(rng, *shape, dtype)
    assert torch.equal(run_by(kernels, perturbed_embedding_population, *arguments, **NAME), expected(*arguments))


@every_backend
def test_strides_and_the_type_of_the_ids_do_not_matter(run_by, rng, kernels):
    ids, weight, index, scale = made(rng, 3, 5, 20, 64)
    strange = ids.mT.contiguous().mT.int(), weight.mT.contiguous().mT, index, scale
    found = run_by(kernels, perturbed_embedding_population, *strange, **NAME)
    assert torch.equal(found, expected(ids, weight, index, scale))


@every_backend
def test_under_vmap_a_member_is_one_of_the_population(monkeypatch, rng, kernels):
    monkeypatch.setenv(VARIABLE, kernels)
    ids, weight, index, scale = made(rng, 3, 10, 20, 64)

    def layer(ids, index, scale):
        return perturbed_embedding(ids, weight, index, scale, **NAME)

    truth = expected(ids, weight, index, scale).unflatten(1, (2, 5))
    own = ids.unflatten(1, (2, 5))
    assert torch.equal(vmap(layer, in_dims=(2, 0, 0))(own.movedim(0, 2), index, scale), truth)
    assert torch.equal(layer(own[1], index[1], scale[1]), truth[1])
    same = vmap(layer, in_dims=(None, 0, 0), out_dims=1)(own[0], index, scale)
    truth = expected(ids[:1].expand_as(ids), weight, index, scale).unflatten(1, (2, 5))
    assert torch.equal(same, truth.movedim(0, 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_give_the_same_numbers(rng, backend):
    ids, weight, index, scale = made(rng, 3, 10, 20, 64)

    def layer(ids, index, scale):
        return 2 * vmap(lambda *own: perturbed_embedding(own[0], weight, *own[1:], **NAME))(ids, index, scale)

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        assert torch.equal(compiled(ids, index, scale), layer(ids, index, scale))


def test_operations_are_what_their_schemas_and_fakes_say(rng):
    ids, weight, index, scale = made(rng, 3, 10, 20, 64)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(perturbed_embedding_population, (ids, weight, index, scale, *NAME.values()), **checks)
    torch.library.opcheck(perturbed_embedding, (ids[0, 0], weight, index[0], scale[0], *NAME.values()), **checks)
