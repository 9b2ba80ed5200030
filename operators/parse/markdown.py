"""Markdown of model answers and of blocks: clean-up, plain text, assembly."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from operators.parse.tables import is_pipe_rule

_FENCE: Final = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)"
# Bounded, so that thousands of unclosed openings in a looping answer do not take minutes.
_CODE_SPAN: Final = r"(?<!`)(?P<ticks>`+)(?!`)[^\n]{1,400}?(?<!`)(?P=ticks)(?!`)"
# Pandoc's rule for inline maths: no space inside the dollars and no digit after the closing one, so that prices stay.
_INLINE_MATH: Final = r"(?<![\\$])\$(?=[^\s$])(?:\\.|[^$\\\n])*?(?<=[^\s])\$(?![\d$])"
_DISPLAY_MATH: Final = r"\$\$.{1,3000}?\$\$|\\\[.{1,3000}?\\\]|\\\(.{1,600}?\\\)"
_WINDOWS_PATH: Final = r"\b[A-Za-z]:\\[^\s\"']*"
_PROTECTED: Final = re.compile(
    f"(?:{_FENCE})|(?:{_CODE_SPAN})|(?:{_DISPLAY_MATH})|(?:{_INLINE_MATH})|(?:{_WINDOWS_PATH})", re.M | re.S
)
_LITERAL_NEWLINE: Final = re.compile(
    # LaTeX commands that begin with n are left alone: a bare formula has no delimiters to protect it.
    r"(?<!\\)\\n(?!(?:abla|eq|eg|exists|otin|ot|leq|geq|mid|parallel|subseteq|warrow|earrow|ewline|atural)(?![a-z]))"
)
_OPENING: Final = re.compile(r"(`{3,})[ \t]*(?:markdown|md)?[ \t]*\n", re.I)

_HTML_TAG: Final = re.compile(
    r"</?(?:a|b|br|caption|center|code|col|colgroup|del|details|div|em|figcaption|figure|font|h[1-6]|hr|i|img|ins|li|ol"
    r"|p|pre|s|small|span|strong|sub|summary|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)(?:\s[^<>]*)?/?>",
    re.I,
)
_HTML_COMMENT: Final = re.compile(r"<!--.{0,2000}?-->", re.S)
_CELL_END: Final = re.compile(r"</t[dh]\s*>\s*(?=<t[dh][\s>])", re.I)
_LINE_END: Final = re.compile(r"</(?:tr|caption|p|div|li|h[1-6]|table)\s*>|<(?:br|hr)\s*/?>", re.I)
_PIPE_ROW: Final = re.compile(r"^[ \t]*\|(.*)\|[ \t]*$")

_SYMBOLS: Final = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "varepsilon": "ε", "zeta": "ζ", "eta": "η",
    "theta": "θ", "iota": "ι", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "pi": "π", "rho": "ρ",
    "sigma": "σ", "tau": "τ", "upsilon": "υ", "phi": "φ", "varphi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω",
    "Gamma": "Γ", "Delta": "Δ", "Theta": "Θ", "Lambda": "Λ", "Xi": "Ξ", "Pi": "Π", "Sigma": "Σ", "Phi": "Φ",
    "Psi": "Ψ", "Omega": "Ω", "times": "×", "cdot": "·", "div": "÷", "pm": "±", "mp": "∓", "leq": "≤", "le": "≤",
    "geq": "≥", "ge": "≥", "neq": "≠", "ne": "≠", "approx": "≈", "equiv": "≡", "sim": "∼", "infty": "∞",
    "partial": "∂", "nabla": "∇", "sum": "∑", "prod": "∏", "int": "∫", "sqrt": "√", "in": "∈", "notin": "∉",
    "subset": "⊂", "subseteq": "⊆", "cup": "∪", "cap": "∩", "emptyset": "∅", "forall": "∀", "exists": "∃",
    "to": "→", "rightarrow": "→", "leftarrow": "←", "Rightarrow": "⇒", "Leftrightarrow": "⇔", "leftrightarrow": "↔",
    "ldots": "…", "cdots": "…", "dots": "…", "degree": "°", "circ": "°", "prime": "′", "langle": "⟨", "rangle": "⟩",
}  # fmt: skip
_FUNCTIONS: Final = frozenset(
    ("sin", "cos", "tan", "cot", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "exp", "lim", "min",
     "max", "sup", "inf", "det", "dim", "gcd", "arg")
)  # fmt: skip


def strip_fence(text: str) -> str:
    """Return `text` without a fence that wraps all of it; a fence that names a language other than Markdown stays."""
    stripped = text.strip()
    opening = _OPENING.match(stripped)
    if opening is None:
        return text
    lines = stripped[opening.end() :].split("\n")
    fences = [index for index, line in enumerate(lines) if line.startswith(opening[1])]
    if fences and fences != [len(lines) - 1]:
        return text
    return "\n".join(lines[: fences[0]] if fences else lines)


def repair_newlines(text: str) -> str:
    r"""Return `text` with each literal backslash-n turned into a newline, outside code, maths and Windows paths.

    Source:
        The model card of MiniCPM-V 4.6 asks for this clean-up; words such as ``\nabla`` are kept here also where no
        delimiter says that they are maths.
    """
    return _outside(_PROTECTED, text, lambda part: _LITERAL_NEWLINE.sub("\n", part))


def clean_answer(text: str) -> str:
    """Return a model's Markdown answer as it is stored: unwrapped, newlines repaired, no control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = repair_newlines(strip_fence(text.replace("\r\n", "\n").replace("\r", "\n")))
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text).strip()


