"""What may be cut: modules that compute otherwise, and networks changed between attach and compact or commit."""

from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import fastgate as fg
from fastgate.pruning.commitment import commit
from fastgate.pruning.costs import total_cost
from tests.helpers import GATINGS, PlainBlock, assert_same_state, gating_ids, named, randomize_batch_norm, state_copy

# weight norm as a hook, torch.ao.quantization
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore::DeprecationWarning")

CHANNELS = GATINGS[1:]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two blocks, neither first nor last; gates in the order "1", "2"."""
    blocks = (PlainBlock(8, 6), PlainBlock(8, 6))
    return randomize_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 8, 1))).to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, 7, 5, dtype=dtype)


def close(model: nn.Module, pattern: list[bool]) -> None:
    """Freeze every channel gate with this pattern, over and over; layer gates with one value each."""
    for i, (_, gate) in enumerate(fg.named_gates(model)):
        at = torch.arange(gate.gates) if gate.gates > 1 else torch.tensor([i])
        gate.freeze(torch.tensor(pattern)[at % len(pattern)])


class Pruning(prune.L1Unstructured):
    """A user's own."""


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def on(name: str, change: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    return lambda model: change(model.get_submodule(name))


def fuse(model: nn.Module) -> None:
    groups = [["1.conv1", "1.bn1", "1.act1"], ["1.conv2", "1.bn2"]]
    quantization.fuse_modules_qat(model.train(), groups, inplace=True)


def prepare(model: nn.Module) -> None:
    model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    for _, gate in fg.named_gates(model):
        gate.qconfig = None
    quantization.prepare_qat(model, inplace=True)


def fuse_and_prepare(model: nn.Module) -> None:
    fuse(model)
    prepare(model)


def wrap(model: nn.Module) -> None:
    model[1].conv1, model[1].conv2 = nn.Sequential(model[1].conv1), nn.Sequential(model[1].conv2)


def share(model: nn.Module, *names: str) -> None:
    """Let the second block have the first one's modules or tensors of these names."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(model[2].get_submodule(path), leaf, getattr(model[1].get_submodule(path), leaf))


COMPUTED = [
    ("weight_norm", parametrizations.weight_norm, "parametrize.remove_parametrizations"),
    ("weight_norm-hook", torch.nn.utils.weight_norm, "remove_weight_norm"),
    ("spectral_norm", parametrizations.spectral_norm, "parametrize.remove_parametrizations"),
    ("spectral_norm-hook", torch.nn.utils.spectral_norm, "remove_spectral_norm"),
    ("prune", lambda m: prune.l1_unstructured(m, "weight", 0.5), "prune.remove"),
    ("prune-bias", lambda m: prune.l1_unstructured(m, "bias", 0.5), "prune.remove"),
    (
        "own",
        lambda m: parametrize.register_parametrization(m, "bias", Half()),
        "parametrize.remove_parametrizations",
    ),
]
QUANTIZED = "fused or prepared by torch.ao.quantization; quantize the compact network"
SHARED = "the module or one of its tensors is also used elsewhere in the network"
WRAPPED = "expected an nn.Conv2d whose channels the gate closes, got "

CHANGES = [
    *((f"{key}-{name}", (on(f"1.{name}", change), "middle", remedy)) for key, change, remedy in COMPUTED
      for name in ("conv1", "conv2")),
    *((f"{key}-bn1", (on("1.bn1", change), "middle", remedy)) for key, change, remedy in COMPUTED[4:]),
    ("prune-before", (on("1.conv1", COMPUTED[4][1]), "before", "prune.remove")),
    ("prune-after", (on("1.conv2", COMPUTED[4][1]), "after", "prune.remove")),
    *((f"qat-{position}", (prepare, position, QUANTIZED)) for _, position in CHANNELS),
    *((f"fused-qat-{position}", (fuse_and_prepare, position, QUANTIZED)) for _, position in CHANNELS),
    *((f"fused-{position}", (fuse, position, WRAPPED)) for _, position in CHANNELS),
    *((f"wrapped-{position}", (wrap, position, WRAPPED)) for _, position in CHANNELS),
    ("observed-activation", (on("1.act1", lambda m: m.add_module("observer", nn.Identity())), "middle", "ReLU 'act1'")),
    ("shared-conv", (lambda m: share(m, "conv1"), "middle", SHARED)),
    ("shared-norm", (lambda m: share(m, "bn1"), "middle", SHARED)),
    ("tied-weight", (lambda m: share(m, "conv2.weight"), "middle", SHARED)),
    ("tied-norm", (lambda m: share(m, "bn1.weight", "bn1.bias"), "middle", SHARED)),
    ("tied-statistics", (lambda m: share(m, "bn1.running_mean"), "middle", SHARED)),
]  # fmt: skip


@pytest.mark.parametrize("pattern", [[True, False, True], [False]], ids=["some", "none"])
@pytest.mark.parametrize("case", named(CHANGES))
def test_what_cannot_be_cut_any_more_is_refused(case: tuple, pattern: list[bool]) -> None:
    change, position, message = case
    model = fg.attach(network(torch.float32), "channel", position)
    change(model)
    if position == "after" and pattern == [False]:
        close(model, pattern)  # the whole branch leaves, whatever is in it
        assert fg.compare(model.eval(), fg.compact(model), images(torch.float32)) == 0.0
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(images(torch.float32)).sum().backward()
    optimizer.step()
    close(model, pattern)
    state, text = state_copy(model), repr(model)
    with pytest.raises(ValueError, match=rf"block '[12]': .*{message}.*gating='layer'"):
        fg.compact(model)
    with pytest.raises(ValueError, match=message):
        commit(model, optimizer)
    assert_same_state(model, state)
    assert repr(model) == text


@pytest.mark.filterwarnings("error:hooks on")
@pytest.mark.parametrize("pattern", [[True, False], [False, True]], ids=["open-closed", "closed-open"])
@pytest.mark.parametrize(
    "change",
    named(
        [
            *((key, on("1.conv1", change)) for key, change, _ in COMPUTED),
            ("prune-norm", on("1.bn1", COMPUTED[4][1])),
            ("prune-own", on("1.conv1", lambda m: Pruning.apply(m, "weight", 0.5))),
            ("qat", prepare),
            ("fused", fuse),
            ("fused-qat", fuse_and_prepare),
            ("wrapped", wrap),
            ("shared", lambda m: share(m, "conv1", "bn2", "conv2.weight")),
        ]
    ),
)
def test_layer_gates_cut_nothing_so_that_all_of_it_is_carried_over(
    change: Callable[[nn.Module], object], pattern: list[bool]
) -> None:
    model = fg.attach(network(torch.float32), "layer")
    change(model)
    x = images(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(x).sum().backward()  # leaves computed weights with a graph
    optimizer.step()
    model.apply(quantization.disable_observer).eval()
    close(model, pattern)
    small = fg.compact(model)
    wanted = model(x)
    # the same operations on the same tensors, with and without the gates
    assert torch.equal(small(x), wanted)
    assert torch.equal(commit(model, optimizer)(x), wanted)


def test_networks_with_computed_weights_are_traced_and_timed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), PlainBlock(8), PlainBlock(8))
    prune.l1_unstructured(model[3].conv1, "weight", 0.5)
    fg.attach(model, "layer")
    x = images(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).sum().backward()
    close(model, [False, True])
    assert total_cost(model, x, "latency") > 0
    commit(model, optimizer)
    assert type(model[2]) is nn.Identity  # its input is known to come out of the ReLU


def test_a_convolution_that_one_of_two_closed_places_shared_is_still_trained() -> None:
    model = network()
    share(model, "conv1")
    fg.attach(model, "layer")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(images()).sum().backward()
    optimizer.step()
    weight = model[2].conv1.weight
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    model[1].gate.freeze(torch.tensor(False))
    commit(model, optimizer)
    assert any(parameter is weight for parameter in optimizer.param_groups[0]["params"])
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Standardized(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, (weight - mean) / std, bias)


class Doubled(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Centered(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True))


class Named(nn.Conv2d):
    """Computes as its base does."""


class Unchecked(nn.BatchNorm2d):
    def _check_input_dim(self, x: Tensor) -> None:
        pass


def with_modules(kind: type[nn.Module]) -> nn.Module:
    """A network with modules of this kind wherever a gate may cut one."""
    model = network()
    for name, sizes in (("conv1", (8, 6)), ("conv2", (6, 8)), ("bn1", (6,)), ("bn2", (8,))):
        if issubclass(kind, nn.Conv2d) and name.startswith("conv"):
            setattr(model[1], name, kind(*sizes, 3, padding=1))
        if not issubclass(kind, nn.Conv2d) and name.startswith("bn"):
            setattr(model[1], name, kind(*sizes))
            for tensor in model[1].get_submodule(name).state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
    return model.double()


@pytest.mark.parametrize("kind", [Same, Standardized, Doubled, timm.layers.StdConv2d, timm.layers.ScaledStdConv2d])
@pytest.mark.parametrize("gating", CHANNELS, ids=gating_ids)
def test_convolutions_that_compute_otherwise_are_not_cut(kind: type[nn.Module], gating: tuple[str, str]) -> None:
    with pytest.raises(
        ValueError, match=rf"block '1': .*{kind.__name__} 'conv[12]', which does not compute like nn.Conv2d"
    ):
        fg.attach(with_modules(kind), *gating)


@pytest.mark.parametrize("position", ["middle", "after"])
def test_a_norm_that_computes_otherwise_is_not_cut(position: str) -> None:
    with pytest.raises(ValueError, match=r"block '1': .*Centered 'bn[12]' between a convolution and its gate"):
        fg.attach(with_modules(Centered), "channel", position)


KNOWN = [
    *(Named, Unchecked, timm.layers.BatchNormAct2d, timm.layers.FrozenBatchNormAct2d),
    torchvision.ops.FrozenBatchNorm2d,
]
EXACT = [(kind, gating) for kind in KNOWN for gating in GATINGS]
EXACT += [(kind, GATINGS[0]) for kind in (Same, Standardized, Doubled, Centered, timm.layers.StdConv2d)]


@pytest.mark.parametrize("pattern", [[True, False, True], [False]], ids=["some", "none"])
@pytest.mark.parametrize(("kind", "gating"), EXACT, ids=[f"{k.__name__}-{gating_ids(g)}" for k, g in EXACT])
def test_subclasses_compact_to_the_same(kind: type[nn.Module], gating: tuple[str, str], pattern: list[bool]) -> None:
    model = fg.attach(with_modules(kind), *gating)
    close(model, pattern)
    x = images()
    small = fg.compact(model)
    for training in (False, True):
        # fp64 sums of fewer terms round in other places
        torch.testing.assert_close(small.train(training)(x), model.train(training)(x), rtol=1e-12, atol=1e-12)
    if gating == ("channel", "middle") and pattern != [False]:
        assert small[1].conv1.out_channels == small[1].bn1.weight.numel() == small[1].bn1.running_mean.numel() == 4


def test_a_hook_on_the_last_relu_runs_with_and_without_a_gate() -> None:
    model = fg.attach(network(), "layer").eval()
    seen = []
    model[1].act2.register_forward_hook(lambda module, inputs, y: (seen.append(1), y * 2)[1])
    close(model, [True])
    x = images()
    wanted = model(x)
    assert torch.equal(fg.compact(model)(x), wanted)
    assert len(seen) == 2


def test_scales_that_the_whole_batch_sets_see_every_sample() -> None:
    model = fg.attach(network(torch.float32), "layer", init_logit=0.0)
    prepare(model)
    x = torch.cat([images(torch.float32) * scale for scale in (0.1, 1, 10)])
    model(x)
    model.eval()
    state = state_copy(model)
    with_graph = model(x)
    decisions = torch.stack([gate.decisions for _, gate in fg.named_gates(model)])
    assert 0 < decisions.mean() < 1
    model.load_state_dict(state)
    with torch.no_grad():
        # the same operations on the same samples
        torch.testing.assert_close(model(x), with_graph, rtol=0, atol=0)


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_sizes_that_are_not_known_yet_are_refused(gating: tuple[str, str]) -> None:
    for name, lazy in (("conv2", nn.LazyConv2d(8, 3, padding=1)), ("bn1", nn.LazyBatchNorm2d())):
        model = network(torch.float32)
        setattr(model[1], name, lazy)
        message = rf"block '1': .* got an uninitialized \w+ '{name}'; run one batch through the network first"
        with pytest.raises(ValueError, match=message):
            fg.attach(model, *gating)
        model(images(torch.float32))
        fg.attach(model, *gating)


def test_a_lazy_stem_is_refused_only_where_the_image_has_to_run_through_it() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 1), PlainBlock(8))
    with pytest.raises(ValueError, match=r"model: .* got an uninitialized LazyConv2d '0'; run one batch"):
        fg.attach(model, "channel", spatial_size=(7, 5))
    fg.attach(model, "channel")(images(torch.float32))
