"""Texts from anywhere, made fit to be shown: uids, captions, errors and the names in a policy are anybody's."""

import unicodedata


def printable(text: str) -> str:
    """A text whose control, escape and direction codes are shown and not obeyed, also by a terminal; line feeds stay."""
    return "".join(
        letter if letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else ascii(letter)[1:-1]
        for letter in text
    )


def one_line(text: str) -> str:
    """The same without line feeds."""
    return printable(text.replace("\n", " "))
