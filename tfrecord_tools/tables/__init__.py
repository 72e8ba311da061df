"""Tables: those of URLs that are downloaded, and the looking up of what stands in one.

- `url_table`: which columns are read, of which types they are over all tables, and how many rows there are.
- `copies`: text tables as parquet, with types that hold for all of them.
- `presets`: the column names of published tables.
- `where`: which rows are wanted, by an SQL condition.
- `digests`: values of a column in a sorted array, for looking up millions.
"""
