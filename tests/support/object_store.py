"""An S3 server on loopback for tests: `from object_store import s3` and take `s3` as a fixture.

It is found through the environment alone, as a user's would be, so child processes and workers find it too.
"""

import uuid
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

NO_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The endpoint of an empty server, with the environment set for it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in NO_CREDENTIALS:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        S3FileSystem.clear_instance_cache()  # they hold the endpoint that the environment had
        yield f"http://{host}:{port}"
        S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> str:
    """A new empty bucket, as `s3://NAME`."""
    name = f"bucket-{uuid.uuid4().hex}"
    S3FileSystem().mkdir(name)
    return f"s3://{name}"
