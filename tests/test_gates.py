import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

import fastgate as fg
from fastgate import estimators, gates
from fastgate.gates import LIVE
from fastgate.transfers import TensorState, Transfer
from tests.helpers import GATINGS, freeze_at_random, gating_ids
from tests.training.tape import Tape

KINDS = {
    "layer": lambda **options: fg.LayerGate(6, **options),
    "channel": lambda **options: fg.ChannelGate(6, 5, **options),
    "channel-depth1": lambda **options: fg.ChannelGate(6, 5, depth=1, **options),
    "channel-flat": lambda **options: fg.ChannelGate(6, 5, spatial_size=(4, 3), **options),
}


def x_for(n: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 6, 4, 3).to(dtype)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def prepare_to_quantize(gate: nn.Module) -> None:
    gate.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(gate, inplace=True)


class WrappedLinear(nn.Module):
    """As low-rank adapters do it: the weight that can be read is not all of it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


HEAD_CHANGES = {
    "weight-norm": lambda gate: torch.nn.utils.weight_norm(gate.fc1),
    "spectral-norm": lambda gate: torch.nn.utils.spectral_norm(gate.fc2),
    "prune": lambda gate: prune.l1_unstructured(gate.fc1, "bias", 0.5),
    "prune-norm": lambda gate: prune.l1_unstructured(gate.bn, "weight", 0.5),
    "wrapped": lambda gate: setattr(gate, "fc2", WrappedLinear(gate.fc2)),
    "quantized": prepare_to_quantize,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", HEAD_CHANGES)
def test_a_head_whose_layers_have_to_be_called_is_refused(change: str) -> None:
    """The head reads their tensors, which would be old ones, or not all there is."""
    gate = fg.LayerGate(6)
    HEAD_CHANGES[change](gate)
    with pytest.raises(ValueError, match=r"(fc1|bn|fc2): expected a gate head as built by fastgate.*exclude gates"):
        gate(x_for())
    gate.freeze(torch.tensor(True))
    assert gate(x_for()).eq(1).all()  # without its head


def test_a_parametrized_head_computes_with_what_it_was_given() -> None:
    gate = fg.LayerGate(6).eval()
    parametrizations.weight_norm(gate.fc1)
    with torch.no_grad():
        gate.fc1.parametrizations.weight.original0.mul_(2)
    x = x_for()
    gate(x)
    wanted = gate.fc2(gate.bn(gate.fc1(x.mean((2, 3)))).relu())[:, 0]
    torch.testing.assert_close(gate.logits, wanted)


def test_table_1_of_the_paper_is_the_heads_layers() -> None:
    def sizes(gate: nn.Module) -> dict[str, tuple]:
        return {name: tuple(p.shape) for name, p in gate.named_parameters()}

    head = {"fc1.bias": (16,), "bn.weight": (16,), "bn.bias": (16,)}
    assert sizes(fg.LayerGate(64)) == {**head, "fc1.weight": (16, 64), "fc2.weight": (1, 16), "fc2.bias": (1,)}
    assert sizes(fg.ChannelGate(64)) == {**head, "fc1.weight": (16, 64), "fc2.weight": (64, 16), "fc2.bias": (64,)}
    # the paper's flatten
    flat = fg.ChannelGate(64, 32, spatial_size=(8, 8))
    assert sizes(flat) == {**head, "fc1.weight": (16, 64 * 8 * 8), "fc2.weight": (32, 16), "fc2.bias": (32,)}
    assert sizes(fg.ChannelGate(64, 32, depth=1)) == {"fc1.weight": (32, 64), "fc1.bias": (32,)}
    assert sizes(fg.LayerGate(64, 7))["fc1.weight"] == (7, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_output_is_0_or_1_per_gate_in_the_inputs_dtype(kind: str, dtype: torch.dtype, training: bool) -> None:
    gate = KINDS[kind](init_logit=None).train(training)
    gates = 1 if kind == "layer" else 5
    y = gate(x_for(dtype=dtype))
    assert y.shape == (8, gates, 1, 1) and y.dtype == dtype
    assert set(y.unique().tolist()) <= {0.0, 1.0}
    per_sample = (8,) if kind == "layer" else (8, 5)
    # the head works in its parameters' dtype whatever comes in
    for values in (gate.logits, gate.decisions):
        assert values.shape == per_sample and values.dtype == torch.float32 and values.requires_grad
    assert torch.equal(gate.decisions, (gate.logits > 0).float())
    assert torch.equal(y.float().reshape(per_sample), gate.decisions)


def test_a_gate_in_half_precision_works_throughout(kind: str) -> None:
    gate = KINDS[kind]().to(torch.bfloat16).eval()
    assert gate(x_for(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert gate.stored.dtype == torch.int8


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_the_drop_in_line_trains(kind: str, estimator: str) -> None:
    gate, f = (
        KINDS[kind](estimator=estimator, window="identity"),
        nn.Conv2d(6, 6 if kind == "layer" else 5, 3, padding=1),
    )
    shortcut = nn.Conv2d(6, f.out_channels, 1)
    optimizer = torch.optim.SGD([*gate.parameters(), *f.parameters()], lr=0.1)
    before = {name: p.detach().clone() for name, p in gate.named_parameters()}
    x = x_for(16)
    y = torch.relu(shortcut(x) + gate(x) * f(x))
    y.square().mean().backward()
    optimizer.step()
    for name, parameter in gate.named_parameters():
        assert torch.isfinite(parameter.grad).all()
        if name == "fc1.bias" and gate.depth == 2:
            continue  # a batch norm follows: shifting its input changes nothing, the gradient is 0
        assert not torch.equal(parameter, before[name]), name


def test_the_drop_in_line_gives_the_gates_gradient_by_hand() -> None:
    # identity window: d loss / d logit of a sample is the sum of its branch's values where the ReLU passes;
    # the last bias adds to every logit
    gate = fg.LayerGate(6, window="identity", init_logit=None).double()
    f = nn.Conv2d(6, 6, 3, padding=1).double()
    x = x_for(16, torch.float64)
    g, branch = gate(x), f(x)
    assert 0 < g.mean() < 1  # open and closed samples
    y = torch.relu(x + g * branch)
    y.sum().backward()
    wanted = (branch * (x + g * branch > 0)).sum()
    # fp64 sums of 1152 terms
    torch.testing.assert_close(gate.fc2.bias.grad, wanted[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None], ids=["0.1", "0.5", "cumulative"])
def test_running_statistics_are_those_of_batch_norm(momentum: float | None) -> None:
    gate, norm = fg.LayerGate(6).double(), nn.BatchNorm1d(16).double()
    gate.bn.momentum = norm.momentum = momentum
    for n in (8, 3, 5):  # a cumulative average does not weigh by batch size
        x = x_for(n, torch.float64)
        gate(x)
        norm(gate.fc1(x.mean((2, 3))))
    assert gate.bn.num_batches_tracked == norm.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        # the same sums in fp64
        torch.testing.assert_close(getattr(gate.bn, name), getattr(norm, name), rtol=1e-12, atol=1e-15)


def test_evaluation_leaves_the_running_statistics() -> None:
    gate = fg.LayerGate(6).double().eval()
    before = copy.deepcopy(gate.bn.state_dict())
    gate(x_for(4, torch.float64))
    assert all(torch.equal(gate.bn.state_dict()[name], value) for name, value in before.items())


def test_a_batch_norm_held_in_eval_mode_uses_its_running_statistics() -> None:
    gate = fg.LayerGate(6, init_logit=None).double().train()
    gate.bn.eval()
    with torch.no_grad():
        gate.bn.running_mean.normal_()
        gate.bn.running_var.uniform_(0.5, 1.5)
    before = copy.deepcopy(gate.bn.state_dict())
    x = x_for(8, torch.float64)
    gate(x)
    wanted = gate.fc2(torch.relu(gate.bn(gate.fc1(x.mean((2, 3))))))
    # fp64, the same sums
    torch.testing.assert_close(gate.logits, wanted.squeeze(1), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(gate.bn.state_dict()[name], value) for name, value in before.items())
    # no batch statistics, so one sample is enough
    assert gate(x[:1]).shape == (1, 1, 1, 1)


def test_a_gate_with_cumulative_averages_runs_in_evaluation() -> None:
    gate = fg.LayerGate(6, init_logit=None).double()
    gate.bn.momentum = None
    gate(x_for(8, torch.float64))
    gate.eval()
    x = x_for(8, torch.float64)
    gate(x)
    wanted = gate.fc2(torch.relu(gate.bn(gate.fc1(x.mean((2, 3))))))
    torch.testing.assert_close(gate.logits, wanted.squeeze(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init_logit", [0.5, -0.5, 2.0])
def test_init_logit_is_where_logits_start(kind: str, init_logit: float) -> None:
    gate = KINDS[kind](init_logit=init_logit)
    gate(x_for(256))
    # weights of std 0.01 on at most 72 features of unit order: five standard deviations of the largest sum
    assert (gate.logits - init_logit).abs().max() < 5 * 0.01 * math.sqrt(72)
    assert gate.decisions.unique().tolist() == [1.0 if init_logit > 0 else 0.0]


def test_without_init_logit_pytorchs_default_stays() -> None:
    torch.manual_seed(7)
    gate = fg.ChannelGate(6, init_logit=None)
    torch.manual_seed(7)
    fc1, fc2 = nn.Linear(6, 16), nn.Linear(16, 6)
    assert torch.equal(gate.fc1.weight, fc1.weight) and torch.equal(gate.fc2.weight, fc2.weight)
    assert torch.equal(gate.fc2.bias, fc2.bias)


def test_autocast_keeps_the_head_in_its_own_dtype(kind: str) -> None:
    gate = KINDS[kind](init_logit=None).eval()
    x = x_for(dtype=torch.bfloat16)
    gate(x)
    plain = gate.logits
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(x).dtype == torch.bfloat16
    assert gate.logits.dtype == torch.float32
    assert torch.equal(gate.logits, plain)


def test_channels_last_is_the_same(kind: str) -> None:
    gate = KINDS[kind](init_logit=None).double().eval()
    x = x_for(dtype=torch.float64)
    gate(x)
    plain = gate.logits
    gate(x.to(memory_format=torch.channels_last))
    # pooled in another order: a few ulp
    torch.testing.assert_close(gate.logits, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("estimator", ["gumbel", "bernoulli"])
def test_sampling_estimators_sample_in_training_only(estimator: str) -> None:
    gate, x = fg.LayerGate(6, estimator=estimator, init_logit=0.1), x_for(64)
    assert 0 < gate(x).mean() < 1
    gate.eval()
    first = gate(x)
    assert torch.equal(gate(x), first)
    assert torch.equal(gate.decisions, (gate.logits > 0).float())


def test_temperature_reaches_the_estimator() -> None:
    gate, x = fg.LayerGate(6, estimator="gumbel", temperature=4.0, init_logit=1.0).eval(), x_for(4)
    gate(x)
    (gradient,) = torch.autograd.grad(gate.decisions.sum(), gate.fc2.bias)
    soft = torch.sigmoid(gate.logits / 4)
    torch.testing.assert_close(gradient, (soft * (1 - soft) / 4).sum()[None])


# frozen gates


def test_a_frozen_gate_returns_its_decision_and_runs_no_head(kind: str) -> None:
    gate = KINDS[kind]()
    calls = []
    gate.fc1.register_forward_hook(lambda *_: calls.append("fc1"))
    monitored = [p.register_hook(lambda _: calls.append("gradient")) for p in gate.parameters()]
    pattern = torch.arange(gate.gates) % 2 == 0
    assert not gate.frozen
    gate.freeze(pattern)
    assert gate.frozen and torch.equal(gate.open, pattern)
    before = copy.deepcopy(gate.state_dict())
    x = x_for().requires_grad_()
    y = gate(x)
    assert torch.equal(y.flatten(1), pattern.float().expand(8, -1))
    assert gate.logits is None and not gate.decisions.requires_grad
    assert gate.decisions.shape == ((8,) if kind == "layer" else (8, 5))
    (x.mean((1, 2, 3))[:, None] * y.flatten(1)).sum().backward()
    assert calls == [] and all(p.grad is None for p in gate.parameters())
    # training mode, and yet no running statistic moves
    assert all(torch.equal(gate.state_dict()[name], value) for name, value in before.items())
    assert len(monitored) == len(list(gate.parameters()))
    # one sample is enough for a gate without batch statistics
    assert gate(x_for(1)).shape == (1, gate.gates, 1, 1)


def test_unfreeze_lets_the_head_decide_again(kind: str) -> None:
    gate, x = KINDS[kind](init_logit=0.5), x_for()
    gate.freeze(torch.zeros(gate.gates, dtype=torch.bool))
    assert gate(x).sum() == 0
    gate.unfreeze()
    assert not gate.frozen and gate(x).sum() == 8 * gate.gates
    assert gate.logits is not None
    with pytest.raises(ValueError, match="the gate is live and has no stored decision"):
        _ = gate.open


def test_one_gate_takes_a_scalar() -> None:
    gate = fg.LayerGate(6)
    gate.freeze(torch.tensor(False))
    assert gate.open.tolist() == [False]


@pytest.mark.parametrize(
    ("open", "error", "message"),
    [
        (torch.ones(5), TypeError, r"open: expected a bool tensor, got torch\.float32"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"open: expected \[5\], got \[4\]"),
        (torch.ones(1, 5, dtype=torch.bool), ValueError, r"open: expected \[5\], got \[1, 5\]"),
        (torch.tensor(True), ValueError, r"open: expected \[5\], got \[\]"),
    ],
)
def test_freeze_refuses_what_is_no_decision(open: Tensor, error: type[Exception], message: str) -> None:
    gate = fg.ChannelGate(6, 5)
    with pytest.raises(error, match=message):
        gate.freeze(open)
    assert not gate.frozen and gate.stored.tolist() == [LIVE] * 5


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_a_strict_load_restores_frozen_and_live_gates(gating: tuple[str, str]) -> None:
    def build() -> fg.models.ResNet:
        return fg.models.resnet(8, gating=gating[0], position=gating[1])

    model, x = build().eval(), torch.randn(3, 3, 8, 8)
    masks = freeze_at_random(model)
    next(iter(fg.named_gates(model)))[1].unfreeze()  # some frozen, one live
    # a model whose gates are all frozen otherwise: live must come back too
    other = build().eval()
    freeze_at_random(other, "none")
    for fresh in (build().eval(), other):
        assert fresh.load_state_dict(model.state_dict(), strict=True)
        assert [g.frozen for _, g in fg.named_gates(fresh)] == [False, True, True]
        for name, gate in list(fg.named_gates(fresh))[1:]:
            assert torch.equal(gate.open, masks[name])
        assert torch.equal(fresh(x), model(x))


def test_state_dict_saves_and_loads_as_plain_weights(tmp_path: object, kind: str) -> None:
    gate = KINDS[kind]()
    gate(x_for())
    gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
    torch.save(gate.state_dict(), f"{tmp_path}/gate.pt")
    fresh = KINDS[kind]()
    fresh.load_state_dict(torch.load(f"{tmp_path}/gate.pt", weights_only=True))
    assert fresh.frozen and bool(fresh.open.all())


def test_a_gate_can_be_copied_after_a_forward_with_graph(kind: str) -> None:
    gate, x = KINDS[kind](init_logit=None), x_for()
    gate(x)
    assert gate.logits.grad_fn is not None
    twin = copy.deepcopy(gate)
    assert twin.logits is None and twin.decisions is None
    assert gate.logits is not None, "the original keeps its last forward"
    assert torch.equal(twin.eval()(x), gate.eval()(x))
    gate.freeze(torch.zeros(gate.gates, dtype=torch.bool))
    assert copy.deepcopy(gate).frozen and not twin.frozen


# one sample


def test_a_single_sample_in_training_is_decided_on_with_the_running_statistics(kind: str) -> None:
    gate, x = KINDS[kind](init_logit=None), x_for(1)
    gate(x_for())  # statistics to run on
    before = copy.deepcopy(gate.state_dict())
    y = gate(x)
    y.sum().backward()
    logits = gate.logits
    assert torch.equal(gate.eval()(x), y) and torch.equal(gate.logits, logits)
    assert all(torch.equal(gate.state_dict()[name], value) for name, value in before.items())
    assert all(torch.isfinite(p.grad).all() for p in gate.parameters())


def test_a_network_trains_on_single_images() -> None:
    """Detection: one image in a step."""
    model = fg.models.resnet(8, gating="layer")
    x = torch.randn(1, 3, 32, 32)
    (model(x).sum() + fg.budget(model, 0.5) + fg.polarization(model)).backward()
    assert all(gate.fc2.bias.grad is not None for _, gate in fg.named_gates(model))


# half precision and nan


def test_sums_of_half_precision_do_not_overflow() -> None:
    """32 x 32 values of 100 sum to more than fp16 holds."""
    gate, x = fg.LayerGate(6).half().eval(), torch.full((2, 6, 32, 32), 100.0).half()
    gate(x)
    assert torch.isfinite(gate.logits).all() and gate.logits.dtype == torch.float16
    wide = fg.LayerGate(6).eval()
    wide.load_state_dict(gate.state_dict())
    wide(x.float())
    # a few roundings to fp16, of numbers up to 100
    torch.testing.assert_close(gate.logits.float(), wide.logits, rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_is_never_closed(kind: str, estimator: str, training: bool) -> None:
    gate, x = KINDS[kind](estimator=estimator, init_logit=None).train(training), x_for()
    x[2, 1, 0, 0] = torch.nan
    y = gate(x)
    assert y[2].isnan().all()
    assert torch.equal(y.isnan(), gate.logits.isnan().reshape(y.shape) | (estimator == "mean_threshold"))


def test_a_network_passes_the_nan_of_a_gate_on() -> None:
    """Also where it computes the open samples alone."""
    model = fg.models.resnet(8, gating="layer").eval()
    gate = next(gate for _, gate in fg.named_gates(model))
    with torch.no_grad():
        gate.fc2.bias.fill_(torch.nan)
        next(reversed([gate for _, gate in fg.named_gates(model)])).fc2.bias.fill_(-1)
        assert model(torch.randn(4, 3, 8, 8)).isnan().all()


# the buffer says it, whoever writes it


def write_in_place(gate: nn.Module, values: Tensor) -> None:
    gate.stored.copy_(values)


def write_past_autograd(gate: nn.Module, values: Tensor) -> None:
    gate.stored.data.copy_(values)


def replace_buffer(gate: nn.Module, values: Tensor) -> None:
    """As accelerate's loader does."""
    gate._buffers["stored"] = values.clone()


