"""Common networks by name, with random weights that give every branch an effect, for tests and benchmarks of gates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# parameters that may be initialised to zero, or so small that a branch is lost in rounding
_SCALES = {
    "gamma",
    "layer_scale",
    "layer_scale_parameter",
    "gamma_1",
    "gamma_2",
    "ls1",
    "ls2",
    "skipinit_gain",
    "scale",
}


class Network(NamedTuple):
    """A network and its kind of inputs.

    Attributes:
        make: builds it with random weights.
        size: side of its images in pixels.
        kind: "image", "video" or "detection".
    """

    make: Callable[[], nn.Module]
    size: int = 64
    kind: str = "image"

    def inputs(self) -> Any:
        """Two images, or clips, for :func:`fastgate.values.call`."""
        generator = torch.Generator().manual_seed(0)
        if self.kind == "detection":
            return ([torch.rand(3, self.size, self.size, generator=generator) for _ in range(2)],)
        frames = (4,) if self.kind == "video" else ()
        return torch.randn(2, 3, *frames, self.size, self.size, generator=generator)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10, **options)

    return make


def _segmentation(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=5)

    return make


def _detection(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        # with random weights no detection has a high score: keep those with low ones
        prefix = "box_" if "rcnn" in name else ""
        found = {f"{prefix}detections_per_img": 3, f"{prefix}score_thresh": 0.0}
        return getattr(torchvision.models.detection, name)(
            weights=None, weights_backbone=None, num_classes=5, trainable_backbone_layers=5, min_size=64, max_size=64,
            **found,
        )  # fmt: skip

    return make


def _frozen_detection() -> nn.Module:
    """A detection network with the frozen batch norms that torchvision uses with pretrained weights."""
    from torchvision.models import resnet50
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    backbone = _resnet_fpn_extractor(resnet50(weights=None, norm_layer=FrozenBatchNorm2d), 5)
    return FasterRCNN(backbone, num_classes=5, min_size=64, max_size=64, box_detections_per_img=3)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **({} if options.get("features_only") else {"num_classes": 10}), **options)

    return make


def _transformers(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as hf

        if kind == "convnext":
            config = hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 2, 2], num_labels=10)
            return hf.ConvNextForImageClassification(config)
        if kind == "vit":
            sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
            return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=64, num_labels=10))
        widths = [16, 32, 48, 64] if kind == "basic" else [32, 48, 64, 96]
        config = hf.ResNetConfig(
            embedding_size=16, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type=kind, num_labels=10
        )
        return hf.ResNetForImageClassification(config)

    return make


_OF_TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"),
    *("mobilenet_v2", "mobilenet_v3_small"),
    *("mobilenet_v3_large", "mnasnet1_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf"),
    *("convnext_tiny", "swin_t", "swin_v2_t", "densenet121", "vgg16_bn", "shufflenet_v2_x1_0", "squeezenet1_0"),
    "alexnet",
)
_OF_TIMM = (
    *("resnet18", "resnet26t", "resnet50", "resnet50d", "resnetv2_50", "resnetv2_50d_gn", "seresnet50", "ecaresnet50d"),
    *("resnext50_32x4d", "skresnet18", "res2net50_26w_4s", "regnetx_002", "regnety_002", "regnetz_b16", "gernet_s"),
    *("cspresnet50", "cspdarknet53", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_b0", "rexnet_100", "repvgg_a0", "repvit_m1"),
    *("nfnet_l0", "convnext_atto", "convnextv2_atto", "hrnet_w18_small", "resnet50_gn", "resnest14d", "resnetblur50"),
    *("resnet34d", "wide_resnet50_2", "resnet50_mlp", "dla34", "ghostnet_050", "mobileone_s0", "tresnet_m"),
    *("resnetaa34d", "seresnext26d_32x4d"),
    *("gcresnet50t", "resnetrs50", "resnet51q", "legacy_seresnet18", "fasternet_t0"),
    *("edgenext_xx_small", "starnet_s1", "poolformer_s12", "poolformerv2_s12", "caformer_s18", "convformer_s18"),
    *("densenet121", "vgg11_bn"),
)

_OF_DETECTION = (
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"),
    *("retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
)

ZOO: dict[str, Network] = {
    **{f"torchvision/{name}": Network(_torchvision(name)) for name in _OF_TORCHVISION},
    "torchvision/vit_b_16": Network(_torchvision("vit_b_16", image_size=64)),
    "torchvision/maxvit_t": Network(_torchvision("maxvit_t", input_size=(224, 224)), 224),
    "torchvision/r3d_18": Network(_torchvision("r3d_18"), 32, "video"),
    **{
        f"torchvision/{name}": Network(_segmentation(name))
        for name in ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
    },
    "torchvision/googlenet": Network(_torchvision("googlenet", aux_logits=False, init_weights=False)),
    "torchvision/inception_v3": Network(_torchvision("inception_v3", aux_logits=False, init_weights=False), 80),
    **{f"torchvision/{name}": Network(_detection(name), 64, "detection") for name in _OF_DETECTION},
    "torchvision/fasterrcnn+frozen": Network(_frozen_detection, 64, "detection"),
    **{f"timm/{name}": Network(_timm(name)) for name in _OF_TIMM},
    "timm/bat_resnext26ts": Network(_timm("bat_resnext26ts"), 256),  # its attention needs sides divisible by 8
    "timm/inception_resnet_v2": Network(_timm("inception_resnet_v2"), 96),
    "timm/resnet18+features": Network(_timm("resnet18", features_only=True)),
    "timm/resnet18+drop": Network(_timm("resnet18", drop_path_rate=0.2, drop_block_rate=0.2)),
    **{
        f"timm/{name}": Network(_timm(name, img_size=64))
        for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s16_224", "resmlp_12_224")
    },
    **{
        f"timm/{name}": Network(_timm(name), 224)
        for name in ("swin_tiny_patch4_window7_224", "efficientformer_l1", "efficientformerv2_s0")
    },
    "transformers/resnet-basic": Network(_transformers("basic")),
    "transformers/resnet-bottleneck": Network(_transformers("bottleneck")),
    "transformers/convnext": Network(_transformers("convnext")),
    "transformers/vit": Network(_transformers("vit")),
}


def build(name: str) -> nn.Module:
    """A network of the zoo in eval mode, with norms and scales that are neither 0 nor 1, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[name].make()
        return randomize(model).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Give norms, layer scales and zero parameters values of order 1, so that every branch has an effect."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) or "FrozenBatchNorm" in str(type(module)):
            for key, low, high in (("weight", 0.5, 1.2), ("running_var", 0.5, 1.5)):
                if isinstance(tensor := getattr(module, key, None), Tensor):
                    tensor.uniform_(low, high)
            for key in ("bias", "running_mean"):
                if isinstance(tensor := getattr(module, key, None), Tensor):
                    tensor.normal_(0, 0.2)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _SCALES and parameter.abs().max() < 0.2:
            parameter.uniform_(0.5, 1)
        elif parameter.numel() and not parameter.any() and name.rpartition(".")[2] in ("weight", "gain"):
            parameter.normal_(0, 0.05)
    return model


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a network returned, in order; of a model output with logits only these."""
    from fastgate.values import tensors_in

    return tensors_in(output.logits if hasattr(output, "logits") else output)
