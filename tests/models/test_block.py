"""What compaction leaves is a plain network to the tools of others: traced, scripted, exported, quantized, compiled."""

import copy
import io
from collections.abc import Callable, Iterable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastgate as fg
from fastgate.models.block import EmptyConv2d, PadShortcut
from tests.helpers import (
    GATINGS,
    PlainBlock,
    PreActivationBlock,
    freeze_at_random,
    gated_resnet,
    gating_ids,
    named,
    randomize_batch_norm,
)


def by_fx(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.fx.symbolic_trace(model)


def by_script(model: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def by_script_of_fx(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.script(torch.fx.symbolic_trace(model))


def by_trace(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.trace(model, (x,))


def by_export(model: nn.Module, x: Tensor, *, strict: bool = False) -> nn.Module:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: batch},)).module()


def by_strict_export(model: nn.Module, x: Tensor) -> nn.Module:
    return by_export(model, x, strict=True)


def by_compile(model: nn.Module, x: Tensor) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


# those that take a tenth of a second, and those that take one
LIGHT = (by_fx, by_script, by_script_of_fx, by_trace)
HEAVY = (by_export, by_strict_export, by_compile)


def small_torchvision(block: type[nn.Module]) -> nn.Module:
    return torchvision.models.ResNet(block, [2, 1, 1, 1], num_classes=4, width_per_group=64)


def registered_blocks() -> nn.Module:
    """Convolutions with bias, one block that ends in a sum, and one of another activation."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        PlainBlock(6, 5, nn.SiLU),
        PreActivationBlock(6, 8),
        PlainBlock(8),
    )


NETWORKS = named(
    [
        ("pad", lambda gating: gated_resnet(8, gating, "pad")),
        ("basic", lambda gating: fg.attach(small_torchvision(torchvision.models.resnet.BasicBlock), *gating)),
        ("bottleneck", lambda gating: fg.attach(small_torchvision(torchvision.models.resnet.Bottleneck), *gating)),
        ("registered", lambda gating: fg.attach(registered_blocks(), *gating)),
    ]
)


def compacted(build: Callable[[tuple[str, str]], nn.Module], gating: tuple[str, str]) -> nn.Module:
    model = randomize_batch_norm(build(gating)).eval()
    freeze_at_random(model, "mixed")
    return fg.compact(model)


def differing(model: nn.Module, x: Tensor, tools: Iterable[Callable[[nn.Module, Tensor], nn.Module]]) -> list[str]:
    """The tools by which the model gives other outputs than it gives itself."""
    with torch.no_grad():
        return [tool.__name__ for tool in tools if not torch.equal(tool(model, x)(x), model(x))]


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch gives up torch.jit
def test_compact_networks_are_traced_and_scripted(
    build: Callable[[tuple[str, str]], nn.Module], gating: tuple[str, str]
) -> None:
    model, x = compacted(build, gating), torch.randn(3, 3, 16, 16)
    children = [type(module) for module in model.modules()]
    assert differing(model, x, LIGHT) == []
    # torch.jit.script may replace children of what it is given
    assert [type(module) for module in model.modules()] == children
    layout = torch.channels_last
    assert differing(model.to(memory_format=layout), x.to(memory_format=layout), LIGHT[:2]) == []


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_compact_networks_are_exported_and_compiled(gating: tuple[str, str]) -> None:
    model = nn.Sequential(compacted(lambda g: fg.attach(registered_blocks(), *g), gating), PadShortcut(8, 12, 1))
    assert differing(model, torch.randn(3, 3, 16, 16), HEAVY) == []


@pytest.mark.parametrize("build", NETWORKS[:2])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_plain_networks_are_scripted_and_traced_too(build: Callable[[tuple[str, str]], nn.Module]) -> None:
    model, x = build(GATINGS[0]).eval(), torch.randn(2, 3, 16, 16)
    freeze_at_random(model, "all")
    assert differing(fg.compact(model), x, (by_fx, by_script)) == []


@pytest.mark.parametrize("tool", [by_fx, by_script])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_was_traced_still_refuses_other_images(tool: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    traced = tool(fg.models.resnet(8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(Exception, match=r"x: expected \[N, 3, H, W\], got \[1, 4, 8, 8\]"):
        traced(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_empty_convolution_is_scripted_and_traced(bias: bool) -> None:
    empty = EmptyConv2d(4, [((3, 3), (2, 2), (1, 1), (1, 1)), ((3, 1), (1, 1), (1, 0), (1, 1))], bias)
    for parameter in empty.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 9, 7)
    assert differing(empty, x, (by_fx, by_script)) == []


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
@pytest.mark.parametrize("build", [NETWORKS[0], NETWORKS[2]])
@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is given up in favour of torchao
def test_fx_quantization_takes_compact_networks(
    build: Callable[[tuple[str, str]], nn.Module], gating: tuple[str, str]
) -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="this torch has no FX quantization")
    from torch.ao.quantization import get_default_qconfig_mapping

    model, x = compacted(build, gating), torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)
        engine = get_default_qconfig_mapping(torch.backends.quantized.engine)
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), engine, (x,))
        prepared(x)
        quantized = quantize_fx.convert_fx(prepared)
        got = quantized(x)
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    in_int8 = [
        m for m in quantized.modules() if type(m).__module__.startswith("torch.ao.nn") and "Conv" in repr(m)[:20]
    ]
    assert len(in_int8) == convs
    # int8 of at most 13 layers: errors of a few hundredths of the outputs' size (0.05 at most over three seeds);
    # another network's outputs would be off by about 1.4
    assert (got - wanted).norm() < 0.3 * wanted.norm()
