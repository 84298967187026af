"""Render the letters of many scripts from the fonts of Debian's package fonts-noto-core."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MASTER = 56
"""Side of a rendered letter in pixels, twice that of a task's image."""

LETTERS = range(15, 300)
"""Numbers of letters with which a script is used as an alphabet."""

TOO_ALIKE = 0.9
"""Correlation of two rendered letters above which they count as the same class."""

PLACES = (Path(".venv/debian/usr/share/fonts/truetype/noto"), Path("/usr/share/fonts/truetype/noto"))
"""Folders with the fonts: unpacked by make, or installed by Debian."""

_INK = 40
_CATEGORIES = ("Lo", "Ll", "Lu")
_BLOCK = 500


class Glyphs(NamedTuple):
    """One rendered image of each letter; letters are sorted by script, then by code point.

    Attributes:
        masters: (letters, 56, 56) uint8, 0 is background and 255 ink.
        code_points: (letters,) int64, Unicode's.
        script_of: (letters,) int64, which of ``scripts`` a letter belongs to.
        scripts: ISO 15924 codes, "Thai" and the like, in alphabetical order.
    """

    masters: NDArray[np.uint8]
    code_points: NDArray[np.int64]
    script_of: NDArray[np.int64]
    scripts: tuple[str, ...]


class Alphabet(NamedTuple):
    """The letters of one script in one font."""

    font: Path
    code_points: tuple[int, ...]


def find_fonts(folder: Path | None = None) -> Path:
    """Return the folder with the Noto fonts: ``folder``, or the first of ``PLACES`` that exists.

    Raises:
        ValueError: if there are none; the message explains how to get them.
    """
    looked = PLACES if folder is None else (folder,)
    for place in looked:
        if any(place.glob("Noto*-Regular.ttf")):
            return place
    places = " nor in ".join(str(place) for place in looked)
    raise ValueError(
        f"there are no Noto fonts in {places}: `make experiments` unpacks Debian's fonts-noto-core into .venv/debian; "
        "--fonts selects another folder with these files"
    )


def list_alphabets(folder: Path) -> dict[str, Alphabet]:
    """Map each script to its letters in the regular font that has most of them (the first by name if equal)."""
    from fontTools import unicodedata as scripts  # type: ignore[import-untyped]
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    found: dict[str, Alphabet] = {}
    for path in sorted(folder.glob("Noto*-Regular.ttf")):
        letters: dict[str, list[int]] = defaultdict(list)
        with TTFont(path, lazy=True) as font:
            for code_point, name in (font.getBestCmap() or {}).items():
                if name != ".notdef" and unicodedata.category(chr(code_point)) in _CATEGORIES:
                    letters[scripts.script(chr(code_point))].append(code_point)
        for script, code_points in letters.items():
            if script not in found or len(code_points) > len(found[script].code_points):
                found[script] = Alphabet(path, tuple(sorted(code_points)))
    return {script: found[script] for script in sorted(found) if len(found[script].code_points) in LETTERS}


def render_glyphs(folder: Path) -> Glyphs:
    """Render every letter of every alphabet in the folder, and keep the first of letters that look alike.

    This takes about 10 seconds. Letters without ink are left out. Letters whose images correlate by more than
    ``TOO_ALIKE`` are left out, too, so that no letter of a held-out script has a duplicate in another script.
    """
    alphabets = list_alphabets(folder)
    scripts = tuple(alphabets)
    pictures, code_points, script_of = [], [], []
    for which, alphabet in enumerate(alphabets.values()):
        for code_point in alphabet.code_points:
            picture = render_letter(alphabet.font, chr(code_point))
            if picture is not None:
                pictures.append(picture)
                code_points.append(code_point)
                script_of.append(which)
    masters = np.stack(pictures)
    kept = find_distinct(masters)
    return Glyphs(masters[kept], np.array(code_points)[kept], np.array(script_of)[kept], scripts)


def render_letter(font: Path, letter: str) -> NDArray[np.uint8] | None:
    """Return a centred letter as a (56, 56) image with a longer side of 40 pixels; None if it has no ink."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), letter, size=100, prop=FontProperties(fname=font))
    if not len(path.vertices):
        return None
    box = path.get_extents()
    longer = max(box.width, box.height)
    if longer <= 0:
        return None
    middle = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
    place = middle.scale(_INK / longer).translate(MASTER / 2, MASTER / 2)
    renderer = RendererAgg(MASTER, MASTER, dpi=72)  # type: ignore[no-untyped-call]
    context = renderer.new_gc()
    context.set_linewidth(0)
    renderer.draw_path(context, path, place, (0.0, 0.0, 0.0))  # type: ignore[no-untyped-call]
    picture = np.asarray(renderer.buffer_rgba())[:, :, 3].copy()  # type: ignore[no-untyped-call]
    return picture if picture.any() else None


def find_distinct(masters: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the indices of the images that do not resemble an earlier returned one, in order."""
    small = masters.reshape(len(masters), MASTER // 4, 4, MASTER // 4, 4).mean(axis=(2, 4)).reshape(len(masters), -1)
    small = small - small.mean(axis=1, keepdims=True)
    small = (small / np.linalg.norm(small, axis=1, keepdims=True)).astype(np.float32)
    kept: list[int] = []
    for first in range(0, len(small), _BLOCK):
        block = small[first : first + _BLOCK]
        alike_before = (block @ small[kept].T).max(axis=1, initial=-1.0) > TOO_ALIKE
        kept += [first + place for place in _select_distinct(block, np.flatnonzero(~alike_before))]
    return np.array(kept, dtype=np.int64)


def _select_distinct(block: NDArray[np.float32], candidates: Iterable[int]) -> list[int]:
    """Return the candidates in a block of unit vectors that are not too close to an earlier returned one."""
    kept: list[int] = []
    for place in candidates:
        if not kept or (block[kept] @ block[place]).max() <= TOO_ALIKE:
            kept.append(int(place))
    return kept
