"""Runs modules on trial: finds arguments on which they run, makes copies, and compares what the copies compute."""

import dataclasses
import inspect
import random
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.models.hooks import copy_network, drop_own_hooks
from fastgate.models.recording import record, replace
from fastgate.modes import eval_mode
from fastgate.values import call, device_of, tensors_in, with_tensors

# feature map sizes to try on a block: small ones first, and not square if possible; windows or patches may require a
# size that they divide
_MAPS = ((9, 10), (8, 8), (14, 14), (32, 32), (56, 56), (224, 224))
# image sizes to try on a network, after those in its configuration
_IMAGES = (64, 224, 32, 96, 128, 192, 256, 299, 384)
_FRAMES = 4  # of a clip, for networks of 3-D convolutions
_SAMPLES = 3
_ULPS = 16
_GRADIENT = "the gradient of "

Found = dict[str, Tensor | None]


@dataclass(frozen=True)
class Probe:
    """Arguments of a module: random tensors of known sizes, and everything else as given.

    Attributes:
        args, kwargs: the arguments, with meta tensors as placeholders for random ones.
        follows_batch: whether the first dimension of the first tensor equals, or is proportional to, the network's
            batch size; True if unknown.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    follows_batch: bool = True

    def make(self, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Create the arguments, the same each time, on the module's device and in its dtype."""
        generator = torch.Generator("cpu").manual_seed(1)
        like = next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), torch.zeros(0))

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_meta:
                return (2 * torch.randn(leaf.shape, generator=generator, device="cpu")).to(like.device, like.dtype)
            return leaf.to(like.device) if isinstance(leaf, Tensor) else leaf

        return replace(self.args, fill), replace(self.kwargs, fill)

    @property
    def sizes(self) -> Any:
        """The arguments with tensors replaced by their sizes."""
        return replace((self.args, self.kwargs), lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf)


def guess_probe(block: nn.Module, *, strict: bool = True, channels: int | None = None) -> Probe | None:
    """Guess images `[N, C, H, W]` for a block that takes nothing else, with the channels it expects; None if unknown.

    Args:
        block: a copy that can be run (:func:`probe_copy`).
        strict: require that a convolution or batch norm reads the image first, so that C is certain, and that the
            forward takes a single argument.
        channels: C, if known.
    """
    conv = next((m for m in block.modules() if isinstance(m, nn.Conv2d)), None)
    norm = next((m for m in block.modules() if isinstance(m, nn.BatchNorm2d)), None)
    if channels is None:
        channels = conv.in_channels if conv is not None else norm.num_features if norm is not None else None
    if channels is None or (strict and _takes_more(block)):
        return None
    for size in _MAPS:
        probe = Probe((torch.empty(_SAMPLES, channels, *size, device="meta"),), {})
        args, kwargs = probe.make(block)
        try:
            with torch.no_grad(), eval_mode(block), same_random_numbers(args[0].device):
                run = record(block, args, kwargs, is_leaf=lambda m: not m._modules)
        except Exception:
            continue
        readers = [dict(block.named_modules())[step.name] for v in run.inputs for step in v.readers if step.name]
        known = any(isinstance(m, nn.Conv2d | nn.modules.batchnorm._BatchNorm) for m in readers)
        return probe if known or not strict else None
    return None


def _takes_more(block: nn.Module) -> bool:
    """Whether the forward takes more than one argument."""
    try:
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return True
    return len(parameters) != 1


