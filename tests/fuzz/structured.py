"""Documents and pictures that are well formed and absurd: what hypothesis draws, written as files."""

import io
from typing import Any

from hypothesis import strategies as st
from PIL import Image

HUGE = 10**30
NUMBERS = st.one_of(
    st.integers(-10, 2000),
    st.sampled_from([0, -1, 2**31 - 1, 2**31, -(2**31), 2**63, HUGE]),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3)),
)
NAMES = st.sampled_from(
    ["Page", "Pages", "Catalog", "Font", "XObject", "Annot", "Widget", "Link", "Image", "Form", "DeviceRGB", "Indexed"]
)


class Name(str):
    """A name of a PDF."""


class Reference(int):
    """A reference to an object of a PDF, by its number."""


SCALARS = st.one_of(
    NUMBERS,
    st.booleans(),
    st.none(),
    NAMES.map(Name),
    st.text(max_size=8),
    st.integers(0, 12).map(Reference),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=3).map(lambda found: dict(found))
    ),
    max_leaves=6,
)
BOXES = st.one_of(st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, max_size=3), SCALARS)
COLOR_SPACES = st.one_of(
    st.sampled_from(["DeviceGray", "DeviceRGB", "DeviceCMYK", "Pattern", "Nonsense"]).map(Name),
    st.tuples(st.just(Name("Indexed")), st.just(Name("DeviceRGB")), NUMBERS, st.text(max_size=12)).map(list),
    st.tuples(st.just(Name("ICCBased")), st.integers(0, 12).map(Reference)).map(list),
    st.tuples(st.just(Name("Separation")), st.just(Name("Black")), st.just(Name("DeviceCMYK")), VALUES).map(list),
)
IMAGES = st.fixed_dictionaries(
    {"Type": st.just(Name("XObject")), "Subtype": st.just(Name("Image")), "Width": NUMBERS, "Height": NUMBERS},
    optional={
        "ColorSpace": COLOR_SPACES,
        "BitsPerComponent": st.sampled_from([0, 1, 2, 4, 8, 16, 32, -8]),
        "Filter": st.sampled_from(
            ["FlateDecode", "DCTDecode", "JPXDecode", "CCITTFaxDecode", "JBIG2Decode", "LZWDecode", "RunLengthDecode"]
        ).map(Name),
        "DecodeParms": VALUES,
        "Decode": st.lists(NUMBERS, max_size=6),
        "SMask": st.integers(0, 12).map(Reference),
        "ImageMask": st.booleans(),
    },
)
ANNOTATIONS = st.fixed_dictionaries(
    {"Type": st.just(Name("Annot"))},
    optional={
        "Subtype": st.sampled_from(["Widget", "Link", "FreeText", "Ink", "Stamp", "Popup", "Movie"]).map(Name),
        "Rect": BOXES,
        "FT": st.sampled_from(["Tx", "Btn", "Ch", "Sig"]).map(Name),
        "V": SCALARS,
        "AP": VALUES,
        "InkList": VALUES,
        "Parent": st.integers(0, 12).map(Reference),
        "Contents": st.text(max_size=20),
    },
)
ENCRYPTION = st.fixed_dictionaries(
    {"Filter": st.sampled_from(["Standard", "Adobe.PubSec", "Nonsense"]).map(Name)},
    optional={
        "V": st.integers(-1, 7),
        "R": st.integers(-1, 7),
        "Length": NUMBERS,
        "P": NUMBERS,
        "O": st.text(max_size=32),
        "U": st.text(max_size=32),
        "CF": VALUES,
        "StmF": NAMES.map(Name),
    },
)
CONTENTS = st.lists(
    st.sampled_from(
        [
            "q", "Q", "BT", "ET", "/F1 12 Tf", "(some words of text) Tj", "10 20 Td", "/X1 Do", "1 0 0 1 50 50 cm",
            "1e30 0 0 1e30 0 0 cm", "0 0 100 100 re f", "/Pattern cs /P1 scn", "W n", "0 0 0 0 0 0 cm", "99999 w", "S",
            "BI /W 4 /H 4 /BPC 8 /CS /G ID aaaaaaaaaaaaaaaa EI", "[(a) 1e9 (b)] TJ", "/GS1 gs", "0 0 m 1 1 l s", "(",
        ]
    ),
    max_size=15,
).map("\n".join)  # fmt: skip


