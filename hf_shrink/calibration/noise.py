"""Stand-ins for images and sounds where there are none: noise with the 1/f spectrum of natural ones.

They exercise a vision or speech model with the right mean, spread and smoothness, but show nothing: real data
calibrates better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Natural images vary far more in brightness than in colour.
_COLOUR = 0.3
# Mean and spread of natural images on a scale from 0 to 1 (those of ImageNet, roughly).
_MEAN, _SPREAD = 0.45, 0.25


def pink_noise(shape: tuple[int, ...], axes: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise, float32, of mean 0 and spread 1 over the last `axes` dimensions.

    Its amplitude falls with the frequency f as natural signals' does: 1/f in images, 1/sqrt(f) in sounds.
    """
    sizes = shape[-axes:]
    dims = tuple(range(-axes, 0))
    white = torch.randn(shape, generator=generator)
    squares = torch.zeros(sizes)
    for axis, size in enumerate(sizes):
        view = [1] * axes
        view[axis] = size
        squares = squares + (torch.fft.fftfreq(size) * size).square().reshape(view)
    fall = squares.sqrt().clamp(min=1.0) ** (axes / 2)
    noise: Tensor = torch.fft.ifftn(torch.fft.fftn(white, dim=dims) / fall, dim=dims).real
    noise = noise - noise.mean(dim=dims, keepdim=True)
    spread = noise.square().mean(dim=dims, keepdim=True).sqrt().clamp(min=1e-12)
    return noise / spread


def noise_images(count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, channels, height, width) float32 of mean 0 and spread 1, as image processors normalise."""
    grey = pink_noise((count, 1, height, width), 2, generator)
    if channels == 1:
        return grey
    colour = pink_noise((count, channels, height, width), 2, generator)
    return (grey + _COLOUR * colour) / math.sqrt(1 + _COLOUR**2)


def as_pixels(images: Tensor) -> Tensor:
    """Noise images as uint8, channels last: what an image processor takes."""
    scaled = (images * _SPREAD + _MEAN).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def noise_clip(samples: int, generator: torch.Generator) -> Tensor:
    """(samples,) float32: a waveform between about -0.4 and 0.4."""
    return pink_noise((samples,), 1, generator) * 0.1
