"""Nets that classify images, from timm and torchvision, with their published configurations."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from zoo_nets.net import Example, Net, example, example_without_norms, images
from zoo_nets.packages import declare_torchvision_operators

CONVOLUTIONAL, ATTENTION, MIXER = "image classification", "vision transformer", "vision mixer"


def timm_net(name: str, size: int = 64, **kwargs: Any) -> Example:
    """Return a net of timm with random weights."""
    declare_torchvision_operators()
    return example(import_module("timm").create_model(name, pretrained=False, **kwargs), x=images(size))


def torchvision_net(name: str, size: int = 64, **kwargs: Any) -> Example:
    """Return a net of torchvision with random weights."""
    declare_torchvision_operators()
    module = getattr(import_module("torchvision.models"), name)(weights=None, **kwargs)
    has_norms = any("BatchNorm" in type(part).__name__ for part in module.modules())
    return (example if has_norms else example_without_norms)(module, x=images(size))


def _net(name: str, make: Callable[[], Example], package: str, family: str = CONVOLUTIONAL) -> Net:
    return Net(name, family, make, convolutional=family == CONVOLUTIONAL, package=package)


def _timm(name: str, model: str, size: int = 64, family: str = CONVOLUTIONAL, **kwargs: Any) -> Net:
    return _net(name, partial(timm_net, model, size, **kwargs), "timm", family)


def _torchvision(name: str, model: str, size: int = 64, **kwargs: Any) -> Net:
    return _net(name, partial(torchvision_net, model, size, **kwargs), "torchvision")


NETS = (
    _torchvision("ResNet-18", "resnet18"),
    _timm("MobileNetV1", "mobilenetv1_100"),
    _torchvision("MobileNetV2", "mobilenet_v2"),
    _torchvision("MobileNetV3-Large", "mobilenet_v3_large"),
    _timm("EfficientNet-B0", "efficientnet_b0"),
    _timm("MixNet-S", "mixnet_s"),
    _torchvision("VGG16", "vgg16"),
    _torchvision("SqueezeNet 1.1", "squeezenet1_1"),
    _torchvision("ShuffleNetV2 0.5", "shufflenet_v2_x0_5"),
    _torchvision("MNASNet 0.5", "mnasnet0_5"),
    _torchvision("DenseNet-121", "densenet121"),
    _torchvision("GoogLeNet", "googlenet", aux_logits=False, init_weights=False),
    _torchvision("RegNetY-400MF", "regnet_y_400mf"),
    _timm("GhostNet 0.5", "ghostnet_050"),
    _timm("NF-RegNet-B0 (normalizer-free)", "nf_regnet_b0"),
    _timm("RepVGG-A0", "repvgg_a0"),
    _timm("MobileNetV4 small", "mobilenetv4_conv_small"),
    _timm("ConvNeXt-Atto", "convnext_atto"),
    _timm("EfficientFormer-L1", "efficientformer_l1", 224, family=MIXER),
    _timm("PoolFormer-S12", "poolformer_s12", family=MIXER),
    _timm("MLP-Mixer-S/32", "mixer_s32_224", 224, family=MIXER),
    _timm("MobileViT-XXS", "mobilevit_xxs", family=ATTENTION),
    _timm("DeiT-Tiny", "deit_tiny_patch16_224", 224, family=ATTENTION),
    _timm("ViT-Tiny", "vit_tiny_patch16_224", 224, family=ATTENTION),
    _timm("Swin-Tiny", "swin_tiny_patch4_window7_224", 224, family=ATTENTION),
)  # fmt: skip
