"""examples/run_clm.py does what it says: in two steps, on tiny models, and with errors that say what to do."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.utils import logging as transformers_logging

from zoo_hf import RNNConfig, RNNForCausalLM
from zoo_hf.clm.arguments import DataTrainingArguments, ModelArguments
from zoo_hf.clm.command_line import MAIN_JOB, parse_arguments
from zoo_hf.clm.text import load_blocks, load_text
from zoo_hf.tasks import byte_tokenizer


SCRIPT = Path(__file__).parent.parent / "examples" / "run_clm.py"
TWO_STEPS = ["--max_steps", "2", "--eval_steps", "1", "--logging_steps", "1", "--num_directions", "2", "--use_cpu"]
SMALL = ["--config_overrides", "embedding_size=8,hidden_size=8", "--max_eval_samples", "4"]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("run_clm", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch):
    """Runs the script in this process, with these arguments."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        script.main()

    verbosity = transformers_logging.get_verbosity()
    yield run
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {number} of a text with an é.\n" for number in range(200)), encoding="utf-8")
    return path


def test_without_a_text_it_trains_on_pythons_documentation_and_writes_all_it_promises(run, tmp_path, capsys):
    run("--output_dir", tmp_path, *TWO_STEPS, *SMALL)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer) == 256
    assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "naïve"
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 1, 2]
    assert [entry["forward_passes"] for entry in history if "loss" in entry] == [4, 8]
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["bits_per_byte"] == pytest.approx(results["eval_loss"] / math.log(2))
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    evaluated = json.loads((tmp_path / "eval_results.json").read_text())
    assert all(re.fullmatch("[a-z_]+", name) for name in evaluated)
    assert [entry["eval_accuracy"] for entry in history if "eval_loss" in entry][-1] == evaluated["eval_accuracy"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "CPython's documentation" in card
    for name in ("eval_loss", "eval_accuracy", "bits_per_byte"):
        assert f"| {results[name]:.4g} |" in card
    printed = capsys.readouterr().out
    assert printed.count("\nThe ") == 2, "a sample before and one after"
    assert str(tmp_path) in printed


def test_two_processes_print_once_and_end_with_the_weights_of_one(run, tmp_path):
    run("--output_dir", tmp_path / "one", *TWO_STEPS, *SMALL)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0"]  # a free one
    arguments = ["--output_dir", str(tmp_path / "two"), *TWO_STEPS, *SMALL]
    done = subprocess.run([*launch, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("It writes now:") == 1
    assert "| processes | 2 |" in (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_its_arguments_may_stand_in_a_json_file(text_file, tmp_path):
    arguments = {"train_file": str(text_file), "do_eval": True, "output_dir": str(tmp_path / "out"), "block_size": 16}
    (tmp_path / "job.json").write_text(json.dumps(arguments))
    _, data_args, args = parse_arguments([str(tmp_path / "job.json")], "")
    assert (data_args.block_size, args.do_train, args.max_steps) == (16, False, -1), (
        "the main job's values are not used"
    )
    (tmp_path / "job.json").write_text(json.dumps({"max_steps": 7}))
    _, data_args, args = parse_arguments([str(tmp_path / "job.json")], "")
    assert (data_args.block_size, args.do_train, args.max_steps) == (MAIN_JOB["block_size"], True, 7)


def test_it_trains_another_kind_of_model_on_a_file_and_keeps_its_end_to_evaluate_on(run, text_file, tmp_path):
    sizes = "n_embd=8,n_layer=1,n_head=2,n_positions=64"
    run(
        *("--train_file", text_file, "--model_type", "gpt2", "--config_overrides", sizes, "--block_size", 32),
        *("--do_train", "--do_eval", "--output_dir", tmp_path / "out", *TWO_STEPS),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, model.config.n_embd, model.config.eos_token_id) == ("gpt2", 8, 255)
    data_args = DataTrainingArguments(train_file=str(text_file), block_size=32, validation_split_percentage=25)
    blocks = load_blocks(data_args, ModelArguments(), byte_tokenizer())
    ids = [token for split in ("train", "validation") for row in blocks[split] for token in row["input_ids"]]
    text = text_file.read_bytes()
    assert bytes(ids) == text[: len(ids)]
    assert len(blocks["validation"]) == round(len(text) // 32 / 4)


def test_it_goes_on_from_the_last_checkpoint_as_if_it_had_not_stopped(run, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    constant = ["--lr_scheduler_type", "constant", "--num_directions", "2", "--use_cpu", *SMALL]
    run("--output_dir", whole, "--max_steps", 4, *constant)
    run("--output_dir", stopped, "--max_steps", 2, *constant)
    run("--output_dir", stopped, "--max_steps", 4, "--resume_from_checkpoint", "last", *constant)
    one, two = (load_file(path / "model.safetensors") for path in (whole, stopped))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_it_evaluates_a_saved_model_on_a_stream_without_changing_its_folder(run, text_file, tmp_path):
    run("--output_dir", tmp_path / "model", *TWO_STEPS, *SMALL)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    run(
        *("--model_name_or_path", tmp_path / "model", "--train_file", text_file, "--validation_file", text_file),
        *("--streaming", "--do_eval", "--max_eval_samples", 4, "--use_cpu", "--output_dir", tmp_path / "model"),
    )
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    results = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-4)


def test_a_loss_that_no_float_can_hold_the_exponential_of_has_infinite_perplexity(run, text_file, tmp_path):
    sizes = {"vocab_size": 256, "embedding_size": 8, "hidden_size": 8}
    model = RNNForCausalLM(RNNConfig(**sizes))
    with torch.no_grad():
        model.lm_head.bias[0] = 1e4  # the byte 0, which the text has not, is all but certain
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    arguments = ["--train_file", text_file, "--do_eval", "--use_cpu", "--output_dir", tmp_path]
    run("--model_name_or_path", tmp_path, *arguments)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_loss"] > 1000
    assert results["perplexity"] == math.inf


CUSTOM_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

class CustomConfig(GPT2Config):
    model_type = "custom_lm"

class CustomModel(GPT2LMHeadModel):
    config_class = CustomConfig
"""


def test_code_that_comes_with_a_model_is_run_where_it_is_trusted(run, mistake, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "code.py").write_text(CUSTOM_CODE)
    places = {"AutoConfig": "code.CustomConfig", "AutoModelForCausalLM": "code.CustomModel"}
    config = {"model_type": "custom_lm", "auto_map": places, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    shared = ["--train_file", text_file, "--block_size", 32, *TWO_STEPS]
    new = [*shared, "--config_name", tmp_path / "custom", "--do_train", "--output_dir", tmp_path / "out"]
    assert re.search("(?s)error: --config_name .*custom: .*trust_remote_code", mistake(*new))
    run(*new, "--trust_remote_code")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("custom_lm", ["CustomModel"])
    run(
        *(*shared, "--model_name_or_path", tmp_path / "out", "--trust_remote_code", "--do_eval"),
        *("--output_dir", tmp_path / "evaluated"),
    )
    assert (tmp_path / "evaluated" / "eval_results.json").exists()


def test_ends_of_lines_of_any_kind_are_newlines_and_letters_are_kept(tmp_path):
    (tmp_path / "text.txt").write_bytes("é\r\nß\r漢\n\r\n🙂\u2028".encode() * 9)
    data_args = DataTrainingArguments(train_file=str(tmp_path / "text.txt"), block_size=4)
    text = load_text(data_args, ModelArguments())["train"]["text"]
    assert "".join(text) == "é\nß\n漢\n\n🙂\u2028" * 9


@pytest.fixture
def mistake(run, capsys):
    """What the script says on standard error when run with these arguments, having ended with exit code 2."""

    def mistake(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return mistake


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "x", "--train_file", "x.txt"], "either --dataset_name or --train_file"),
        (["--train_file", "absent.txt"], "--train_file absent.txt: there is no such file"),
        (["--train_file", str(SCRIPT)], "--train_file .*run_clm.py: the name must end in one of .txt"),
        (["--validation_file", str(SCRIPT)], "--validation_file needs --train_file"),
        (["--train_file", str(SCRIPT.parent.parent / "constraints.txt")], "give --do_train, --do_eval or both"),
        (["--block_size", "1000000"], "--block_size 1000000 is longer than the train text"),
        (["--block_size", "1"], "--block_size must be at least 2, got 1"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1, got 0: leave it out"),
        (["--max_train_samples", "-3"], "--max_train_samples must be at least 1, got -3: leave it out"),
        (["--max_eval_samples", "0"], "--max_eval_samples must be at least 1, got 0: leave it out"),
        (["--preprocessing_num_workers", "0"], "--preprocessing_num_workers must be at least 1, got 0"),
        (["--num_directions", "0"], "`num_directions` must be at least 1, got 0"),
        (["--model_type", "gpt2", "--config_overrides", "n_embd=12,n_positions=16"], "at most the model's 16, not 32"),
        (["--model_type", "lstm"], "--model_type lstm is unknown; choose from .*zoo_rnn"),
        (["--config_overrides", "hidden_size=abc"], "--config_overrides hidden_size=abc: invalid literal"),
        (["--config_overrides", "foo=1"], "--config_overrides foo=1: key foo"),
        (["--model_name_or_path", "/absent"], "/absent cannot be loaded"),
        (["--smoothing_radius", "1e-12"], "`smoothing_radius`=1e-12 moves only"),
        (["--fp16"], "float16 on a CPU"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_flag_and_the_remedy(mistake, tmp_path, arguments, message):
    assert re.search(f"run_clm.py: error: .*{message}", mistake("--output_dir", tmp_path, "--use_cpu", *arguments))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "--train_file .*empty.txt: the file is empty"),
        ("latin.txt", "é\n".encode("latin-1"), "latin.txt cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("numbers.csv", b"id,text_of_it\n1,a\n", "numbers.csv: Column `id` must hold text, not 1"),
        ("short.txt", b"one block, none to evaluate on...\n", "1 blocks .* another --validation_split_percentage"),
    ],
)
def test_a_file_without_a_text_to_cut_is_named(mistake, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    arguments = ["--train_file", tmp_path / name, "--do_eval", "--block_size", 32, "--use_cpu"]
    assert re.search(message, mistake(*arguments, "--output_dir", tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "job.json: there is no such file"),
        ("{", "job.json is not JSON: "),
        ("[]", "job.json must hold arguments by name"),
        ('{"block_sise": 3}', "block_sise"),
        ('{"train_file": "absent.txt"}', "--train_file absent.txt: there is no such file"),
    ],
)
def test_a_mistake_in_a_json_file_is_named(mistake, tmp_path, content, message):
    if content is not None:
        (tmp_path / "job.json").write_text(content)
    assert re.search(f"error: .*{message}", mistake(tmp_path / "job.json"))


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "absent.json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("run_clm.py: error: absent.json: there is no such file.\n")
    assert "Traceback" not in done.stderr


def test_another_runs_model_is_not_overwritten_unless_told_to(run, mistake, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "--overwrite_output_dir" in mistake("--output_dir", tmp_path, *TWO_STEPS, *SMALL)
    run("--output_dir", tmp_path, "--overwrite_output_dir", *TWO_STEPS, *SMALL)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "zoo_rnn"


def test_a_stream_that_has_no_validation_text_is_refused(mistake, text_file, tmp_path):
    arguments = ["--train_file", text_file, "--streaming", "--do_train", "--output_dir", tmp_path, *TWO_STEPS]
    assert "add --validation_file" in mistake(*arguments)


def test_a_stream_without_a_last_step_is_refused(mistake, text_file, tmp_path):
    files = ["--train_file", text_file, "--validation_file", text_file]
    arguments = [*files, "--streaming", "--do_train", "--output_dir", tmp_path, "--use_cpu"]
    assert "say with --max_steps when to stop" in mistake(*arguments)


def test_help_explains_every_flag_of_its_own(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "trains a small LSTM on CPython's own documentation" in printed
    for flag in ("--model_name_or_path", "--block_size", "--num_directions", "--smoothing_radius", "--max_steps"):
        assert flag in printed
    head = printed[: printed.index("options:")]
    assert "Without a text, these take the place of the defaults below" in head
    for name, value in MAIN_JOB.items():
        assert f"--{name} {value}" in head


@pytest.mark.parametrize(("given", "done"), [([], (True, True)), (["--do_eval"], (False, True))])
def test_the_main_job_does_no_more_than_it_is_told(given, done):
    _, _, args = parse_arguments(given, "")
    assert (args.do_train, args.do_eval) == done
