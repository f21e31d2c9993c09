"""Handling of module hooks: moves them to a replacement module, and warns of those lost when a network is pruned."""

import copy
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

# the dictionaries in which torch.nn.Module keeps them
_CALL_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# torch.nn.utils computes weights with hooks (weight norm, spectral norm, pruning), which belong to their module
_OF_TORCH = "torch.nn.utils."
# hooks that are plain functions, of weight norm and of observers; they belong to their modules too
_FUNCTIONS_OF_TORCH = (_OF_TORCH, "torch.ao.")


def has_call_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks that run on its forward or backward."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def move_hooks(source: nn.Module, target: nn.Module, *, state: bool = True) -> None:
    """Move the hooks of `source` to its replacement `target`; their handles keep working.

    Args:
        source: the replaced module.
        target: its replacement.
        state: include hooks of `state_dict` and `load_state_dict`, which read the module's tensors.
    """
    # handles refer to the dictionary they remove from, so the dictionaries themselves are moved
    for kind in (*_CALL_HOOKS, *_STATE_HOOKS) if state else _CALL_HOOKS:
        hooks = getattr(source, kind)
        hooks.update(getattr(target, kind))
        setattr(target, kind, hooks)
    target._is_full_backward_hook = source._is_full_backward_hook
    for hook in target._load_state_dict_pre_hooks.values() if state else ():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(target)  # type: ignore[attr-defined]


def is_own(hook: Any) -> bool:
    """Whether a hook is not one with which torch.nn.utils computes weights (these do not see features)."""
    kinds = type(getattr(hook, "hook", hook)).__mro__  # a pruning method may be derived from torch's
    return not any(kind.__module__.startswith(_OF_TORCH) for kind in kinds)


def _is_users(hook: Any) -> bool:
    module = getattr(getattr(hook, "hook", hook), "__module__", None) or ""
    return is_own(hook) and not module.startswith(_FUNCTIONS_OF_TORCH)


def drop_own_hooks(module: nn.Module) -> None:
    """Remove every hook of a module tree, except those with which torch.nn.utils computes weights."""
    for part in module.modules():
        for kind in (*_CALL_HOOKS, *_STATE_HOOKS):
            hooks = getattr(part, kind)
            for key in [key for key, hook in hooks.items() if is_own(hook)]:
                del hooks[key]


def hooked(model: nn.Module) -> dict[str, list[int]]:
    """Modules with user-defined hooks: name -> ids of the dictionaries that hold the hooks."""
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        for kind in (*_CALL_HOOKS, *_STATE_HOOKS):
            hooks = getattr(module, kind)
            hooks = hooks.values() if kind.endswith("hooks") else ()  # the others only hold call options
            if any(map(_is_users, hooks)):
                found.setdefault(name, []).append(id(getattr(module, kind)))
    return found


def warn_of_lost_hooks(before: dict[str, list[int]], model: nn.Module) -> None:
    """Warn of modules whose hooks are no longer in the network; `before`: :func:`hooked` before it was pruned."""
    left = {kept for ids in hooked(model).values() for kept in ids}
    if lost := [name for name, ids in before.items() if not left.issuperset(ids)]:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        warnings.warn(
            f"hooks on {', '.join(map(repr, lost[:4]))}{more} no longer run: their modules were removed from the "
            "network; register them on a module that stays",
            stacklevel=3,
        )


def copy_network(model: Module, shared: Iterable[Tensor] = ()) -> Module:
    """Deep copy that also supports modules with computed tensors, which `copy.deepcopy` rejects (weight norm, pruning).

    In the copy such a tensor is a plain value until the hook that computes it runs again. The `shared` tensors are not
    copied.
    """
    memo: dict[int, Tensor] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
