"""A trajectory on the Hub stands for the weights: what it starts from is found again, or it is said why not."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import VOCABULARY, texts, weights
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from small_models import dnc, mamba2, rnn, rwkv7
from test_trainer import tiny_llama
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaForCausalLM

import zoo_hf
from zoo_hf import Trajectory, TrajectoryError, cli, from_base, load_from_trajectory
from zoo_hf.origin import Origin, made_again, origin_of, uniform


BASE, TUNED = "tester/base", "tester/tuned"
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def base(hub):
    """A Llama on the Hub, to be tuned."""
    tiny_llama().push_to_hub(BASE)
    return BASE


@pytest.fixture
def tuned(trainer, tmp_path):
    """`tuned(model)`: its trainer, after four steps."""

    def make(model, examples=None, **arguments):
        arguments = {"max_steps": 4, "optim": "adamw_torch", "output_dir": str(tmp_path / "run")} | arguments
        made = trainer(model, examples or texts(8), **arguments)
        made.train()
        return made

    return make


def classified(count=8):
    """Texts with one of three labels."""
    return [{"input_ids": text["input_ids"], "labels": place % 3} for place, text in enumerate(texts(count))]


def the_whole_model():
    return AutoModelForCausalLM.from_pretrained(BASE), None


def an_adapter():
    return from_base(BASE, adapter=LORA, seed=7), None


def an_adapter_of_bfloat16():
    return from_base(BASE, adapter=LORA, dtype=torch.bfloat16), None


def a_new_head():
    options = {"auto": "AutoModelForSequenceClassification", "num_labels": 3, "pad_token_id": 0}
    return from_base(BASE, **options), classified()


def a_new_head_beside_an_adapter():
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    options = {"auto": "AutoModelForSequenceClassification", "num_labels": 3, "pad_token_id": 0}
    return from_base(BASE, adapter=adapter, **options), classified()


def a_dora_adapter():
    return from_base(BASE, adapter=LoraConfig(use_dora=True, target_modules=["q_proj"])), None


def new(family):
    """A new model of a family, as a script makes it after `set_seed(args.seed)`."""

    def started():
        torch.manual_seed(42)
        return family(vocab_size=VOCABULARY), None

    started.__name__ = f"new {family.__name__}"
    return started


@pytest.mark.parametrize(
    "started",
    [
        the_whole_model,
        an_adapter,
        an_adapter_of_bfloat16,
        a_new_head,
        a_new_head_beside_an_adapter,
        a_dora_adapter,
        *map(new, (rnn, dnc, rwkv7, mamba2)),
    ],
    ids=lambda started: started.__name__,
)
def test_kilobytes_on_the_hub_give_the_weights_bit_for_bit(hub, base, tuned, started):
    model, examples = started()
    made = tuned(model, examples)
    made.push_trajectory_to_hub(TUNED, dataset="random tokens")
    files = hub.files(TUNED)
    assert files.keys() == {".gitattributes", "README.md", "trajectory.zoo"}
    assert len(files["trajectory.zoo"]) < 20_000
    torch.manual_seed(1)
    rebuilt, expected = weights(load_from_trajectory(TUNED)), weights(made.model)
    assert rebuilt.keys() == expected.keys()
    assert all(torch.equal(rebuilt[name], weight) for name, weight in expected.items())
    start = weights(load_from_trajectory(TUNED, upto=0))
    assert not all(torch.equal(rebuilt[name], weight) for name, weight in start.items())


def test_the_card_says_that_there_are_no_weights_and_how_to_get_them(hub, base, tuned):
    made = tuned(from_base(BASE, adapter=LORA))
    made.push_trajectory_to_hub(TUNED, license="mit")
    card = hub.files(TUNED)["README.md"].decode()
    assert f"base_model: {BASE}" in card
    assert "This repository has no weights." in card
    assert "training_args.bin" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert code == f'import zoo_hf\n\nmodel = zoo_hf.load_from_trajectory("{TUNED}")\n'
    names = {}
    exec(code, names)
    assert all(torch.equal(weights(names["model"])[name], weight) for name, weight in weights(made.model).items())
    info = HfApi().model_info(TUNED)
    assert {"trajectory", "zoo_hf"} <= set(info.tags)


def test_the_command_of_the_card_saves_the_model(hub, base, tuned, tmp_path, monkeypatch, capsys):
    made = tuned(AutoModelForCausalLM.from_pretrained(BASE))
    made.push_trajectory_to_hub(TUNED)
    monkeypatch.chdir(tmp_path)
    command = hub.files(TUNED)["README.md"].decode().split("```bash\n")[1].split("\n```")[0]
    assert cli.main(command.split()[1:]) == 0
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "replayed"))
    assert all(torch.equal(saved[name], weight) for name, weight in weights(made.model).items())
    assert cli.main(["trajectory", "info", TUNED]) == 0
    commit = HfApi().model_info(BASE).sha
    assert f"{BASE} at {commit}" in capsys.readouterr().out


def test_the_base_is_that_of_its_commit_whatever_was_pushed_since(hub, base, tuned, tmp_path, monkeypatch):
    made = tuned(AutoModelForCausalLM.from_pretrained(BASE))
    made.push_trajectory_to_hub(TUNED)
    torch.manual_seed(9)
    LlamaForCausalLM(tiny_llama().config).push_to_hub(BASE)
    rebuilt = weights(load_from_trajectory(TUNED))
    assert all(torch.equal(rebuilt[name], weight) for name, weight in weights(made.model).items())
    HfApi().delete_repo(BASE)
    HfApi().create_repo(BASE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(OSError, match=BASE):
        load_from_trajectory(TUNED)


def test_weights_and_trajectory_of_one_repository_agree(hub, base, trainer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    made = trainer(model, texts(8), push_to_hub=True, hub_model_id=TUNED, output_dir=str(tmp_path / "run"))
    made.train()
    made.push_to_hub()
    pushed, rebuilt = weights(AutoModelForCausalLM.from_pretrained(TUNED)), weights(load_from_trajectory(TUNED))
    assert all(torch.equal(rebuilt[name], weight) for name, weight in pushed.items())


def test_new_tensors_are_named_with_their_bounds(hub, base, tuned, tmp_path):
    model = from_base(BASE, adapter=LORA, seed=7)
    tuned(model)
    origin = Origin(**Trajectory.open(tmp_path / "run/trajectory.zoo").header.origin)
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert sorted(origin.drawn) == sorted(names)
    for name, bound in origin.drawn.items():
        start = made_again(asdict(origin)).get_parameter(name)
        assert torch.equal(start, (uniform(7, name, start.numel()) * bound).view_as(start))
        assert bound == pytest.approx(start.shape[1] ** -0.5, rel=0.35), "what peft draws from"
    assert origin.adapter == {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }


def test_initial_noise_is_uniform_and_the_same_everywhere():
    noise = uniform(3, "a", 40_000)
    assert torch.equal(noise[:7], uniform(3, "a", 7))
    assert noise.min() >= -1
    assert noise.max() < 1
    error = 4 * (1 / 3 / len(noise)) ** 0.5
    assert abs(noise.mean()) < error
    assert (noise**2).mean() == pytest.approx(1 / 3, abs=4 * (4 / 45 / len(noise)) ** 0.5)
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / 3 / len(noise) ** 0.5
    words = zoo_hf.philox4x32(torch.tensor([0, 5, zoo_hf.noise.parameter_id("a"), 0]), torch.tensor([3, 0]))
    assert noise[:4].tolist() == [int(word >> 8) / 2**23 - 1 for word in words]
    assert abs((noise * uniform(4, "a", len(noise))).mean()) < 4 / 3 / len(noise) ** 0.5


def test_an_adapter_that_was_added_by_hand_cannot_be_made_again(hub, base, tuned):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LORA)
    start = weights(model)
    made = tuned(model)
    with pytest.raises(TrajectoryError, match=r"does not say from what the run started .* `zoo_hf.from_base` makes"):
        made.push_trajectory_to_hub(TUNED)
    assert (TUNED in [found.id for found in HfApi().list_models()]) is False
    again = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LORA)
    again.load_state_dict(start)
    rebuilt = weights(load_from_trajectory(made.args.output_dir, model=again))
    assert all(torch.equal(rebuilt[name], weight) for name, weight in weights(made.model).items())


def test_what_was_changed_in_the_configuration_goes_along(hub, base, tuned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE, hidden_act="relu")
    model.config.rms_norm_eps = 1e-3
    tuned(model).push_trajectory_to_hub(TUNED)
    assert load_from_trajectory(TUNED).config.hidden_act == "relu"
    assert load_from_trajectory(TUNED).config.rms_norm_eps == 1e-3
    origin = Trajectory.open(tmp_path / "run/trajectory.zoo").header.origin
    assert origin["config"] == {"hidden_act": "relu", "rms_norm_eps": 1e-3}


def test_the_trainers_arguments_hold_for_a_trajectory_too(hub, base, tuned, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    arguments = {"hub_private_repo": True, "hub_token": f"{hub.token}\n", "optim": "sgd"}
    made = tuned(zoo_hf.RNNForCausalLM(zoo_hf.RNNConfig(vocab_size=VOCABULARY)), seed=3, **arguments)
    with pytest.raises(TrajectoryError, match="not those that the run started from"):
        made.push_trajectory_to_hub(TUNED)  # nobody has set the seed
    torch.manual_seed(3)
    made = tuned(zoo_hf.RNNForCausalLM(zoo_hf.RNNConfig(vocab_size=VOCABULARY)), seed=3, **arguments)
    made.push_trajectory_to_hub(TUNED)
    api = HfApi(token=hub.token)
    assert api.model_info(TUNED).private
    api.create_branch(TUNED, branch="second")
    made.args.hub_revision = "second"
    made.push_trajectory_to_hub(TUNED, commit_message="Again")
    assert (
        'load_from_trajectory("tester/tuned", revision="second")' in hub.files(TUNED, "second")["README.md"].decode()
    )


def test_a_configuration_that_json_has_no_word_for_does_not_stop_a_run(hub, base, tuned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.config.compute_dtype = {"torch": torch.bfloat16, "names": {"a"}}
    tuned(model)
    origin = Trajectory.open(tmp_path / "run/trajectory.zoo").header.origin
    assert origin["config"]["compute_dtype"]["names"] == "{'a'}"


def test_a_class_that_no_known_auto_class_makes_has_no_origin():
    model = BertForMaskedLM(BertConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_attention_heads=1))
    assert origin_of(model, 0) == {}
    assert origin_of(model.bert, 0)["auto"] == "AutoModel"


def test_a_repository_with_weights_is_not_said_to_have_none(hub, base, tuned):
    tiny_llama().push_to_hub(TUNED)
    made = tuned(AutoModelForCausalLM.from_pretrained(BASE))
    with pytest.raises(ValueError, match="tester/tuned has weights, beside which a trajectory would not be alone"):
        made.push_trajectory_to_hub(TUNED)


def test_a_hub_that_is_not_reached_is_not_one_without_a_trajectory(hub, impatient, base):
    hub.die()
    with pytest.raises(OSError, match=r"cannot find|[cC]onnection") as error:
        load_from_trajectory(TUNED)
    assert not isinstance(error.value, TrajectoryError)


def test_what_was_loaded_is_no_longer_what_it_was_made_from(hub, base, tuned):
    tuned(from_base(BASE, adapter=LORA)).push_trajectory_to_hub(TUNED)
    made = tuned(load_from_trajectory(TUNED))
    with pytest.raises(TrajectoryError, match="does not say from what the run started"):
        made.push_trajectory_to_hub("tester/twice")


def test_what_a_trajectory_does_not_give_is_not_published(hub, base, tuned):
    made = tuned(AutoModelForCausalLM.from_pretrained(BASE))
    with torch.no_grad():
        next(made.model.parameters()).mul_(1.001)
    with pytest.raises(TrajectoryError, match="does not give the model's present weights"):
        made.push_trajectory_to_hub(TUNED)


def test_a_model_whose_weights_were_changed_before_the_run_is_refused(hub, base, tuned):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    made = tuned(model)
    with pytest.raises(TrajectoryError, match="not those that the run started from"):
        made.push_trajectory_to_hub(TUNED)


def test_a_folder_of_this_machine_is_no_origin(hub, base, tuned, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "local")
    with pytest.raises(ValueError, match="`base` must be the name of a model on the Hub, got"):
        from_base(str(tmp_path / "local"))
    made = tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "local"))
    assert Trajectory.open(tmp_path / "run/trajectory.zoo").header.origin == {}
    assert str(tmp_path) not in (tmp_path / "run/trajectory.zoo").read_bytes().decode("latin-1")
    with pytest.raises(TrajectoryError, match="does not say from what the run started"):
        made.push_trajectory_to_hub(TUNED)


@pytest.mark.parametrize(
    "adapter", [LoraConfig(init_lora_weights="pissa"), LoraConfig(init_lora_weights="olora"), object()]
)
def test_an_adapter_that_starts_from_what_is_no_noise_is_refused(hub, base, adapter):
    with pytest.raises(ValueError, match=r"`adapter` must be a `peft.LoraConfig` with `init_lora_weights` one of"):
        from_base(BASE, adapter=adapter)


def test_what_cannot_be_recorded_is_refused_before_the_training(hub, base):
    with pytest.raises(ValueError, match="recorded as JSON: Object of type set is not JSON"):
        from_base(BASE, pad_token_id={1, 2})
    with pytest.raises(ValueError, match=r"`seed` must be in \[0, 2\*\*32\), got -1"):
        from_base(BASE, seed=-1)
    with pytest.raises(ValueError, match="The configuration of tester/base, LlamaConfig, has no `num_label`"):
        from_base(BASE, num_label=3)
    with pytest.raises(ValueError, match="`auto` must be one of"):
        from_base(BASE, auto="AutoModelForMaskedLM")


def test_a_repository_without_a_trajectory_and_one_that_is_not_there(hub, base):
    with pytest.raises(TrajectoryError, match=f"{BASE}: this repository has no trajectory.zoo"):
        load_from_trajectory(BASE)
    with pytest.raises(RepositoryNotFoundError):
        load_from_trajectory("tester/nothing")


@pytest.mark.parametrize(
    "forged",
    [
        {"auto": "os"},
        {"base": "../base", "revision": "main"},
        {"dtype": "nn"},
        {"adapter": {"no such": 1}},
        {"adapter": {"r": "two"}},
        {"config": {"vocab_size": -1}},
        {"config": []},
        {"drawn": {"nothing": 1.0}},
        {"extra": 1},
        {"base": None, "config": {}},
        {"base": None, "config": {"model_type": "nothing"}},
        {"base": None, "config": {"model_type": "llama", "hidden_size": "wide"}},
        {"seed": -1},
    ],
    ids=json.dumps,
)
def test_an_origin_that_was_forged_is_an_error_or_not_the_start(hub, base, tuned, tmp_path, forged):
    tuned(from_base(BASE, adapter=LORA))
    found = Trajectory.open(tmp_path / "run/trajectory.zoo")
    header = replace(found.header, origin=found.header.origin | forged)
    made = Trajectory.create(tmp_path / "forged.zoo", header)
    for step in found:
        made.append(step)
    with pytest.raises(TrajectoryError):
        load_from_trajectory(tmp_path / "forged.zoo")
