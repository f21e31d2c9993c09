"""What a residual block computes: its layout, held against the block's own forward before it is believed."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgate.models.block import ResidualBlock
from fastgate.models.hooks import copy_network, drop_own_hooks


@dataclass(frozen=True)
class BlockLayout:
    """Which children of a residual block do what; children that are None or missing are left out."""

    branch: tuple[str, ...]
    shortcut: str | None
    activation: str | None


# by qualified class name, so that nothing is imported to know them
_LAYOUTS = {
    "torchvision.models.resnet.BasicBlock": BlockLayout(("conv1", "bn1", "relu", "conv2", "bn2"), "downsample", "relu"),
    "torchvision.models.resnet.Bottleneck": BlockLayout(
        ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), "downsample", "relu"
    ),
    "timm.models.resnet.BasicBlock": BlockLayout(
        ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path"), "downsample", "act2"
    ),
    "timm.models.resnet.Bottleneck": BlockLayout(
        ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "se", "drop_path"),
        "downsample",
        "act3",
    ),
}


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_block(
    cls: type[nn.Module], *, branch: Sequence[str], shortcut: str | None = None, activation: str | None = None
) -> None:
    """Tell :func:`attach` how a residual block class computes: activation(shortcut(x) + branch(x)).

    Args:
        cls: the block's class.
        branch: names of the child modules of the branch, in the order they run; a name may occur twice.
        shortcut: name of the child on the shortcut; None, or a child that is None, is the identity.
        activation: name of the child applied to the sum; None for none.

    Example: `register_block(MyBlock, branch=("conv1", "bn1", "relu", "conv2", "bn2"), activation="relu")`
    """
    if not branch:
        raise ValueError(f"branch: expected the names of child modules of {cls.__name__}, got none")
    _LAYOUTS[_class_name(cls)] = BlockLayout(tuple(branch), shortcut, activation)


def find_layout(block: nn.Module) -> BlockLayout | None:
    """The layout of the block's class, None for a class that is not known."""
    return _LAYOUTS.get(_class_name(type(block)))


def known_classes() -> str:
    """The names of the classes that have a layout."""
    return ", ".join(_LAYOUTS)


def to_residual_block(block: nn.Module, layout: BlockLayout) -> ResidualBlock:
    """The same children under the same names, so that state_dict keys stay as they were."""
    # not named_children(): it leaves out a module that is registered under a second name
    children = {name: child for name, child in block._modules.items() if child is not None}
    named = [*layout.branch, *(name for name in (layout.shortcut, layout.activation) if name is not None)]
    remedy = "correct its register_block()"
    if missing := [name for name in named if not hasattr(block, name)]:
        raise ValueError(f"{type(block).__name__}: no child named {', '.join(missing)}; {remedy}")
    unused = [name for name in children if name not in named and not isinstance(children[name], nn.Identity)]
    if unused := unused + list(block._parameters) + list(block._buffers):
        raise ValueError(f"{type(block).__name__}: its layout leaves out {', '.join(unused)}; {remedy}")
    if taken := [name for name in children if name in _RESERVED]:
        raise ValueError(f"{type(block).__name__}: a child cannot be named {taken[0]!r} in a gated block; rename it")
    branch = [name for name in layout.branch if name in children]
    result = ResidualBlock(
        children,
        branch,
        layout.shortcut if layout.shortcut in children else None,
        layout.activation if layout.activation in children else None,
    )
    result.training = block.training
    # what the network's own forward, or a hook, may read of its block (a stride, a flag)
    for name, value in vars(block).items():
        if name not in _RESERVED:
            setattr(result, name, value)
    return result


# the names that a ResidualBlock uses itself
_RESERVED = frozenset({*dir(ResidualBlock), *vars(ResidualBlock({}, (), None, None)), "gate", "in_index", "out_index"})


# maps that a block is tried on: small, and not square where its own forward takes such; a window or a patch may ask for
# a size that it divides
_PROBE_SIZES = ((9, 10), (8, 8), (14, 14), (32, 32), (56, 56), (224, 224))
_PROBE_SAMPLES = 3
_ULPS = 16  # see check_layout
_GRADIENT = "the gradient of "


