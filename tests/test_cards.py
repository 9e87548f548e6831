"""A model card holds the figures of its run, valid metadata, and code that loads the model."""

import math
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import torch
from conftest import VOCABULARY, texts, tiny_lstm
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from zoo_hf.cards import final_metrics, model_card
from zoo_hf.procedure import command, peak_memory
from zoo_hf.tasks import byte_tokenizer


TINY_GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY, "pad_token_id": 0}


@pytest.fixture
def finished(trainer):
    """`finished(model, examples, keywords, **arguments)`: a trainer after two steps and an evaluation."""

    def run(model=None, examples=None, keywords=(), **arguments):
        examples = examples or texts(8)
        sets = {"eval_dataset": examples[:4]} | dict(keywords)
        run = trainer(model or tiny_lstm(), examples, sets, **arguments)
        run.train()
        run.evaluate()
        return run

    return run


def procedure(card):
    """The card's table of how the model was trained."""
    section = card.content.split("## Training procedure")[1]
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", section, flags=re.MULTILINE))


def loading_code(card):
    return re.search(r"```python\n(.*?)```", card.content, flags=re.DOTALL).group(1)


def test_the_table_says_how_the_model_was_trained(finished):
    run = finished(num_directions=4, smoothing_radius=0.02, learning_rate=0.5, distribution="gaussian", seed=7)
    rows = procedure(model_card(run))
    size = run.model.num_parameters()
    assert rows["weights"] == f"{size:,}, of which {size:,} trained"
    assert rows["estimator"] == "central differences (CD-RGE), 4 directions, gaussian"
    assert rows["smoothing radius ε"] == "0.02"
    assert rows["optimizer"] == "sgd, learning rate 0.5, weight decay 0"
    assert rows["schedule"] == "constant, 0 steps of warm-up"
    assert (rows["examples a step"], rows["steps"], rows["forward passes"]) == ("4", "2", "16")
    assert (rows["processes"], rows["precision"], rows["seed"]) == ("1", "float32", "7")
    assert f"torch {version('torch')}" in rows["software"]
    assert float(rows["forward passes a second"].replace(",", "")) > 0
    assert rows["tokens"] == "64", "2 steps of 4 texts of 8"
    assert float(rows["peak memory"].split(" MB")[0].replace(",", "")) == pytest.approx(peak_memory() / 1e6, rel=0.5)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["train.py", "--seed", "3"], "`python train.py --seed 3`"),
        (["a folder/train.py", "--text", "two words"], "`python 'a folder/train.py' --text 'two words'`"),
        (["train.py", "--hub_token", "hf_secret", "--seed", "3"], "`python train.py --hub_token TOKEN --seed 3`"),
        (["train.py", "--token=hf_secret"], "`python train.py --token=TOKEN`"),
        (["/elsewhere/train.py"], ""),
        (["notebook"], ""),
    ],
)
def test_the_command_is_what_was_typed_without_tokens(tmp_path, monkeypatch, typed, shown):
    monkeypatch.chdir(tmp_path)
    assert command(typed) == shown


