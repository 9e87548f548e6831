"""The record of a run: what is written is read back, what was damaged is refused, and replay gives the weights."""

import json
import logging
import math
import os
import random
import struct
import subprocess
import sys
import zlib
from importlib.metadata import version

import pytest
import torch
from conftest import texts, tiny_lstm, weights
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from zoo_hf import Trajectory, TrajectoryError, ZOOTrainer, replay
from zoo_hf.record import Header, Step
from zoo_hf.replay import weights_hash
from zoo_hf.trajectory import SIGNATURE, frame


def header(**changes):
    settings = {
        "seed": 5,
        "num_directions": 3,
        "distribution": "rademacher",
        "direction_rank": 1,
        "max_grad_norm": 0.0,
    }
    parameters = {"w": {"shape": [2, 3], "dtype": "float32", "id": zlib.crc32(b"w")}}
    fields = {
        "settings": settings | {"max_grad_norm": 0.0} | changes.pop("settings", {}),
        "optimizer": "torch.optim.sgd.SGD",
        "groups": [{"params": ["w"], "momentum": 0.0}],
        "parameters": parameters,
        "matrices": [],
        "run": "0" * 32,
        "start": "0" * 64,
        "first_step": 0,
        "continued": False,
        "versions": {"torch": "2"},
    }
    return Header(**fields | changes)


def step(number, **changes):
    fields = {
        "step": number,
        "rates": (1e-3 / (number + 1),),
        "smoothing_radius": 0.01,
        "loss": 2.5 - number,
        "coefficients": torch.tensor([1.5, math.nan, -0.1 * number]),
        "key": 64,
        "members": 6,
    }
    return Step(**fields | changes)


def written(path, steps=4, **changes):
    """A trajectory with some steps."""
    made = Trajectory.create(path, header(**changes))
    for number in range(steps):
        made.append(step(made.header.first_step + number))
    return made


def as_numbers(found):
    """A step as plain numbers, NaN included."""
    return found[:4], found.coefficients.view(torch.int32).tolist(), found[5:]


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    written(tmp_path / "t.zoo", first_step=7)
    found = Trajectory.open(tmp_path / "t.zoo")
    found.verify()
    assert found.header == header(first_step=7)
    assert [as_numbers(each) for each in found] == [as_numbers(step(number)) for number in range(7, 11)]
    assert (len(found), found.stop) == (4, 11)


def test_the_file_is_laid_out_as_its_module_says(tmp_path):
    written(tmp_path / "t.zoo", steps=1)
    content = (tmp_path / "t.zoo").read_bytes()
    assert content.startswith(SIGNATURE)
    place, checksum = len(SIGNATURE), zlib.crc32(SIGNATURE)
    bodies = []
    while place < len(content):
        length, check = struct.unpack_from("<II", content, place)
        assert check == zlib.crc32(content[place : place + 4])
        bodies.append(content[place + 8 : place + 8 + length])
        checksum = zlib.crc32(bodies[-1], checksum)
        assert struct.unpack_from("<I", content, place + 8 + length) == (checksum,)
        place += length + 12
    assert json.loads(bodies[0])["settings"]["seed"] == 5
    number, radius, loss, key, members, rate = struct.unpack_from("<IddQId", bodies[1])
    assert (number, radius, loss, key, members, rate) == (0, 0.01, 2.5, 64, 6, 1e-3)
    assert len(bodies[1]) == struct.calcsize("<IddQId") + 3 * 4


def test_a_step_adds_its_coefficients_and_52_bytes_whatever_the_models_size(tmp_path):
    made = Trajectory.create(tmp_path / "t.zoo", header(settings={"num_directions": 96}))
    before = made.end
    made.append(step(0, coefficients=torch.randn(96)))
    assert made.end - before == 4 * 96 + 52


@pytest.mark.parametrize("left", range(1, 64))
def test_a_last_step_that_was_not_written_to_its_end_is_left_out_and_said(tmp_path, caplog, left):
    path = tmp_path / "t.zoo"
    made = written(path)
    os.truncate(path, made.end - left)
    with caplog.at_level(logging.WARNING):
        found = Trajectory.open(path)
    assert len(found) == 3
    (record,) = caplog.records
    assert str(path) in record.message
    found.append(step(3))
    found.append(step(4))
    assert [each.step for each in Trajectory.open(path)] == [0, 1, 2, 3, 4]
    caplog.clear()
    assert [each.step for each in Trajectory.open(path)] == [0, 1, 2, 3, 4]
    assert not caplog.records, "what was torn is gone from the file"


