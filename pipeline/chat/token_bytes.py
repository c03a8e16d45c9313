"""The bytes of one token: a character may be made of several, so a token need not be text."""

from functools import cache

from tokenizers import Tokenizer


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token of a byte-level vocabulary stands for; b"" for an id without a token."""
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    letters = _bytes_of_letters()
    is_added = token_id in tokenizer.get_added_tokens_decoder()
    if is_added or any(letter not in letters for letter in token):
        return bytes(token.encode())
    return bytes(letters[letter] for letter in token)


@cache
def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}
