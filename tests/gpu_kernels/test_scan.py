"""The recurrent scans of a population: Triton's kernels, in its interpreter where there is no GPU, and plain twins."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo_hf.displaced import DisplacedMatrix
from zoo_hf.kernels import flashrnn, scan
from zoo_hf.kernels.choice import VARIABLE
from zoo_hf.models.backends import ADDED, Added, chosen
from zoo_hf.models.choices import choices
from zoo_hf.models.elman import Elman, elman, elman_scan
from zoo_hf.models.gru import GRU, GRUWeights, gru, gru_forms, gru_scan
from zoo_hf.models.lstm import LSTM, lstm, lstm_forms, lstm_scan
from zoo_hf.models.recurrent_layer import LayerWeights
from zoo_hf.models.slstm import SLSTM, slstm, slstm_scan


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = 2**32 - 1
CELLS = {
    "lstm": (LSTM, LayerWeights, lstm, lstm_scan),
    "gru": (GRU, GRUWeights, gru, gru_scan),
    "slstm": (SLSTM, LayerWeights, slstm, slstm_scan),
    "elman": (Elman, LayerWeights, elman, elman_scan),
}
# sums in another order; for halves, h is rounded for each product, and R h is too in the alternating form
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FUSED, ALTERNATING = "fused", "alternating"
every_cell = pytest.mark.parametrize("cell", CELLS)
both_forms = pytest.mark.parametrize("form", [FUSED, ALTERNATING])


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    def filled(function):
        def call(*arguments, **keywords):
            out = function(*arguments, **keywords)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return call

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


@pytest.fixture
def take(monkeypatch):
    """`take(form)`: from now on Triton's kernels in this form, or with "plain" the plain twin."""

    def call(form):
        monkeypatch.setenv(VARIABLE, "plain" if form == "plain" else "triton")
        if form != "plain":
            monkeypatch.setattr(scan, "fits", lambda *_: form == FUSED)

    return call


def arguments(cell, dtype, sizes, *, masked=False, stacked=False, named=True):
    """Of `recurrent_scan_population` for (members, tokens, heads, sequences, units)."""
    generator = torch.Generator().manual_seed(0)
    members, tokens, heads, batch, size = sizes
    gates, slots = CELLS[cell][0].gates, CELLS[cell][0].slots

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    pre = random(members, batch, tokens, gates, heads, size).permute(0, 2, 4, 1, 3, 5)
    state = random(members, slots, heads, batch, size) / 2
    if cell == "slstm":
        state = state.float()
        state[:, 2] = state[:, 2].abs() + 1
        state[:, :, :, : batch // 2] = 0  # no token yet
    recurrent = random(members if stacked else 1, gates, heads, size, size) / size**0.5
    bias = random(members, heads, size) if cell == "gru" else None
    shape = {"all": (batch, tokens), "own": (members, batch, tokens)}.get(masked)
    real = None if shape is None else (torch.rand(shape, generator=generator) < 0.6).to(DEVICE)
    index = torch.tensor([3, 3, LARGE], device=DEVICE)[:members]
    names = (index, torch.tensor([0.25, -0.25, 0.1], device=DEVICE)[:members]) if named else (None, None)
    return cell, pre, state, recurrent, bias, real, *names, LARGE, 7, "model.layers.0.recurrent_weight"


def run(*call):
    return torch.ops.zoo_hf.recurrent_scan_population(*call)


def exact(cell, pre, state, recurrent, bias, real, index, scale, *names):
    """What `run` returns, by the plain twin in float32 with the same weights."""
    if index is not None:
        made = torch.ops.zoo_hf.displaced_members(recurrent.reshape(-1), index, scale, *names, "rademacher")
        recurrent = made.view(-1, *recurrent.shape[1:])
    bias = None if bias is None else bias.float()
    return run(cell, pre.float(), state.float(), recurrent.float(), bias, real, None, None, 0, 0, "")


def same(found, expected, dtype):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@every_cell
@both_forms
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("sizes", "how"),
    [((3, 3, 2, 3, 5), {"masked": "own"}), ((2, 3, 1, 17, 20), {"masked": "all"}), ((1, 2, 2, 1, 33), {})],
)
def test_kernels_give_what_the_formula_gives_in_float32(take, cell, form, dtype, sizes, how):
    call = arguments(cell, dtype, sizes, **how)
    take("plain")
    expected = exact(*call)
    take(form)
    found = run(*call)
    assert (found[0].dtype, found[1].dtype) == (dtype, call[2].dtype)
    same(found, expected, dtype)


