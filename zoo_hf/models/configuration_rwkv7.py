"""Configuration of the RWKV-7 language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class RWKV7Config(PreTrainedConfig):
    r"""Sizes and choices of an RWKV-7 language model.

    Names and meaning are those of the package `flash-linear-attention` (fla). The default sizes are not: they make a
    model of 162 k parameters for bytes, without special tokens. `from_pretrained` also reads the configuration of a
    model that fla saved (`model_type` "rwkv7").

    Args:
        vocab_size (`int`, defaults to 256):
            Number of tokens V; 256 is one token a byte.
        hidden_size (`int`, defaults to 64):
            Width H of the embedding, of every layer's input and output, and of the head's input.
        num_hidden_layers (`int`, defaults to 2):
            Number of layers L, each a recurrent part ("attention") and a channel mix.
        head_dim (`int`, defaults to 64):
            Width D of a head: keys and values are D numbers, and the head keeps a D × D matrix. Must divide
            `hidden_size`.
        intermediate_size (`int`, *optional*):
            Width of the channel mix inside; 4 · `hidden_size` by default.
        decay_low_rank_dim (`int`, *optional*):
            Rank of the map from the input to the decay w. By default 2.5 √H · D/64 to the nearest multiple of 32, at
            least 32.
        a_low_rank_dim (`int`, *optional*):
            Rank of the map from the input to the in-context learning rate a. By default as `decay_low_rank_dim`.
        v_low_rank_dim (`int`, *optional*):
            Rank of the map from the input to the share of the first layer's value. By default 1.7 √H · D/64 to the
            nearest multiple of 32, at least 32.
        gate_low_rank_dim (`int`, *optional*):
            Rank of the map from the input to the output gate g. By default 5 √H to the nearest multiple of 32, at
            least 32.
        norm_eps (`float`, defaults to 1e-5):
            Added to the variance in every layer norm; D times as much in the norm of a head's output.
        norm_bias (`bool`, defaults to `True`):
            Whether layer norms have a bias.
        norm_first (`bool`, defaults to `True`):
            Whether embeddings are normalised before the first layer.
        key_eps (`float`, defaults to 1e-24):
            Added to |κ|² where the removal key κ is brought to length 1. 1e-24 is that of the authors' code and of
            fla's models with `fuse_norm=False`; with `fuse_norm=True` it is 1e-6.
        embedding_range (`float`, defaults to 0.1):
            Initial embeddings are uniform within ± this. The authors' 1e-4 is for training by gradients: a probe's
            displacement of 1e-3 would drown it.
        chunk_length (`int`, defaults to 1024):
            Tokens that a forward pass runs at a time; longer sequences are run in chunks that hand on the state. With
            `labels` the head and the loss follow chunk by chunk, so that memory does not grow with the context.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the head's weight is the embedding's.
        use_cache (`bool`, defaults to `True`):
            Whether a forward pass returns the state after the last token. Its size does not depend on the context.
        pad_token_id (`int`, *optional*):
            Token that fills a batch up to one length. Only `attention_mask` decides what is padding.
        bos_token_id (`int`, *optional*):
            Token that starts a text.
        eos_token_id (`int` or `list[int]`, *optional*):
            Token or tokens that end a text and with it `generate()`.

    Example:

    ```python
    >>> from zoo_hf.models import RWKV7Config, RWKV7ForCausalLM

    >>> model = RWKV7ForCausalLM(RWKV7Config(hidden_size=256, num_hidden_layers=6))
    >>> model.num_parameters()
    5354752
    ```
    """

    model_type = "zoo_rwkv7"
    keys_to_ignore_at_inference = ["state"]

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    head_dim: int = 64
    intermediate_size: int | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_first: bool = True
    key_eps: float = 1e-24
    embedding_range: float = 0.1
    chunk_length: int = 1024
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "decay_low_rank_dim": self.decay_low_rank_dim,
            "a_low_rank_dim": self.a_low_rank_dim,
            "v_low_rank_dim": self.v_low_rank_dim,
            "gate_low_rank_dim": self.gate_low_rank_dim,
            "chunk_length": self.chunk_length,
        }
        for name, size in sizes.items():
            if size is not None and size <= 0:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.hidden_size % self.head_dim != 0:
            raise ValueError(
                f"`head_dim` must divide `hidden_size`, got {self.head_dim} and {self.hidden_size}; take a divisor."
            )

    @property
    def num_heads(self) -> int:
        """Number of heads N."""
        return self.hidden_size // self.head_dim

    @property
    def channel_mix_size(self) -> int:
        """`intermediate_size`, or its default."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the maps to w, a, v and g: the `*_low_rank_dim`, or their defaults."""
        width, share = self.hidden_size**0.5, self.head_dim / 64
        dims = {
            "w": (self.decay_low_rank_dim, 2.5 * width * share),
            "a": (self.a_low_rank_dim, 2.5 * width * share),
            "v": (self.v_low_rank_dim, 1.7 * width * share),
            "g": (self.gate_low_rank_dim, 5 * width),
        }
        return {name: max(32, 32 * round(ideal / 32)) if dim is None else dim for name, (dim, ideal) in dims.items()}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a saved configuration, ours or fla's."""
        fields, unused = super().get_config_dict(*args, **kwargs)
        return from_fla(fields) if fields.get("model_type") == "rwkv7" else fields, unused


# fields that both have, with fla's defaults
SHARED_WITH_FLA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": 64,
    "intermediate_size": None,
    "decay_low_rank_dim": 64,
    "a_low_rank_dim": 64,
    "v_low_rank_dim": 16,
    "gate_low_rank_dim": 128,
    "norm_eps": 1e-5,
    "norm_bias": True,
    "norm_first": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def from_fla(fields: dict[str, Any]) -> dict[str, Any]:
    """Our fields from those of a configuration that fla saved; what this model cannot compute is refused."""
    ours = {name: fields.get(name, default) for name, default in SHARED_WITH_FLA.items()}
    width = ours["hidden_size"]
    values = fields.get("value_dim") or width
    if {*values} != {width} if isinstance(values, list) else values != width:
        raise ValueError(f"`value_dim` must be `hidden_size`, got {values} and {width}; take a model where it is.")
    if fields.get("attn") is not None:
        raise ValueError(f"`attn` must be None, got {fields['attn']}; take a model without softmax attention.")
    if fields.get("hidden_act", "sqrelu") != "sqrelu":
        raise ValueError(f'`hidden_act` must be "sqrelu", got {fields["hidden_act"]!r}; take a model where it is.')
    if ours["head_dim"] is None:
        ours["head_dim"] = width // fields["num_heads"]
    if ours["intermediate_size"] is None:
        ours["intermediate_size"] = 32 * -(-int(width * (fields.get("hidden_ratio") or 4)) // 32)  # rounded up
    ours["key_eps"] = 1e-6 if fields.get("fuse_norm", True) else 1e-24
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    return ours | {"model_type": RWKV7Config.model_type, "dtype": dtype}


__all__ = ["RWKV7Config"]
