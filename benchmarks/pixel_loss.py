"""The pixel side's BCE in several ways, all with the same sums and gradients, and the least work that it is.

Shape suffixes as in kernels/mask_loss.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, interpolate, pad

from benchmarks.measure import Work
from swim.kernels.mask_loss import frame_sums

FRAMES_AT_A_TIME = 64  # while masks are drawn


class Case(NamedTuple):
    """Frames (nouns x steps) of h x w cells, each upsampled to H x W pixels."""

    frames: int
    grid: tuple[int, int]
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.frames * self.size[0] * self.size[1]

    def works(self) -> tuple[Work, ...]:
        """In one go: bits and maps read once, the maps' gradient and the sums written; a reciprocal a pixel for the
        gradient. Logarithms are those of products of many pixels; multiplications are not counted."""
        height, width = self.size
        maps = 4 * self.grid[0] * self.grid[1]
        return (Work(self.frames * (height * -(-width // 8) + 2 * maps + 12), 0, self.pixels),)

    def launches(self) -> int:
        """Kernels of the Triton way: two forward, two of torch's backward."""
        return 4


class Problem(NamedTuple):
    case: Case
    log_map: Tensor  # (N, h, w)
    mask: Tensor  # (N, H, W) bool
    packed: Tensor  # (N, H, B)
    gradient: Tensor  # (N,) of the loss at the frames' BCE
    sums_gradient: Tensor  # (N, 3): the same, where the BCE is the first of three sums

    def double(self) -> "Problem":
        log_map = self.log_map.detach().double().requires_grad_()
        return self._replace(
            log_map=log_map, gradient=self.gradient.double(), sums_gradient=self.sums_gradient.double()
        )


def problem(case: Case, device: str = "cpu") -> Problem:
    """A softmax over each frame's cells, and an ellipse in each frame."""
    generator = torch.Generator(device).manual_seed(0)
    logits = 2 * torch.randn(case.frames, case.grid[0] * case.grid[1], generator=generator, device=device)
    log_map = logits.log_softmax(-1).view(case.frames, *case.grid).requires_grad_()
    y, x = (torch.linspace(-1, 1, n, device=device) for n in case.size)
    centres = torch.rand(case.frames, 2, 1, 1, generator=generator, device=device) - 0.5
    radii = 0.2 + 0.5 * torch.rand(case.frames, 2, 1, 1, generator=generator, device=device)
    masks = []
    for centre, radius in zip(centres.split(FRAMES_AT_A_TIME), radii.split(FRAMES_AT_A_TIME)):
        distance_y = (y[:, None] - centre[:, 0]) / radius[:, 0]
        masks.append(distance_y**2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2 < 1)
    packed = torch.cat([pack(part) for part in masks])
    gradient = torch.randn(case.frames, generator=generator, device=device)
    return Problem(case, log_map, torch.cat(masks), packed, gradient, pad(gradient[:, None], (0, 2)))


def pack(mask_NYX: Tensor) -> Tensor:
    """Bits (N, Y, B) as `unpack_masks` reads them."""
    bits = pad(mask_NYX.to(torch.uint8), (0, -mask_NYX.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def operator(p: Problem, backend: str = "torch") -> Tensor:
    return frame_sums(p.log_map, p.packed, kind="bce", size=p.case.size, backend=backend)  # type: ignore[arg-type]


def upsample_and_bce(p: Problem) -> Tensor:
    """On tensors of full size, as one writes it first."""
    m_NYX = interpolate(p.log_map.exp()[:, None], p.case.size, mode="bilinear", align_corners=False)[:, 0]
    return binary_cross_entropy(m_NYX, p.mask.to(m_NYX.dtype), reduction="none").sum((1, 2))


Way = Callable[[Problem], Tensor]
# What a GPU compares; the first needs Triton.
GPU_WAYS: dict[str, Way] = {
    "triton": partial(operator, backend="triton"),
    "torch": operator,
    "upsample and BCE": upsample_and_bce,
}


def values_and_gradients(way: Way, p: Problem) -> tuple[Tensor, ...]:
    """The frames' BCE (N,) and the gradient of the log maps."""
    sums = way(p)
    gradient = p.gradient if sums.dim() == 1 else p.sums_gradient
    values = sums if sums.dim() == 1 else sums[:, 0]
    return values.detach(), *torch.autograd.grad(sums, p.log_map, gradient)
