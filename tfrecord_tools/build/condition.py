"""`--where` over samples: their metadata as an Arrow table, so that DuckDB judges them as it judges a table of URLs.

A sample's columns are what its shard holds, without a schema. The kinds are found on the first samples; where a later
value needs a wider kind, the condition is asked again with that kind, so that no value is taken for missing.
"""

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from clipkit.formats.kinds import KindWidenedError, arrow_type, fit, kind_of, unify
from clipkit.tfrecord_tools.sample import Sample
from clipkit.tfrecord_tools.tables.where import Mask, RowFilter

CAPTION = "txt"


def kinds_of(samples: Iterable[Sample]) -> dict[str, str]:
    """The kinds of the columns of some samples, the caption as `txt`; text where no sample has a value."""
    schemas = [{CAPTION: "text"}]
    names: dict[str, None] = {}
    for sample in samples:
        names.update(dict.fromkeys(sample.columns))
        schemas.append({name: kind for name, value in sample.columns.items() if (kind := kind_of(value)) is not None})
    return {**dict.fromkeys(names, "text"), **unify(schemas)}


def arrow_schema(kinds: Mapping[str, str]) -> pa.Schema:
    """The columns in Arrow's types."""
    return pa.schema([(name, arrow_type(kind)) for name, kind in sorted(kinds.items())])


class Condition:
    """A condition asked of samples; one a worker, not for several threads."""

    def __init__(self, where: str, kinds: Mapping[str, str]) -> None:
        """`kinds` of the columns that there are. Raises UserError for a condition that can't be asked of them."""
        self.where = where
        self.kinds = dict(kinds)
        self.filter = RowFilter(where, arrow_schema(kinds))

    def mask(self, samples: Sequence[Sample]) -> Mask:
        """bool[len(samples)]: which fulfil the condition; a missing value makes it unknown, which counts as not."""
        while True:
            named = {name: self.kinds[name] for name in self.filter.columns}
            try:
                rows = [self._row(sample, named) for sample in samples]
            except KindWidenedError as widened:
                self.kinds.update(widened.kinds)
                self.filter = RowFilter(self.where, arrow_schema(self.kinds))
                continue
            return self.filter.mask(pa.Table.from_pylist(rows, arrow_schema(named)))

    @staticmethod
    def _row(sample: Sample, kinds: dict[str, str]) -> dict[str, object]:
        columns = {name: sample.columns.get(name) for name in kinds}
        if CAPTION in kinds:
            columns[CAPTION] = sample.caption
        fitted = fit(columns, kinds, {})
        return {name: v.encode("utf-8", "replace") if isinstance(v, str) else v for name, v in fitted.items()}