def load_in_place(gate: nn.Module, values: Tensor) -> None:
    gate.load_state_dict({**gate.state_dict(), "stored": values})


def load_assigned(gate: nn.Module, values: Tensor) -> None:
    gate.load_state_dict({**gate.state_dict(), "stored": values}, assign=True)


WRITERS = [write_in_place, write_past_autograd, replace_buffer, load_in_place, load_assigned]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_whoever_writes_the_buffer_freezes_the_gate(write: Callable[[nn.Module, Tensor], None]) -> None:
    gate, x = fg.ChannelGate(6, 3, init_logit=1.0), x_for()
    for values in ([1, 0, 1], [0, 0, 0], [1, 1, 1], [LIVE] * 3, [1, 0, 0]):
        write(gate, torch.tensor(values, dtype=torch.int8))
        live = LIVE in values
        y = gate(x)  # before anything asks
        assert y.flatten(1).tolist() == [[1.0] * 3 if live else [float(v) for v in values]] * 8
        assert gate.frozen == (not live) and gate.all_open == (values == [1, 1, 1])
        assert (gate.logits is None) == gate.frozen
        if gate.frozen:
            assert gate.open.tolist() == [bool(value) for value in values]


def through_accelerate(source: nn.Module, target: nn.Module, folder: Path) -> None:
    from accelerate import load_checkpoint_in_model
    from safetensors.torch import save_file

    save_file(source.state_dict(), folder / "model.safetensors")
    load_checkpoint_in_model(target, str(folder))


