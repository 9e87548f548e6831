"""examples/convert_textgenrnn.py with the real weights, which pip brings if it reaches a package index."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"
PIP = "install --quiet --no-deps --no-build-isolation --retries 0 --timeout 10 textgenrnn==2.0.0 h5py --target"
ENGLISH = (
    "I went to the store this morning to buy some bread and milk, but it was closed. My wife told me that we should "
    "try the other one down the street. It was open, and the people who worked there were very nice."
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of textgenrnn, in a place from where it and h5py can be imported."""
    place = tmp_path_factory.mktemp("packages")
    pip = subprocess.run([sys.executable, "-m", "pip", *PIP.split(), place], capture_output=True, text=True)
    if pip.returncode != 0:
        pytest.skip(f"pip cannot bring textgenrnn and h5py here: {pip.stderr.strip().rpartition(chr(10))[2]}")
    sys.path.insert(0, str(place))
    yield place / "textgenrnn"
    sys.path.remove(str(place))


@pytest.fixture(scope="module")
def script(package):
    specification = importlib.util.spec_from_file_location("convert_textgenrnn", EXAMPLES / "convert_textgenrnn.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vocabulary(package):
    return json.loads((package / "textgenrnn_vocab.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ids(script, vocabulary):
    return script.convert_tokenizer(vocabulary)(ENGLISH, return_tensors="pt")["input_ids"][0]


@pytest.fixture(scope="module")
def run(package):
    """Runs an example as its user does, and gives what it prints."""

    def run(name, *arguments):
        places = [str(package.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    return run


@pytest.fixture(scope="module")
def converted(run, tmp_path_factory):
    """The folder that the script writes, and what it prints."""
    folder = tmp_path_factory.mktemp("converted")
    return folder, run("convert_textgenrnn.py", "--output_dir", folder)


def keras_lstm(inputs, kernel, recurrent, bias):
    """Outputs (B, T, H) of Keras' LSTM with the weights of a cuDNN layer."""
    kernels = [gate.T.reshape(gate.shape, order="F") for gate in np.hsplit(kernel, 4)]
    recurrents = [gate.T for gate in np.hsplit(recurrent, 4)]
    biases = np.split(sum(np.split(bias, 2)), 4)
    h = c = np.zeros((len(inputs), len(biases[0])))
    outputs = []
    for x in inputs.swapaxes(0, 1):
        i, f, g, o = (x @ k + h @ r + b for k, r, b in zip(kernels, recurrents, biases, strict=True))
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        outputs.append(h)
    return np.stack(outputs, axis=1)


def textgenrnn_scores(path, windows):
    """What textgenrnn computes before its softmax, (B, V) for windows (B, 40), in float64."""
    import h5py

    with h5py.File(path) as file:

        def weight(layer, name):
            return file[f"{layer}/{layer}/{name}:0"][:].astype(np.float64)

        hidden = [weight("embedding", "embeddings")[windows]]
        for layer in ("rnn_1", "rnn_2"):
            weights = [weight(layer, name) for name in ("kernel", "recurrent_kernel", "bias")]
            hidden.append(keras_lstm(hidden[-1], *weights))
        inputs = np.concatenate(hidden, axis=-1)  # (B, 40, 356)
        attention = np.exp(inputs @ weight("attention", "attention_W"))  # (B, 40, 1)
        average = (attention * inputs).sum(1) / attention.sum(1)
        return average @ weight("output", "kernel") + weight("output", "bias")


def test_scores_equal_textgenrnns_own_in_its_windows(script, package, ids):
    path = package / "textgenrnn_weights.hdf5"
    model = script.convert_model(path, exact=True).double()
    expected = textgenrnn_scores(path, np.lib.stride_tricks.sliding_window_view(np.pad(ids, (39, 0)), 40))
    assert expected.shape == (len(ENGLISH) + 1, 465)
    # float32 weights, and the two biases of a layer added in float32
    np.testing.assert_allclose(script.next_scores(model, ids, exact=True), expected, atol=1e-4)


@pytest.mark.parametrize(("exact", "nats"), [(True, 1.142), (False, 1.345)])
def test_a_character_of_plain_english_costs_what_the_docs_say(script, package, ids, exact, nats):
    model = script.convert_model(package / "textgenrnn_weights.hdf5", exact=exact)
    scores = script.next_scores(model, ids[:-1], exact)
    assert F.cross_entropy(scores, ids[1:]).item() == pytest.approx(nats, abs=2e-3)


def test_tokenizer_has_textgenrnns_numbers_and_restores_what_it_knows(script, vocabulary, tmp_path):
    tokenizer = script.convert_tokenizer(vocabulary)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.get_vocab() == {"<pad>": 0} | vocabulary
        ids = each("Naïve “quotes”\nin two lines, 漢: <s>")["input_ids"]
        known = "Naïve “quotes” in two lines, : "
        assert ids == [464, *(vocabulary[character] for character in known), 464]
        assert each.decode(ids, skip_special_tokens=True) == known


def test_what_is_written_is_mostly_english(converted):
    """Of its words half and more stand in CPython's documentation; a fourth do when its letters are shuffled."""
    folder, printed = converted
    english = set(re.findall("[a-z]+", " ".join(topics.values()).lower()))
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(lines) == 8
    for sample in (lines[:4], lines[4:]):  # textgenrnn's, and the converted model's
        words = re.findall("[a-z]+", " ".join(sample).lower())
        assert len(words) > 20
        assert np.mean([word in english for word in words]) > 0.5
    assert (folder / "model.safetensors").exists()


def test_saved_model_goes_on_from_its_state_as_if_it_had_read_all(converted, ids):
    model = AutoModelForCausalLM.from_pretrained(converted[0])
    with torch.inference_mode():
        whole = model(ids[None])
        first = model(ids[None, :100])
        rest = model(ids[None, 100:], state=first.state)
    torch.testing.assert_close(rest.logits, whole.logits[:, 100:], atol=1e-3, rtol=1e-4)
    assert whole.state.shape == (1, 2 * 2 * 128 + 356 + 1)


def test_it_trains_further_without_backpropagation(run, converted, tmp_path):
    run(
        *("run_clm.py", "--model_name_or_path", converted[0], "--do_train", "--do_eval", "--output_dir", tmp_path),
        *("--optim", "sgd", "--learning_rate", 5e-2, "--smoothing_radius", 1e-3, "--max_steps", 20),
        *("--max_eval_samples", 200, "--use_cpu"),
    )
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert after < before - 0.3