def plain_text(markdown: str) -> str:
    """Return `markdown` without Markdown, HTML and LaTeX mark-up: table cells are parted by tabs, rows by newlines."""
    kept: list[str] = []

    def keep(content: str) -> str:
        kept.append(content)
        return f"\x00{len(kept) - 1}\x00"

    text = markdown.replace("\x00", "")
    text = re.sub(_FENCE, lambda m: keep(_fence_body(m[0])), text, flags=re.M | re.S)
    text = re.sub(_CODE_SPAN, lambda m: keep(m[0].strip("`")), text)
    text = re.sub(f"{_DISPLAY_MATH}|{_INLINE_MATH}", lambda m: keep(_plain_latex(m[0])), text, flags=re.S)
    text = _plain_html(text)
    text = "\n".join(line for line in map(_plain_line, text.split("\n")) if line is not None)
    text = _plain_inline(text)
    text = re.sub(r"\x00(\d+)\x00", lambda m: kept[int(m[1])], text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def block_markdown(block: Mapping[str, Any]) -> str:
    """Return the Markdown of one block, from its label and its `html`, `latex`, `markdown` or `text`."""
    label, text = block["label"], (block["text"] or "").strip()
    if label == "table" and block["html"]:
        return str(block["html"])
    if label == "formula" and block["latex"]:
        return f"$$\n{block['latex']}\n$$"
    if block["markdown"]:
        return str(block["markdown"])
    if not text:
        return ""
    if label in ("title", "section_header"):
        level = block["level"] or (1 if label == "title" else 2)
        return "#" * min(max(level, 1), 6) + " " + " ".join(text.split())
    if label == "list_item" and not re.match(r"(?:[-*+]|\(?\w{1,4}[.)])\s", text):
        return "- " + text
    if label == "code":
        fence = "```" if "```" not in text else "~~~~"
        return f"{fence}\n{text}\n{fence}"
    return text


def blocks_to_markdown(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown of a page from its blocks in reading order, page headers and footers included."""
    parts: list[str] = []
    previous = ""
    for block in blocks:
        part = block_markdown(block)
        if not part:
            continue
        is_list_run = block["label"] == previous == "list_item"
        parts.append(("\n" if is_list_run else "\n\n") + part)
        previous = block["label"]
    return "".join(parts).strip()


def _outside(protected: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """Return `text` with `change` applied to everything that `protected` does not match."""
    parts: list[str] = []
    position = 0
    for match in protected.finditer(text):
        parts += [change(text[position : match.start()]), match[0]]
        position = match.end()
    return "".join(parts) + change(text[position:])


def _fence_body(fenced: str) -> str:
    lines = fenced.split("\n")[1:]
    if lines and re.fullmatch(r"[ \t]*[`~]{3,}[ \t]*", lines[-1]):
        lines.pop()
    return "\n".join(lines)


def _plain_html(text: str) -> str:
    text = _HTML_COMMENT.sub("", text)
    text = re.sub(r">\s+<(?=/?(?:t[rdh]|thead|tbody|tfoot|table)\b)", "><", text, flags=re.I)
    text = _LINE_END.sub("\n", _CELL_END.sub("\t", text))
    return html.unescape(_HTML_TAG.sub("", text))


def _plain_line(line: str) -> str | None:
    """Return one line without its block mark-up, or None where the line is nothing but mark-up."""
    if re.fullmatch(r"[ \t]*(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})", line):
        return None
    if is_pipe_rule(line):
        return None
    if row := _PIPE_ROW.match(line):
        return "\t".join(cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row[1]))
    line = re.sub(r"^[ \t]*(?:>[ \t]?)+", "", line)
    line = re.sub(r"^[ \t]{0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$", r"\1", line)
    return re.sub(r"^([ \t]*)[-*+][ \t]+(?:\[[ xX]\][ \t]+)?", r"\1", line)


def _plain_inline(text: str) -> str:
    text = re.sub(r"!\[([^\]\n]{0,500})\]\([^)\n]{0,500}\)", r"\1", text)
    text = re.sub(r"\[([^\]\n]{1,500})\]\([^)\n]{0,500}\)", r"\1", text)
    text = re.sub(r"\*\*\*(?=\S)([^\n]+?)(?<=\S)\*\*\*", r"\1", text)
    text = re.sub(r"(\*\*|__|~~)(?=\S)([^\n]+?)(?<=\S)\1", r"\2", text)
    text = re.sub(r"(?<![\w*\\])\*(?=[^\s*])([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w_\\])_(?=[^\s_])([^_\n]+?)(?<=\S)_(?![\w_])", r"\1", text)
    return re.sub(r"\\([\\`*_{}\[\]()#+.!|>~$-])", r"\1", text)


def _plain_latex(maths: str) -> str:
    text = re.sub(r"\A(?:\$\$?|\\[(\[])|(?:\$\$?|\\[)\]])\Z", "", maths).strip()
    text = re.sub(r"\\(?:begin|end)\{[^{}]*\}(?:\{[lcr|]+\})?", "", text)
    for _ in range(4):
        text = re.sub(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
        text = re.sub(
            r"\\(?:text|mathrm|mathbf|mathit|mathsf|mathcal|mathbb|operatorname|textbf|textit|boldsymbol)\s*\{([^{}]*)\}",
            r"\1",
            text,
        )
    text = re.sub(r"\(([\w.]+)\)/\(([\w.]+)\)", r"\1/\2", text)
    text = text.replace("\\\\", "\n").replace("&", " ")
    text = re.sub(r"\\([A-Za-z]+)\s*", _plain_command, text)
    text = re.sub(r"\\([%$#&_{}])", r"\1", re.sub(r"\\[,;:! ]", " ", text))
    text = re.sub(r"(?<!\\)[{}]", "", text)
    return re.sub(r"[ \t]{2,}", " ", text).strip()


def _plain_command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _FUNCTIONS:
        return name + " "
    return _SYMBOLS.get(name, "") + (" " if match[0][-1:].isspace() and name in _SYMBOLS else "")