def seldom(usual: Any, absurd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw `usual` most of the time: a document in which everything is wrong is refused at its first line."""
    return st.integers(0, 9).flatmap(lambda number: absurd if number == 9 else st.just(usual))


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Draw a PDF: a tree of pages that may share, loop or lie, with absurd boxes, pictures, forms and ciphers."""
    page_count = draw(st.integers(1, 3))
    pages = [Reference(3 + number) for number in range(page_count)]
    kids = draw(seldom(pages, st.lists(st.integers(0, 12).map(Reference), max_size=4)))
    objects: dict[int, Any] = {
        1: {"Type": Name("Catalog"), "Pages": Reference(2)},
        2: {"Type": Name("Pages"), "Kids": kids, "Count": draw(seldom(page_count, NUMBERS))},
    }
    if draw(seldom(False, st.just(True))):
        objects[1]["AcroForm"] = draw(VALUES)
    for page in pages:
        objects[page] = {"Type": Name("Page"), "Parent": Reference(2), "MediaBox": [0, 0, 200, 200]}
        objects[page] |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "MediaBox": seldom([0, 0, 300, 100], BOXES),
                    "CropBox": seldom([10, 10, 90, 90], BOXES),
                    "Rotate": seldom(90, NUMBERS),
                    "UserUnit": seldom(2, NUMBERS),
                    "Annots": st.lists(ANNOTATIONS, max_size=2),
                    "Resources": st.just({"XObject": {"X1": Reference(9)}, "Font": {"F1": Reference(10)}}),
                    "Contents": st.just(Reference(8)),
                },
            )
        )
    objects[8] = ({}, draw(CONTENTS).encode())
    objects[9] = (draw(IMAGES), draw(st.binary(max_size=64)))
    objects[10] = {"Type": Name("Font"), "Subtype": Name("Type1"), "BaseFont": Name("Helvetica")}
    objects[11] = draw(VALUES)
    trailer: dict[str, Any] = {"Size": 12, "Root": Reference(1)}
    if draw(seldom(False, st.just(True))):
        trailer |= {"Encrypt": draw(ENCRYPTION), "ID": ["0123456789abcdef", "0123456789abcdef"]}
    return written(objects, trailer)


def written(objects: dict[int, Any], trailer: dict[str, Any]) -> bytes:
    """Return a PDF of `objects`; a stream is a pair of its dictionary and its bytes."""
    out = io.BytesIO()
    out.write(b"%PDF-1.7\n")
    places = {}
    for number, value in objects.items():
        places[number] = out.tell()
        out.write(b"%d 0 obj\n" % number)
        if isinstance(value, tuple):
            out.write(token({"Length": len(value[1])} | value[0]) + b"\nstream\n" + value[1] + b"\nendstream")
        else:
            out.write(token(value))
        out.write(b"\nendobj\n")
    start = out.tell()
    out.write(b"xref\n")
    for number, place in places.items():
        out.write(b"%d 1\n%010d 00000 n \n" % (number, place))
    out.write(b"trailer\n" + token(trailer) + b"\nstartxref\n%d\n%%%%EOF" % start)
    return out.getvalue()


def token(value: Any) -> bytes:
    """Return a value as a PDF writes it."""
    if isinstance(value, dict):
        return b"<< " + b" ".join(b"/" + key.encode() + b" " + token(item) for key, item in value.items()) + b" >>"
    if isinstance(value, list):
        return b"[" + b" ".join(map(token, value)) + b"]"
    if value is None:
        return b"null"
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, Reference):
        return b"%d 0 R" % value
    if isinstance(value, Name):
        return b"/" + value.encode()
    if isinstance(value, str):
        return b"<" + value.encode("utf-16-be", "surrogatepass").hex().encode() + b">"
    return str(value).encode()


MODES = {
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    ".jpg": ("L", "RGB", "CMYK"),
    ".tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    ".webp": ("RGB", "RGBA"),
    ".gif": ("1", "L", "P"),
    ".bmp": ("1", "L", "P", "RGB", "RGBA"),
}
"""What Pillow can write of each format that is read."""


@st.composite
def pictures(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a suffix and the bytes of a picture of any mode and shape, with metadata that need not make sense."""
    suffix = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[suffix]))
    size = (draw(st.sampled_from([1, 2, 7, 64, 3000])), draw(st.sampled_from([1, 3, 64, 500])))
    fill = draw(st.integers(0, 255))
    image = Image.new("L", size, fill)
    image.paste(255 - fill, (0, 0, size[0] // 2, size[1] // 2))
    image = Image.new(mode, size) if mode == "LAB" else image.convert(mode) if mode != "I;16" else image.convert("I;16")
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["dpi"] = (draw(st.sampled_from([0.0, 1e-6, 72.0, 300.0, 1e6])),) * 2
    if suffix in (".jpg", ".png", ".webp", ".tif") and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 20))
        options["exif"] = exif.tobytes()
    if suffix in (".png", ".gif") and mode in ("P", "L", "1", "RGB") and draw(st.booleans()):
        options["transparency"] = (0, 0, 0) if mode == "RGB" else draw(st.integers(0, 255))
    if suffix in (".jpg", ".png", ".webp", ".tif") and draw(st.booleans()):
        options["icc_profile"] = draw(st.binary(max_size=32))
    out = io.BytesIO()
    image.save(out, {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()), **options)
    return suffix, out.getvalue()
