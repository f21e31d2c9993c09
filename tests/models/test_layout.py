"""What attach finds out about a block before anything changes: its layout, its hooks, what cannot be cut."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastgate as fg
from fastgate.pruning.commitment import commit
from tests.helpers import freeze_at_random


class Functional(nn.Module):
    """ReLUs that a layout does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def test_a_layout_that_is_not_what_the_block_computes_is_refused() -> None:
    fg.register_block(Functional, branch=("conv1", "conv2"))
    model = nn.Sequential(Functional())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="block '0': Functional computes something other than its layout"):
        fg.attach(model, "layer")
    assert type(model[0]) is Functional
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_hooks_stay_with_their_block_and_their_handles_work() -> None:
    model = torchvision.models.resnet18().eval()
    seen: list[str] = []
    handles = [
        model.layer1[0].register_forward_hook(lambda *_: seen.append("forward")),
        model.layer1[0].register_forward_pre_hook(lambda *_: seen.append("pre")),
    ]
    fg.attach(model, "layer")
    model(torch.randn(2, 3, 32, 32))
    assert seen == ["pre", "forward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 32, 32))
    assert seen == ["pre", "forward"]


@pytest.mark.parametrize("committed", [False, True], ids=["compact", "commit"])
def test_hooks_that_leave_with_a_closed_block_are_named(committed: bool) -> None:
    model = fg.attach(torchvision.models.resnet18(), "layer").eval()
    for block in (model.layer1[0], model.layer1[1]):
        block.register_forward_hook(lambda *_: None)
    opened = [True, False] + [True] * 6
    for is_open, (_, gate) in zip(opened, fg.named_gates(model), strict=True):
        gate.freeze(torch.tensor(is_open))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"hooks on 'layer1\.1' no longer run"):
        small = commit(model, optimizer) if committed else fg.compact(model)
    assert len(small.layer1[0]._forward_hooks) == 1


WRAPPERS = [
    torch.nn.utils.parametrizations.weight_norm,
    torch.nn.utils.parametrizations.spectral_norm,
    torch.nn.utils.spectral_norm,
    lambda conv: torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["weight_norm", "spectral_norm", "spectral_norm-hook", "prune"])
def test_weights_that_are_computed_cannot_be_cut(wrap: Callable[[nn.Module], object]) -> None:
    import torch.nn.utils.prune

    model = torchvision.models.resnet18().eval()
    wrap(model.layer1[0].conv2)
    with pytest.raises(ValueError, match=r"layer1\.0.*gating='layer'"):
        fg.attach(model, "channel")
    # layer gates cut nothing
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    fg.attach(model, "layer")
    for _, gate in fg.named_gates(model):
        gate.freeze(torch.tensor(True))
    assert torch.equal(model.eval()(x), plain)


def test_statistics_of_the_batch_see_every_sample() -> None:
    """In eval mode too, where closed samples are skipped elsewhere."""
    model = torchvision.models.resnet18(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    fg.attach(model, "layer", init_logit=0.0).eval()
    x = torch.randn(6, 3, 64, 64)
    with_graph = model(x)
    decisions = torch.stack([gate.decisions for _, gate in fg.named_gates(model)])
    assert 0 < decisions.mean() < 1
    with torch.no_grad():
        # the same operations on the same samples
        torch.testing.assert_close(model(x), with_graph, rtol=0, atol=0)


def test_batch_norms_converted_after_attach_are_cut() -> None:
    model = fg.attach(torchvision.models.resnet18(), "channel")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    freeze_at_random(model, "mixed")
    small = fg.compact(model)
    # fp32 sums of fewer terms
    assert fg.compare(model, small, torch.randn(2, 3, 64, 64)) < 1e-4
    kept = sum(module.num_features for module in small.modules() if isinstance(module, nn.SyncBatchNorm))
    assert kept < sum(
        module.num_features for module in torchvision.models.resnet18().modules() if hasattr(module, "num_features")
    )
