"""Any columns that a record may have, for hypothesis, and what decoding must give of them."""

from hypothesis import strategies as st

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
SCALAR = st.one_of(st.binary(max_size=300), st.text(max_size=40), INT64, FLOAT32)
LIST = st.one_of(st.lists(st.binary(max_size=9)), st.lists(INT64), st.lists(FLOAT32), st.lists(st.text(max_size=9)))
COLUMNS = st.dictionaries(st.text(max_size=20), st.one_of(SCALAR, LIST, st.none()), max_size=8)


def as_lists(columns):
    """What decoding must give: lists, text as UTF-8, missing keys left out."""
    wrapped = {
        name: value if isinstance(value, list) else [value] for name, value in columns.items() if value is not None
    }
    return {
        name: [item.encode() if isinstance(item, str) else item for item in items] for name, items in wrapped.items()
    }