def test_a_torn_header_counts_as_no_trajectory(tmp_path):
    path = tmp_path / "t.zoo"
    made = written(path, steps=0)
    whole = path.read_bytes()
    for length in range(made.end):
        path.write_bytes(whole[:length])
        assert Trajectory.find(path) is None
        with pytest.raises(TrajectoryError, match=r"t\.zoo: its header was not written to the end"):
            Trajectory.open(path)
    assert Trajectory.find(tmp_path / "none.zoo") is None


def frames(content):
    """The signature, and every frame, as bytes."""
    place, found = len(SIGNATURE), [content[: len(SIGNATURE)]]
    while place < len(content):
        length = struct.unpack_from("<I", content, place)[0] + 12
        found.append(content[place : place + length])
        place += length
    return found


def test_every_flipped_bit_is_found_and_its_record_named(tmp_path):
    path = tmp_path / "t.zoo"
    written(path)
    parts = frames(path.read_bytes())
    for number, part in enumerate(parts):
        for bit in range(8 * len(part)):
            changed = bytearray(part)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(b"".join([*parts[:number], changed, *parts[number + 1 :]]))
            what = "no trajectory" if number == 0 else "the header" if number == 1 else f"record {number - 2}"
            with pytest.raises(TrajectoryError, match=what):
                Trajectory.open(path)


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 3, 2, 4, 5],
        [0, 1, 2, 2, 3, 4, 5],
        [0, 1, 2, 4, 5],
        [0, 1, 2, 3, 5],
        [0, 2, 3, 4, 5],
        [0, 1, 1, 2, 3, 4, 5],
    ],
    ids=["reordered", "doubled", "one missing", "last but one missing", "no header", "two headers"],
)
def test_records_that_were_moved_doubled_or_taken_out_are_found(tmp_path, order):
    path = tmp_path / "t.zoo"
    written(path)
    parts = frames(path.read_bytes())
    path.write_bytes(b"".join(parts[place] for place in order))
    with pytest.raises(TrajectoryError, match=r"t\.zoo: the checksum of (the header|record \d) is wrong"):
        Trajectory.open(path)


def test_records_of_another_run_are_found(tmp_path):
    written(tmp_path / "a.zoo")
    written(tmp_path / "b.zoo", start="1" * 64)
    a, b = (frames((tmp_path / name).read_bytes()) for name in ("a.zoo", "b.zoo"))
    (tmp_path / "c.zoo").write_bytes(b"".join([*a[:3], *b[3:]]))
    with pytest.raises(TrajectoryError, match="the checksum of record 1 is wrong"):
        Trajectory.open(tmp_path / "c.zoo")


def forged(path, body, *steps):
    """A file whose checksums are right, whatever is in it."""
    content, checksum = SIGNATURE, zlib.crc32(SIGNATURE)
    for each in (body, *steps):
        checksum = zlib.crc32(each, checksum)
        content += frame(each, checksum)
    path.write_bytes(content)


HEADER = json.loads(header().pack_header())


def changed(**fields):
    return json.dumps(HEADER | fields).encode()


def with_setting(name, value):
    return changed(settings=HEADER["settings"] | {name: value})


