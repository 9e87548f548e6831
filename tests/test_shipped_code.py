"""The code that is saved beside the weights is enough to use a model where zoo_hf is not installed."""

import subprocess
import sys

import pytest
import torch
from small_models import SMALL


# Run in a process of its own; the arguments are the folder of models and their names.
WITHOUT_ZOO_HF = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "zoo_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM

logits = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(Path(sys.argv[1], name), trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits[name] = model(torch.load(Path(sys.argv[1], "tokens.pt"))).logits
assert "zoo_hf" not in sys.modules
torch.save(logits, Path(sys.argv[1], "logits.pt"))
"""


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """The models' logits for the same tokens by name: (in this process, in one without zoo_hf)."""
    folder, here = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    tokens = torch.randint(1, 11, (2, 9))
    torch.save(tokens, folder / "tokens.pt")
    names = {name: name.replace(" ", "_").replace(",", "") for name in SMALL}
    for name, place in names.items():
        model = SMALL[name]().eval()
        model.save_pretrained(folder / place)
        with torch.no_grad():
            here[name] = model(tokens).logits
    environment = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_ZOO_HF, str(folder), *names.values()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stderr
    elsewhere = torch.load(folder / "logits.pt")
    return {name: (here[name], elsewhere[place]) for name, place in names.items()}


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_same_where_zoo_hf_cannot_be_imported(logits, name):
    here, elsewhere = logits[name]
    torch.testing.assert_close(elsewhere, here, atol=1e-6, rtol=0)