def check_layout(name: str, block: nn.Module, layout: BlockLayout) -> bool:
    """Compare what the layout computes with the block's own forward, in eval and in training mode, and the gradients.

    Both run on copies with random weights (those of a fresh block may hide a part of it behind zeros) and on the same
    random numbers; the block, its hooks and every random state stay as they were.

    Returns:
        Whether a sample's result in eval mode depends on the other samples of its batch.

    Raises:
        ValueError: they differ, or one of them raises. They run the same operations and are expected to be bit-equal;
            16 units in the last place of the largest value are let pass for a forward that adds up in another order. A
            wrong layout is off by the order of the values.
    """
    own = _probe_copy(block)
    ours = to_residual_block(copy_network(own), layout)
    weight = ours.branch_convs()[0][2].weight
    shape = (_PROBE_SAMPLES, ours.branch_convs()[0][2].in_channels)
    generator = torch.Generator("cpu").manual_seed(1)
    what = f"block {name!r}: {type(block).__name__}"
    remedy = "declare what it computes with fastgate.register_block(), every operation as a child module"
    failure: Exception | None = None
    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        for size in _PROBE_SIZES:
            x = 2 * torch.randn(*shape, *size, generator=generator, device="cpu")
            x = x.to(weight.device, weight.dtype)
            try:
                _run(own, x, training=False)
            except Exception as error:
                failure = failure or error
                continue
            break
        else:
            raise ValueError(
                f"{what} cannot be compared with its layout, as its own forward raises on random images of every size "
                f"tried ({failure}); {remedy}"
            ) from failure
        for training in (False, True):
            mode = "training" if training else "eval"
            expected = _run(own, x, training)
            try:
                got = _run(ours, x, training)
            except Exception as error:
                raise ValueError(f"{what} runs, but its layout raises in {mode} mode ({error}); {remedy}") from error
            # of one scale: what should cancel out, such as the gradient of a bias before a norm, is rounding alone
            of_gradients = max(
                (_largest(value) for key, value in expected.items() if key.startswith(_GRADIENT)), default=0
            )
            for of, wanted in expected.items():
                scale = of_gradients if of.startswith(_GRADIENT) else _largest(wanted)
                difference = _difference(wanted, got[of], scale)
                if difference is not None:
                    raise ValueError(
                        f"{what} computes something else than its layout says: {of} in {mode} mode differs by up to "
                        f"{difference}; {remedy}"
                    )
        with torch.no_grad():
            alone, batch = (_run(ours, images, training=False)["its result"] for images in (x[:1], x))
    if alone is None or batch is None:
        return True
    # convolutions of one and of several samples round differently, statistics of others change the first digits
    rounding = torch.finfo(batch.dtype).eps ** 0.5
    return not torch.allclose(alone, batch[:1], rtol=0, atol=rounding * float(batch.abs().max()))


def _probe_copy(block: nn.Module) -> nn.Module:
    """A copy on which a layout can be tried: no hooks that are seen outside, no weights that hide what is computed."""
    copied = copy_network(block)
    drop_own_hooks(copied)
    if any(tensor.is_meta for tensor in copied.parameters()):
        copied.to_empty(device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.is_floating_point():
                # of unit order after a layer
                scale = 1.0 if parameter.dim() < 2 else (parameter[0].numel()) ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, device="cpu"))
        for module in copied.modules():
            for key, buffer in module._buffers.items():
                if key == "running_mean" and buffer is not None:
                    buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, device="cpu"))
                if key == "running_var" and buffer is not None:
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, device="cpu"))
    return copied


def _run(block: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor | None]:
    """What the block makes of a copy of x, with the gradients in training mode."""
    block.train(training)
    leaf = x.clone().requires_grad_(training)
    inputs = leaf * 1  # a block may work in place, which a leaf forbids
    with _same_random_numbers(x.device):
        result = block(inputs)
    if not isinstance(result, Tensor):
        raise TypeError(f"expected a block that returns one tensor, got {type(result).__name__}")
    found: dict[str, Tensor | None] = {"its result": result.detach(), "its input afterwards": inputs.detach()}
    if training and result.requires_grad:
        block.zero_grad()
        # not a sum: batch norms would cancel it
        result.backward(
            torch.linspace(-1, 1, result.numel(), dtype=x.dtype, device=x.device).reshape(result.shape).sin()
        )
        found[f"{_GRADIENT}its input"] = leaf.grad
        for name, parameter in block.named_parameters():
            found[f"{_GRADIENT}{name}"] = parameter.grad
    return found


def _largest(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.abs().max())


def _difference(wanted: Tensor | None, got: Tensor | None, scale: float) -> str | None:
    """How far apart two tensors of this scale are, None where no more than rounding."""
    if wanted is None or got is None:
        return None if wanted is got else "all of it (one of them has none)"
    if wanted.shape != got.shape:
        return f"its shape, {list(got.shape)} for {list(wanted.shape)}"
    if torch.allclose(wanted, got, rtol=0, atol=_ULPS * torch.finfo(wanted.dtype).eps * scale, equal_nan=True):
        return None
    return f"{float((wanted.double() - got.double()).abs().max()):.2g} of {scale:.2g}"


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """The same random numbers each time; the random states of the process are as before afterwards."""
    state = random.getstate()
    on_cuda = device.type == "cuda"
    index = torch.cuda.current_device() if on_cuda and device.index is None else device.index
    with torch.random.fork_rng([index] if on_cuda else []):
        random.seed(0)
        # not torch.manual_seed: it reaches every device, those not forked too
        torch.default_generator.manual_seed(0)
        if on_cuda:
            torch.cuda.default_generators[index].manual_seed(0)
        try:
            yield
        finally:
            random.setstate(state)
