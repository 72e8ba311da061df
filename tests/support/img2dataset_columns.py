"""The metadata of one sample as img2dataset hands them to its writers, with their schema."""

import pyarrow as pa

META = {
    "url": "http://example.org/1.jpg",
    "caption": "“a cat” on é 猫",
    "key": "000000001",
    "status": "success",
    "error_message": None,
    "width": 16,
    "height": 18,
    "similarity": 0.25,
    "NSFW": None,
    "sizes": [3, -4],
}
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("url", "caption", "key", "status", "error_message", "NSFW")]
    + [("width", pa.int32()), ("height", pa.int32()), ("similarity", pa.float32()), ("sizes", pa.list_(pa.int64()))]
)