HOSTILE = {
    "endless lists": b"[" * 1_000_000,
    "no JSON": b"\x80\x04\x95pickle",
    "a list": b"[]",
    "another format": changed(format=3),
    "no format": b"{}",
    "a field too many": changed(load="os.system"),
    "a field too few": json.dumps({name: value for name, value in HEADER.items() if name != "start"}).encode(),
    "endless directions": with_setting("num_directions", 10**30),
    "no directions": with_setting("num_directions", 0),
    "a float for a seed": with_setting("seed", 0.5),
    "a seed that is none": with_setting("seed", -1),
    "no settings": changed(settings=None),
    "another distribution": with_setting("distribution", "cauchy"),
    "a list for a distribution": with_setting("distribution", []),
    "a number as text": with_setting("max_grad_norm", "1.0"),
    "versions that are none": changed(versions=[]),
    "a side beyond all measure": changed(parameters={"w": {"shape": [2**70], "dtype": "float32", "id": 0}}),
    "a vector as a matrix": changed(
        matrices=["w"], parameters={"w": {"shape": [6], "dtype": "float32", "id": zlib.crc32(b"w")}}
    ),
    "a negative norm": with_setting("max_grad_norm", -1),
    "text for a norm": with_setting("max_grad_norm", "x"),
    "a negative step": changed(first_step=-1),
    "another id": changed(parameters={"w": {"shape": [2], "dtype": "float32", "id": 0}}),
    "unknown names": changed(groups=[{"params": ["v"]}]),
    "groups of numbers": changed(groups=[1, 2]),
    "names that are none": changed(groups=[{"params": [["w"]]}]),
    "other matrices": changed(matrices=["v"]),
    "an endless rank": changed(matrices=["w"], settings=HEADER["settings"] | {"direction_rank": 2**20 - 1}),
    "an origin that is none": changed(origin=[]),
    "a launch that is none": changed(launch=1),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_with_right_checksums_is_refused(tmp_path, body):
    forged(tmp_path / "t.zoo", body)
    with pytest.raises(TrajectoryError, match=r"t\.zoo: its (header makes no sense|format is)"):
        Trajectory.open(tmp_path / "t.zoo")


@pytest.mark.parametrize("length", [2**26 + 1, 2**32 - 1])
def test_a_length_beyond_all_measure_is_refused_before_anything_is_read(tmp_path, length):
    prefix = struct.pack("<I", length)
    with (tmp_path / "t.zoo").open("wb") as file:
        file.write(SIGNATURE + prefix + struct.pack("<I", zlib.crc32(prefix)))
        file.truncate(2**33)  # a sparse file
    with pytest.raises(TrajectoryError, match="the header claims to have"):
        Trajectory.open(tmp_path / "t.zoo")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": 1}, "step 1 stands where step 0 should"),
        ({"smoothing_radius": -1.0}, "smoothing radius is -1"),
        ({"loss": math.inf}, "loss inf"),
        ({"rates": (math.inf,)}, "infinite"),
        ({"coefficients": torch.tensor([math.inf, 0, 0])}, "infinite"),
        ({"coefficients": torch.tensor([math.nan, math.nan, 0])}, "not a number"),
        ({"coefficients": torch.zeros(4)}, "bytes in place of"),
    ],
)
def test_a_hostile_step_with_right_checksums_is_refused(tmp_path, changes, reason):
    forged(tmp_path / "t.zoo", header().pack_header(), header().pack(step(0, **changes)))
    with pytest.raises(TrajectoryError, match=reason):
        Trajectory.open(tmp_path / "t.zoo")


def test_none_of_ten_thousand_changed_files_is_taken_for_what_was_written(tmp_path):
    path, draw, mutations = tmp_path / "t.zoo", random.Random(0), 10_000
    written(path, steps=6)
    whole = path.read_bytes()
    steps = [as_numbers(each) for each in Trajectory.open(path)]
    refused, whole_ends = 0, 0
    for _ in range(mutations):
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            mutate_(changed, draw)
        path.write_bytes(changed)
        try:
            found = Trajectory.open(path)
        except TrajectoryError as error:
            refused += error.args[0].startswith(str(path))
            continue
        read = [as_numbers(each) for each in found]
        assert found.header == header()
        assert read == steps[: len(read)], "at most the end was cut off"
        whole_ends += 1
    assert refused + whole_ends == mutations, "every error names the file"
    assert refused > mutations / 2


def mutate_(content, draw):
    """Flip, set, insert, take out, double or move bytes, or cut the end off."""
    first, length = draw.randrange(len(content) + 1), draw.choice([1, 2, 4, 8, 64, 1000])
    match draw.randrange(7):
        case 0:
            content[first : first + 1] = bytes(byte ^ 1 << draw.randrange(8) for byte in content[first : first + 1])
        case 1:
            content[first : first + length] = draw.randbytes(len(content[first : first + length]))
        case 2:
            content[first:first] = draw.randbytes(length)
        case 3:
            del content[first : first + length]
        case 4:
            content[first:first] = content[first : first + length]
        case 5:
            content[first:first] = content[draw.randrange(len(content) + 1) :][:length]
        case 6:
            del content[max(1, first) :]


