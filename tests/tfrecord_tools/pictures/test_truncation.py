"""A body that was cut off is noticed, and what only looks so is not."""

import pytest
from download_site import JPEG, encoded

from clipkit.tfrecord_tools.pictures.sniff import is_truncated


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_every_cut_is_noticed(kind: str, share: float) -> None:
    data = encoded(kind)
    assert not is_truncated(data)
    assert is_truncated(data[: max(20, int(len(data) * share) - 1)])


def test_jpeg_oddities() -> None:
    thumbnail = encoded("JPEG", seed=1)
    exif = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = JPEG[:2] + exif + JPEG[2:]
    assert not is_truncated(with_thumbnail)
    assert is_truncated(with_thumbnail[: len(exif) + 600])  # the thumbnail's end marker is whole, the image isn't
    assert not is_truncated(JPEG + bytes(100)) and not is_truncated(encoded("PNG") + bytes(100))  # padding behind
    assert not is_truncated(with_thumbnail + b"a camera's own data")
    assert not is_truncated(encoded("JPEG", progressive=True, restart_marker_blocks=1))
    assert not is_truncated(b"GIF89a") and not is_truncated(b"\xff\xd8 text")
