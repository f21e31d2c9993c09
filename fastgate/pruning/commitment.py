"""Pruning during training: removes frozen gates and their closed parts from a network and its optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.gates import named_gates
from fastgate.models.hooks import copy_network, hooked, warn_of_lost_hooks
from fastgate.pruning.compaction import cut_frozen
from fastgate.pruning.parallel import mark_stale, wrappers_of


def commit(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
    """Prune a network in training, in place: remove frozen gates and their closed parts; live gates stay live.

    Closed blocks are removed, closed channels are cut, and an open block becomes a plain one. In eval mode the outputs
    do not change: bit-equal for layer gates, up to the rounding of shorter sums for channel gates.

    The optimizer keeps its parameter groups, without the removed parameters. State tensors with their parameter's shape
    (momentum, Adam's moments) are cut like the parameter; all other state is kept. Training therefore continues as it
    would with the frozen network. `DistributedDataParallel` wrappers have to be created again; a stale one raises in
    its next forward. Call it between steps: gradients of cut parameters are dropped. Losses that average over a
    model's gates from then on average over the remaining ones.

    Args:
        model: a network with gates, some or all frozen.
        optimizer: optimizer of some or all of this network's parameters, possibly of others too; None if there is none
            yet.

    Returns:
        The same model, unless it is itself a single closed block: then what remains of it.

    Raises:
        ValueError: an optimizer of another network, sharded parameters, state that cannot be cut, or a frozen gate
            whose block cannot be cut (see :func:`fastgate.compact`). Model and optimizer are then unchanged.
    """
    _check_whole(model)
    names = _names(model)
    if optimizer is None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.empty(0))])
    else:
        _check_own(names, optimizer)
    shapes = {name: parameter.shape for parameter, known_as in names.items() for name in known_as}
    state = {name: entries for parameter, entries in optimizer.state.items() for name in names.get(parameter, ())}
    foreign = {parameter: entries for parameter, entries in optimizer.state.items() if parameter not in names}
    # copies are cut first, so that errors are raised before anything has changed
    left = {name: parameter.shape for name, parameter in _cut_copy(model, {}).items()}
    moved = {key: _cut_copy(model, values) for key, values in _split_state(state, shapes, left).items()}

    hooks, wrappers = hooked(model), wrappers_of(model)
    model = cut_frozen(model)
    warn_of_lost_hooks(hooks, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            stays = next((n for n in names.get(parameter, ()) if n in parameters), None)
            kept += [parameters[stays]] if stays is not None else [] if parameter in names else [parameter]
        group["params"] = kept
    optimizer.state.clear()
    optimizer.state.update(foreign)
    for name, entries in state.items():
        if name in parameters:
            optimizer.state[parameters[name]] = {
                key: moved[key][name] if _is_like(value, shapes[name]) else value for key, value in entries.items()
            }
    for wrapper in wrappers if shapes != {name: parameter.shape for name, parameter in parameters.items()} else ():
        mark_stale(wrapper)
    return model


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check at the start of a run for errors that :func:`commit` would raise in the middle of it.

    Raises:
        ValueError: gate parameters that the optimizer does not train, sharded parameters, an optimizer of another
            network, or state that cannot be cut along with this network's channel gates.
    """
    _check_whole(model)
    names = _names(model)
    _check_own(names, optimizer)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    gates = dict(named_gates(model))
    missed = [p for gate in gates.values() for p in gate.parameters() if p.requires_grad and p not in trained]
    if missed:
        raise ValueError(
            f"optimizer: expected the parameters of all gates, got one without {len(missed)} tensors of the "
            f"{len(gates)} gates; create it after fastgate.attach, for example "
            "torch.optim.SGD(fastgate.parameter_groups(model), lr=0.1)"
        )
    if optimizer.state and any(gate.gates > 1 for gate in gates.values()):
        state = {name: entries for p, entries in optimizer.state.items() for name in names.get(p, ())}
        shapes = {name: parameter.shape for parameter, known_as in names.items() for name in known_as}
        _split_state(state, shapes, {name: parameter.shape for name, parameter in _halved(model).items()})


def _halved(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name in a pruned copy of the model in which every channel gate has closed half of its channels."""
    copied = copy_network(model)
    for _, gate in named_gates(copied):
        if gate.gates > 1:
            gate.freeze(torch.arange(gate.gates) % 2 == 0)
    return dict(cut_frozen(copied).named_parameters(remove_duplicate=False))


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    """All names of every parameter: a shared one has several, some of which may be removed."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, of FSDP or tensor parallelism
            raise ValueError(
                f"model: expected unsharded parameters, got {name!r} sharded over several processes; use "
                "DistributedDataParallel, in which every process holds the whole network"
            )


def _check_own(names: Mapping[Tensor, list[str]], optimizer: torch.optim.Optimizer) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(parameter not in names for parameter in held)
    if foreign and foreign == len(held):
        raise ValueError(
            f"optimizer: expected parameters of this model, got {foreign} others; commit with the optimizer that "
            "trains this model"
        )


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _split_state(
    state: Mapping[str, dict[str, Any]], shapes: Mapping[str, torch.Size], left: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """State tensors that have their parameter's shape: key in the optimizer's state -> parameter name -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, entries in state.items():
        for key, value in entries.items():
            if _is_like(value, shapes[name]):
                found.setdefault(key, {})[name] = value
            elif isinstance(value, Tensor) and value.dim() > 0 and left.get(name, shapes[name]) != shapes[name]:
                raise ValueError(
                    f"optimizer: expected its state {key!r} of {name!r} to have the parameter's shape "
                    f"{list(shapes[name])}, got {list(value.shape)}, which cannot be cut; commit with SGD or Adam"
                )
    return found


def _cut_copy(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, under all their names, of a pruned copy of the model in which `values` replace parameters."""
    copied = copy_network(model)
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        copied.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return {name: parameter.detach() for name, parameter in cut_frozen(copied).named_parameters(remove_duplicate=False)}
