from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import fastgate as fg


def test_compare_is_the_largest_difference_in_eval_mode() -> None:
    first, second = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 2)), nn.Linear(3, 2)
    second.load_state_dict(first[1].state_dict())
    x = torch.randn(4, 3)
    assert first.training and second.eval() is second
    assert fg.compare(first, second, x) == 0.0
    with torch.no_grad():
        second.bias[1] -= 0.25
    # 0.25 is exact, the sums it enters round
    assert fg.compare(first, second, x) == pytest.approx(0.25, abs=1e-6)
    assert first.training and first[0].training and not second.training
    with pytest.raises(ValueError, match=r"outputs: expected the same shape, got \[4, 2\] and \[4, 5\]"):
        fg.compare(second, nn.Linear(3, 5), x)


def test_no_network_sees_what_another_did_to_the_inputs() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    x = torch.ones(2)
    assert fg.compare(Doubling(), Doubling(), x) == 0.0
    assert x.tolist() == [1, 1]


class Named(nn.Module):
    """Tensors by name in and out, with a result that is no tensor."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(2, 2), extra

    def forward(self, left: Tensor, right: list[Tensor]) -> dict[str, Any]:
        return {"sum": self.layer(left) + sum(right), "extra": self.extra}


def test_nested_inputs_and_outputs() -> None:
    inputs = {"left": torch.ones(1, 2), "right": [torch.ones(1, 2), torch.ones(2)]}
    first, second = Named((7, "a")), Named((7, "a"))
    second.load_state_dict(first.state_dict())
    assert fg.compare(first, second, inputs) == 0.0
    assert fg.compare(first, second, tuple(inputs.values())) == 0.0
    second.extra = (8, "a")
    assert fg.compare(first, second, inputs) == float("inf")
    second.extra = object()
    with pytest.raises(ValueError, match=r"outputs\['extra'\]: expected values of the same type, got tuple and object"):
        fg.compare(first, second, inputs)
    assert fg.compare(first, second, inputs, forward=lambda model, inputs: model(**inputs)["sum"]) == 0.0


def test_segmentation() -> None:
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2)
    fg.attach(model, "layer")
    x = torch.rand(1, 3, 32, 32)
    fg.freeze(model, fg.decide(model, [x]))
    small = fg.compact(model)
    assert fg.compare(model, small, x) == 0.0
    with torch.no_grad():
        small.classifier[4].bias[0] += 0.5
    # 0.5 is exact, the sum it enters rounds
    assert fg.compare(model, small, x) == pytest.approx(0.5, abs=1e-6)


def test_detection() -> None:
    model, other = (
        torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=2, min_size=32, max_size=64, box_score_thresh=0.0,
            box_detections_per_img=detections, rpn_post_nms_top_n_test=3,
        )
        for detections in (2, 1)
    )  # fmt: skip
    other.load_state_dict(model.state_dict())
    images = [torch.rand(3, 30, 32), torch.rand(3, 32, 28)]
    assert len(model.eval()(images)[0]["boxes"]) == 2
    assert fg.compare(model, model, images) == 0.0
    with pytest.raises(
        ValueError, match=r"outputs\[0\]\['boxes'\]: expected the same shape, got \[2, 4\] and \[1, 4\]"
    ):
        fg.compare(model, other, images)
    model.roi_heads.score_thresh = 2.0  # nothing is found
    with pytest.raises(ValueError, match="outputs: expected numbers to compare, got none"):
        fg.compare(model, model, images)


def test_hugging_face() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model, other = (transformers.ResNetForImageClassification(config) for _ in range(2))
    other.load_state_dict(model.state_dict())
    batch = {"pixel_values": torch.rand(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    assert fg.compare(model, other, batch) == 0.0
    with torch.no_grad():
        other.classifier[1].bias += 0.5
    # 0.5 is exact, the sum it enters rounds
    assert fg.compare(model, other, batch) == pytest.approx(0.5, abs=1e-6)
