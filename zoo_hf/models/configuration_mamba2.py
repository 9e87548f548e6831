"""Configuration of the Mamba-2 language model."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config, PreTrainedConfig


# options of a layer in the package `mamba_ssm`, and what transformers calls them
MAMBA_SSM_OPTIONS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "chunk_size": "chunk_size",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
}


@strict
class ZooMamba2Config(PreTrainedConfig):
    r"""Sizes and choices of a Mamba-2 language model: every field of transformers' `Mamba2Config`, and `chunk_length`.

    Names and meaning are those of `Mamba2Config`. The default sizes are not: they make a model of 93 k parameters for
    bytes, without special tokens, where transformers' make one of 7.3 billion. `from_pretrained` also reads the
    configuration of a model that transformers saved (`model_type` "mamba2"), where a missing field has transformers'
    default, and the one of a checkpoint in the format of the `mamba_ssm` package (fields `d_model`, `n_layer`, …).

    Args:
        vocab_size (`int`, defaults to 256):
            Number of tokens V; 256 is one token a byte.
        hidden_size (`int`, defaults to 64):
            Width W of the embedding, of every layer's input and output, and of the head's input.
        num_hidden_layers (`int`, defaults to 2):
            Number of layers.
        expand (`int`, defaults to 2):
            Width of the recurrence, H·P, in units of `hidden_size`.
        num_heads (`int`, defaults to 4):
            Heads H, each with its own decay. `num_heads * head_dim` must be `expand * hidden_size`.
        head_dim (`int`, defaults to 32):
            Values P of a head.
        state_size (`int`, defaults to 32):
            Numbers N that a layer keeps of every value.
        n_groups (`int`, defaults to 1):
            Heads are split into this many groups, which share B and C. Must divide `num_heads`.
        conv_kernel (`int`, defaults to 4):
            Tokens that the short convolution before the recurrence sees, this one included.
        chunk_size (`int`, defaults to 256):
            Tokens that the recurrence takes in one block of matrix products; memory grows with it, the result does
            not depend on it. A CPU takes 32, where it is faster, unless this is less.
        chunk_length (`int`, defaults to 1024):
            Tokens that a forward pass runs at a time; longer sequences are run in chunks that hand on the state. With
            `labels` the head and the loss follow chunk by chunk, so that memory does not grow with the context.
        hidden_act (`str`, defaults to `"silu"`):
            Activation after the short convolution, a name from transformers' `ACT2FN`. The gate's is always silu.
        use_bias (`bool`, defaults to `False`):
            Whether the projections into and out of a layer have biases.
        use_conv_bias (`bool`, defaults to `True`):
            Whether the short convolution has a bias.
        layer_norm_epsilon (`float`, defaults to 1e-5):
            Added to the mean square in every norm.
        residual_in_fp32 (`bool`, defaults to `True`):
            Whether the sum over layers is kept in float32 when the weights are of lower precision.
        time_step_limit (`tuple[float, float]`, defaults to `(0.0, inf)`):
            Smallest and largest step Δ of a real token.
        time_step_min (`float`, defaults to 1e-3):
            Smallest step that `dt_bias` stands for at the start.
        time_step_max (`float`, defaults to 0.1):
            Largest step that `dt_bias` stands for at the start.
        time_step_floor (`float`, defaults to 1e-4):
            Initial steps are raised to this one.
        time_step_rank (`int` or `str`, defaults to `"auto"`):
            Without effect; kept because transformers' configuration has it.
        initializer_range (`float`, defaults to 0.1):
            Standard deviation of the initial embedding, head and input projections.
        rescale_prenorm_residual (`bool`, defaults to `False`):
            Whether initial output projections are divided by √`num_hidden_layers`.
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
    >>> from zoo_hf.models import ZooMamba2Config, ZooMamba2ForCausalLM

    >>> model = ZooMamba2ForCausalLM(ZooMamba2Config(hidden_size=128, num_heads=8))
    >>> model.num_parameters()
    284720
    ```
    """

    model_type = "zoo_mamba2"
    keys_to_ignore_at_inference = ["state"]

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    expand: int = 2
    num_heads: int = 4
    head_dim: int = 32
    state_size: int = 32
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 256
    chunk_length: int = 1024
    hidden_act: str = "silu"
    use_bias: bool = False
    use_conv_bias: bool = True
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_rank: str | int = "auto"
    initializer_range: float = 0.1
    rescale_prenorm_residual: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self._check_sizes()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "expand": self.expand,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "state_size": self.state_size,
            "n_groups": self.n_groups,
            "conv_kernel": self.conv_kernel,
            "chunk_size": self.chunk_size,
            "chunk_length": self.chunk_length,
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.num_heads * self.head_dim != self.expand * self.hidden_size:
            raise ValueError(
                f"`num_heads * head_dim` must be `expand * hidden_size`, got {self.num_heads} * {self.head_dim} and "
                f"{self.expand} * {self.hidden_size}; change one of the four."
            )
        if self.num_heads % self.n_groups != 0:
            raise ValueError(
                f"`n_groups` must divide `num_heads`, got {self.n_groups} and {self.num_heads}; take a divisor."
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a saved configuration: ours, transformers' `Mamba2Config`, or that of package `mamba_ssm`."""
        fields, unused = super().get_config_dict(*args, **kwargs)
        if "d_model" in fields:
            fields = from_mamba_ssm(fields)
        if fields.get("model_type") == Mamba2Config.model_type:
            fields = Mamba2Config(**fields).to_dict() | {"model_type": cls.model_type}
        return fields, unused


def from_mamba_ssm(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of transformers' `Mamba2Config` from those of the package `mamba_ssm`, with its defaults."""
    options = {"layer": "Mamba1", "headdim": 64, "ngroups": 1, "expand": 2} | fields.get("ssm_cfg", {})
    if options.pop("layer") != "Mamba2" or fields.get("attn_layer_idx") or fields.get("d_intermediate"):
        raise ValueError("`ssm_cfg['layer']` must be \"Mamba2\", without attention or MLP layers; take such a model.")
    unknown = options.keys() - MAMBA_SSM_OPTIONS.keys()
    if unknown:
        raise ValueError(f"`ssm_cfg` has options that this model has not: {sorted(unknown)}; take a model without.")
    multiple = fields.get("pad_vocab_size_multiple", 8)
    return {MAMBA_SSM_OPTIONS[name]: value for name, value in options.items()} | {
        "model_type": Mamba2Config.model_type,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "num_heads": options["expand"] * fields["d_model"] // options["headdim"],
        "vocab_size": multiple * math.ceil(fields["vocab_size"] / multiple),
        "residual_in_fp32": fields.get("residual_in_fp32", True),
        "tie_word_embeddings": fields.get("tie_embeddings", True),
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"]),  # it does not say which they are
    }


__all__ = ["ZooMamba2Config"]