@every_cell
@both_forms
@pytest.mark.parametrize("stacked", [False, True])
def test_members_may_have_their_own_matrices_or_share_one_that_is_not_displaced(take, cell, form, stacked):
    call = arguments(cell, torch.float32, (2, 3, 2, 2, 16), stacked=stacked, named=False)
    take("plain")
    expected = run(*call)
    take(form)
    same(run(*call), expected, torch.float32)


def test_a_head_of_128_units_is_made_of_whole_blocks_of_signs(take):
    call = arguments("elman", torch.float32, (2, 2, 2, 2, 128))
    take("plain")
    expected = exact(*call)
    take(FUSED)
    same(run(*call), expected, torch.float32)


def test_inputs_of_any_layout_give_the_same(take):
    call = [*arguments("gru", torch.float32, (2, 3, 2, 3, 5))]
    take("plain")
    expected = run(*call)
    take(FUSED)
    call[1] = call[1].transpose(-1, -2).contiguous().transpose(-1, -2)
    call[2] = call[2].transpose(0, 3).contiguous().transpose(0, 3)
    call[3] = call[3].mT.contiguous().mT
    same(run(*call), expected, torch.float32)


@every_cell
@both_forms
@pytest.mark.parametrize("sizes", [(2, 3, 2, 0, 5), (2, 0, 2, 3, 5)])
def test_without_sequences_or_tokens_nothing_changes(take, cell, form, sizes):
    call = arguments(cell, torch.float32, sizes)
    take(form)
    outputs, final = run(*call)
    assert outputs.shape == sizes
    assert torch.equal(final, call[2])


