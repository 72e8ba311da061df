"""Why a row gave no image: the closed set of reasons by which failures are counted, compared and retried."""

DNS = "dns"  # the name does not exist, or no resolver would say
CONNECT = "connect"  # refused, unreachable, or closed before an answer
TLS = "tls"
TIMEOUT = "timeout"
HTTP_3XX = "http-3xx"  # a loop of redirects, too many, or one to where we don't go
HTTP_4XX = "http-4xx"
HTTP_5XX = "http-5xx"
RATE_LIMITED = "rate-limited"  # the host asked for patience beyond the deadline
TOO_LARGE = "too-large"
TRUNCATED = "truncated"
EMPTY = "empty"
NOT_AN_IMAGE = "not-an-image"
TOO_SMALL = "too-small"
TOO_MANY_PIXELS = "too-many-pixels"
ASPECT_RATIO = "aspect-ratio"
DISALLOWED = "disallowed"  # X-Robots-Tag, TDM reservation or robots.txt
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

# What may pass by itself. A row that failed for one of these is worth another try, now or in a later run.
PASSING = frozenset({DNS, CONNECT, TIMEOUT, HTTP_5XX, RATE_LIMITED, TRUNCATED})
