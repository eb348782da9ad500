"""Synthetic white blood cells under each hospital's own scanner.

Datasheet
    What: colour images of one stained white blood cell each, drawn from formulas. **Synthetic: no cell, patient or hospital is real,
    and nothing learnt from it says anything about blood.** It exists to rehearse a federation whose sites differ in equipment.
    Classes: 0 lymphocyte (one round nucleus that fills the cell), 1 monocyte (large cell, kidney-shaped nucleus), 2 neutrophil (three
    lobes), 3 eosinophil (two lobes, red granules). Sizes, places, angles, tints and the red cells around vary by cell.
    Shift between hospitals: *features* (each scanner has its own blur, colour gain, gamma, offset, vignette and photon count) and
    *labels* (each hospital's class mix is drawn from a Dirichlet distribution).
    Size: any; made in memory from a seed, about 3,000 images a second at 28 pixels. Images are uint8, (n, 3, size, size).
    Not modelled: patients (no two images belong together), several cells in an image, mistakes of the labelling expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds

Floats = npt.NDArray[np.float64]

CLASSES: Final = ("lymphocyte", "monocyte", "neutrophil", "eosinophil")
BACKGROUND: Final = np.array([0.93, 0.89, 0.90])
RED_CELL: Final = np.array([0.86, 0.63, 0.64])
CYTOPLASM: Final = np.array([[0.72, 0.76, 0.90], [0.74, 0.74, 0.84], [0.88, 0.80, 0.84], [0.89, 0.79, 0.81]])
NUCLEUS: Final = np.array([0.42, 0.26, 0.56])
GRANULE: Final = np.array([0.84, 0.42, 0.40])
CELL_RADIUS: Final = np.array([0.46, 0.66, 0.58, 0.58])
"""By class, in units of half the image's width."""
RED_CELLS: Final = 3
GRANULES: Final = 14


@dataclass(frozen=True)
class Scanner:
    """How one hospital's microscope and camera change what they see.

    Args:
        blur: standard deviation of the point spread, in 1/28 of the image's width.
        gain: factor on red, green and blue.
        gamma: exponent on the light.
        offset: added to all channels: stray light.
        vignette: loss of light in the corners, 0 to 1.
        photons: expected count at full light; fewer means more noise.
    """

    blur: float
    gain: tuple[float, float, float]
    gamma: float
    offset: float
    vignette: float
    photons: float


def scanner_of(hospital: int, seed: int, strength: float = 1.0) -> Scanner:
    """The scanner of one hospital: a function of its number and the seed.

    Args:
        hospital: its number, from 0.
        seed: of the whole data set.
        strength: 0 gives every hospital the same neutral scanner, 1 clearly different ones.
    """
    g = seeds.numpy_generator(seed, "blood smear", "scanner", hospital)
    blur, vignette, few_photons = g.uniform(0, 1, 3) * strength
    tint, gamma, offset = g.uniform(-1, 1, 3), g.uniform(-1, 1) * strength, g.uniform(-1, 1) * strength
    red, green, blue = (1.0 + 0.18 * strength * tint).tolist()
    return Scanner(
        blur=0.3 + 1.2 * float(blur),
        gain=(red, green, blue),
        gamma=float(np.exp(0.5 * gamma)),
        offset=0.08 * float(offset),
        vignette=0.6 * float(vignette),
        photons=400.0 * float(np.exp(-2.5 * few_photons)),
    )


