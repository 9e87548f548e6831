"""What a forward pass does, counted: operations, bytes, flops of products, and bytes held at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from zoo_hf.meter import Work, work


FLOAT = 4  # bytes
X, W, B = torch.randn(6, 5), torch.randn(7, 5), torch.randn(7)


def test_a_linear_layer_in_inference_mode():
    with torch.inference_mode():
        done = work(lambda: F.linear(X, W, B))
    assert done == Work(operations=1, bytes=FLOAT * (30 + 35 + 7 + 42), flops=2 * 6 * 5 * 7, peak=FLOAT * 42)


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda: X @ W.mT, 2 * 6 * 5 * 7),
        (lambda: torch.addmm(B, X, W.mT), 2 * 6 * 5 * 7),
        (lambda: torch.bmm(X[None], W.mT[None]), 2 * 6 * 5 * 7),
        (lambda: torch.baddbmm(B[None, None], X[None], W.mT[None]), 2 * 6 * 5 * 7),
        (lambda: X * 2, 0),
    ],
)
def test_flops_are_two_for_every_multiplication_of_a_product(run, flops):
    with torch.no_grad():
        assert work(run).flops == flops


def test_an_lstm_in_one_call_has_the_flops_of_its_products():
    lstm, inputs = torch.nn.LSTM(5, 8), torch.randn(3, 2, 5)
    with torch.inference_mode():
        assert work(lambda: lstm(inputs)).flops == 2 * (3 * 2) * (4 * 8 * (5 + 8))


def test_views_cost_nothing_and_operations_in_place_count():
    with torch.no_grad():
        assert work(lambda: X.view(-1)[3:].unsqueeze(0)) == Work(0, 0, 0, 0)
        assert work(lambda: X.clone().mul_(2)) == Work(2, FLOAT * (30 + 30 + 30), 0, FLOAT * 30)


def test_peak_is_what_is_held_at_once_and_not_what_was_made():
    def run():
        for _ in range(5):
            made = torch.zeros(1000)
            del made
        return torch.zeros(500) + torch.zeros(500)

    assert work(run).peak == FLOAT * 1500


def test_a_population_does_its_members_work_in_as_many_operations():
    stacked = torch.randn(4, 7, 5)
    with torch.inference_mode():
        one = work(lambda: torch.mm(X, W.mT))
        many = work(lambda: vmap(lambda w: torch.mm(X, w.mT))(stacked))
    assert many.flops == 4 * one.flops
    assert many.operations <= 2 * one.operations
