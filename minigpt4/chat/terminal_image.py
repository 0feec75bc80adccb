"""Pictures in a terminal: by a graphics protocol where the environment names one, else as coloured half blocks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping

from PIL import Image

PROTOCOLS = ("kitty", "iterm", "sixel", "blocks", "none")
_KITTY = {"ghostty", "kitty"}
_ITERM = {"iterm.app", "wezterm", "mintty", "rio"}
_SIXEL = ("sixel", "mlterm", "foot", "yaft", "contour")
_CHUNK = 4096  # of base64 text per escape sequence of kitty
_SIDE = 640  # pixels of a picture sent by a graphics protocol, longer side


def choose_protocol(environment: Mapping[str, str], is_terminal: bool, wish: str = "auto") -> str:
    """One of PROTOCOLS. wish: auto (nothing where the output is no terminal), always (half blocks at least), never.

    A terminal multiplexer swallows the protocols, so that half blocks are left in it.
    """
    if wish == "never" or (wish == "auto" and not is_terminal):
        return "none"
    term, program = environment.get("TERM", "").lower(), environment.get("TERM_PROGRAM", "").lower()
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):
        if "KITTY_WINDOW_ID" in environment or program in _KITTY or term == "xterm-kitty":
            return "kitty"
        if program in _ITERM or environment.get("LC_TERMINAL", "").lower() == "iterm2":
            return "iterm"
        if any(name in term for name in _SIXEL):
            return "sixel"
    if wish == "always":
        return "blocks"
    has_colours = "COLORTERM" in environment or "color" in term or term in ("xterm", "linux")
    return "blocks" if has_colours and not environment.get("NO_COLOR") else "none"


def render(image: Image.Image, protocol: str, columns: int = 60, is_true_colour: bool = True) -> str:
    """What to print for ``image`` to appear, at most ``columns`` wide; empty for protocol none."""
    rgb = image.convert("RGB")
    if protocol == "blocks":
        return "\n".join(_block_lines(rgb, columns, is_true_colour))
    if protocol not in ("kitty", "iterm", "sixel"):
        return ""
    if max(rgb.size) > _SIDE:
        rgb.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if protocol == "sixel":
        return "".join(_sixel(rgb))
    file = io.BytesIO()
    rgb.save(file, format="PNG")
    content = base64.b64encode(file.getvalue()).decode("ascii")
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(file.getvalue())};preserveAspectRatio=1:{content}\x07"
    return "".join(_kitty(content))


def _kitty(content: str) -> Iterator[str]:
    """Kitty's graphics protocol: a PNG, sent and shown, in chunks of which all but the last announce another."""
    for start in range(0, len(content), _CHUNK):
        control = "f=100,a=T,q=2," if start == 0 else ""
        more = int(start + _CHUNK < len(content))
        yield f"\x1b_G{control}m={more};{content[start : start + _CHUNK]}\x1b\\"


def _block_lines(image: Image.Image, columns: int, is_true_colour: bool) -> Iterator[str]:
    """Two pixels per character: the upper one colours the half block, the lower one its ground."""
    width = max(1, min(columns, 100))
    height = max(1, round(image.height / image.width * width / 2))
    if height > 30:  # a tall picture must not scroll its own top away
        width, height = max(1, round(width * 30 / height)), 30
    pixels = image.resize((width, 2 * height), Image.Resampling.LANCZOS)
    data = pixels.tobytes()

    def code(layer: int, x: int, y: int) -> str:
        at = 3 * (y * width + x)
        red, green, blue = data[at : at + 3]
        if is_true_colour:
            return f"{layer};2;{red};{green};{blue}"
        cube = (round(value / 255 * 5) for value in (red, green, blue))
        return f"{layer};5;{16 + sum(level * weight for level, weight in zip(cube, (36, 6, 1), strict=True))}"

    for row in range(height):
        cells = (f"\x1b[{code(38, x, 2 * row)};{code(48, x, 2 * row + 1)}m▀" for x in range(width))
        yield "".join(cells) + "\x1b[0m"


def _sixel(image: Image.Image) -> Iterator[str]:
    """DEC's sixel format: rows of six pixels, one pass per colour, runs of one sixel counted."""
    indexed = image.quantize(64, dither=Image.Dither.NONE)
    palette, data = indexed.getpalette() or [], indexed.tobytes()
    width, height = image.size
    used = sorted(set(data))
    yield f'\x1bPq"1;1;{width};{height}'
    for colour in used:
        red, green, blue = (round(value / 255 * 100) for value in palette[3 * colour : 3 * colour + 3])
        yield f"#{colour};2;{red};{green};{blue}"
    for top in range(0, height, 6):
        band = [data[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        for colour in sorted(set().union(*band)):
            sixels = [sum((line[x] == colour) << bit for bit, line in enumerate(band)) for x in range(width)]
            yield f"#{colour}" + "".join(_runs(sixels)) + "$"
        yield "-"
    yield "\x1b\\"


def _runs(sixels: list[int]) -> Iterator[str]:
    start = 0
    for end in range(1, len(sixels) + 1):
        if end == len(sixels) or sixels[end] != sixels[start]:
            letter, count = chr(63 + sixels[start]), end - start
            yield f"!{count}{letter}" if count > 3 else letter * count
            start = end
