"""Calls of the package's operations, in the shapes that GPUs see, by name; see gpu_code.py."""

import torch

import zoo_hf.kernels  # noqa: F401  # registers the operations


# float16 is compiled as bfloat16 is, but rounded by one instruction: FEWER are for kernels that round little
DTYPES, FEWER = (torch.float16, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32)


def displace() -> None:
    for dtype in DTYPES:
        weights = torch.zeros(4096, dtype=dtype)
        for distribution in ("rademacher", "gaussian"):
            arguments = [0, 1, 2], "head.weight", 0, 1e-2, distribution
            torch.ops.zoo_hf.displace_(torch.empty_like(weights), weights, *arguments)
            members = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
            torch.ops.zoo_hf.displaced_members(weights, *members, 0, 1, "head.weight", distribution)


def update() -> None:
    names, coefficients = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4)
    for distribution in ("rademacher", "gaussian"):
        torch.ops.zoo_hf.weighted_sum(names, coefficients, "w", 4096, distribution, torch.float32)
        for dtype in FEWER:
            weights = torch.zeros(4096, dtype=dtype)
            rule = [0.1, 0.9, 0.0, 0.0, 1.0, 0.0, 0.0]
            if distribution == "rademacher":  # normals need the most, which a buffer adds to
                torch.ops.zoo_hf.sgd_(weights, None, names, coefficients, "w", distribution, rule)
            torch.ops.zoo_hf.sgd_(weights, weights.clone(), names, coefficients, "w", distribution, rule)


def head_loss() -> None:
    for dtype in FEWER:
        for shape in ((256, 512, 256), (128, 512, 256), (256, 512, 200), (256, 33, 96), (16, 64, 32)):
            length, vocabulary, width = shape
            hidden, weight = torch.zeros(2, length, width, dtype=dtype), torch.zeros(vocabulary, width, dtype=dtype)
            bias, targets = torch.zeros(vocabulary, dtype=dtype), torch.zeros(length, dtype=torch.int64)
            torch.ops.zoo_hf.head_loss_population(hidden, weight, bias, targets, None, None, 0, 0, "")
            members = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
            torch.ops.zoo_hf.head_loss_population(hidden, weight, None, targets, *members, 0, 1, "head.weight")


def scans() -> None:
    """The fused form where it needs the most, and the alternating form's kernel."""
    cells = {"lstm": (4, 2), "gru": (3, 1), "slstm": (4, 4), "elman": (1, 1)}
    half, single = torch.bfloat16, torch.float32
    for cell, (gates, slots) in cells.items():
        for dtype, size, batch in ((half, 64, 64), (half, 128, 64), (single, 64, 16), (half, 256, 8)):
            if slots == 1 and (dtype == single or size == 256):  # with fewer slots it needs less
                continue
            heads = 2 if size == 64 else 1  # which Triton takes for a constant
            pre = torch.zeros(2, batch, 8, gates, heads, size, dtype=dtype).permute(0, 2, 4, 1, 3, 5)
            state = torch.zeros(2, slots, heads, batch, size, dtype=torch.float32 if cell == "slstm" else dtype)
            recurrent = torch.zeros(1, gates, heads, size, size, dtype=dtype)
            bias = torch.zeros(2, heads, size, dtype=dtype) if cell == "gru" else None
            real = torch.ones(batch, 8, dtype=torch.bool)
            members = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
            arguments = cell, pre, state, recurrent, bias, real, *members, 0, 1, "layers.0.recurrent_weight"
            torch.ops.zoo_hf.recurrent_scan_population(*arguments)


def rwkv7() -> None:
    for dtype in FEWER:
        for batch, size in ((2, 64), (1024, 64), (2, 32), (512, 128)):
            steps, state = torch.zeros(6, batch, 4, 2, size, dtype=dtype), torch.zeros(batch, 2, size, size)
            torch.ops.zoo_hf.rwkv7_scan(*steps, state)


def mamba2() -> None:
    for dtype in FEWER:
        for batch, size in ((2, 128), (1024, 128), (1024, 64), (1024, 16)):
            x, vectors = torch.zeros(batch, 4, 1, 2, 64, dtype=dtype), torch.zeros(2, batch, 4, 1, size, dtype=dtype)
            step, state = torch.zeros(batch, 4, 1, 2), torch.zeros(batch, 1, size, 2, 64)
            torch.ops.zoo_hf.mamba2_scan(x, step, *vectors, torch.zeros(1, 2), state)
    for dtype in FEWER:
        for size, values in ((128, 64), (64, 64), (16, 32)):
            x, vectors = torch.zeros(2, 64, 1, 2, values, dtype=dtype), torch.zeros(2, 2, 64, 1, size, dtype=dtype)
            step, state = torch.zeros(2, 64, 1, 2), torch.zeros(2, 1, size, 2, values)
            torch.ops.zoo_hf.mamba2_scan(x, step, *vectors, torch.zeros(1, 2), state)


def members(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and scales."""
    return torch.zeros(count, dtype=torch.int64), torch.zeros(count)


def linear() -> None:
    half, wide = torch.bfloat16, torch.float32
    shapes = [(2, 256, 512), (2, 128, 512), (2, 16, 512), (1, 64, 512), (2, 256, 576), (2, 256, 99)]
    kinds = [(torch.float16, torch.float16, shapes[:1])]
    kinds += [(x, w, shapes) for x, w in ((half, half), (wide, wide), (half, wide))]
    for dtype, of_weight, sizes in kinds:
        for count, rows, inputs in sizes:
            x, weight = torch.zeros(count, rows, inputs, dtype=dtype), torch.zeros(256, inputs, dtype=of_weight)
            for form in ("apart", "fused"):
                arguments = torch.zeros(count, 256, dtype=dtype), *members(count), 0, 1, "w", form
                torch.ops.zoo_hf.perturbed_linear_population(x, weight, *arguments)


def low_rank_linear() -> None:
    for dtype in FEWER:
        for count, rows, inputs in ((2, 256, 512), (2, 16, 512), (1, 64, 512), (2, 256, 99)):
            x, weight = torch.zeros(count, rows, inputs, dtype=dtype), torch.zeros(256, inputs, dtype=dtype)
            for wide in {dtype, torch.float32}:
                factors = torch.zeros(count, 256, 4, dtype=wide), torch.zeros(count, inputs, 4, dtype=wide)
                torch.ops.zoo_hf.low_rank_linear_population(x, weight, None, *factors)


def embedding() -> None:
    for dtype in DTYPES:
        for width in (512, 192, 99):
            ids, weight = torch.zeros(2, 64, dtype=torch.int64), torch.zeros(1024, width, dtype=dtype)
            torch.ops.zoo_hf.perturbed_embedding_population(ids, weight, *members(2), 0, 1, "w")


CASES = {
    "linear": linear,
    "low_rank_linear": low_rank_linear,
    "embedding": embedding,
    "rwkv7": rwkv7,
    "mamba2": mamba2,
    "scans": scans,
    "head_loss": head_loss,
    "update": update,
    "displace": displace,
}
