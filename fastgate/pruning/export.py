"""Export of plain networks to ONNX, checked by onnxruntime, and to PyTorch exported programs."""

import importlib
import io
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fastgate.files import write_atomically
from fastgate.gates import named_gates
from fastgate.models.cuts import runs_as
from fastgate.models.hooks import copy_network
from fastgate.models.recording import Recording, record
from fastgate.modes import eval_mode
from fastgate.pruning.latency import latency_quartiles
from fastgate.values import call, difference, tensors_in, with_tensors

# allowed difference relative to the largest output: other kernels sum in another order; half precision has 11 bits
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    opset: int | None = None,
    half: bool = False,
    int8: Iterable[Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Export a plain network to an ONNX file, verified with onnxruntime before it is written; needs extra `export`.

    Args:
        model: a network without live or frozen gates, as returned by :func:`fastgate.compact`; it does not change.
        inputs: example inputs: a tensor, a mapping of keyword arguments, or a tuple of positional ones. The file
            accepts tensors of these sizes.
        path: path of the file, ending in .onnx.
        dynamic_batch: accept any batch size, the first dimension of every input tensor.
        opset: ONNX opset; None: the exporter's own.
        half: export the network in fp16, including inputs and outputs.
        int8: calibration inputs, each of the form of `inputs`, a few hundred training samples in all: quantize the
            network with onnxruntime's static quantization, weights to int8 with a scale per output channel, activations
            to uint8 between the smallest and the largest value seen in calibration. Inputs and outputs stay float32.
        metadata: strings to store in the file, see :class:`OnnxNetwork`.

    Returns:
        The largest absolute difference between the outputs of the file and of the network on `inputs`. With `int8` it
        has no bound: measure the accuracy of the file.

    Raises:
        ValueError: a path with another suffix, a network with gates, one that PyTorch cannot export, or one whose file
            gives other outputs (off by more than 1e-3 of the largest output, 5e-2 in fp16, before quantization);
            calibration inputs that the file does not accept, or none; both `half` and `int8`.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
    """
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        _import(needed)
    _check_name(path, ".onnx")
    if half and int8 is not None:
        raise ValueError("half, int8: expected at most one of them, got both")
    if odd := [key for key, value in (metadata or {}).items() if not isinstance(value, str)]:
        raise TypeError(f"metadata: expected strings, got {type((metadata or {})[odd[0]]).__name__} as {odd[0]!r}")
    plain, example = _prepare(model, inputs, dynamic_batch)
    examples = [example, *([_first_sample(example)] if dynamic_batch else [])]
    expected = [_outputs(plain, each) for each in examples]
    if half:
        plain = plain.half()
        examples = [with_tensors(each, [_halved(tensor) for tensor in tensors_in(each)]) for each in examples]
    args, kwargs, shapes = _arguments(_cloned(examples[0]), dynamic_batch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's internal warnings
            program = torch.onnx.export(
                plain, args, kwargs=kwargs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        raise _refused("ONNX", error) from error
    if program is None:
        raise ValueError("model: PyTorch did not produce an ONNX program")
    made = program.model.opset_imports[""]
    if opset is not None and made != opset:
        raise ValueError(f"opset: expected one that the exporter supports, got {opset}; it writes {made}")
    for key, value in (metadata or {}).items():
        program.model.metadata_props[key] = value
    data = program.model_proto.SerializeToString()
    found = _check_onnx(data, examples, expected, _HALF_TOLERANCE if half else _TOLERANCE)
    if int8 is not None:
        samples = None if dynamic_batch else len(tensors_in(example)[0])
        data = _quantize(program.model_proto, int8, samples)
        found = _check_onnx(data, examples, expected, math.inf)
    write_atomically(path, lambda file: file.write(data))
    return found


def export_pt2(model: nn.Module, inputs: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = False) -> float:
    """Export a plain network to a PyTorch exported program (.pt2), which `torch.export.load` reads without its code.

    Arguments, result and errors are those of :func:`export_onnx`, for a path ending in .pt2.
    """
    _check_name(path, ".pt2")
    plain, example = _prepare(model, inputs, dynamic_batch)
    examples = [example, *([_first_sample(example)] if dynamic_batch else [])]
    args, kwargs, shapes = _arguments(_cloned(example), dynamic_batch)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(plain, args, kwargs, dynamic_shapes=shapes), buffer)
            buffer.seek(0)
            loaded = torch.export.load(buffer).module()
    except Exception as error:
        raise _refused("an exported program", error) from error
    found = [_check(_outputs(plain, each), _outputs(loaded, each), _TOLERANCE) for each in examples]
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    return max(found)


class OnnxNetwork(nn.Module):
    """An ONNX file as a module on the CPU, run by onnxruntime with as many threads as PyTorch uses.

    `forward(*tensors) -> Tensor`, or a tuple of them. If the file has a fixed batch size, other numbers of samples are
    split into batches, the last one padded with copies of its first sample. Half-precision outputs are returned as
    float32.

    Args:
        source: the file, or its bytes.

    Attributes:
        metadata: the strings that :func:`export_onnx` stored in the file.

    Raises:
        ValueError: not an ONNX file.
        ModuleNotFoundError: onnxruntime is not installed.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        super().__init__()
        runtime = _import("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        name = "source" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise FileNotFoundError(f"{name}: expected an ONNX file, found none")
        try:
            self._session = runtime.InferenceSession(
                source if isinstance(source, bytes) else os.fspath(source), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ValueError(f"{name}: expected an ONNX file, got one that onnxruntime rejects: {error}") from error
        self._inputs = self._session.get_inputs()
        first = self._inputs[0].shape[0] if self._inputs[0].shape else None
        self._samples = first if isinstance(first, int) else None
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def forward(self, *tensors: Tensor) -> Any:
        """Run the network."""
        if len(tensors) != len(self._inputs):
            raise ValueError(f"tensors: expected {len(self._inputs)}, got {len(tensors)}")
        given = [
            _halved(tensor) if info.type == "tensor(float16)" else tensor.detach().cpu()
            for tensor, info in zip(tensors, self._inputs, strict=True)
        ]
        samples = len(given[0])
        if samples == 0:
            raise ValueError("tensors: expected at least one sample, got none")
        size = self._samples or samples
        parts = [
            self._run([tensor[start : start + size] for tensor in given], size) for start in range(0, samples, size)
        ]
        if len(parts) == 1:
            joined = tuple(tensor if samples == size else tensor[:samples] for tensor in parts[0])
        else:
            joined = tuple(torch.cat(part)[:samples] for part in zip(*parts, strict=True))
        return joined[0] if len(joined) == 1 else joined

    def _run(self, given: list[Tensor], size: int) -> list[Tensor]:
        """Outputs for a batch of `size` samples; smaller ones are padded."""
        filled = [torch.cat([tensor, *[tensor[:1]] * (size - len(tensor))]) if size > len(tensor) else tensor
                  for tensor in given]  # fmt: skip
        feeds = {info.name: tensor.numpy() for info, tensor in zip(self._inputs, filled, strict=True)}
        found = [torch.from_numpy(array) for array in self._session.run(None, feeds)]
        return [tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in found]


class ExportedNetwork(nn.Module):
    """A .pt2 file as a module: `forward` takes the network's arguments. It is always in eval mode.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not an exported program.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a .pt2 file, found none")
        try:
            program = torch.export.load(path).module()
        except Exception as error:  # a damaged one can fail in any way
            raise ValueError(f"{path}: expected a .pt2 file, got one that PyTorch rejects: {error}") from error
        self._program = (program,)  # in a tuple: as a child module it would raise on eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self._program[0](*args, **kwargs)


def compare_runtimes(
    networks: Mapping[str, nn.Module], images: Tensor, *, one_by_one: bool
) -> dict[str, dict[str, float]]:
    """Compare a network in several runtimes: largest difference from the first, and milliseconds per image.

    Args:
        networks: networks by name, all on the CPU.
        images: `[N, C, H, W]`.
        one_by_one: run images one at a time, for networks with a fixed batch size of 1; otherwise all at once.
    """
    batches = images.split(1) if one_by_one else (images,)
    with torch.no_grad():
        outputs = {
            name: torch.cat([tensors_in(network(batch))[0] for batch in batches]) for name, network in networks.items()
        }
    expected = next(iter(outputs.values()))
    seconds = latency_quartiles(networks, images[:1])
    return {
        name: {"difference": difference(expected, found), "latency_ms": seconds[name][1] * 1e3}
        for name, found in outputs.items()
    }


def fuse(model: nn.Module, inputs: Any) -> nn.Module:
    """Return a copy for inference with batch norms folded into the convolutions or linear layers before them.

    Uses PyTorch's :func:`torch.nn.utils.fuse_conv_bn_eval`. An `nn.BatchNorm` is folded, and becomes `nn.Identity`, if
    it is the only consumer of its convolution's or linear layer's output. Others stay, including timm's combined
    norm-activation layers. The copy is in eval mode and not suited to further training.

    Args:
        model: a network without gates, as returned by :func:`fastgate.compact`.
        inputs: example inputs; see :func:`export_onnx`.

    Raises:
        ValueError: a network with gates, or one whose outputs would change because its own code uses a weight.
    """
    copied, example = _prepare(model, inputs, dynamic_batch=False)
    expected = _outputs(copied, example)
    args, kwargs, _ = _arguments(_cloned(example), dynamic_batch=False)
    with torch.no_grad(), eval_mode(copied):
        recording = record(copied, args, kwargs, is_leaf=lambda module: not module._modules)
    for layer, norm in _pairs(copied, recording):
        folded: Any = copied.get_submodule(layer)
        by: Any = fuse_conv_bn_eval if isinstance(folded, _CONVOLUTIONS) else fuse_linear_bn_eval
        copied.set_submodule(layer, by(folded, copied.get_submodule(norm)))
        copied.set_submodule(norm, nn.Identity())
    try:
        _check(expected, _outputs(copied, example), _TOLERANCE)
    except Exception as error:  # the network's own code may access attributes of a removed batch norm
        raise ValueError(f"model: its batch norms cannot be folded, as other code uses them ({error})") from error
    return copied


def _pairs(model: nn.Module, recording: Recording) -> list[tuple[str, str]]:
    """Names (layer, batch norm) of the pairs that can be folded."""
    modules = dict(model.named_modules())
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    once = {name for name in names if sum(step.name == name for step in recording.steps) == 1}
    once = {name for name in once if sum(modules.get(other) is modules.get(name) for other in names) == 1}
    found = []
    for step in recording.steps:
        maker = step.inputs[0].maker if step.name in once and step.inputs else None
        if maker is None or maker.name not in once:
            continue
        layer, norm = modules[maker.name], modules[str(step.name)]
        if (
            runs_as(norm, *_BATCH_NORMS)
            and norm.running_mean is not None
            and runs_as(layer, *_CONVOLUTIONS, nn.Linear)
            and "weight" in layer._parameters  # not computed from other tensors
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm))
            and (not isinstance(layer, nn.Linear) or step.inputs[0].tensor.dim() == 2)
            and step.inputs[0].readers == [step]
            and maker.outputs == [step.inputs[0]]
            and maker.outputs[0] not in recording.outputs
        ):
            found.append((str(maker.name), str(step.name)))
    return found


def _prepare(model: nn.Module, inputs: Any, dynamic_batch: bool) -> tuple[nn.Module, Any]:
    """A copy on the CPU in eval mode, and its inputs there; at least two samples if the batch size is dynamic."""
    if gates := [name for name, _ in named_gates(model)]:
        raise ValueError(
            f"model: expected a network without gates, got one with {len(gates)}, the first of them {gates[0]!r}; call "
            "fastgate.compact first"
        )
    given = tensors_in(inputs)
    if not given or any(tensor.is_meta or not tensor.numel() for tensor in given):
        what = "one without a value" if given else "none"
        raise ValueError(f"inputs: expected example inputs with tensors of at least one sample, got {what}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model: expected a network with values, got one on the meta device")
    tensors = [tensor.detach().cpu().clone() for tensor in given]
    if dynamic_batch and len(tensors[0]) < 2:  # the exporter would specialize on a size of 1
        tensors = [torch.cat([tensor, tensor]) for tensor in tensors]
    copied = copy_network(model).cpu().eval().requires_grad_(False)
    return copied, with_tensors(inputs, tensors)


def _arguments(example: Any, dynamic_batch: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments, and their dynamic shapes."""
    batch = torch.export.Dim("batch")

    def shapes(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch}
        if isinstance(value, Mapping):
            return {key: shapes(item) for key, item in value.items()}
        return type(value)(map(shapes, value)) if isinstance(value, tuple | list) else None

    if isinstance(example, Mapping):
        return (), dict(example), {key: shapes(value) for key, value in example.items()} if dynamic_batch else None
    args = example if type(example) is tuple else (example,)
    return args, {}, tuple(map(shapes, args)) if dynamic_batch else None


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Outputs of the network for the example, which does not change."""
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_in(call(model, _cloned(example)))]


def _cloned(example: Any) -> Any:
    return with_tensors(example, [tensor.clone() for tensor in tensors_in(example)])


def _first_sample(example: Any) -> Any:
    return with_tensors(example, [tensor[:1] for tensor in tensors_in(example)])


def _check_name(path: str | os.PathLike[str], suffix: str) -> None:
    if Path(path).suffix != suffix:
        raise ValueError(f"path: expected a name ending in {suffix}, got {Path(path).name}")


def _check(expected: list[Tensor], got: Any, tolerance: float) -> float:
    """Difference between the outputs of a file and of the network; raises `ValueError` above the tolerance."""
    found = difference(expected, tensors_in(got))
    largest = max((float(tensor.abs().max()) for tensor in expected if tensor.is_floating_point()), default=0.0)
    if not found <= tolerance * max(largest, 1e-6):
        raise ValueError(
            f"model: the outputs of the exported network differ by {found:.3g}, with outputs of up to {largest:.3g}; "
            "nothing was written"
        )
    return found


def _check_onnx(data: bytes, examples: list[Any], expected: list[list[Tensor]], tolerance: float) -> float:
    """How far the outputs of an ONNX file are from the network's, on several examples."""
    try:
        exported = OnnxNetwork(data)
    except ValueError as error:
        raise ValueError(f"model: onnxruntime cannot run the exported network ({_first_line(error)})") from error
    return max(
        _check(wanted, exported(*tensors_in(each)), tolerance) for wanted, each in zip(expected, examples, strict=True)
    )


def _quantize(program: Any, batches: Iterable[Any], samples: int | None) -> bytes:
    """An ONNX file in int8, of a program in fp32 that takes so many samples at once (None: any number)."""
    quantization = _import("onnxruntime.quantization")
    feeds = _feeds([info.name for info in program.graph.input], batches, samples)
    first = next(feeds, None)
    if first is None:
        raise ValueError(f"int8: expected calibration inputs, at least {samples or 1} samples in one of them, got none")
    calibration = _Calibration(chain([first], feeds))
    with tempfile.TemporaryDirectory() as folder:
        prepared, path = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        # the shapes of what is inside; PyTorch's exporter has folded what can be folded
        preparation = _import("onnxruntime.quantization.shape_inference")
        preparation.quant_pre_process(program, prepared, skip_optimization=True, skip_symbolic_shape=True)
        try:
            quantization.quantize_static(
                prepared, path, calibration, per_channel=True, activation_type=quantization.QuantType.QUInt8
            )
        except Exception as error:
            raise ValueError(f"int8: onnxruntime cannot quantize it with these inputs: {_first_line(error)}") from error
        return path.read_bytes()


class _Calibration:
    """Inputs by name, one after the other, as onnxruntime's `CalibrationDataReader` gives them."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _feeds(names: list[str], batches: Iterable[Any], samples: int | None) -> Iterator[dict[str, Any]]:
    """Calibration inputs by the names that the file has for them, in parts of the size that it takes."""
    for batch in batches:
        tensors = [tensor.detach().cpu() for tensor in tensors_in(batch)]
        if len(tensors) != len(names):
            raise ValueError(
                f"int8: expected calibration inputs of {len(names)} tensors, as inputs, got {len(tensors)}"
            )
        for start in range(0, len(tensors[0]), samples or len(tensors[0]) or 1):
            part = [tensor[start : start + samples] if samples else tensor for tensor in tensors]
            if samples in (None, len(part[0])):
                yield {name: tensor.numpy() for name, tensor in zip(names, part, strict=True)}


def _halved(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().half() if tensor.is_floating_point() else tensor.detach().cpu()


def _refused(what: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    return ValueError(f"model: PyTorch cannot export it as {what}: {_first_line(cause)}")


def _first_line(error: BaseException) -> str:
    """First line of an error message, without terminal colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is not installed; run `pip install 'fastgate[export]'`") from error
