"""What an optimizer is given of a gated network."""

from typing import Any

from torch import nn

from fastgate.gates import named_gates


def parameter_groups(
    model: nn.Module, gate_weight_decay: float = 0.0, *, gate_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameters of a gated network for an optimizer: gate heads are a group with a weight decay of their own.

    Weight decay pulls the weights of a head, and with them its logits, towards 0, which is where a gate opens or
    closes: what the samples agree on would not last.

        optimizer = torch.optim.AdamW(fastgate.parameter_groups(model), lr=1e-3, weight_decay=0.05)

    Args:
        model: a network, with gates or without.
        gate_weight_decay: of the gate heads; all other parameters have the optimizer's.
        gate_lr: learning rate of the gate heads; None: the optimizer's.

    Returns:
        One group or two, the network's first, without parameters that are not trained.
    """
    heads = {parameter for _, gate in named_gates(model) for parameter in gate.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.requires_grad and p not in heads]},
        {
            "params": [p for p in model.parameters() if p.requires_grad and p in heads],
            "weight_decay": gate_weight_decay,
        },
    ]
    if gate_lr is not None:
        groups[1]["lr"] = gate_lr
    return [group for group in groups if group["params"]]
