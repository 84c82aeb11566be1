"""The embedded set: captioned pictures of shapes, letters and words, drawn on the fly.

Picture i is a pure function of (seed, i) and of the size at which it is drawn: no files, no download, no end of data.
What it holds is known exactly, so it carries several independent labels; a label that does not apply is absent.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
COUNTS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
WORDS = tuple(
    "ant bat bee box bus car cat cow cup dog egg fox hat ice jam key log map net oak owl pen pie pig rug sea sky sun "
    "tea toy van zoo".split()
)
CLASSES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "size": SIZES,
    "count": COUNTS,
    "relation": RELATIONS,
    "letter": LETTERS,
    "word": WORDS,
}
# Prompts speak as the captions do, over the other attributes, so that an ensemble of them is a clean classifier.
TEMPLATES = {
    "shape": tuple(
        template
        for c in COLOURS
        for template in (
            f"{'an' if c == 'orange' else 'a'} {c} {{}}",
            *(f"a {word} {c} {{}}" for word in SIZES + TEXTURES),
            *(f"{count} {c} {{}}s" for count in COUNTS[1:]),
        )
    ),
    "colour": (*(f"a {{}} {s}" for s in SHAPES), "a {} letter", "a word in {}"),
    "texture": tuple(f"a {{}} {c} {s}" for c, s in zip(COLOURS, SHAPES, strict=True)),
    "size": tuple(f"a {{}} {c} {s}" for c, s in zip(COLOURS, SHAPES, strict=True)),
    "count": tuple(f"{{}} {c} {s}s" for c, s in zip(COLOURS, SHAPES, strict=True)),
    "relation": tuple(
        f"a large {COLOURS[i]} {SHAPES[i]} {{}} a small {COLOURS[i - 3]} {SHAPES[i - 5]}" for i in range(len(SHAPES))
    ),
    "letter": ("the letter {}", *(f"the letter {{}} in {c}" for c in COLOURS)),
    "word": ('the word "{}"', *(f'the word "{{}}" in {c}' for c in COLOURS)),
}
TRAIN = range(1_000_000)  # indices; the held-out ones start far behind, so that the training range may grow
TEST = range(1 << 40, (1 << 40) + 5_000)

_RGB = np.array(
    [
        (214, 40, 40),
        (247, 127, 0),
        (252, 205, 10),
        (30, 140, 60),
        (30, 190, 205),
        (35, 80, 215),
        (130, 45, 165),
        (28, 28, 32),
    ],
    np.float32,
)
# The second tone of a texture: a tint, but a shade where the colour is too light for a tint to show.
_SECOND = np.where(
    (_RGB @ np.array((0.3, 0.6, 0.1), np.float32) > 140)[:, None], 0.45 * _RGB, 0.2 * _RGB + 0.8 * np.float32(255)
).astype(np.float32)
_BACKGROUNDS = {
    "white": (246, 246, 244),
    "grey": (188, 190, 194),
    "beige": (232, 218, 190),
    "sky": (190, 214, 238),
    "mint": (196, 230, 206),
    "pink": (244, 208, 216),
}
_GROUND_NAMES = tuple(_BACKGROUNDS)
_GROUND_RGB = np.array(list(_BACKGROUNDS.values()), np.float32)
_DIAMETERS = (0.38, 0.58, 0.84)  # of the picture's side, by SIZES
_KINDS = np.cumsum((0.38, 0.20, 0.17, 0.16, 0.09))  # one object, n equal ones, two in a relation, a letter, a word
_DRAWS = 48  # random numbers a picture may use


class Scene(NamedTuple):
    image: ndarray  # [size, size, 3] uint8
    caption: str
    labels: dict[str, int]  # indices into CLASSES


def draw(index: int, size: int = 32, seed: int = 0) -> Scene:
    """Picture `index` at `size` x `size` pixels (at least 16), its caption and its labels."""
    if size < 16:
        raise ValueError(f"scenes can be drawn at 16 pixels and more, not at {size}")
    u = _Draws(_uniform(seed, index))
    ground = u.choice(len(_GROUND_NAMES))
    canvas = _background(size, ground, u.next() - 0.5, u.next() - 0.5)
    kind = int(np.searchsorted(_KINDS, u.next()))
    caption, labels = (_one, _several, _related, _letter, _word)[kind](canvas, u)
    if u.next() < 0.3:
        caption = f"{caption} on {_GROUND_NAMES[ground]}"
    if u.next() < 0.2:
        caption = f"a picture of {caption}"
    return Scene((canvas + 0.5).astype(np.uint8), caption, labels)


class _Draws:
    """Uniform numbers handed out in order."""

    def __init__(self, numbers: ndarray) -> None:
        self._next = iter(numbers.tolist()).__next__

    def next(self) -> float:
        return self._next()

    def choice(self, n: int) -> int:
        return int(self._next() * n)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._next()


_STEPS = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _uniform(seed: int, index: int) -> Float[ndarray, " n"]:
    """Counter-based numbers in [0, 1): the splitmix64 stream of a key mixed from (seed, index)."""
    key = _mix(np.array([index], np.uint64) ^ _of_seed(seed))
    return (_mix(key + _STEPS) >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=64)
def _of_seed(seed: int) -> ndarray:
    return _mix(np.array([seed + 1], np.uint64))


def _mix(z: ndarray) -> ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# --- kinds of picture: each paints and returns (caption, labels) ---


def _one(canvas: ndarray, u: _Draws) -> tuple[str, dict[str, int]]:
    shape, colour, texture, size = u.choice(8), u.choice(8), _texture(u), u.choice(3)
    d = _DIAMETERS[size] * u.between(0.93, 1.07)
    x, y = (u.between(d / 2 + 0.03, 0.97 - d / 2) for _ in range(2))
    _paint(canvas, _shape(SHAPES[shape], _quantised(d), len(canvas)), colour, texture, x, y, u)
    labels = {"shape": shape, "colour": colour, "texture": texture, "size": size, "count": 0}
    words = [SIZES[size]] if u.next() < 0.6 else []
    words += _texture_words(texture, u) + [COLOURS[colour], SHAPES[shape]]
    return f"one {' '.join(words)}" if u.next() < 0.2 else _a(" ".join(words)), labels


def _several(canvas: ndarray, u: _Draws) -> tuple[str, dict[str, int]]:
    shape, colour, texture, n = u.choice(8), u.choice(8), _texture(u), 2 + u.choice(3)
    cells = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
    for _ in range(4 - n):
        cells.pop(u.choice(len(cells)))
    d = u.between(0.36, 0.42)
    room = 0.24 - d / 2
    for cx, cy in cells:
        x, y = cx + u.between(-room, room), cy + u.between(-room, room)
        _paint(canvas, _shape(SHAPES[shape], _quantised(d), len(canvas)), colour, texture, x, y, u)
    labels = {"shape": shape, "colour": colour, "texture": texture, "count": n - 1}
    plural = " ".join([*_texture_words(texture, u), COLOURS[colour], f"{SHAPES[shape]}{'e' * (shape == 4)}s"])
    return f"{n if u.next() < 0.25 else COUNTS[n - 1]} {plural}", labels


def _related(canvas: ndarray, u: _Draws) -> tuple[str, dict[str, int]]:
    """The relation is that of the larger object to the smaller one, so that the picture alone decides it."""
    relation = u.choice(4)
    shapes = [u.choice(8), u.choice(8)]
    colours = [u.choice(8)]
    colours.append((colours[0] + 1 + u.choice(7)) % 8)
    sign = -1 if relation in (0, 2) else 1
    along, across = (0.5 + 0.2 * sign, 0.5 - 0.27 * sign), (u.between(0.36, 0.64), u.between(0.3, 0.7))
    for i, d in enumerate((u.between(0.48, 0.54), u.between(0.3, 0.34))):
        x, y = (along[i], across[i]) if relation < 2 else (across[i], along[i])
        _paint(canvas, _shape(SHAPES[shapes[i]], _quantised(d), len(canvas)), colours[i], 0, x, y, u)
    names = [f"{COLOURS[c]} {SHAPES[s]}" for c, s in zip(colours, shapes, strict=True)]
    if u.next() < 0.25:
        return f"a small {names[1]} {RELATIONS[relation ^ 1]} a large {names[0]}", {"relation": relation}
    return f"a large {names[0]} {RELATIONS[relation]} a small {names[1]}", {"relation": relation}


def _letter(canvas: ndarray, u: _Draws) -> tuple[str, dict[str, int]]:
    letter, colour = u.choice(26), u.choice(8)
    mask = _text(LETTERS[letter], _quantised(u.between(0.58, 0.8)), len(canvas))
    _paint_inside(canvas, mask, colour, u)
    frame = ("the letter {l} in {c}", "a {c} letter {l}", "the letter {l} written in {c}")[u.choice(3)]
    caption = frame.format(l=LETTERS[letter], c=COLOURS[colour])
    return caption.replace("a orange", "an orange"), {"letter": letter, "colour": colour}


def _word(canvas: ndarray, u: _Draws) -> tuple[str, dict[str, int]]:
    word, colour = u.choice(len(WORDS)), u.choice(8)
    mask = _text(WORDS[word], _quantised(u.between(0.38, 0.56)), len(canvas))
    _paint_inside(canvas, mask, colour, u)
    frame = ('the word "{w}" in {c}', '"{w}" written in {c}', 'the word "{w}" in {c} letters')[u.choice(3)]
    return frame.format(w=WORDS[word], c=COLOURS[colour]), {"word": word, "colour": colour}


def _texture(u: _Draws) -> int:
    return max(0, u.choice(8) - 4)  # five of eight are solid: at 32 pixels a pattern hides the shape of a small object


def _texture_words(texture: int, u: _Draws) -> list[str]:
    return [TEXTURES[texture]] if u.next() < (0.8 if texture else 0.2) else []


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# --- paint: masks are made once per size and kept ---


def _quantised(diameter: float) -> int:
    """Sixty-fourths of the side: few enough sizes to keep every mask."""
    return round(diameter * 64)


@lru_cache(maxsize=64)
def _ramp(size: int) -> Float[ndarray, " n"]:
    return np.linspace(-1, 1, size, dtype=np.float32)


def _background(size: int, ground: int, right: float, down: float) -> Float[ndarray, "s s 3"]:
    """One tone with a soft slope of light."""
    ramp = _ramp(size)
    light = 1 + 0.12 * (right * ramp[None, :] + down * ramp[:, None])
    return np.minimum(light[:, :, None] * _GROUND_RGB[ground], np.float32(255))


def _paint_inside(canvas: ndarray, mask: tuple[ndarray, ndarray], colour: int, u: _Draws) -> None:
    half_h, half_w = (n / 2 / len(canvas) for n in mask[0].shape[:2])
    x, y = (0.5 + u.between(-1.0, 1.0) * max(0.0, 0.5 - half) for half in (half_w, half_h))
    _paint(canvas, mask, colour, 0, x, y, u)


def _paint(
    canvas: ndarray, mask: tuple[ndarray, ndarray], colour: int, texture: int, x: float, y: float, u: _Draws
) -> None:
    """Lay a soft shadow and then a coloured mask on the canvas, centred at (x, y) in shares of the side."""
    size = len(canvas)
    cover, shadow = mask
    h, w = cover.shape[:2]
    top = min(max(round(y * size - h / 2), 0), max(size - h, 0))
    left = min(max(round(x * size - w / 2), 0), max(size - w, 0))
    offset = max(1, round(size / 28))
    _blend(canvas, shadow, np.float32(0), top - (len(shadow) - h) // 2 + offset, left - (len(shadow[0]) - w) // 2)
    tone = _RGB[colour] * _shade(h)
    if texture:
        period, tile = _tile(TEXTURES[texture], size)
        dy, dx = u.choice(period), u.choice(period)
        tone = tone + tile[dy : dy + h, dx : dx + w] * (_SECOND[colour] - _RGB[colour])
    _blend(canvas, cover, tone, top, left)


def _blend(canvas: ndarray, alpha: ndarray, tone: ndarray | np.float32, top: int, left: int) -> None:
    """canvas = canvas + alpha (tone - canvas), cut to the canvas; `tone` has alpha's height and width, or 1."""
    size = len(canvas)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + len(alpha), size), min(left + len(alpha[0]), size)
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    if isinstance(tone, ndarray):
        tone = tone[inside[0], inside[1] if tone.shape[1] > 1 else slice(None)]
    region = canvas[y0:y1, x0:x1]
    region += alpha[inside] * (tone - region)


