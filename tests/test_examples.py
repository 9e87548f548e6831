"""Each example, run in short form, does what it says; two of them have files of their own beside this one."""

import csv
import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from zoo_hf import RNNConfig, RNNForCausalLM, Trajectory
from zoo_hf.tasks import byte_tokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"
TWO_STEPS = ["--max_steps", "2", "--num_directions", "2", "--use_cpu", "--report_to", "none"]
MISTAKES = {
    "overfit": ["--num_directions", "0"],
    "replay": ["--num_directions", "0"],
    "run_transduction": ["--cell_type", "lstn"],
    "train_on_reward": ["--model_name_or_path", "absent/folder"],
    "finetune_sentiment": ["--model_name_or_path", "absent/folder"],
    "push_to_hub": [],
    "long_context": ["--long", "1"],
}
SAID = {
    "overfit": "`num_directions` must be at least 1, got 0",
    "replay": "`num_directions` must be at least 1, got 0",
    "run_transduction": "`cell_type` must be .* got 'lstn'",
    "train_on_reward": "--model_name_or_path absent/folder: .*: run examples/run_clm.py first",
    "finetune_sentiment": "--model_name_or_path absent/folder: ",
    "push_to_hub": "--hub_model_id is missing: say where to publish",
    "long_context": "--long must be from 2 to 100,000, got 1",
}