def capture_probes(model: nn.Module, names: Container[str], inputs: Any = None) -> dict[str, Probe]:
    """Record the arguments of modules in a run of the whole network, by name; empty if the network cannot be run.

    Args:
        model: the network; a copy runs, in eval mode.
        names: names of the modules.
        inputs: inputs of the network, see :func:`fastgate.values.call`; None tries images of common sizes.
    """
    copied = probe_copy(model, randomize=False)
    found: dict[str, Probe] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found and tensors_in((args, kwargs)):
            # in signature order: the first one is the features
            order = [key for key in inspect.signature(module.forward).parameters if key in kwargs]
            kwargs = {key: kwargs[key] for key in dict.fromkeys([*order, *kwargs])}
            found[name] = Probe(replace(args, _describe), replace(kwargs, _describe))

    for name, module in copied.named_modules():
        if name in names:
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: note(name, module, args, kwargs), with_kwargs=True
            )

    def run(given: Any) -> None:
        found.clear()
        with torch.no_grad(), eval_mode(copied), same_random_numbers(device_of(copied) or torch.device("cpu")):
            call(copied, given)

    failure: Exception | None = None
    for candidate in [inputs] if inputs is not None else _images_for(copied):
        try:
            run(candidate)
        except Exception as error:
            failure = failure or error
            continue
        probes, other = dict(found), _other_batch(candidate)
        if other is not None:
            with suppress(Exception):  # it may not accept another batch size
                run(other)
                fixed = [
                    name for name, probe in found.items() if name in probes and _length(probe) == _length(probes[name])
                ]
                probes |= {name: dataclasses.replace(probes[name], follows_batch=False) for name in fixed}
        return probes
    if inputs is not None:
        raise ValueError(f"inputs: expected valid inputs of the network, but it raises ({failure})") from failure
    return {}


def _other_batch(inputs: Any) -> Any:
    """The inputs with one sample fewer, or two instead of one; None if the tensors are not batches of equal length."""
    tensors = tensors_in(inputs)
    lengths = {len(tensor) if tensor.dim() else None for tensor in tensors}
    if len(lengths) != 1 or lengths & {None, 0} or isinstance(inputs, list):
        return None
    return with_tensors(inputs, [tensor[:-1] if len(tensor) > 1 else torch.cat([tensor, tensor]) for tensor in tensors])


def _length(probe: Probe) -> int:
    return len(tensors_in((probe.args, probe.kwargs))[0])


def _describe(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_like(leaf, device="meta") if leaf.is_floating_point() else leaf.clone()


def _images_for(model: nn.Module) -> Iterator[Any]:
    """Batches of images that the network may accept."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if conv is None:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    for height, width in dict.fromkeys([*_own_sizes(model), *((side, side) for side in _IMAGES)]):
        frames = (_FRAMES,) if isinstance(conv, nn.Conv3d) else ()
        images = torch.rand(_SAMPLES, conv.in_channels, *frames, height, width, generator=generator)
        images = images.to(conv.weight.device, conv.weight.dtype)
        yield images
        yield (list(images),)  # detection networks


def _own_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Image sizes from the configuration of torchvision, timm and Hugging Face networks."""
    config = getattr(model, "config", None)
    embedding = getattr(model, "patch_embed", None)
    default = getattr(model, "default_cfg", None)
    sizes = [getattr(embedding, "img_size", None), getattr(model, "image_size", None)]
    sizes += [getattr(config, "image_size", None)]
    if isinstance(default, dict) and isinstance(default.get("input_size"), tuple):
        sizes.append(default["input_size"][1:])
    for size in sizes:
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, tuple | list) and len(size) == 2:
            yield int(size[0]), int(size[1])


def probe_copy(block: nn.Module, *, randomize: bool = True) -> nn.Module:
    """A copy for trial runs, without hooks that have outside effects, and with weights that hide no computation."""
    copied = copy_network(block)
    drop_own_hooks(copied)
    if any(tensor.is_meta for tensor in copied.parameters()):
        copied.to_empty(device="cpu")
    if not randomize:
        return copied
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.is_floating_point():
                # keeps activations at unit scale
                scale = 1.0 if parameter.dim() < 2 else (parameter[0].numel()) ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, device="cpu"))
        for module in copied.modules():
            for key, buffer in module._buffers.items():
                if key == "running_mean" and buffer is not None:
                    buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, device="cpu"))
                if key == "running_var" and buffer is not None:
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, device="cpu"))
    return copied


