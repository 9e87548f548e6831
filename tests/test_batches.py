"""Which examples a member sees: the same whenever a batch is made again, or a share of it for every pair."""

import random

import numpy as np
import pytest
import torch
from conftest import Estimates, texts, tiny_lstm, weights
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from zoo_hf import CentralDifference, ZOOTrainer, gradient
from zoo_hf.batches import Batches, NamedBatches, as_it_is, rows_of, split
from zoo_hf.noise import Direction, batch_seed
from zoo_hf.perturbation import Member


class Drawing(Dataset):
    """Examples with noise of every generator."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return [float(index), random.random(), np.random.rand(), torch.rand(()).item()]


def loader(epoch, workers=0):
    """Batches of four of ten examples, named."""
    batches = NamedBatches(BatchSampler(SequentialSampler(range(10)), 4, False), 7, lambda: epoch)
    return DataLoader(
        Batches(Drawing(), torch.tensor), batch_sampler=batches, collate_fn=as_it_is, num_workers=workers
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_what_a_batch_draws_depends_on_its_name_and_not_on_workers_or_generators():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = list(loader(0))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    torch.rand(3)  # a loader itself draws from torch's generator, as every one does
    random.seed(9)
    again, others = list(loader(0, workers=2)), list(loader(1))
    assert [each[:, 0].tolist() for each in first] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = torch.cat([each[:, 1:].flatten() for each in [*first, *others]])
    assert drawn.unique().numel() == 2 * 10 * 3, "of every batch its own"


def test_seeds_of_batches_do_not_meet():
    assert (
        len({batch_seed(seed, epoch, place) for seed in range(4) for epoch in range(8) for place in range(64)}) == 2048
    )


@pytest.mark.parametrize(("pairs", "rows"), [(1, 8), (4, 8), (3, 8), (8, 8), (5, 3), (8, 1)])
def test_every_item_of_a_batch_counts_the_same(pairs, rows):
    items = torch.arange(rows) % 3  # of every row, some have none
    inputs = {"items": items, "scale": torch.tensor(2.0), "name": "text"}
    members = [Member(Direction(0, 0, index), sign) for index in range(pairs) for sign in (1, -1)]
    total = max(1, int(items.sum()))
    shares = split(inputs, members, pairs, count=lambda share: float(share["items"].sum()), total=total)
    counted = torch.zeros(rows)  # of every row's items, in the mean over all members
    for member, (share, weight) in zip(members, shares, strict=True):
        first, last = rows_of(member.direction.index, pairs, rows)
        assert share["items"].tolist() == items[first:last].tolist()
        assert share["scale"] is inputs["scale"]
        if weight:
            counted[first:last] += items[first:last] / share["items"].sum() * weight / (2 * pairs)
    assert torch.allclose(counted, items / total)


def test_a_batch_without_rows_cannot_be_shared():
    with pytest.raises(ValueError, match="no tensor of the batch has rows"):
        split({"x": 3}, [], 2, count=len, total=1)


@pytest.mark.parametrize(("pairs", "rows"), [(4, 12), (3, 8), (6, 4)])
@pytest.mark.parametrize("data", ["shared", "split"])
def test_both_ways_to_see_a_batch_estimate_its_gradient_without_bias(pairs, rows, data):
    """On losses linear in θ, where E ĝ = ∇L exactly: the mean of many estimates is within four standard errors."""
    slopes = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = {"theta": torch.zeros(5, dtype=torch.float64)}
    estimator, updates = CentralDifference(1e-2), 500
    found = []
    for step in range(updates):
        directions = [Direction(3, step, index) for index in range(pairs)]
        members = estimator.members(directions)
        parts = [({"x": slopes}, 1.0)] * len(members)
        if data == "split":
            parts = split({"x": slopes}, members, pairs, count=lambda share: len(share["x"]), total=rows)
        shares = iter(parts)

        def objective(shares=shares):
            share, weight = next(shares)
            return weight * (share["x"] @ theta["theta"]).mean()

        found.append(gradient(estimator(objective, theta, directions), "theta", theta["theta"]))
    estimates = torch.stack(found)
    error = estimates.std(0) / updates**0.5
    assert ((estimates.mean(0) - slopes.mean(0)).abs() <= 4 * error).all()


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}])
def test_shares_of_the_trainer_have_the_coefficients_of_their_rows(config, arguments):
    args = config(data="split", num_directions=3, max_steps=1, **{"per_device_train_batch_size": 6} | arguments)
    seen, model = Estimates(), tiny_lstm()
    examples = texts(6)
    made = ZOOTrainer(model, args, train_dataset=examples, callbacks=[seen])
    loaded = [made._prepare_inputs(each) for each in made.get_train_dataloader()]

    # as the Trainer counts them: before transformers 5.19 with the first label of a text, which is never predicted
    def items(batches):
        return int(made.get_batch_samples(iter(batches), len(batches), made.args.device)[1])

    made.train()
    (estimate,) = seen.seen
    start = tiny_lstm()
    for index in range(3):
        losses = []
        for sign in (1, -1):
            displaced = tiny_lstm()
            for name, parameter in displaced.named_parameters():
                moved = gradient(
                    estimate._replace(directions=[estimate.directions[index]], coefficients=torch.ones(1)),
                    name,
                    parameter,
                )
                with torch.no_grad():
                    parameter.add_(moved, alpha=sign * args.smoothing_radius)
            total = 0.0
            for each in loaded:
                first, last = rows_of(index, 3, len(each["input_ids"]))
                rows = {name: value[first:last] for name, value in each.items()}
                with torch.no_grad():
                    total += displaced(**rows).loss.item() * items([rows])
            losses.append(3 * total / items(loaded))
        expected = (losses[0] - losses[1]) / (2 * args.smoothing_radius)
        assert estimate.coefficients[index].item() == pytest.approx(expected, rel=1e-3, abs=2e-4)
    assert any(not torch.equal(weight, weights(start)[name]) for name, weight in weights(model).items())


def bert(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=8, num_labels=3))


def masked(count):
    """Texts of which every fourth has labels, and not many."""
    examples = []
    for index, example in enumerate(texts(count)):
        labels = torch.full((8,), -100)
        if index % 4 == 0:
            labels[: index % 3 + 1] = example["input_ids"][: index % 3 + 1]
        examples.append({"input_ids": example["input_ids"], "labels": labels})
    return examples


@pytest.mark.parametrize(
    ("model", "examples"),
    [
        (lambda: bert(BertForSequenceClassification), [each | {"labels": torch.tensor(1)} for each in texts(8)]),
        (lambda: bert(BertForMaskedLM), masked(8)),
        (tiny_lstm, masked(8)),
    ],
    ids=["a mean over rows", "a mean over labels", "a sum over labels"],
)
@pytest.mark.parametrize("pairs", [3, 8])
def test_the_loss_of_all_shares_is_that_of_the_batch(trainer, model, examples, pairs):
    """Also for models that take the number of items and do not heed it, and where shares have no label."""
    losses = {}
    for data in ("shared", "split"):
        made = trainer(
            model(), examples, data=data, num_directions=pairs, per_device_train_batch_size=8, smoothing_radius=1e-4
        )
        made.args.max_steps = 1
        made.train()
        losses[data] = made.state.log_history[0]["loss"]
    assert losses["split"] == pytest.approx(losses["shared"], rel=2e-3)