def test_an_optimizer_and_a_schedule_that_were_given_are_the_ones_named(finished):
    model = tiny_lstm()
    groups = [{"params": [p], "weight_decay": 0.2 if p.dim() > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.NAdam(groups, lr=0.25)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    run = finished(model, keywords={"optimizers": (optimizer, schedule)}, optim="sgd", learning_rate=0.5)
    rows = procedure(model_card(run))
    assert rows["optimizer"] == "NAdam, learning rate 0.25, weight decay 0.2"
    assert rows["schedule"] == "StepLR"


def test_the_class_of_an_optimizer_that_was_given_is_named(finished):
    kind = (torch.optim.Adamax, {"lr": 0.125})
    rows = procedure(model_card(finished(keywords={"optimizer_cls_and_kwargs": kind}, weight_decay=0.0)))
    assert rows["optimizer"] == "Adamax, learning rate 0.125, weight decay 0"
    assert rows["schedule"] == "constant, 0 steps of warm-up"


def test_a_forward_estimate_is_called_one(finished):
    card = model_card(finished(estimator="forward", num_directions=4, max_steps=1))
    assert procedure(card)["estimator"] == "forward differences (RGE), 4 directions, rademacher"
    assert procedure(card)["members"] == "one at a time"
    assert procedure(card)["forward passes"] == "5"
    assert "[L(θ + εzᵢ) − L(θ)]/ε" in card.content


def test_results_are_the_last_evaluation_in_the_text_and_in_the_metadata(finished):
    run = finished()
    loss = run.state.log_history[-1]["eval_loss"]
    card = model_card(run, model_name="tiny", dataset="random tokens", dataset_tags="some/tokens")
    assert f"| loss, in nats a token | {loss:.4g} |" in card.content
    assert f"| perplexity | {math.exp(loss):.4g} |" in card.content
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["loss"].metric_value == loss
    assert results["perplexity"].metric_value == pytest.approx(math.exp(loss))
    assert (results["loss"].dataset_name, results["loss"].dataset_type) == ("random tokens", "some/tokens")


def test_metadata_survives_being_saved_and_loaded(finished, tmp_path):
    card = model_card(finished(), model_name="tiny", license="mit", language="en", tags="mine", dataset_tags="a/b")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == card.data.to_dict()
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["a/b"])
    assert data.tags == ["mine", "rnn", "zeroth-order", "zoo_hf"]


def test_nothing_is_claimed_that_was_not_given(finished):
    card = model_card(finished())
    assert {"license", "base_model", "datasets", "language"}.isdisjoint(card.data.to_dict())
    assert "trained from scratch without backpropagation" in card.content
    assert "None" not in card.content


def test_a_run_without_evaluation_says_so(trainer):
    run = trainer(tiny_lstm(), texts(8))
    run.train()
    card = model_card(run)
    assert "The model was not evaluated." in card.content
    assert card.data.eval_results is None


def test_a_run_that_logged_nothing_has_a_card(trainer):
    run = trainer(tiny_lstm(), texts(8))
    assert procedure(model_card(run))["forward passes"] == "not logged"


def test_the_plot_is_shown_if_it_is_there(finished, tmp_path):
    run = finished()
    assert "loss.png" not in model_card(run).content
    (tmp_path / "loss.png").touch()
    assert "](loss.png)" in model_card(run).content


def test_the_code_on_the_card_loads_the_model_and_its_tokenizer(finished, tmp_path):
    run = finished(keywords={"processing_class": byte_tokenizer()})
    run.save_model()
    names = {}
    exec(loading_code(model_card(run)), names)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], weight)
    assert len(names["tokenizer"]) == 256


def test_a_model_of_transformers_needs_no_import_of_zoo_hf(finished):
    run = finished(GPT2LMHeadModel(GPT2Config(**TINY_GPT2)))
    run.save_model()
    card = model_card(run)
    assert "zoo_hf" not in loading_code(card)
    assert "rnn" not in card.data.tags
    names = {}
    exec(loading_code(card), names)
    assert type(names["model"]) is GPT2LMHeadModel


class Regression(nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean(), "predicted": self.linear(x)}


def test_a_model_that_is_not_of_transformers_is_loaded_into_its_class(finished, rng):
    examples = [{"x": row, "labels": row.sum()} for row in torch.randn(8, 3, generator=rng)]
    run = finished(Regression(), examples)
    run.save_model()
    card = model_card(run, dataset="points")
    assert "`Regression`, trained on points without backpropagation" in card.content
    assert {"library_name", "pipeline_tag", "base_model"}.isdisjoint(card.data.to_dict())
    assert card.data.tags == ["zeroth-order", "zoo_hf"]
    names = {"Regression": Regression}
    exec(loading_code(card).replace("Regression(...)", "Regression()"), names)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], weight)
    assert "None" not in card.content


