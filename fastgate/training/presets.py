"""Recipes by name."""

import difflib

from fastgate.training.recipe import Recipe, change, make_recipe

# section 5.1 as printed; what it leaves open (lambda, gate position) follows the closest table, see each preset
_PAPER = make_recipe(
    gate_input="flatten",
    window="clipped",
    init_logit=None,
    epochs=350,
    warmup_epochs=0,
    nesterov=False,
    gate_weight_decay=5e-4,
    polarization=1,
    budget=0,
    capacity=0,
    target=None,
    open_until=0.0,
    settle_at=None,
    anneal_until=0.0,
    commit_after=None,
    detach_gates=False,
    compact_training=False,
    round_to=None,
)
_PAPER_10 = change(_PAPER, batch_size=256, lr_schedule="0:1, 60:0.1, 120:0.01, 160:0.001")
_PAPER_100 = change(_PAPER, dataset="cifar100", batch_size=64, lr_schedule="0:1, 125:0.1, 190:0.01, 250:0.001")

_FINETUNE = make_recipe(
    dataset="folder:images",
    network="torchvision:resnet18",
    weights="default",
    epochs=30,
    batch_size=32,
    learning_rate=0.01,
    # gates at the network's low rate do not reach the target: 0.8 points less (bench/results/search/rates.json)
    gate_lr_factor=10,
    warmup_epochs=1,
    weight_decay=1e-4,
)
_IMAGENET = make_recipe(
    dataset="folder:imagenet",
    network="torchvision:resnet50",
    image_size=224,
    epochs=90,
    batch_size=256,
    lr_schedule="0:1, 30:0.1, 60:0.01",
    warmup_epochs=0,
    nesterov=False,
    weight_decay=1e-4,
)

PRESETS: dict[str, Recipe] = {
    "demo": make_recipe(
        dataset="digits",
        network="resnet20",
        epochs=40,
        batch_size=64,
        warmup_epochs=2,
        control="unpruned",
    ),
    # the recipe behind the strongest plain baselines at this budget (AutoDL-Projects, CIFAR-E300-W5-L1-COS)
    "cifar10-layer": Recipe(),
    "cifar10-channel": make_recipe(gating="channel"),
    "cifar100-layer": make_recipe(dataset="cifar100"),
    "cifar100-channel": make_recipe(dataset="cifar100", gating="channel"),
    "paper-cifar10-layer": change(_PAPER_10, gate_input="pool"),
    # the FLOPs of Table 2 fit "after" on CIFAR-10 and "middle" on CIFAR-100
    "paper-cifar10-channel": change(_PAPER_10, gating="channel", position="after"),
    "paper-cifar100-layer": change(_PAPER_100, gate_input="pool"),
    "paper-cifar100-channel": change(_PAPER_100, gating="channel", position="middle"),
    # own images, pretrained weights: the low rate preserves what they learned; 30 epochs as in torchvision's tutorials
    "finetune-layer": _FINETUNE,
    "finetune-channel": change(_FINETUNE, gating="channel"),
    # torchvision's reference recipe for its first weights (references/classification); not run here
    "imagenet-resnet50-layer": _IMAGENET,
    "imagenet-resnet50-channel": change(_IMAGENET, gating="channel"),
}


def get_preset(name: str) -> Recipe:
    """The preset called `name`; an unknown name is a `ValueError` that lists the known ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ValueError(
            f"preset: expected one of {', '.join(PRESETS)}, got {name!r}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return PRESETS[name]
