"""A long text in sections that have the same tokens as the whole, so that it is never in memory at once."""

import io
import re
from collections.abc import Iterator

from gptjax.data.patterns import BYTES_PATTERN, KNOWN, WHOLE_PATTERN
from gptjax.data.tokenizer import Tokenizer

LONG_TEXT = 2**24  # characters from which a text is read in sections
SECTION = 2**22  # characters
# Every known pattern cuts before a blank or a line end between two letters, whatever is before and after them. These
# are letters in all versions of Unicode: Latin, Greek, Cyrillic, Han.
_LETTER = "A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-ωА-я一-鿋"
_CUT = re.compile(rf"[{_LETTER}](?=[ \n][{_LETTER}])")


def keeps_tokens(tokenizer: Tokenizer) -> bool:
    """Returns whether sections have the tokens of the whole text; unknown patterns may cut a text otherwise."""
    if tokenizer.prefix_space:  # a section that does not begin with a blank would get one
        return False
    if tokenizer.pattern == BYTES_PATTERN:
        return tokenizer.vocab_size - len(tokenizer.specials) == 256  # pieces end anywhere
    is_characters = tokenizer.pattern == ""
    return is_characters or (tokenizer.pattern in KNOWN and tokenizer.pattern != WHOLE_PATTERN)


def sections(file: io.TextIOBase) -> Iterator[tuple[str, bool]]:
    """Yields the text of a file in sections, and whether each is the last.

    A section has about SECTION characters, and more if it has no blank between two letters.
    """
    rest = file.read(SECTION)
    while following := file.read(max(SECTION, len(rest))):  # longer and longer where nothing can be cut
        cut = _last_cut(rest)
        if cut:
            yield rest[:cut], False
        rest = rest[cut:] + following
    yield rest, True


def _last_cut(text: str) -> int:
    """Returns a place near the end of `text` at which it can be cut, 0 if it has none."""
    size = 2**12
    while True:
        start = max(0, len(text) - size)
        cuts = [match.end() for match in _CUT.finditer(text, start)]
        if cuts or start == 0:
            return cuts[-1] if cuts else 0
        size *= 16
