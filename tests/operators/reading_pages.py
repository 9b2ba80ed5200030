"""Pages for the tests of orientation and of the CPU engine: rendered as the pipeline does, and as rows."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pymupdf

from operators.orientation import find_orientation, upright
from operators.read import READS, ReadPages

LANGUAGES = {
    "english": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood. Everyone is entitled to all the rights "
    "and freedoms set forth in this Declaration, without distinction of any kind.",
    "german": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
    "begabt und sollen einander im Geiste der Brüderlichkeit begegnen. Jeder hat Anspruch auf die in dieser Erklärung "
    "verkündeten Rechte und Freiheiten.",
    "chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。人人有资格享有"
    "本宣言所载的一切权利和自由，不分种族、肤色、性别、语言、宗教、政治或其他见解、国籍或社会出身。",
    "russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью "
    "и должны поступать в отношении друг друга в духе братства. Каждый человек должен обладать всеми правами.",
    "greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι "
    "με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا "
    "بروح الإخاء. لكل إنسان حق التمتع بكافة الحقوق والحريات الواردة في هذا الإعلان.",
    "hebrew": "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה עליהם "
    "לנהוג איש ברעהו ברוח של אחווה. כל אדם זכאי לזכויות ולחרויות שנקבעו בהכרזה זו.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और "
    "अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 "
    "부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、"
    "理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
}
"""Article 1 of the Universal Declaration of Human Rights, and some of article 2; public domain."""


def render(path: Path, page_index: int = 0) -> tuple[np.ndarray, tuple[float, float]]:
    """Return a page at 200 dpi, at most 6 Mpx, and its width and height in points."""
    with pymupdf.open(path) as document:
        return rendered(document[page_index])


def rendered(page: pymupdf.Page) -> tuple[np.ndarray, tuple[float, float]]:
    width, height = page.rect.width, page.rect.height
    zoom = min(200 / 72, math.sqrt(6e6 / (width * height)))
    pixmap = page.get_pixmap(matrix=pymupdf.Matrix(zoom, zoom), alpha=False, colorspace=pymupdf.csRGB)
    image = np.frombuffer(pixmap.samples, np.uint8).reshape(pixmap.height, pixmap.width, 3)
    return image.copy(), (width, height)


def page_of(
    text: str, *, size: tuple[float, float] = (420, 595), repeats: int = 1
) -> tuple[np.ndarray, tuple[float, float]]:
    """Return a rendered page that holds `text` in paragraphs of 12 pt."""
    document = pymupdf.open()
    page = document.new_page(width=size[0], height=size[1])
    html = "".join(f'<p style="font-size:12pt">{text}</p>' for _ in range(repeats))
    page.insert_htmlbox(pymupdf.Rect(40, 40, size[0] - 40, size[1] - 40), html)
    return rendered(page)


def page_row(image: np.ndarray, size: tuple[float, float], *, task: str = "ocr", **columns: object) -> dict:
    height, width = image.shape[:2]
    row = {
        "record_key": "key", "task": task, "route": "cpu", "page_width_pt": size[0], "page_height_pt": size[1],
        "pixels": image.tobytes(), "pixel_encoding": "raw",
        "slice_shapes": [{"height_px": height, "width_px": width}], "slice_grids": [{"rows": 0, "cols": 0}],
    }  # fmt: skip
    return row | columns


def read_row(operator: ReadPages, row: dict) -> dict:
    """Return what `operator` makes of one row."""
    return operator(pa.Table.from_pylist([row], schema=READS)).to_pylist()[0]


def read_page(operator: ReadPages, image: np.ndarray, size: tuple[float, float], task: str = "ocr") -> dict:
    """Return the row of a page that is put upright and then read."""
    read = upright(image, find_orientation(image))
    points = size[0] / image.shape[1]
    return read_row(operator, page_row(read, (read.shape[1] * points, read.shape[0] * points), task=task))


def character_error_rate(read: str, truth: str) -> float:
    """Return the edit distance over the length of the truth, white space aside in both."""
    found, wanted = "".join(read.split()), "".join(truth.split())
    previous = list(range(len(wanted) + 1))
    for index, character in enumerate(found, 1):
        current = [index]
        for column, other in enumerate(wanted, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (character != other)))
        previous = current
    return previous[-1] / len(wanted)
