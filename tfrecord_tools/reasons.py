"""Why a row or a sample gave no record: the closed list by which download, build, ImageNet and purge count and report.

`REASONS` are those of a fetch, which `--retry-failed` takes; no retry changes the others, of a sample that is there.
`ADVICE` says what to do when most rows of a table fail for one reason.
"""

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

NO_IMAGE = "no-image"
NO_CAPTION = "no-caption"
EMPTY_CAPTION = "empty-caption"
BAD_TEXT = "not-utf-8"
BAD_METADATA = "metadata-not-json"
NOT_WANTED = "where"  # by --where
DUPLICATE = "duplicate"  # by --dedup
NO_SCORE = "no-score"  # for --keep-best
NOT_BEST = "keep-best"
NO_CONCEPT = "no-concept"  # of --balance
THINNED_OUT = "balance"
PURGED = "purged"

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

# What the user didn't want: it can be most of the data, so it is counted and not listed sample by sample.
UNWANTED = frozenset({NOT_WANTED, NOT_BEST, NO_CONCEPT, THINNED_OUT})

# What may pass by itself. A row that failed for one of these is worth another try, now or in a later run.
PASSING = frozenset({DNS, CONNECT, TIMEOUT, HTTP_5XX, RATE_LIMITED, TRUNCATED})
DEFAULT_RETRY = ",".join(sorted(PASSING))  # what `--retry-failed` takes without a value

ADVICE = {
    DNS: "names don't resolve: name other resolvers, such as --resolver 1.1.1.1 --resolver 8.8.8.8",
    CONNECT: "hosts can't be reached: check the network, a firewall or a proxy, and try fewer --connections",
    TIMEOUT: "answers come too late: try fewer --connections, or a longer --timeout",
    TLS: "certificates fail: check the machine's clock and its root certificates (SSL_CERT_FILE)",
    RATE_LIMITED: "hosts ask for patience: lower --per-host",
    HTTP_4XX: "links are dead or refused: an old table may be so",
    HTTP_5XX: "servers fail: try later",
    DISALLOWED: "hosts forbid the use of their images: they aren't to be taken",
    BLOCKED_ADDRESS: "URLs lead to private addresses: --allow-private-hosts, if these servers are your own",
    BAD_URL: "the column holds no http or https URLs: name another with --url-column",
    NOT_AN_IMAGE: "answers are no images: name another column with --url-column",
    EMPTY_CAPTION: "rows have no caption: name another column with --caption-column, or take --format webdataset",
}
# These are mended by another column or format, which makes another download.
ELSEWHERE = frozenset({BAD_URL, NOT_AN_IMAGE, EMPTY_CAPTION})


def remedy_after_download(reason: str) -> str:
    """What to do after a download in which nearly all failed for this reason."""
    advice = ADVICE.get(reason, f"most fail as {reason}")
    if reason in ELSEWHERE:
        return f"{advice}, and another output"
    if reason in PASSING | {BLOCKED_ADDRESS}:
        return f"{advice}; then the same command with --retry-failed tries again"
    return f"{advice}; the same command with --retry-failed={reason} tries again"