def through_distributed_checkpoint(source: nn.Module, target: nn.Module, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(source.state_dict(), checkpoint_id=folder)
    dcp.load(target.state_dict(), checkpoint_id=folder)  # into its tensors


@pytest.mark.filterwarnings("ignore:.*torch.distributed")
@pytest.mark.parametrize("load", [through_accelerate, through_distributed_checkpoint], ids=lambda load: load.__name__)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "live"])
def test_loaders_of_checkpoints(
    load: Callable[[nn.Module, nn.Module, Path], None], frozen: bool, tmp_path: Path
) -> None:
    """A frozen network into a live one, and a live one into a frozen one."""
    source, target = (fg.models.resnet(8, gating="channel").eval() for _ in range(2))
    freeze_at_random(source if frozen else target)
    load(source, target, tmp_path)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(target(x), source(x))
    assert {gate.frozen for _, gate in fg.named_gates(target)} == {frozen}


def test_the_live_state_of_earlier_versions_is_live() -> None:
    gate = fg.ChannelGate(6, 3)
    gate.freeze(torch.zeros(3, dtype=torch.bool))
    gate.load_state_dict({**gate.state_dict(), "stored": torch.full((3,), -1, dtype=torch.int8)})
    assert not gate.frozen and gate(x_for()).sum() == 24