def test_append_refuses_what_cannot_follow(tmp_path):
    made = written(tmp_path / "t.zoo")
    for wrong in (step(3), step(5), step(4, coefficients=torch.zeros(2)), step(4, rates=(1.0, 2.0))):
        with pytest.raises(
            TrajectoryError,
            match=r"t\.zoo: step \d (is not what can follow step 3|cannot be recorded: it has \d+ bytes)",
        ):
            made.append(wrong)
    made.append(step(4))


def test_a_second_writer_of_one_file_is_noticed(tmp_path):
    one = written(tmp_path / "t.zoo")
    other = Trajectory.open(tmp_path / "t.zoo")
    one.append(step(4))
    with pytest.raises(TrajectoryError, match="something else has written to it since step 3"):
        other.append(step(4))
    with pytest.raises(TrajectoryError, match="it has 5 steps now, and had 4"):
        other.verify()


def test_cut_drops_later_steps_from_the_file(tmp_path):
    made = written(tmp_path / "t.zoo")
    made.cut(2)
    made.append(step(2, loss=9.0))
    assert [each.loss for each in Trajectory.open(tmp_path / "t.zoo")] == [2.5, 1.5, 9.0]


def test_a_new_file_moves_one_with_steps_aside_and_replaces_one_without(tmp_path):
    path = tmp_path / "trajectory.zoo"
    for steps in (1, 0, 2, 3):
        written(path, steps=steps)
    assert {p.name: len(Trajectory.open(p)) for p in tmp_path.iterdir()} == {
        "trajectory.zoo": 3,
        "trajectory-1.zoo": 1,
        "trajectory-2.zoo": 2,
    }


def test_a_full_disk_is_named_and_the_file_ends_with_the_step_before(tmp_path):
    made = written(tmp_path / "t.zoo")
    code = (
        "import resource, signal, sys; sys.path[:0] = sys.argv[3:]\n"
        "from test_trajectory import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))\n"
        "found = Trajectory.open(sys.argv[1])\n"
        "try: found.append(step(4))\n"
        "except OSError as error: print(error)\n"
    )
    room = made.end + 10  # so that a part of the step is written
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        str(tmp_path / "t.zoo"),
        str(room),
        os.path.dirname(__file__),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "step 4 could not be recorded and was not made (File too large)" in said
    assert "t.zoo" in said
    assert (tmp_path / "t.zoo").stat().st_size == made.end


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def lora():
    torch.manual_seed(0)
    return get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))


def in_bfloat16():
    return tiny_lstm().to(torch.bfloat16)


RUNS = {
    "sgd": {"optim": "sgd"},
    "momentum and a schedule": {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine"},
    "adamw with decay": {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    },
    "fused adamw": {"optim": "adamw_torch_fused"},
    "rmsprop": {"optim": "rmsprop"},
    "adagrad": {"optim": "adagrad"},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "forward difference": {"estimator": "forward"},
    "gaussian": {"distribution": "gaussian"},
    "low rank": {"distribution": "low_rank", "direction_rank": 2},
    "low rank gaussian": {"distribution": "low_rank_gaussian"},
    "clipped": {"max_grad_norm": 0.5},
    "population": {"probes": "population", "members_per_forward": 4},
    "bf16": {"bf16": True},
    "bfloat16 weights": {"model": in_bfloat16, "smoothing_radius": 0.05},
    "adapter": {"model": lora, "optim": "adamw_torch"},
    "split": {"data": "split"},
    "dropout": {"model": gpt2, "dropout": True},
}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_replay_gives_the_weights_of_the_run_bit_for_bit_without_a_forward_pass(trainer, tmp_path, arguments):
    arguments = dict(arguments)
    model = arguments.pop("model", tiny_lstm)
    made = trainer(model(), texts(10), **{"max_steps": 5, "learning_rate": 1e-2} | arguments)
    made.train()
    again = model()
    again.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    assert replay(again, tmp_path / "trajectory.zoo") is again
    start, moved = weights(model()), 0
    for name, weight in weights(made.model).items():
        assert torch.equal(weight, weights(again)[name]), name
        moved += not torch.equal(weight, start[name])
    assert moved > 0


def test_replay_stops_after_a_number_of_steps(trainer, tmp_path):
    made = trainer(tiny_lstm(), texts(10), max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
    made.train()
    half = replay(tiny_lstm(), tmp_path / "trajectory.zoo", upto=2)
    saved = type(half).from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), saved.parameters(), strict=True))
    with pytest.raises(TrajectoryError, match="`upto` must be between 0 and 4"):
        replay(tiny_lstm(), tmp_path / "trajectory.zoo", upto=5)


