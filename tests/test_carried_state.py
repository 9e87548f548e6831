"""Streams of text, and the state that goes with them from one window to the next."""

import pytest
import torch
from conftest import tiny_lstm, weights
from peft import LoraConfig, get_peft_model

from zoo_hf import Direction, ZOOTrainer
from zoo_hf.perturbation import perturbed
from zoo_hf.tasks import byte_tokenizer, text_streams


WINDOW, ROWS = 6, 2


def streams(lengths=(20, 9, 13, 15, 6), rows=ROWS):
    """Documents of these lengths as streams, one byte a character."""
    documents = ["".join(chr(32 + (7 * i + k) % 90) for k in range(n)) for i, n in enumerate(lengths)]
    return text_streams(documents, byte_tokenizer(), WINDOW, batch_size=rows), documents


def test_each_stream_reads_whole_documents_in_order():
    data, documents = streams()
    found = []
    for row in range(ROWS):
        text = ""
        for example in list(data)[row::ROWS]:
            if example["starts"]:
                found.append(text)
                text = ""
            real = sum(example["attention_mask"])
            assert example["labels"] == example["input_ids"][:real] + [-100] * (WINDOW - real)
            text += bytes(example["input_ids"][:real]).decode()
        found.append(text)
    whole = {text for text in found if text in documents}
    assert whole == {documents[0], documents[1], documents[2], documents[4]}  # the fourth is cut where a stream ends
    assert all(any(document.startswith(text) for document in documents) for text in found)


def test_streams_want_a_document_each():
    with pytest.raises(ValueError, match="Fewer documents than `batch_size`=6"):
        streams(rows=6)
    with pytest.raises(ValueError, match="`window` must be at least 2"):
        text_streams(["text"], byte_tokenizer(), 1, batch_size=1)


def test_rows_that_start_leave_the_given_state():
    model, ids = tiny_lstm(vocab_size=256).eval(), torch.randint(256, (2, 5))
    state = model(ids).state
    starts = torch.tensor([True, False])
    mixed = model(ids, state=state, starts=starts)
    torch.testing.assert_close(mixed.logits[:1], model(ids[:1]).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.logits[1:], model(ids[1:], state=state[1:]).logits, atol=1e-6, rtol=0)


class Recorded(ZOOTrainer):
    """Keeps the state that every forward pass is given."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.given.append(inputs.get("state"))
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer(config, kind=ZOOTrainer, **arguments):
    defaults = {"carry_state": True, "per_device_train_batch_size": ROWS, "max_steps": 4, "learning_rate": 0.1}
    data, _ = streams()
    made = kind(tiny_lstm(vocab_size=256), config(**(defaults | arguments)), train_dataset=data)
    made.given = []
    return made, data


def test_every_member_starts_from_the_state_of_the_undisplaced_weights(config):
    run, data = trainer(config, Recorded, learning_rate=0.0)
    run.train()
    passes = 2 * run.args.num_directions
    assert len(run.given) == 4 * passes
    model, state = tiny_lstm(vocab_size=256).eval(), None
    for step in range(4):
        here = run.given[step * passes : (step + 1) * passes]
        if state is None:
            assert here == [None] * passes
        else:
            for given in here:
                torch.testing.assert_close(given, state, atol=1e-6, rtol=0)
        batch = data.with_format("torch")[step * ROWS : (step + 1) * ROWS]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "starts")}
        with torch.no_grad():
            state = model(**inputs, state=state).state


def test_the_state_is_that_of_the_weights_before_the_update(config):
    run, data = trainer(config, Recorded, max_steps=2)
    run.train()
    batch = data.with_format("torch")[:ROWS]
    expected = tiny_lstm(vocab_size=256).eval()(batch["input_ids"], batch["attention_mask"]).state
    torch.testing.assert_close(run.given[-1], expected, atol=1e-6, rtol=0)


def test_coefficients_are_differences_of_losses_from_the_carried_state(config):
    run, data = trainer(config, learning_rate=0.0, max_steps=2)
    estimates = []
    original = run.create_optimizer

    def create_optimizer():
        optimizer = original()
        hold = run.update.hold
        run.update.hold = lambda estimate: (estimates.append(estimate), hold(estimate))
        return optimizer

    run.create_optimizer = create_optimizer
    run.train()
    model = tiny_lstm(vocab_size=256).eval()
    batches = [data.with_format("torch")[i * ROWS : (i + 1) * ROWS] for i in range(2)]
    with torch.no_grad():
        state = model(batches[0]["input_ids"], batches[0]["attention_mask"]).state
        losses = []
        for sign in (1, -1):
            with perturbed(dict(model.named_parameters()), Direction(42, 1, 0), sign * 1e-2):
                losses.append(model(**batches[1], state=state).loss)
    torch.testing.assert_close(
        estimates[1].coefficients[0].double(), (losses[0] - losses[1]) / 2e-2, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_from_the_carried_state(config, tmp_path, accumulation):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    arguments["gradient_accumulation_steps"] = accumulation
    whole, _ = trainer(config, output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    resumed, _ = trainer(config, output_dir=str(tmp_path / "resumed"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected = weights(whole.model)
    for name, weight in weights(resumed.model).items():
        assert torch.equal(weight, expected[name]), name


def test_training_with_the_state_differs_from_training_without(config):
    finals = []
    for carry_state in (True, False):
        run, _ = trainer(config, carry_state=carry_state, train_sampling_strategy="sequential")
        run.train()
        finals.append(weights(run.model))
    assert any(not torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_an_adapter_carries_the_state_of_its_base(config):
    data, _ = streams()
    adapted = get_peft_model(tiny_lstm(vocab_size=256), LoraConfig(r=2, target_modules=["lm_head"]))
    run = Recorded(adapted, config(carry_state=True, per_device_train_batch_size=ROWS), train_dataset=data)
    run.given = []
    run.train()
    batch = data.with_format("torch")[:ROWS]
    expected = tiny_lstm(vocab_size=256).eval()(batch["input_ids"], batch["attention_mask"]).state
    torch.testing.assert_close(run.given[-1], expected, atol=1e-6, rtol=0)


def test_a_model_without_a_state_and_a_batch_of_another_size_are_refused(config):
    with pytest.raises(ValueError, match="needs a model whose forward pass takes and returns `state`"):
        ZOOTrainer(torch.nn.Linear(2, 2), config(carry_state=True))
    run, data = trainer(config)
    run.train_dataset = data.select(range(ROWS + 1))
    with pytest.raises(ValueError, match="carried state has 2 rows and the batch 1"):
        run.train()
