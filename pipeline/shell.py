"""Words of a shell's command line."""

import shlex


def shell_word(text: str) -> str:
    """Return `text` as one word of a command of bash or zsh; what cannot be printed is written as its bytes."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
