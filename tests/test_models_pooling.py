"""The attention pooling of zoo_rnn against its plain scan, and against the average written out."""

import pytest
import torch

from zoo_hf.models import RNNConfig, RNNForCausalLM
from zoo_hf.models.pooling import BLOCK, AttentionPooling, pooling_scan


@pytest.fixture
def pooling():
    """`pooling(decay)`: of width 5, in float64, with scores that would overflow two plain sums."""

    def make(decay=0.0):
        torch.manual_seed(0)
        module = AttentionPooling(5, decay).double()
        torch.nn.init.normal_(module.score_weight, std=300)
        return module

    return make


def padded(rows, length):
    """Which tokens are real: a row without any, one with none in its first block, one with gaps, one whole."""
    real = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 0.6
    real[0], real[1, : BLOCK + 3], real[3] = False, False, True
    return real


@pytest.mark.parametrize("decay", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("mask", [None, padded(4, 3 * BLOCK + 7)], ids=["whole", "padded"])
def test_blocks_equal_the_plain_scan(pooling, decay, mask):
    module = pooling(decay)
    inputs = torch.randn(4, 3 * BLOCK + 7, 5, dtype=torch.float64)
    started = module(torch.randn(4, 6, 5, dtype=torch.float64), module.initial_state(inputs))[1]
    for state in (module.initial_state(inputs), started):
        averages, final = module(inputs, state, mask)
        expected, expected_final = pooling_scan(inputs, state, module.score_weight, decay, real=mask)
        assert averages.isfinite().all()
        torch.testing.assert_close(averages, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(final, expected_final, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_output_is_the_softmax_weighted_average_of_the_past(pooling, decay):
    module, inputs = pooling(decay), torch.randn(2, 9, 5, dtype=torch.float64)
    averages, final = module(inputs, module.initial_state(inputs))
    for t in range(9):
        past = inputs[:, : t + 1]
        scores = past @ module.score_weight - decay * torch.arange(t, -1, -1).double()  # (B, t + 1)
        expected = (scores.softmax(dim=1)[..., None] * past).sum(1)
        torch.testing.assert_close(averages[:, t], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(final[:, -1], scores.logsumexp(dim=1), atol=0, rtol=1e-12)


def test_equal_scores_give_the_running_mean_and_a_large_decay_the_input_itself():
    inputs = torch.randn(2, BLOCK + 9, 5)
    mean, last = AttentionPooling(5), AttentionPooling(5, decay=50.0)
    counts = torch.arange(1, BLOCK + 10)[:, None]
    averages, _ = mean(inputs, mean.initial_state(inputs))
    torch.testing.assert_close(averages, inputs.cumsum(1) / counts, atol=1e-6, rtol=0)
    torch.testing.assert_close(last(inputs, last.initial_state(inputs))[0], inputs, atol=1e-6, rtol=0)


def test_head_reads_the_average_of_the_embedding_and_all_layers():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "embedding_size": 6, "hidden_size": 8, "num_layers": 2}
    model = RNNForCausalLM(RNNConfig(pooling="attention", pooling_decay=0.3, **sizes)).double()
    torch.nn.init.normal_(model.model.pooling.score_weight)
    outputs = model(torch.randint(11, (2, 7)), output_hidden_states=True)
    *layers, average = outputs.hidden_states
    assert [hidden.shape[-1] for hidden in layers] == [6, 8, 8]
    past = torch.cat(layers, dim=-1)  # (2, 7, 22)
    scores = past @ model.model.pooling.score_weight - 0.3 * torch.arange(6, -1, -1).double()
    expected = (scores.softmax(dim=1)[..., None] * past).sum(1)
    torch.testing.assert_close(average[:, -1], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(outputs.logits[:, -1], model.lm_head(expected), atol=1e-12, rtol=0)
    assert outputs.state.shape == (2, 2 * 2 * 8 + 22 + 1)  # h and c of two layers, y, ℓ


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "mean"}, "`pooling` must be one of none, attention, got 'mean'"),
        ({"pooling": "attention", "pooling_decay": -1.0}, "`pooling_decay` must be at least 0 and finite, got -1.0"),
        ({"pooling": "attention", "tie_word_embeddings": True}, "32, but with `pooling` it is 64 wide; set `tie_word"),
    ],
)
def test_bad_configurations_name_field_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        RNNConfig(**changes)


def test_in_bfloat16_one_token_at_a_time_still_weighs_the_whole_past():
    torch.manual_seed(0)
    model = RNNForCausalLM(RNNConfig(cell_type="gru", pooling="attention", vocab_size=11)).eval().to(torch.bfloat16)
    ids = torch.tensor([[3] * 300 + [7] * 300])
    whole, state, outputs = model.model(ids).last_hidden_state.float(), None, []
    for token in ids.unbind(1):
        step = model.model(token[:, None], state=state)
        outputs.append(step.last_hidden_state.float())
        state = step.state
    assert state.dtype == torch.float32
    assert (torch.cat(outputs, dim=1) - whole).abs().max() < 0.05 * whole.abs().max()