def cells(labels: npt.NDArray[np.int64], g: np.random.Generator, size: int = 28) -> Floats:
    """Clean images of cells, before any scanner.

    Args:
        labels: class of each cell, 0 to 3, shape (n,).
        g: where the variation comes from.
        size: height and width, pixels.

    Returns:
        Light from 0 to 1, shape (n, 3, size, size).
    """
    n = len(labels)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    soft = 3.0 / size
    image = np.broadcast_to(BACKGROUND[None, :, None, None], (n, 3, size, size)) + g.normal(0, 0.02, (n, 3, 1, 1))

    def disc(cx: Any, cy: Any, rx: Any, ry: Any, angle: Any) -> Floats:
        """Soft ellipses, one an image: 1 inside, 0 outside, shape (n, 1, size, size)."""
        cx, cy, rx, ry, angle = (np.broadcast_to(v, (n,))[:, None, None] for v in (cx, cy, rx, ry, angle))
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        distance = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
        edge: Floats = np.clip((1 - distance) * np.minimum(rx, ry) / soft + 0.5, 0, 1)[:, None]
        return edge

    def paint(below: Floats, mask: Floats, colour: Floats, spread: float) -> Floats:
        tint = np.broadcast_to(colour, (n, 3)) + g.normal(0, spread, (n, 3))
        return below * (1 - mask) + tint[:, :, None, None] * mask

    for _ in range(RED_CELLS):
        angle, radius = g.uniform(0, 2 * np.pi, n), g.uniform(0.28, 0.36, n)
        image = paint(image, disc(1.05 * np.cos(angle), 1.05 * np.sin(angle), radius, radius, 0.0), RED_CELL, 0.03)

    cx, cy = g.uniform(-0.14, 0.14, (2, n))
    radius = CELL_RADIUS[labels] * g.uniform(0.85, 1.15, n)
    stretch, turn = g.uniform(0.85, 1.18, n), g.uniform(0, 2 * np.pi, n)
    body = disc(cx, cy, radius * stretch, radius / stretch, turn)
    image = paint(image, body, CYTOPLASM[labels], 0.025)

    # The nucleus: as many lobes as the class has, on a ring about the middle; monocytes have one with a notch.
    lobes = np.array([1, 1, 3, 2])[labels]
    ring = np.array([0.0, 0.0, 0.42, 0.40])[labels] * radius
    lobe_radius = np.array([0.80, 0.72, 0.36, 0.42])[labels] * radius
    nucleus = np.zeros((n, 1, size, size))
    for lobe in range(3):
        angle = turn + lobe * 2 * np.pi / lobes + g.normal(0, 0.2, n)
        r, flat = lobe_radius * g.uniform(0.85, 1.15, n), g.uniform(0.85, 1.15, n)
        one = disc(cx + ring * np.cos(angle), cy + ring * np.sin(angle), r * flat, r / flat, angle)
        nucleus = np.where((lobe < lobes)[:, None, None, None], np.maximum(nucleus, one), nucleus)
    notch = disc(
        cx + 0.65 * radius * np.cos(turn), cy + 0.65 * radius * np.sin(turn), 0.42 * radius, 0.42 * radius, 0.0
    )
    nucleus = np.where((labels == 1)[:, None, None, None], nucleus * (1 - notch), nucleus)
    image = paint(image, nucleus * body, NUCLEUS, 0.03)

    granules = np.zeros((n, 1, size, size))
    for _ in range(GRANULES):
        angle, reach = g.uniform(0, 2 * np.pi, n), radius * np.sqrt(g.uniform(0, 0.8, n))
        granules = np.maximum(granules, disc(cx + reach * np.cos(angle), cy + reach * np.sin(angle), 0.06, 0.06, 0.0))
    only_eosinophils = (labels == 3)[:, None, None, None]
    image = np.where(only_eosinophils, paint(image, 0.8 * granules * body * (1 - nucleus), GRANULE, 0.03), image)
    return np.clip(image, 0, 1)


def scan(light: Floats, scanner: Scanner, g: np.random.Generator) -> npt.NDArray[np.uint8]:
    """What a scanner makes of clean images.

    Args:
        light: 0 to 1, shape (n, 3, size, size).
        scanner: the hospital's.
        g: the photons' chance.

    Returns:
        uint8, the same shape.
    """
    size = light.shape[-1]
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    spread = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / (scanner.blur * 2 / 28)) ** 2)
    spread /= spread.sum(axis=1, keepdims=True)
    blurred = np.einsum("ij,ncjk,lk->ncil", spread, light, spread, optimize=True)
    corner = 1 - scanner.vignette * (axis[:, None] ** 2 + axis[None, :] ** 2) / 2
    gain = np.array(scanner.gain)[None, :, None, None]
    seen = np.clip(blurred * gain * corner + scanner.offset, 0, 1.2) ** scanner.gamma
    counted = g.poisson(seen * scanner.photons) / scanner.photons
    pixels: npt.NDArray[np.uint8] = np.rint(np.clip(counted, 0, 1) * 255).astype(np.uint8)
    return pixels


def blood_smear_synthetic(
    hospitals: int, images_per_hospital: int, seed: int, *, size: int = 28, strength: float = 1.0, alpha: float = 2.0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A whole data set. One hospital's images do not depend on how many hospitals there are.

    Args:
        hospitals: how many.
        images_per_hospital: at each.
        seed: of everything.
        size: height and width, pixels.
        strength: how much scanners differ; see `scanner_of`.
        alpha: of the Dirichlet class mix; large means balanced.

    Returns:
        Images uint8 (n, 3, size, size), classes int64 (n,), hospital numbers int64 (n,).
    """
    images, labels = [], []
    for hospital in range(hospitals):
        g = seeds.numpy_generator(seed, "blood smear", "cells", hospital)
        mix = g.dirichlet(np.full(len(CLASSES), alpha))
        mine = g.choice(len(CLASSES), images_per_hospital, p=mix).astype(np.int64)
        images.append(scan(cells(mine, g, size), scanner_of(hospital, seed, strength), g))
        labels.append(mine)
    where = np.repeat(np.arange(hospitals, dtype=np.int64), images_per_hospital)
    return np.concatenate(images), np.concatenate(labels), where