def run_probe(block: nn.Module, probe: Probe, training: bool, samples: int | None = None) -> Found:
    """Results of the block on the probe, by description, including gradients in training mode.

    `samples`: use only this many samples of the batch.
    """
    block.train(training)
    args, kwargs = probe.make(block)
    if samples is not None:
        of = len(tensors_in((args, kwargs))[0])
        args, kwargs = replace((args, kwargs), lambda leaf: leaf[:samples] if _is_batch(leaf, of) else leaf)
    leaf = tensors_in((args, kwargs))[0].requires_grad_(training)
    given = leaf * 1  # a block may work in place, which is not allowed on a leaf
    args, kwargs = replace((args, kwargs), lambda value: given if value is leaf else value)
    with same_random_numbers(leaf.device):
        result = block(*args, **kwargs)
    tensors = [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]
    if not tensors:
        raise TypeError(f"expected a block that returns a tensor, got {type(result).__name__}")
    found: Found = {"its result": tensors[0].detach(), "its input afterwards": given.detach()}
    found |= {f"its result number {i}": tensor.detach() for i, tensor in enumerate(tensors[1:], 2)}
    if training and tensors[0].requires_grad:
        block.zero_grad()
        # not a sum: batch norms would cancel it
        weights = torch.linspace(-1, 1, tensors[0].numel(), dtype=leaf.dtype, device=leaf.device)
        tensors[0].backward(weights.reshape(tensors[0].shape).sin().to(tensors[0].dtype))
        found[f"{_GRADIENT}its input"] = leaf.grad
        for name, parameter in block.named_parameters():
            found[f"{_GRADIENT}{name}"] = parameter.grad
    return found


def first_difference(expected: Found, got: Found) -> str | None:
    """Describe the first difference between two runs beyond rounding; None if there is none.

    Equal operations should be bit-equal; 16 units in the last place of the largest value are tolerated for a forward
    that sums in another order.
    """
    # one scale for all gradients: those that should cancel, such as of a bias before a norm, consist of rounding only
    of_gradients = max((_largest(value) for key, value in expected.items() if key.startswith(_GRADIENT)), default=0)
    for of, wanted in expected.items():
        scale = of_gradients if of.startswith(_GRADIENT) else _largest(wanted)
        difference = _difference(wanted, got.get(of), scale)
        if difference is not None:
            return f"{of} differs by up to {difference}"
    return None


def _largest(value: Tensor | None) -> float:
    return 0.0 if value is None or value.numel() == 0 else float(value.abs().max())


def _difference(wanted: Tensor | None, got: Tensor | None, scale: float) -> str | None:
    """Describe the difference between two tensors of this scale; None if it is only rounding."""
    if wanted is None or got is None:
        return None if wanted is got else "all of it (one of them has none)"
    if wanted.shape != got.shape:
        return f"its shape, {list(got.shape)} for {list(wanted.shape)}"
    if torch.allclose(wanted, got, rtol=0, atol=_ULPS * torch.finfo(wanted.dtype).eps * scale, equal_nan=True):
        return None
    return f"{float((wanted.double() - got.double()).abs().max()):.2g} of {scale:.2g}"


def _is_batch(leaf: Any, of: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == of


def mixes_samples(block: nn.Module, probe: Probe) -> bool:
    """Whether a sample's result in eval mode depends on the rest of its batch, or cannot be computed alone."""
    with torch.no_grad():
        try:
            alone, batch = (run_probe(block, probe, False, samples)["its result"] for samples in (1, None))
        except Exception:
            return True
    if alone is None or batch is None or alone.shape[1:] != batch.shape[1:]:
        return True
    # convolutions round differently for one and for several samples; batch statistics change the leading digits
    rounding = torch.finfo(batch.dtype).eps ** 0.5
    return not torch.allclose(alone, batch[:1], rtol=0, atol=rounding * float(batch.abs().max()))


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Context with fixed random seeds; all random number generators are restored on exit."""
    state = random.getstate()
    on_cuda = device.type == "cuda"
    index = torch.cuda.current_device() if on_cuda and device.index is None else device.index
    with torch.random.fork_rng([index] if on_cuda else []):
        random.seed(0)
        # not torch.manual_seed, which also seeds devices that were not forked
        torch.default_generator.manual_seed(0)
        if on_cuda:
            torch.cuda.default_generators[index].manual_seed(0)
        try:
            yield
        finally:
            random.setstate(state)