def test_replay_trains_what_the_run_trained_whatever_the_models_flags(trainer, tmp_path):
    model = lora()
    made = trainer(model, texts(10), max_steps=3)
    made.train()
    frozen = lora().requires_grad_(False)
    replay(frozen, tmp_path / "trajectory.zoo")
    assert all(torch.equal(weight, weights(frozen)[name]) for name, weight in weights(model).items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda ps: torch.optim.SGD(ps), "the optimizer is torch.optim.sgd.SGD and was torch.optim.adamw.AdamW"),
        (lambda ps: torch.optim.AdamW(ps, weight_decay=0.0), "the parameters are grouped otherwise"),
    ],
)
def test_another_optimizer_than_the_runs_is_refused(trainer, tmp_path, made, said):
    trainer(tiny_lstm(), texts(10), optim="adamw_torch", weight_decay=0.1).train()
    model = tiny_lstm()
    with pytest.raises(TrajectoryError, match=said):
        replay(model, tmp_path / "trajectory.zoo", optimizer=made(model.parameters()))


def test_a_second_run_of_an_optimizer_with_a_state_is_not_replayed_as_if_it_were_new(trainer, tmp_path):
    made = trainer(tiny_lstm(), texts(10), optim="adamw_torch")
    made.train()
    between = tiny_lstm()
    between.load_state_dict(made.model.state_dict())
    made.train()
    with pytest.raises(TrajectoryError, match="when AdamW had a state: pass `optimizer` with it"):
        replay(between, tmp_path / "trajectory.zoo")


def test_a_rate_that_is_a_tensor_needs_its_optimizer(config, tmp_path):
    def build():
        model = tiny_lstm()
        return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.0123))

    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    ZOOTrainer(model, config(max_steps=3), train_dataset=texts(10), optimizers=(optimizer, scheduler)).train()
    with pytest.raises(TrajectoryError, match="pass an `optimizer` like that of the run"):
        replay(tiny_lstm(), tmp_path / "trajectory.zoo")
    again, optimizer = build()
    replay(again, tmp_path / "trajectory.zoo", optimizer=optimizer)
    assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("name", ["schedule_free_adamw", "adafactor"])
def test_an_optimizer_that_is_none_of_torchs_is_asked_for_and_used(trainer, tmp_path, name):
    made = trainer(tiny_lstm(), texts(10), max_steps=4, optim=name)
    made.train()
    with pytest.raises(TrajectoryError, match="pass `optimizer`"):
        replay(tiny_lstm(), tmp_path / "trajectory.zoo")
    again = trainer(tiny_lstm(), texts(10), max_steps=4, optim=name, output_dir=str(tmp_path / "other"))
    again.create_optimizer()
    if name.startswith("schedule_free"):
        again.update.optimizer.train()  # of its two points, the one that is trained
        made.update.optimizer.train()
    replay(again.model, tmp_path / "trajectory.zoo", optimizer=again.update.optimizer)
    for key, weight in weights(made.model).items():
        assert torch.equal(weight, weights(again.model)[key]), key


def test_an_optimizer_with_a_state_is_refused_and_so_are_other_options(trainer, tmp_path):
    made = trainer(tiny_lstm(), texts(10), max_steps=4, optim="adamw_torch")
    made.train()
    again = trainer(tiny_lstm(), texts(10), max_steps=4, optim="adamw_torch", output_dir=str(tmp_path / "other"))
    used = again.create_optimizer().optimizer
    used.load_state_dict(made.update.optimizer.state_dict())
    with pytest.raises(TrajectoryError, match="AdamW has a state, and had none when the run began"):
        replay(again.model, tmp_path / "trajectory.zoo", optimizer=used)
    trainer(tiny_lstm(), texts(10), max_steps=4, optim="adafactor").train()
    again = trainer(tiny_lstm(), texts(10), max_steps=4, optim="adafactor", output_dir=str(tmp_path / "other"))
    other = again.create_optimizer().optimizer
    other.param_groups[0]["scale_parameter"] = True
    with pytest.raises(TrajectoryError, match="`scale_parameter` of parameter group 0 is True and was False"):
        replay(again.model, tmp_path / "trajectory.zoo", optimizer=other)


