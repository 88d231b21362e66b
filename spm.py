"""tokenizer.model, the file of the sentencepiece library that Llama 2, Vicuna and Mistral come with,
as a tokenizer.

The file is a protocol buffer: pieces with a score and a type, and how text is normalised. Byte-pair
encoding joins the neighbours whose union has the highest score; characters that are no piece are
spelled in bytes.
"""
import struct

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from files import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6    # types of pieces; 5 is unused
BPE = 2                                                         # among the kinds of models
SPACE = "▁"


def fields(data):
    """
    Yield (number, value) of a protocol buffer message: whole numbers, floats, and bytes for all
    that has a length.
    """
    at = 0

    def varint():
        """The number at `at`: seven bits a byte, lowest first; the eighth says that more follow."""
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            value = varint()
        elif wire == 2:
            size = varint()
            if at + size > len(data):
                raise IndexError("cut short")
            value = data[at:at + size]
            at += size
        elif wire == 5:
            value = struct.unpack_from("<f", data, at)[0]
            at += 4
        elif wire == 1:
            value = struct.unpack_from("<d", data, at)[0]
            at += 8
        else:
            raise ValueError(f"wire type {wire}")
        yield number, value


def read(path):
    """
    [(piece, score, type)] in the order of their ids. Raises InputError where the file is damaged,
    or its model is not what Llama's is: byte-pair encoding of text as it stands, with a space put
    before it.
    """
    pieces, trainer, normaliser = [], {}, {}
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                piece = dict(fields(value))
                pieces.append((piece[1].decode("utf-8"), piece.get(2, 0.0), piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(fields(value))
            elif number == 3:
                normaliser = dict(fields(value))
    except (LookupError, ValueError, TypeError, AttributeError, struct.error, OSError) as error:
        raise InputError(f"{path}: not a readable sentencepiece model ({error}); download it "
                         "again") from None
    for right, what in ((trainer.get(3, 1) == BPE, "is no byte-pair encoding"),
                        (not normaliser.get(2), "rewrites its text"),
                        (normaliser.get(3, 1) == 1, "puts no space before its text"),
                        (normaliser.get(4, 1) == 0, "removes spaces")):
        if not right:
            raise InputError(f"{path}: this sentencepiece model {what}, which is not implemented; "
                             "save a tokenizer.json beside it")
    return pieces


def merges_of(pieces):
    """Pairs of pieces that make a third one, the one with the highest score first."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
    found = []
    for piece, i in ids.items():
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(a, b) for a, b in pairs if a in ids and b in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-pieces[i][1], pair) for pair in pairs]
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]


def tokenizer(path):
    """A `tokenizers` tokenizer that splits text as the sentencepiece model in `path` does."""
    return build(read(path))


def build(pieces, space=True):
    """The tokenizer of pieces [(piece, score, type)]. space: one is put before every text."""
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    unknown = next((piece for piece, _, kind in pieces if kind == UNKNOWN), None)
    in_bytes = any(kind == BYTE for _, _, kind in pieces)
    tok = Tokenizer(models.BPE(vocabulary, merges_of(pieces), unk_token=unknown, fuse_unk=True,
                               byte_fallback=in_bytes))
    before = [normalizers.Prepend(SPACE)] if space else []
    after = [decoders.Strip(" ", 1, 0)] if space else []
    tok.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tok.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(),
                                     decoders.Fuse(), *after])
    add_special(tok, [piece for piece, _, _ in pieces], [kind for _, _, kind in pieces])
    return tok


def add_special(tok, pieces, kinds):
    """Tell a tokenizer which of its pieces are special tokens, and which are never split."""
    for piece, kind in zip(pieces, kinds):
        if kind in (UNKNOWN, CONTROL):
            tok.add_special_tokens([AddedToken(piece, normalized=False)])
        elif kind == USER_DEFINED:
            tok.add_tokens([AddedToken(piece, normalized=False)])
