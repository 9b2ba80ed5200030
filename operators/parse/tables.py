"""Tables of model answers: HTML reduced to table tags, Markdown tables as HTML, tables as plain text."""

import html
import re
from html.parser import HTMLParser
from typing import Final

_TABLE_TAGS: Final = frozenset(("table", "thead", "tbody", "tfoot", "tr", "th", "td", "caption"))
_HIDDEN_TAGS: Final = frozenset(("script", "style", "template", "noscript", "iframe", "object"))
_MAX_SPAN: Final = 1000
_INSIDE: Final[dict[str, tuple[str, ...]]] = {
    "td": ("tr",),
    "th": ("tr",),
    "tr": ("table", "thead", "tbody", "tfoot"),
    "thead": ("table",),
    "tbody": ("table",),
    "tfoot": ("table",),
    "caption": ("table",),
}
"""Where an element may lie: whatever is open above that is closed first, as a browser does."""


class _TableCleaner(HTMLParser):
    """Rebuilds markup with table tags, spans and escaped text only."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN_TAGS:
            self.hidden += 1
        elif tag == "br" and self.open:
            self.parts.append("<br>")
        elif tag in _TABLE_TAGS and not self.hidden:
            self._make_room(tag)
            self.open.append(tag)
            self.parts.append(f"<{tag}{_spans(attrs) if tag in ('td', 'th') else ''}>")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "br":
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN_TAGS:
            self.hidden = max(0, self.hidden - 1)
        elif tag in _TABLE_TAGS and tag in self._innermost_table():
            while self.open:
                closed = self.open.pop()
                self.parts.append(f"</{closed}>")
                if closed == tag:
                    break

    def handle_data(self, data: str) -> None:
        if not self.hidden and self.open and (data.strip() or self.open[-1] in ("td", "th", "caption")):
            self.parts.append(html.escape(data, quote=False))

    def finish(self) -> str:
        self.close()
        self.parts += [f"</{tag}>" for tag in reversed(self.open)]
        self.open.clear()
        return "".join(self.parts).strip()

    def _innermost_table(self) -> list[str]:
        for index in range(len(self.open) - 1, -1, -1):
            if self.open[index] == "table":
                return self.open[index:]
        return self.open

    def _make_room(self, tag: str) -> None:
        wanted = _INSIDE.get(tag)
        if wanted is None:
            return
        scope = self._innermost_table()
        if tag != "tr" and tag not in ("td", "th"):
            wanted = ("table",)
        if not any(name in scope for name in wanted):
            if tag in ("td", "th"):
                self._make_room("tr")
                self.open.append("tr")
                self.parts.append("<tr>")
            return
        while self.open and self.open[-1] not in wanted:
            self.parts.append(f"</{self.open.pop()}>")


def _spans(attrs: list[tuple[str, str | None]]) -> str:
    kept: dict[str, int] = {}
    for name, value in attrs:
        if name in ("rowspan", "colspan") and value and re.fullmatch(r"\d{1,4}", value.strip()):
            kept[name] = min(int(value), _MAX_SPAN)
    return "".join(f' {name}="{count}"' for name, count in sorted(kept.items()) if count > 1)


def sanitise_table(markup: str) -> str:
    """Return `markup` with table tags and their spans only, balanced, all text escaped.

    Text outside a table is dropped; scripts and styles go with their content.
    """
    cleaner = _TableCleaner()
    # The standard parser asserts on some malformed declarations; no table needs one.
    cleaner.feed(re.sub(r"<(?=[!?])", "&lt;", re.sub(r"<!--.{0,2000}?-->", "", markup, flags=re.S)))
    return cleaner.finish()


def table_text(markup: str) -> str:
    """Return the cells of an HTML table: tabs between cells, newlines between rows."""
    text = re.sub(r"</t[dh]>(?=<t[dh])", "\t", markup)
    text = re.sub(r"</tr>|</caption>|<br>", "\n", text)
    text = html.unescape(re.sub(r"</?(?:table|thead|tbody|tfoot|tr|th|td|caption)(?: [^<>]*)?>", "", text))
    return "\n".join(line.rstrip() for line in text.split("\n") if line.strip())


def pipes_to_html(lines: list[str]) -> str:
    """Return a Markdown pipe table as HTML; the row above the rule is its head."""
    rows: list[str] = []
    has_head = len(lines) > 1 and is_pipe_rule(lines[1])
    for index, line in enumerate(lines):
        if is_pipe_rule(line):
            continue
        tag = "th" if index == 0 and has_head else "td"
        cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
        inner = "".join(f"<{tag}>{html.escape(cell.strip(), quote=False)}</{tag}>" for cell in cells)
        rows.append(f"<tr>{inner}</tr>")
    return f"<table>{''.join(rows)}</table>"


def is_pipe_rule(line: str) -> bool:
    """Return True for the line that parts head and body of a pipe table, such as ``|---|:-:|``."""
    return "-" in line and "|" in line and re.fullmatch(r"[\s|:-]+", line) is not None