def load(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(name, *arguments)`: the example's `main()` in this process and in an empty folder; returns its module."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        module = load(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module.main()
        return module

    levels = transformers_logging.get_verbosity(), logging.getLogger().level
    yield run
    transformers_logging.set_verbosity(levels[0])
    logging.getLogger().setLevel(levels[1])
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_at_most_120_lines_and_a_row_in_their_readme(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 119
    assert f"]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_no_file_and_no_flag_that_is_not_there():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {path for path in re.findall(r"examples/\w+\.py", text) if not (EXAMPLES.parent / path).exists()} == set()
    for command in re.findall(r"^ *python examples/(\w+)\.py(.*)$", text, re.MULTILINE):
        source = (EXAMPLES / f"{command[0]}.py").read_text(encoding="utf-8")
        own = {flag for flag in re.findall(r"--(\w+)", command[1]) if flag not in source}
        assert own <= {"learning_rate", "num_directions", "max_steps", "output_dir", "dtype"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(run, capsys, name):
    with pytest.raises(SystemExit) as stop:
        run(name, *MISTAKES[name])
    assert stop.value.code == 2
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert re.match(f"{name}.py: error: .*{SAID[name]}", line)


def test_replay_makes_the_same_weights_of_a_smaller_file(run, tmp_path, capsys):
    run("replay", *TWO_STEPS, "--output_dir", tmp_path / "run", "--logging_steps", 1)
    printed = capsys.readouterr().out
    assert "bit for bit equal: True" in printed
    trajectory, held = (
        int(n.replace(",", "")) for n in re.search(r"trajectory ([\d,]+) .*weights ([\d,]+)", printed).groups()
    )
    assert trajectory == (tmp_path / "run/trajectory.zoo").stat().st_size
    config = RNNConfig(cell_type="gru", vocab_size=256, embedding_size=32, hidden_size=64)
    assert held == 4 * RNNForCausalLM(config).num_parameters()
    assert Trajectory.open(tmp_path / "run/trajectory.zoo").steps == 2
    assert re.findall(r"^step +(\d+): loss [\d.]+$", printed, re.MULTILINE) == ["1", "2"]


def test_overfit_draws_curves_of_which_backpropagations_falls_below_half(run, tmp_path, capsys):
    arguments = ["--num_directions", 4, "--max_steps", 20, "--use_cpu", "--output_dir", tmp_path]
    run("overfit", *arguments)
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?) +(\d+) +([\d,]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    table = {name: (int(steps), int(passes.replace(",", "")), float(loss)) for name, steps, passes, _, loss in rows}
    assert {name: row[:2] for name, row in table.items()} == {
        "CD-RGE, 4 directions": (20, 160),
        "BPTT, AdamW": (20, 60),
        "BPTT, gradient descent": (20, 60),
    }
    curve = printed.split("BPTT, AdamW\n")[1].split("BPTT")[0]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", curve)]
    assert losses[-1] < math.log(40) / 2
    assert losses[-1] == table["BPTT, AdamW"][2]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_overfit_lowers_the_loss_by_forward_passes_alone(run, tmp_path, capsys):
    run("overfit", "--num_directions", 32, "--max_steps", 10, "--use_cpu", "--output_dir", tmp_path)
    own = capsys.readouterr().out.split("BPTT")[0]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", own)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("how", [[], ["--backprop", "--learning_rate", 1e-2, "--max_steps", 40]], ids=["zoo", "bptt"])
def test_run_transduction_counts_what_it_writes_and_saves_its_model(run, tmp_path, capsys, how):
    rows = ["--train_rows", 64, "--eval_rows", 30, "--eval_steps", 1000, "--logging_steps", 1, "--eval_strategy", "no"]
    module = run("run_transduction", *TWO_STEPS, *rows, "--output_dir", tmp_path, "--task", "add", *how)
    printed = capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    asked = module.transduction("add", 30, shortest=2, longest=10, seed=1)
    trained = SimpleNamespace(model=model.eval(), processing_class=tokenizer)
    written = [module.answer(trained, row) for row in asked]
    right = sum(text == answer for text, answer in zip(written, asked["answer"], strict=True))
    shown = re.search(r"^held_out loss ([\d.]+)  accuracy ([\d.]+)  exact_match ([\d.]+)$", printed, re.MULTILINE)
    assert float(shown[3]) == pytest.approx(right / 30, abs=1e-3)
    assert f"  {asked[0]['question']}{written[0]}  (right: {asked[0]['answer']})" in printed
    losses = [float(loss) for loss in re.findall(r"^step +\d+: loss ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == (40 if how else 2)
    assert losses[0] == pytest.approx(math.log(40), abs=0.1), "a new model knows nothing"
    if how:
        assert losses[-1] < 2.5


@pytest.fixture
def sentences(tmp_path):
    """A folder with a random llama and its tokenizer, and 40 reviews of which half are good."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=256, **sizes)).save_pretrained(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([" negative", " positive"])
    tokenizer.save_pretrained(tmp_path / "m")
    with (tmp_path / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [(f"film {n} is {('bad', 'good')[n % 2]}", n % 2) for n in range(40)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return ["--model_name_or_path", tmp_path / "m", "--train_file", tmp_path / "reviews.csv", "--held_out", 10]


@pytest.mark.parametrize("objective", ["loss", "error", "f1"])
def test_finetune_sentiment_trains_an_adapter_and_leaves_the_base_as_it_was(
    run, tmp_path, sentences, objective, monkeypatch
):
    trainers = []
    module = load("finetune_sentiment")
    monkeypatch.setattr("zoo_hf.ZOOTrainer.save_model", lambda trainer: trainers.append(trainer))
    small = ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "run", "--objective", objective]
    run("finetune_sentiment", *sentences, *TWO_STEPS, *small)
    (trainer,) = trainers
    base = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    held = {name.replace(".base_layer", ""): w for name, w in weights(trainer.model.base_model.model).items()}
    assert all(torch.equal(held.pop(name), weight) for name, weight in base.items())
    assert held, "the adapter's"
    if objective == "loss":
        assert any(weight.abs().max() > 0 for name, weight in held.items() if "lora_B" in name), "which start at 0"
    results = json.loads((tmp_path / "run/sentiment_results.json").read_text())
    for when in ("before", "after"):
        p = results[f"accuracy_{when}"]
        assert p * 10 == pytest.approx(round(p * 10))
        assert results[f"standard_error_{when}"] == pytest.approx(math.sqrt(p * (1 - p) / 10))
    asked = trainer.eval_dataset[0]
    tokenizer = byte_tokenizer()
    assert re.fullmatch(r"Review: film \d+ is (bad|good)\nSentiment:", tokenizer.decode(asked["input_ids"]))
    assert asked["words"] == [256, 257]
    assert len(trainer.train_dataset) == 30
    assert module.JOB.keys() == {"lora", "full"}


def test_finetune_sentiment_minimises_what_it_names():
    module = load("finetune_sentiment")
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])  # of negative and positive
    labels = torch.tensor([0, 1, 0, 1])

    head = torch.nn.Linear(2, 9, bias=False)
    torch.nn.init.zeros_(head.weight)
    head.weight.data[[5, 7]] = torch.eye(2)
    states = SimpleNamespace(last_hidden_state=torch.stack([scores + 1, scores], 1))
    model = SimpleNamespace(get_decoder=lambda: lambda use_cache, **texts: states, get_output_embeddings=lambda: head)
    inputs = {"input_ids": None, "attention_mask": None, "words": torch.tensor([[5, 7]] * 4), "labels": labels}
    said = [-math.log(1 / (1 + math.exp(-margin))) for margin in (2, 1, -3, -1)]
    assert module.loss(model, inputs).item() == pytest.approx(sum(said) / 4)
    assert module.error(model, inputs).item() == 0.5
    # one true positive, one false positive, one false negative
    assert module.f1(model, inputs).item() == pytest.approx(1 - 2 / 4)
    assert module.f1(model, inputs | {"labels": torch.zeros(4, dtype=torch.long)}).item() == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--train_file", "absent.csv"], "absent.csv"),
        (["--held_out", 40], "--held_out must be above 0 and below the 40 reviews there are, got 40"),
    ],
)
def test_finetune_sentiment_names_what_is_missing(run, sentences, capsys, wrong, said):
    with pytest.raises(SystemExit) as stop:
        run("finetune_sentiment", *sentences, *wrong)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.rstrip().splitlines()[-1]


def test_finetune_sentiment_refuses_a_table_without_labels(run, sentences, tmp_path, capsys):
    (tmp_path / "reviews.csv").write_text("text,stars\nfine,5\nbad,1\n")
    with pytest.raises(SystemExit) as stop:
        run("finetune_sentiment", *sentences)
    assert stop.value.code == 2
    assert "give it columns `text` and `label`, and only 0 and 1 as labels" in capsys.readouterr().err


def test_a_reward_is_the_share_of_letters_in_known_words():
    reward = load("train_on_reward").reward
    known = {"the", "of", "a"}
    assert reward(["The of"], known) == 5 / 6
    assert reward(["a xyz ", "the!"], known) == 3 / 10, "a word of one letter is none"
    assert reward(["xyz", "123"], known) == 0


@pytest.fixture
def writer(tmp_path):
    """A folder with a random LSTM of bytes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "embedding_size": 8, "hidden_size": 8, "eos_token_id": 255, "pad_token_id": 255}
    RNNForCausalLM(RNNConfig(**sizes)).save_pretrained(tmp_path / "writer")
    byte_tokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


def test_the_same_seed_writes_the_same_texts_and_advances_no_generator(writer):
    module, model = load("train_on_reward"), AutoModelForCausalLM.from_pretrained(writer).eval()
    arguments = SimpleNamespace(texts=3, new_tokens=6)
    state = torch.get_rng_state()
    once, again, other = (module.written(model, byte_tokenizer(), arguments, seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert len(once) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_train_on_reward_prints_the_reward_of_the_model_it_saves(run, writer, tmp_path, capsys):
    short = ["--texts", 8, "--new_tokens", 8, "--logging_steps", 1, "--output_dir", tmp_path / "run"]
    module = run("train_on_reward", "--model_name_or_path", writer, *TWO_STEPS, *short)
    printed = capsys.readouterr().out
    text = "".join(module.python_documentation()["train"]["text"])
    known = {word.lower() for word in re.findall("[A-Za-z]+", text)}
    arguments = SimpleNamespace(texts=8, new_tokens=8)
    for when, folder in (("before", writer), ("after", tmp_path / "run")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        seeds = range(module.UNSEEN, module.UNSEEN + 8)
        texts = [line for seed in seeds for line in module.written(model, byte_tokenizer(), arguments, seed)]
        assert f"{when}: reward {module.reward(texts, known):.3f}\n  {texts[0]!r}\n" in printed
    assert len(re.findall(r"^step +\d+: objective -?[\d.]+$", printed, re.MULTILINE)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_context_but_that_of_backpropagation_does():
    lengths = ["--short", "1000", "--long", "8000", "--backprop", "8000", "--steps", "2"]
    command = [sys.executable, str(EXAMPLES / "long_context.py"), *lengths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S+) +([\d,]+) +([\d.]+) +[\d.]+ +([\d.]+)", done.stdout, re.MULTILINE)
    assert [(kind, tokens) for kind, tokens, *_ in rows] == [
        ("zero-order", "1,000"),
        ("zero-order", "8,000"),
        ("backpropagation", "1,000"),
        ("backpropagation", "8,000"),
    ]
    short, long, own, grown = (float(megabytes) for _, _, megabytes, _ in rows)
    assert long < short + 3, "megabytes"
    assert grown > own + 10
    assert all(float(loss) == pytest.approx(math.log(256), abs=0.1) for *_, loss in rows)
