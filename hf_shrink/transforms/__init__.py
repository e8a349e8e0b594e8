"""Transforms folded into the weights before they are rounded: same function, easier to quantize. One method a file."""

from hf_shrink.transforms.base import TRANSFORMS, Rotation, Scaling, ScalingCase, Shifting, Transform, build_transforms

__all__ = ["TRANSFORMS", "Rotation", "Scaling", "ScalingCase", "Shifting", "Transform", "build_transforms"]
