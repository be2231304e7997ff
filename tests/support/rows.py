"""The data stage's streams as lists, and its parts as the trainer will have them, for tests that look at rows."""

from autosloth.data import clean, encode, pairs


def usable(rows, name, settings, found):
    return list(clean.usable(rows, name, settings, found, set()))


def encode_rows(*args, **kwargs):
    return list(encode.encode_rows(*args, **kwargs))


def encode_pairs(*args, **kwargs):
    return list(pairs.encode_pairs(*args, **kwargs))


def load_rows(settings, found):
    """The usable rows of a dataset to train on, and those held out, as they stand before the tokenizer."""
    train, given = (None if rows is None else list(rows) for rows in clean.streams(settings, found))
    clean.refuse_single(found, settings)
    keys = [None if rows is None else [clean.measured_by(row) for row in rows] for rows in (train, given)]
    taken, held_out = clean.draw_parts(*keys, settings, found)
    return [train[i] for i in taken], [(given or train)[i] for i in held_out]