def averages() -> dict[str, Callable[[nn.Module], nn.Module]]:
    from timm.utils import ModelEmaV2, ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return {
        "ModelEmaV2": lambda model: ModelEmaV2(model, decay=0.9999),
        "ModelEmaV2-fast": lambda model: ModelEmaV2(model, decay=0.9),
        "ModelEmaV3": lambda model: ModelEmaV3(model, decay=0.9999),
        "AveragedModel": lambda model: AveragedModel(model, use_buffers=True),
        "AveragedModel-ema": lambda model: AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True
        ),
        "AveragedModel-copied": AveragedModel,
    }


def update(average: nn.Module, model: nn.Module) -> None:
    (average.update_parameters if hasattr(average, "update_parameters") else average.update)(model)


@pytest.mark.filterwarnings("ignore:a gate's stored state is")
@pytest.mark.parametrize("name", averages())
def test_an_average_of_live_and_frozen_is_never_closed(name: str, kind: str) -> None:
    """It is live, or frozen as the model is; a fresh model that loads it likewise."""
    model, x = KINDS[kind](init_logit=1.0), x_for()
    opened = torch.arange(model.gates) % 2 == 0
    average = averages()[name](model)
    update(average, model)
    model.freeze(opened)
    wanted = opened.float().expand(8, -1)
    for _ in range(140):  # 127 steps lead from live to frozen in integers
        update(average, model)
        averaged = average.module.eval()
        fresh = KINDS[kind]().eval()
        fresh.load_state_dict(averaged.state_dict())
        for gate in (averaged, fresh):
            y = gate(x).flatten(1)
            # on its way down from live a closed channel passes through open
            assert bool((y >= wanted).all())
        if name in ("ModelEmaV3", "AveragedModel-copied"):
            assert averaged.frozen  # integers are copied
    assert averaged.stored[opened].min() > 0
    if "Ema" in name:  # time enough to forget the live state, at least in integers
        assert averaged.frozen and torch.equal(averaged.open, opened)