@lru_cache(maxsize=4096)
def _shade(height: int) -> Float[ndarray, "h 1 1"]:
    return np.linspace(1.0, 0.86, height, dtype=np.float32)[:, None, None]


@lru_cache(maxsize=4096)
def _shape(name: str, diameter: int, size: int) -> tuple[ndarray, ndarray]:
    """Antialiased cover of a shape whose box is `diameter` sixty-fourths of the side, and its shadow."""
    side, fine = max(6, round(diameter * size / 64)), 8
    n = side * fine
    image = Image.new("L", (n, n))
    pen = ImageDraw.Draw(image)
    if name in ("circle", "ring"):
        pen.ellipse((0, 0, n - 1, n - 1), fill=255)
        if name == "ring":
            pen.ellipse((0.29 * n, 0.29 * n, 0.71 * n, 0.71 * n), fill=0)
    else:
        pen.polygon([(x * (n - 1), y * (n - 1)) for x, y in _outline(name)], fill=255)
    return _cover(np.asarray(image.reduce(fine)), size)


def _outline(name: str) -> list[tuple[float, float]]:
    if name == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if name == "triangle":
        return [(0.5, 0.03), (1.0, 0.95), (0.0, 0.95)]
    if name == "diamond":
        return [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)]
    if name == "cross":
        o, a, b, e = 0.0, 0.33, 0.67, 1.0
        return [(a, o), (b, o), (b, a), (e, a), (e, b), (b, b), (b, e), (a, e), (a, b), (o, b), (o, a), (a, a)]
    if name == "star":
        t = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.21, 0.52)
        x, y = 0.5 + radius * np.sin(t), 0.53 - radius * np.cos(t)
    else:  # heart
        t = np.linspace(0, 2 * np.pi, 100)
        x = 0.5 + np.sin(t) ** 3 * 16 / 33
        y = 0.46 - (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 33
    return list(zip(x.tolist(), y.tolist(), strict=True))


@lru_cache(maxsize=4096)
def _text(text: str, height: int, size: int) -> tuple[ndarray, ndarray]:
    """Antialiased cover of bold text, its capitals `height` sixty-fourths of the side, narrowed to fit the picture."""
    fine = 8
    font = ImageFont.load_default(max(8, height * size * fine / 64 * 1.4))
    stroke = round(size * fine * height / 64 / 24)
    left, top, right, bottom = (round(v) for v in font.getbbox(text, stroke_width=stroke))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font, stroke_width=stroke)
    shrink = min(1.0, 0.94 * size * fine / image.width)
    shape = (max(1, round(image.width * shrink / fine)), max(1, round(image.height * shrink**0.5 / fine)))
    return _cover(np.asarray(image.resize(shape, Image.Resampling.BOX)), size)