@every_cell
def test_the_plain_twin_is_the_models_scan_of_every_member(take, cell):
    """Also where a sequence has no token yet, and where some of its tokens are masked."""
    layer, pack, _, plain = CELLS[cell]
    _, pre, state, recurrent, bias, real, *_ = arguments(cell, torch.float32, (2, 4, 2, 4, 5), masked="own")
    take("plain")
    outputs, final = run(cell, pre, state, recurrent, bias, real, None, None, 0, 0, "")
    for member in range(2):
        eye = torch.eye(layer.gates * 10, device=DEVICE)
        inputs = pre[member].permute(2, 0, 3, 1, 4).flatten(2)  # (B, T, G·H), which W = 1 leaves as they are
        own = [] if bias is None else [bias[member].flatten()]
        weights = pack(eye, recurrent[0], torch.zeros(len(eye), device=DEVICE), *own)
        slots = state[member].permute(2, 0, 1, 3).flatten(2)  # (B, S, H)
        expected = plain(inputs, slots, weights, real[member])
        torch.testing.assert_close(outputs[member].permute(2, 0, 1, 3).flatten(2), expected[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(final[member].permute(2, 0, 1, 3).flatten(2), expected[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", ALTERNATING])
def test_members_matrices_are_made_for_a_group_at_a_time(take, monkeypatch, kind):
    call = arguments("lstm", torch.float32, (3, 2, 2, 2, 5), masked="own")
    take(kind)
    expected, groups = run(*call), []
    monkeypatch.setattr(scan, "GROUP_BYTES", 2 * call[3].nbytes)
    matrices = scan.Task.matrices
    monkeypatch.setattr(scan.Task, "matrices", lambda task, own: groups.append(own) or matrices(task, own))
    same(run(*call), expected, torch.float32)
    assert groups == [slice(0, 2), slice(2, 3)]


@every_cell
@pytest.mark.parametrize("masked", ["own", False])
def test_a_recording_replayed_for_chunks_gives_what_single_launches_give(take, monkeypatch, cell, masked):
    """Without a GPU, what is recorded is called again instead of replayed: it reads and writes the same memory."""
    from zoo_hf.kernels.gpu import gates

    take(ALTERNATING)
    first = arguments(cell, torch.float32, (2, 5, 2, 3, 5), masked=masked)
    second = [x + 0.1 if place in (1, 3) else x for place, x in enumerate(first)]
    monkeypatch.setattr(gates, "recordable", lambda device: False)
    expected = [run(*call) for call in (first, second)]
    recordings, replayed = [], []

    def recording_of(shape, device):
        recordings.append(recordings[0] if recordings else gates.Recording(shape, torch.device(device)))
        return recordings[-1]

    def captured(run):
        return lambda: replayed.append(None) or run()

    if DEVICE == "cpu":
        monkeypatch.setattr(gates, "captured", captured)
    monkeypatch.setattr(gates, "recording_of", recording_of)
    monkeypatch.setattr(gates, "recordable", lambda device: True)
    monkeypatch.setattr(gates, "FEWEST", 2)
    monkeypatch.setattr(gates, "CHUNK", 3)
    for call, outputs in zip((first, second), expected, strict=True):
        same(run(*call), outputs, torch.float32)
    assert len(replayed) == (4 if DEVICE == "cpu" else 0), "two chunks of two tokens each, and single launches for one"


@pytest.mark.parametrize(
    ("tokens", "megabytes", "recorded"),
    [(7, 0.1, 0), (8, 0.1, 8), (10, 0.1, 8), (31, 0.1, 16), (10_000, 0.1, 32), (10_000, 4, 16), (10_000, 16, 0)],
)
def test_chunks_are_recorded_where_launching_takes_longer_than_computing(tokens, megabytes, recorded):
    from zoo_hf.kernels.gpu.gates import recorded_tokens

    assert recorded_tokens(tokens, int(megabytes * 2**20)) == recorded


class StandIn(torch.Tensor):
    """W + s Z by its name, as `NamedMatrix`; nothing but its shape may be asked for."""

    @staticmethod
    def of(base, index, scale, direction):
        matrix = base.as_subclass(StandIn)
        matrix.base, matrix.index, matrix.scale, matrix.direction = base, index, scale, direction
        return matrix

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func == torch.Tensor.shape.__get__, func
        return super().__torch_function__(func, types, args, kwargs or {})


@every_cell
@pytest.mark.parametrize("form", ["plain", FUSED, ALTERNATING])
def test_a_layer_of_a_population_runs_all_members_at_once_from_one_matrix_and_its_name(take, cell, form):
    layer, pack, _, plain = CELLS[cell]
    torch.manual_seed(0)
    own = layer(6, 10, 2).to(DEVICE)
    inputs, real = torch.randn(2, 3, 4, 6, device=DEVICE), torch.rand(3, 4, device=DEVICE) < 0.7
    state, direction = torch.zeros(3, layer.slots, 10, device=DEVICE), (1, 2, "recurrent_weight")
    index, scale = torch.tensor([5, LARGE], device=DEVICE), torch.tensor([0.2, -0.1], device=DEVICE)
    before = pack(*own.parameters())

    def member(inputs, index, scale):
        matrix = StandIn.of(before.recurrent.detach(), index, scale, direction)
        return scan.scan(cell, inputs, state, before._replace(recurrent=matrix), real)

    with torch.no_grad():
        take(form)
        found = torch.func.vmap(member)(inputs, index, scale)
        flat = before.recurrent.detach().flatten()
        made = torch.ops.zoo_hf.displaced_members(flat, index, scale, *direction, "rademacher")
        for row in range(2):
            weights = before._replace(recurrent=made[row].view_as(before.recurrent))
            expected = plain(inputs[row], state, weights, real)
            same([part[row] for part in found], expected, torch.float32)


def test_members_with_low_rank_displacements_of_a_matrix_run_all_at_once(take):
    torch.manual_seed(0)
    own = LayerWeights(*LSTM(6, 10, 2).to(DEVICE).parameters())
    inputs, state = torch.randn(3, 4, 6, device=DEVICE), torch.zeros(3, 2, 10, device=DEVICE)
    left, right = torch.randn(2, 40, 1, device=DEVICE), torch.randn(2, 5, 1, device=DEVICE)

    def member(left, right):
        return lstm(inputs, state, own._replace(recurrent=DisplacedMatrix(own.recurrent, left, right)))

    with torch.no_grad():
        take(FUSED)
        found = torch.func.vmap(member)(left, right)
        for row in range(2):
            dense = own.recurrent + (left[row] @ right[row].mT).view_as(own.recurrent)
            expected = lstm_scan(inputs, state, own._replace(recurrent=dense))
            same([part[row] for part in found], expected, torch.float32)


@every_cell
def test_the_compiler_sees_through_the_operations(monkeypatch, cell):
    monkeypatch.undo()  # it looks at memory that is not written yet
    call = arguments(cell, torch.float32, (2, 3, 2, 3, 5), masked="all")
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.zoo_hf.recurrent_scan_population.default, call, test_utils=tests)
    member = [x if x is None or place in (0, 5) else x[0] for place, x in enumerate(call[:8])]
    torch.library.opcheck(torch.ops.zoo_hf.recurrent_scan.default, (*member, *call[8:]), test_utils=tests)


def test_what_does_not_fit_together_is_refused():
    cell, pre, state, recurrent, *others = arguments("lstm", torch.float32, (2, 3, 2, 3, 5))
    with pytest.raises(ValueError, match=r"`cell` must be one of .*'elman'.*, got 'rnn'"):
        run("rnn", pre, state, recurrent, *others)
    with pytest.raises(ValueError, match=r"`recurrent` must be \(1, 4, 2, 5, 5\), got \(2, 4, 2, 5, 5\)"):
        run(cell, pre, state, recurrent.expand(2, -1, -1, -1, -1), *others)
    with pytest.raises(ValueError, match="`candidate_bias` is for the cell 'gru'"):
        run(cell, pre, state, recurrent, pre[:, 0, :, 0, 0], *others[1:])


# which form runs


@every_cell
def test_a_layer_takes_the_form_that_is_asked_for(monkeypatch, cell):
    layer, pack, fastest, plain = CELLS[cell]
    torch.manual_seed(0)
    weights = pack(*layer(6, 8).to(DEVICE).parameters())
    inputs, state = torch.randn(3, 4, 6, device=DEVICE), torch.zeros(3, layer.slots, 8, device=DEVICE)
    launched = []
    triton = scan.recurrent_scan_population
    monkeypatch.setattr(scan, "recurrent_scan_population", lambda *a: launched.append(a) or triton(*a))
    for name, launches in (("auto", DEVICE == "cuda"), ("plain", 0), ("triton", 1)):
        monkeypatch.setenv(VARIABLE, name)
        launched.clear()
        with torch.no_grad():
            found = fastest(inputs, state, weights)
            same(found, plain(inputs, state, weights), torch.float32)
        assert len(launched) == launches, name
    fastest(inputs, state, weights)[0].sum().backward()
    assert weights.recurrent.grad.abs().max() > 0, "with gradients the scan is the plain one or torch's"


def test_kernels_come_first_where_no_gradient_is_wanted_and_cudnn_for_one_large_head():
    def names(forms, heads, size, **inputs):
        weights = torch.empty(4, heads, size, size)
        return forms(torch.empty(2, 200, 3, **inputs), SimpleNamespace(recurrent=weights))

    assert names(lstm_forms, 2, 64) == ["torch", "plain"]
    with torch.no_grad():
        assert names(lstm_forms, 2, 64) == ["triton", "torch", "plain", "flashrnn"]
        assert names(lstm_forms, 1, 64)[0] == "triton"
        assert names(lstm_forms, 1, 128) == ["torch", "triton", "plain", "flashrnn"], "256 KiB in float32"
        assert names(gru_forms, 1, 256)[:2] == ["torch", "triton"]
        assert names(lstm_forms, 2, 64, dtype=torch.float64) == ["torch", "plain"]
        assert names(gru_forms, 2, 64) == ["triton", "plain", "flashrnn"]
        population = []
        torch.func.vmap(lambda own: population.append(names(lstm_forms, 1, 256)) or own)(torch.zeros(2))
    assert population == [["triton", "plain"]]


def test_without_the_package_a_cells_own_forms_are_taken(monkeypatch):
    monkeypatch.setattr("zoo_hf.models.backends.ADDED", Added())
    own = {"torch": lstm, "plain": lstm_scan}
    assert chosen("lstm", own, ["triton", "plain", "torch", "flashrnn"], torch.device("cuda")) is lstm_scan
    assert set(ADDED.forms["lstm"]) == {"triton", "flashrnn"}


def test_what_runs_is_told_for_every_cell(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    told = choices(torch.device("cpu"))
    assert told["lstm"] == "8 × 64 units: torch, in a population plain; 1 × 512 units: torch, in a population plain"
    assert {*CELLS, "rwkv7", "mamba2"} < set(told)
    monkeypatch.setattr("zoo_hf.kernels.choice.runs", lambda name, *_, **__: name != "flashrnn")  # as on a GPU
    alone, population = "triton (fused)", "triton (alternating)"
    assert choices(torch.device("cpu"))["lstm"] == (
        f"8 × 64 units: {alone}, in a population {alone}; 1 × 512 units: torch, in a population {population}"
    )


# FlashRNN


def flashrnn_by_its_formulas(inputs, recurrent, bias, *, states, function, **_):
    """Its interface: W x (B, T, G, N, D), R (G, N, D, D), biases (·, N, D), states (S, B, 1, N, D)."""
    found = []
    states = states[:, :, 0]
    for x in inputs.unbind(1):  # (B, G, N, D)
        product = torch.einsum("gnoi,bni->bgno", recurrent, states[0])
        if function == "gru":
            (h,), (n, r, z) = states, product.unbind(1)
            reset, update = (r + x[:, 0] + bias[1]).sigmoid(), (z + x[:, 1] + bias[2]).sigmoid()
            candidate = (x[:, 2] + bias[3] + reset * (n + bias[0])).tanh()
            states = (update * h + (1 - update) * candidate)[None]
        elif function == "elman":
            states = (x + product + bias).tanh().transpose(0, 1)
        elif function == "lstm":
            i, f, z, o = (x + product + bias).unbind(1)
            c = f.sigmoid() * states[1] + i.sigmoid() * z.tanh()
            states = torch.stack([o.sigmoid() * c.tanh(), c])
        else:
            i, f, z, o = (x + product + bias).unbind(1)
            _, c, n, m = states
            kept = F.logsigmoid(f) + m
            new_m = i if (n == 0).all() else torch.maximum(i, kept)
            write, keep = (i - new_m).exp(), (kept - new_m).exp()
            c, n = keep * c + write * z.tanh(), torch.clamp(keep * n + write, min=1)
            states = torch.stack([o.sigmoid() * c / n, c, n, new_m])
        found.append(states)
    return torch.stack(found, dim=2), states.unsqueeze(2)


@pytest.fixture(params=["formulas", "package"])
def flashrnn_package(request, monkeypatch):
    if request.param == "formulas":
        monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn_by_its_formulas))
    elif importlib.util.find_spec("flashrnn") is None:
        pytest.skip("flashrnn is not installed")


@every_cell
@pytest.mark.usefixtures("flashrnn_package")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_flashrnn_gives_what_the_plain_scan_gives(cell, masked, heads):
    layer, pack, _, plain = CELLS[cell]
    torch.manual_seed(0)
    weights = pack(*(nn.init.normal_(p, std=0.5) for p in layer(6, 32 * heads, heads).to(DEVICE).parameters()))
    inputs, state = torch.randn(8, 7, 6, device=DEVICE), torch.randn(8, layer.slots, 32 * heads, device=DEVICE) / 2
    if cell == "slstm":
        state[:, 2] = state[:, 2].abs() + 1
        state[4:] = 0  # no token yet
    real = torch.rand(8, 7, device=DEVICE) < 0.6 if masked else None
    with torch.no_grad():
        found, expected = flashrnn.scan(cell, inputs, state, weights, real), plain(inputs, state, weights, real)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)
