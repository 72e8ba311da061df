"""Why a row gave no image: a small set of reasons, so that failures can be counted, compared and retried by kind."""

DNS = "dns"
CONNECT = "connect"
TLS = "tls"
TIMEOUT = "timeout"
HTTP_3XX = "http-3xx"
HTTP_4XX = "http-4xx"
HTTP_5XX = "http-5xx"
RATE_LIMITED = "rate-limited"
TOO_LARGE = "too-large"
TRUNCATED = "truncated"
EMPTY = "empty"
NOT_AN_IMAGE = "not-an-image"
TOO_SMALL = "too-small"
TOO_MANY_PIXELS = "too-many-pixels"
ASPECT_RATIO = "aspect-ratio"
DISALLOWED = "disallowed"
BLOCKED_ADDRESS = "blocked-address"
BAD_URL = "bad-url"
HASH_CHANGED = "hash-changed"
OTHER = "other"

REASONS = (
    DNS,
    CONNECT,
    TLS,
    TIMEOUT,
    HTTP_3XX,
    HTTP_4XX,
    HTTP_5XX,
    RATE_LIMITED,
    TOO_LARGE,
    TRUNCATED,
    EMPTY,
    NOT_AN_IMAGE,
    TOO_SMALL,
    TOO_MANY_PIXELS,
    ASPECT_RATIO,
    DISALLOWED,
    BLOCKED_ADDRESS,
    BAD_URL,
    HASH_CHANGED,
    OTHER,
)