def test_the_wrong_model_is_refused_and_the_reason_named(trainer, tmp_path):
    trainer(tiny_lstm(), texts(10)).train()
    torch.manual_seed(1)
    other = tiny_lstm()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    for model, reason in (
        (other, "not those that the run started from"),
        (gpt2(), "the model has no parameter"),
        (in_bfloat16(), "'bfloat16'"),
        (tiny_lstm(hidden_size=8), "was .*'shape'"),
    ):
        before = weights(model)
        with pytest.raises(TrajectoryError, match=reason):
            replay(model, tmp_path / "trajectory.zoo")
        assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_an_adapters_base_is_part_of_what_the_run_started_from(trainer, tmp_path):
    trainer(lora(), texts(10)).train()
    other = lora()
    with torch.no_grad():
        other.get_parameter("base_model.model.transformer.wte.weight")[0, 0] += 1e-3
    with pytest.raises(TrajectoryError, match="not those that the run started from"):
        replay(other, tmp_path / "trajectory.zoo")


def test_a_header_names_no_code_that_replay_would_run(trainer, tmp_path):
    trainer(tiny_lstm(), texts(10)).train()
    found = Trajectory.open(tmp_path / "trajectory.zoo")
    for name in ("os.system", "torch.optim.lr_scheduler.LambdaLR", "torch.optim.sgd.sgd", "torch.optim.evil.Adagrad"):
        body = json.dumps(json.loads(found.header.pack_header()) | {"optimizer": name}).encode()
        forged(tmp_path / "forged.zoo", body)
        with pytest.raises(TrajectoryError, match="optimizer"):
            replay(tiny_lstm(), tmp_path / "forged.zoo")


def test_the_hash_of_the_weights_depends_on_every_bit_name_shape_and_dtype():
    model = tiny_lstm()
    hashes = [weights_hash(model)]
    with torch.no_grad():
        model.lm_head.bias.view(torch.int32)[-1] ^= 1
    hashes.append(weights_hash(model))
    model.lm_head.bias = torch.nn.Parameter(model.lm_head.bias.view(2, -1))
    hashes.append(weights_hash(model))
    model.lm_head.register_parameter("other", model.lm_head.bias)
    del model.lm_head.bias
    hashes.append(weights_hash(model))
    model.to(torch.bfloat16)
    hashes.append(weights_hash(model))
    assert len(set(hashes)) == len(hashes)
    assert weights_hash(tiny_lstm()) == hashes[0]


def test_a_run_writes_its_record_and_a_new_run_keeps_the_old_one(trainer, tmp_path):
    for steps in (2, 3):
        trainer(tiny_lstm(), texts(10), max_steps=steps).train()
    found = Trajectory.open(tmp_path / "trajectory.zoo")
    assert (len(found), len(Trajectory.open(tmp_path / "trajectory-1.zoo"))) == (3, 2)
    assert found.header.versions["zoo_hf"] == version("zoo_hf")
    assert found.header.start == weights_hash(tiny_lstm())


def test_a_scheduler_that_changes_more_than_the_rate_is_refused_before_anything_is_lost(config, tmp_path):
    model = tiny_lstm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    made = ZOOTrainer(model, config(max_steps=4), train_dataset=texts(10), optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        made.train()
    assert made.state.global_step == 1
    assert len(Trajectory.open(tmp_path / "trajectory.zoo")) == 1


SENSELESS = [
    {"weight_decay": "x"},
    {"betas": [0.9]},
    {"betas": [1.0, 0.9]},
    {"betas": [0.9, 2.0]},
    {"eps": None},
    {"eps": 10**400},
    {"amsgrad": []},
    {"fused": True, "differentiable": True},
    {"capturable": True, "foreach": True},
]


@pytest.mark.parametrize("options", SENSELESS, ids=str)
def test_options_that_make_no_sense_are_named_as_the_files_fault(trainer, tmp_path, options):
    trainer(tiny_lstm(), texts(10), optim="adamw_torch").train()
    found = Trajectory.open(tmp_path / "trajectory.zoo")
    loaded = json.loads(found.header.pack_header())
    groups = [group | options for group in loaded["groups"]]
    body = json.dumps(loaded | {"groups": groups}).encode()
    forged(tmp_path / "forged.zoo", body, *map(found.header.pack, found))
    try:
        replay(tiny_lstm(), tmp_path / "forged.zoo")
    except TrajectoryError as error:
        assert "forged.zoo" in str(error)  # noqa: PT017  # an option may also be harmless