def test_zoo_hf_does_not_import_peft():
    script = """
        import sys
        import transformers.trainer  # which may import it by itself
        for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
            del sys.modules[name]
        import zoo_hf
        assert "peft" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_a_model_that_was_fine_tuned_names_its_base(finished):
    model = GPT2LMHeadModel(GPT2Config(**TINY_GPT2))
    model.config._name_or_path = "someone/gpt2-tiny"
    card = model_card(finished(model))
    assert card.data.base_model == "someone/gpt2-tiny"
    assert "fine-tuned from [someone/gpt2-tiny](https://huggingface.co/someone/gpt2-tiny)" in card.content


def test_a_folder_of_this_machine_is_no_base_model(finished, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**TINY_GPT2))
    model.config._name_or_path = str(tmp_path)
    assert model_card(finished(model)).data.base_model is None


def test_an_adapter_says_how_many_weights_it_trained_and_loads_with_peft(finished):
    base = GPT2LMHeadModel(GPT2Config(**TINY_GPT2))
    base.config._name_or_path = "someone/gpt2-tiny"
    adapter = LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    run = finished(get_peft_model(base, adapter))
    card = model_card(run)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert procedure(card)["weights"].endswith(f"of which {trained:,} trained")
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/gpt2-tiny")
    assert "from peft import AutoPeftModelForCausalLM" in loading_code(card)


def test_a_classifier_has_its_task_and_no_perplexity(finished):
    model = GPT2ForSequenceClassification(GPT2Config(**TINY_GPT2, num_labels=2))
    examples = [{"input_ids": row["input_ids"], "labels": torch.tensor(0)} for row in texts(8)]
    run = finished(model, examples)
    card = model_card(run)
    assert card.data.pipeline_tag == "text-classification"
    assert "perplexity" not in card.content
    assert "AutoModelForSequenceClassification" in loading_code(card)


def test_results_are_the_best_models_if_that_was_loaded(trainer):
    run = trainer(tiny_lstm(), texts(8))
    run.args.load_best_model_at_end = True
    run.state.best_global_step = 1
    run.state.log_history = [
        {"step": 1, "eval_loss": 2.0, "eval_runtime": 0.5},
        {"step": 2, "eval_loss": 3.0, "eval_runtime": 0.5},
    ]
    assert final_metrics(run, with_perplexity=False) == {"loss": 2.0}
    run.args.load_best_model_at_end = False
    assert final_metrics(run, with_perplexity=False) == {"loss": 3.0}


def test_metrics_of_several_evaluation_sets_stand_side_by_side(trainer):
    run = trainer(tiny_lstm(), texts(8))
    run.state.log_history = [
        {"step": 1, "eval_news_loss": 9.0},
        {"step": 2, "eval_news_loss": 2.0, "eval_news_runtime": 0.1, "eval_news_samples_per_second": 7.0},
        {"step": 2, "eval_wiki_loss": 3.0, "eval_wiki_accuracy": 0.5},
    ]
    assert final_metrics(run, with_perplexity=True) == {"news_loss": 2.0, "wiki_loss": 3.0, "wiki_accuracy": 0.5}


def test_the_limits_state_the_cosine_of_these_directions_and_weights(finished):
    run = finished(num_directions=4)
    cosine = math.sqrt(4 / (4 + run.model.num_parameters() - 1))
    assert f"√(n/(n+d−1)) = {cosine:.2g} to the true gradient" in model_card(run).content


def test_the_trainer_writes_the_card(finished, tmp_path):
    finished().create_model_card(model_name="tiny")
    assert ModelCard.load(tmp_path / "README.md").data.model_name == "tiny"


def test_a_population_and_low_rank_directions_are_named(finished):
    card = model_card(finished(probes="population", members_per_forward=4, distribution="low_rank", direction_rank=2))
    assert procedure(card)["estimator"].endswith("low_rank of rank 2")
    assert procedure(card)["members"] == "4 in a forward pass"
