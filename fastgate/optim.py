"""Parameter groups of a gated network for an optimizer."""

from typing import Any

from torch import nn

from fastgate.gates import named_gates


def parameter_groups(
    model: nn.Module, gate_weight_decay: float = 0.0, *, gate_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return optimizer parameter groups in which gate heads have their own weight decay and learning rate.

    Weight decay pulls a head's weights, and with them its logits, towards 0, the threshold at which a gate opens or
    closes, and so undoes decisions on which the samples agree.

        optimizer = torch.optim.AdamW(fastgate.parameter_groups(model), lr=1e-3, weight_decay=0.05)

    Args:
        model: a network, with gates or without.
        gate_weight_decay: weight decay of the gate heads; all other parameters use the optimizer's.
        gate_lr: learning rate of the gate heads; None uses the optimizer's. At fine-tuning rates gates learn too
            slowly to reach the target: pass the rate that training from scratch would take, such as 0.1 with SGD.

    Returns:
        One or two groups, the network's first; parameters that do not require grad are left out.
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
