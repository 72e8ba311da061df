"""The samples of a tar, as evaluation lists them."""

import pytest
from image_shards import pair, write_tar

from clipkit.errors import UserError
from clipkit.formats.tar import list_samples


def test_a_sample_that_stands_twice_is_refused(tmp_path):
    """As in two tars that were numbered alike and joined by `cat`."""
    for name, first in (("a", 0), ("b", 2)):
        write_tar(tmp_path / f"{name}.tar", [pair(number) for number in range(first, first + 3)])
    (tmp_path / "joined.tar").write_bytes(b"".join((tmp_path / f"{name}.tar").read_bytes() for name in ("a", "b")))
    assert len(list_samples(tmp_path / "a.tar")) == 3
    with pytest.raises(UserError, match=r"joined.tar holds the sample 0*2 twice"):
        list_samples(tmp_path / "joined.tar")
