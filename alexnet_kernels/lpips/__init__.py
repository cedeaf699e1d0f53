"""LPIPS, the perceptual distance of Zhang et al. 2018, on AlexNet: the numbers of the package lpips, faster."""

from alexnet_kernels.lpips.features import ImageFeatures
from alexnet_kernels.lpips.metric import LPIPS

__all__ = ["LPIPS", "ImageFeatures"]