def test_an_averaged_state_is_said() -> None:
    gate = fg.ChannelGate(6, 2)
    gate.stored.copy_(torch.tensor([126, 1]))
    with pytest.warns(UserWarning, match="stored state is 126, an average of live and frozen states"):
        assert not gate.frozen


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_a_detached_gate_passes_no_gradient_on(kind: str, estimator: str) -> None:
    gate = KINDS[kind](estimator=estimator)
    gate.detach_input = True
    for each in (gate, copy.deepcopy(gate)):
        x = x_for().requires_grad_()
        (each(x).sum() + each.logits.sum()).backward()
        assert x.grad is None and each.fc1.weight.grad is not None


def test_copies_and_pickles_go_their_own_ways(kind: str, tmp_path: object) -> None:
    gate = KINDS[kind]()
    gate.freeze(torch.zeros(gate.gates, dtype=torch.bool))
    torch.save(gate, f"{tmp_path}/gate.pt")
    twins = [copy.deepcopy(gate), torch.load(f"{tmp_path}/gate.pt", weights_only=False)]
    gate.stored.fill_(1)
    assert gate.all_open and all(twin.frozen and not twin.all_open for twin in twins)
    assert len({id(g.calls) for g in (gate, *twins)}) == 3


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Gates whose buffers seem to lie on an accelerator; whether each copy to the host has arrived, to be set."""
    copies: list[list[bool]] = []

    def send(tensor: Tensor) -> Transfer:
        copies.append([False])
        return Transfer(TensorState.of(tensor), tensor.clone(), lambda arrived=copies[-1]: arrived[0])

    monkeypatch.setattr(gates, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(gates, "send_to_host", send)
    return copies


def test_on_an_accelerator_a_forward_never_waits(kind: str, elsewhere: list[list[bool]]) -> None:
    """A changed buffer is right at once, there; its values are read once, when they have arrived."""
    gate, x = KINDS[kind](init_logit=1.0), x_for()
    reads: list[int] = []

    def forward() -> Tensor:
        with Tape() as tape:  # raises HostReads
            y = gate(x)
        reads.append(len(tape.operations))
        return y.flatten(1)

    gate.freeze(torch.zeros(gate.gates, dtype=torch.bool))
    assert forward().sum() == 0 and gate.logits is None and elsewhere == []
    for value, arrived in ((1, False), (0, False), (LIVE, False), (0, True)):
        gate.stored.fill_(value)
        for _ in range(3):
            assert torch.equal(forward(), torch.full((8, gate.gates), float(value != 0)))
            assert gate.logits is not None  # not known yet
        elsewhere[-1][0] = arrived
    assert len(elsewhere) == 4
    assert forward().sum() == 0 and gate.logits is None
    assert len(elsewhere) == 4  # known from here on
    gate.stored.data.fill_(LIVE)  # no version tells
    assert forward().sum() == 8 * gate.gates and gate.logits is None
    assert gate.eval()(x).sum() == 8 * gate.gates and gate.logits is not None


def test_a_gate_on_meta_keeps_its_shapes(kind: str) -> None:
    gate = KINDS[kind]()
    gate.freeze(torch.zeros(gate.gates, dtype=torch.bool))
    assert gate.to("meta")(x_for().to("meta")).shape == (8, gate.gates, 1, 1)


@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_a_compiled_network_follows_the_buffer(gating: str) -> None:
    model, x = fg.models.resnet(8, gating=gating, init_logit=1.0).eval(), torch.randn(4, 3, 8, 8)
    gates = [gate for _, gate in fg.named_gates(model)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for value in (LIVE, 0, 1):
            for gate in gates:
                gate.stored.fill_(value)
            got = compiled(x)
            # other operations than those of the eager network, of fp32 rounding
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


# names and arguments


def test_named_gates_are_in_forward_order() -> None:
    model = fg.models.resnet(20, gating="layer")
    names = [name for name, _ in fg.named_gates(model)]
    assert names == [f"layer{stage}.{block}.gate" for stage in (1, 2, 3) for block in range(3)]
    order = []
    for name, gate in fg.named_gates(model):
        gate.register_forward_hook(lambda *_, name=name: order.append(name))
    model.eval()(torch.zeros(1, 3, 8, 8))
    assert order == names
    assert list(fg.named_gates(nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "in_channels: expected a positive number, got 0"),
        ((3, 0), {}, "gates: expected a positive number, got 0"),
        ((3, 3, -1), {}, "hidden_features: expected a positive number, got -1"),
        ((3,), {"depth": 3}, "depth: expected 1 or 2 dense layers, got 3"),
        ((3,), {"estimator": "softmax"}, "estimator: expected one of straight_through, .*, got 'softmax'"),
        ((3,), {"window": "hard"}, "window: expected one of clipped, restoring, identity, got 'hard'"),
        ((3,), {"temperature": 0.0}, r"temperature: expected a positive number, got 0\.0"),
        ((3,), {"impl": "cudnn"}, "impl: expected one of auto, triton, torch, got 'cudnn'"),
    ],
)
def test_bad_arguments_say_expected_and_got(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fg.ChannelGate(*arguments, **options)


@pytest.mark.parametrize("options", [{"depth": 1}, {"spatial_size": (2, 2)}, {"out_channels": 2}])
def test_layer_gates_have_no_channel_options(options: dict) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        fg.LayerGate(3, **options)


@pytest.mark.parametrize("shape", [(8, 5, 4, 3), (8, 6, 4), (6,)])
def test_input_of_another_shape_is_refused(kind: str, shape: tuple) -> None:
    gate = KINDS[kind]()
    expected = r"tokens \[N, T, 6\]" if kind == "layer" and len(shape) == 3 else r"\[N, 6, H, W\]"
    with pytest.raises(ValueError, match=rf"x: expected {expected}, got \["):
        gate(torch.zeros(shape))
    gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"x: expected {expected}, got \["):
        gate(torch.zeros(shape))


def test_layer_gates_take_tokens() -> None:
    gate, x = fg.LayerGate(6).eval(), torch.randn(8, 5, 6)
    decisions = gate(x)
    logits = gate.logits
    assert decisions.shape == (8, 1, 1, 1)
    # the same means over T as over one column of a map
    assert torch.equal(gate(x.transpose(1, 2)[..., None]), decisions) and torch.equal(gate.logits, logits)


def test_a_flattening_gate_is_tied_to_its_size() -> None:
    gate = fg.ChannelGate(6, spatial_size=(4, 3))
    # (3, 4) has as many pixels: the order would be wrong without a word
    for size in ((3, 4), (8, 6), (1, 1)):
        with pytest.raises(
            ValueError, match=rf"x: expected a spatial size of \(4, 3\) .* got \({size[0]}, {size[1]}\); use spatial"
        ):
            gate(torch.zeros(8, 6, *size))
    pooled = fg.ChannelGate(6)
    assert all(pooled(torch.zeros(8, 6, *size)).shape == (8, 6, 1, 1) for size in ((3, 4), (8, 6), (1, 1)))


def test_integer_images_are_refused() -> None:
    gate = fg.LayerGate(6)
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.uint8"):
        gate(torch.zeros(8, 6, 4, 3, dtype=torch.uint8))


def test_repr_says_the_state() -> None:
    gate = fg.ChannelGate(6, 5, estimator="gumbel")
    assert "6 -> 5, depth=2, estimator=gumbel, live" in repr(gate)
    gate.freeze(torch.ones(5, dtype=torch.bool))
    assert "frozen" in repr(gate)


def test_a_capture_asks_nothing_of_the_device(
    kind: str, elsewhere: list[list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, x = KINDS[kind](init_logit=1.0), x_for()
    gate.stored.fill_(0)
    gate(x)
    elsewhere[-1][0] = True  # on the host by now
    with monkeypatch.context() as patch:
        patch.setattr(gates, "is_capturing", lambda: True)
        assert gate(x).sum() == 0 and gate.logits is not None  # found out there
        gate.stored.fill_(1)
        assert gate(x).sum() == 8 * gate.gates and len(elsewhere) == 1  # no copy would be made until the replay
    gate(x)
    assert len(elsewhere) == 2


@pytest.mark.gpu
def test_on_a_device_a_graph_follows_the_buffer(kind: str) -> None:
    gate, x = KINDS[kind](init_logit=1.0).cuda(), x_for().cuda()
    with torch.no_grad():
        gate(x)  # sends for the buffer's values
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gate(x)
    for value in (0, 1, LIVE):
        gate.stored.fill_(value)
        graph.replay()
        assert bool((y == (value != 0)).all())


@pytest.mark.gpu
def test_on_a_device_a_frozen_gate_waits_for_nothing(kind: str) -> None:
    gate, x = KINDS[kind]().cuda(), x_for().cuda()
    gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = gate(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.device == x.device and bool((y == 1).all())
