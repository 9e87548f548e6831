r"""Turns a pretrained character model, textgenrnn 2.0.0 (Max Woolf, MIT licence), into a zoo_rnn with its tokenizer.

    pip install --no-deps --no-build-isolation textgenrnn==2.0.0 h5py
    python examples/convert_textgenrnn.py --output_dir outputs/textgenrnn

reads two files of that package, which it never imports (or `--weights` and `--vocab`), prints what a character of your
English `--text` costs and what is written after "The ", and saves the model. To train it further:

    python examples/run_clm.py --model_name_or_path outputs/textgenrnn --train_file notes.txt --do_train --do_eval \
        --output_dir outputs/notes --optim sgd --learning_rate 5e-2 --smoothing_radius 1e-3 --block_size 64

textgenrnn reads the last 40 characters anew for every character that it predicts. The converted model carries its
state on instead, for a fortieth of the work, and predicts worse until it is trained further. Both are shown.
"""

import argparse
import json
from importlib.metadata import distribution
from pathlib import Path

import h5py
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zoo_hf import RNNConfig, RNNForCausalLM
from zoo_hf.tasks import python_documentation


WINDOW = 40  # characters that textgenrnn reads, zeros before the first


def convert_tokenizer(vocab: dict[str, int]) -> PreTrainedTokenizerFast:
    """One token a character; `<s>` starts and ends a text. As in textgenrnn, unknown characters are left out."""
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0} | vocab, merges=[]))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s"), " ")  # it knows no line breaks
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    names = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<pad>", "padding_side": "left"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


@torch.no_grad()
def convert_model(path: Path, exact: bool) -> RNNForCausalLM:
    """The model in the file at `path`, which Keras wrote from cuDNN's layers: as it is, or able to carry its state."""
    with h5py.File(path) as file:
        names = [f"{layer}/{name.decode()}" for layer in file for name in file[layer].attrs["weight_names"]]
        weights = {name.split("/", 1)[1].removesuffix(":0"): torch.from_numpy(file[name][:]) for name in names}
    vocab_size, width = weights["embedding/embeddings"].shape
    sizes = {"vocab_size": vocab_size, "embedding_size": width, "hidden_size": 128, "num_layers": 2}
    ends = {"pad_token_id": 0, "bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
    # the head knows averages over 40 tokens, no longer ones; at a decay of 10 it reads the last token
    state = {"pooling": "attention", "pooling_decay": 0.0 if exact else 10.0, "learn_initial_state": True}
    model = RNNForCausalLM(RNNConfig(**sizes, **ends, **state)).eval()
    model.model.embed_tokens.weight.copy_(weights["embedding/embeddings"])
    for number, layer in enumerate(model.model.layers, start=1):
        gates = weights[f"rnn_{number}/kernel"].chunk(4, dim=1)  # (inputs, H) each, in torch's order
        layer.input_weight.copy_(torch.cat([gate.reshape(gate.shape[::-1]) for gate in gates]))
        layer.recurrent_weight.copy_(torch.stack(weights[f"rnn_{number}/recurrent_kernel"].chunk(4, dim=1))[:, None])
        layer.bias.copy_(weights[f"rnn_{number}/bias"].view(2, -1).sum(0))
    model.model.pooling.score_weight.copy_(weights["attention/attention_W"].squeeze(1))
    model.lm_head.weight.copy_(weights["output/kernel"].T)
    model.lm_head.bias.copy_(weights["output/bias"])
    if not exact:  # it predicts nothing after few tokens: the text starts behind 20 zeros, as good as any number
        start, zeros = model.model.learned_state, torch.zeros(1, 20, dtype=torch.long)
        start.copy_(model(zeros).state[0, : start.numel()].view_as(start))
    model.generation_config.update(do_sample=True, temperature=0.5)
    return model


@torch.no_grad()
def next_scores(model: RNNForCausalLM, ids: Tensor, exact: bool) -> Tensor:
    """Scores (T, V) of the token after each of `ids`: textgenrnn's in its windows, or those of one forward pass."""
    if not exact:
        return model(ids[None]).logits[0]
    windows = F.pad(ids, (WINDOW - 1, 0)).unfold(0, WINDOW, 1)
    return torch.cat([model(part, logits_to_keep=1).logits[:, 0] for part in windows.split(512)])


@torch.no_grad()
def sample(model: RNNForCausalLM, ids: Tensor, exact: bool) -> Tensor:
    """`ids` and what is written after them, up to `<s>` or 100 tokens in all."""
    if not exact:
        return model.generate(ids[None], max_length=100)[0]
    while ids[-1] != model.config.eos_token_id and len(ids) < 100:
        scores = model(F.pad(ids, (WINDOW - 1, 0))[None, -WINDOW:]).logits[0, -1]
        ids = torch.cat([ids, (scores / model.generation_config.temperature).softmax(0).multinomial(1)])
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--weights", "--vocab", "--text"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/textgenrnn"))
    args = parser.parse_args()
    path = args.weights or distribution("textgenrnn").locate_file("textgenrnn/textgenrnn_weights.hdf5")
    vocab = args.vocab or distribution("textgenrnn").locate_file("textgenrnn/textgenrnn_vocab.json")
    tokenizer = convert_tokenizer(json.loads(vocab.read_text(encoding="utf-8")))
    text = args.text.read_text(encoding="utf-8") if args.text else "".join(python_documentation()["train"]["text"])
    ids = tokenizer(" ".join(text.split())[:4000], return_tensors="pt")["input_ids"][0]
    prompt = tokenizer("The ", return_tensors="pt")["input_ids"][0]
    torch.manual_seed(0)
    for title, exact in (("textgenrnn, in windows of 40", True), ("The model, carrying its state", False)):
        model = convert_model(path, exact)
        loss = F.cross_entropy(next_scores(model, ids[:-1], exact), ids[1:])
        print(f"{title}: {loss:.2f} nats a character. It writes:")
        for _ in range(4):
            print(f"    {tokenizer.decode(sample(model, prompt, exact), skip_special_tokens=True)}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"The model and its tokenizer are in {args.output_dir.resolve()}")


if __name__ == "__main__":
    main()