def _cover(mask: UInt8[ndarray, "h w"], size: int) -> tuple[ndarray, ndarray]:
    """A mask as floats [h, w, 1] in 0..1, and a blurred, fainter, wider copy of it."""
    pad = max(2, round(size / 16))
    shadow = Image.fromarray(np.pad(mask, pad)).filter(ImageFilter.GaussianBlur(size / 32))
    as_float = [np.asarray(m, np.float32)[:, :, None] / 255 for m in (mask, shadow)]
    return as_float[0], 0.22 * as_float[1]


@lru_cache(maxsize=64)
def _tile(texture: str, size: int) -> tuple[int, ndarray]:
    """(period in pixels, second-tone share [size + period, size + period, 1]) of a texture."""
    fine = 4
    period = {"striped": 5, "dotted": 5, "checkered": 6}[texture] * size / 32
    whole = max(2, round(period))
    n = (size + whole) * fine
    y, x = np.mgrid[:n, :n] / (fine * whole)
    if texture == "striped":
        on = (x + y) % 1 < 0.45
    elif texture == "dotted":
        on = ((x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2) < 0.29**2
    else:
        on = (x % 1 < 0.5) ^ (y % 1 < 0.5)
    return whole, on.reshape(n // fine, fine, n // fine, fine).mean((1, 3)).astype(np.float32)[:, :, None]
