"""From a source of records to training batches, every byte of which follows from the samples seen.

- `loader`: what a batch is, and the generator of batches: order, prefetching, the count of bad records.
- `workers`: threads and processes that make chunks of batches, and the buffers that they share.
- `samples`: the settings of a loader, and the making of a chunk of samples from its records.
- `captions`: which of a record's captions a sample gets, and which sentence of a long one.
- `augment`: the pixels of a sample: cut, warped and coloured at random.
- `crop`: random crops straight from encoded bytes.
"""
